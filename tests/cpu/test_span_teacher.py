"""A teacher of other tokens by hand: which tokens of both are a span, what each sum is of, and what is left out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend

from tandem.algo.advantage import Selection
from tandem.algo.pack import count_prompts
from tandem.columns import Columns
from tandem.config import override
from tandem.errors import ConfigError
from tandem.models.checkpoint import open_checkpoint, save_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.tokenizer import Tokenizer, byte_alphabet
from tandem.models.view import PackView
from tandem.program.render import Renderer
from tandem.run.spans import SpanTeacher
from tandem.types import Group, Message, Prompt, Sample, Trajectory
from tests.sums import tiny_arithmetic

MODEL = "new:width=32,layers=2,heads=4,kv_heads=2,ff_width=48,max_position=128"
ASKED = Prompt("p", (Message("user", "six?"),))
TEXT = "12 =é"


def joined(tokens: Sequence[str], **changes: str) -> Tokenizer:
    """The tokeniser of new models with these as tokens of their own, each of two bytes."""
    made = open_checkpoint(MODEL).load_tokenizer()
    words, alphabet = json.loads(made.backend.to_str()), byte_alphabet()
    pairs = [[alphabet[byte] for byte in token.encode()] for token in tokens]
    first = len(words["model"]["vocab"])
    words["model"]["vocab"] |= {"".join(pair): first + place for place, pair in enumerate(pairs)}
    words["model"]["merges"] = pairs
    words |= {name: {"type": kind} for name, kind in changes.items()}
    return Tokenizer(Backend.from_str(json.dumps(words)), made.settings, made.chat_template, origin="joined")


def compared(folder: Path, teacher: Tokenizer, sample: Sample) -> tuple[Sample, Decoder]:
    """A sample with its spans, and the teacher's model."""
    checkpoint = open_checkpoint(f"{MODEL},seed=3")
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors()}
    more = len(teacher.backend.get_vocab(True)) - checkpoint.spec.vocab_size
    name = "model.embed_tokens.weight"
    drawn = torch.randn(more, 32, generator=torch.Generator().manual_seed(1)).to(tensors[name].dtype)
    tensors[name] = torch.cat([tensors[name], drawn])
    spec = dataclasses.replace(checkpoint.spec, vocab_size=checkpoint.spec.vocab_size + more)
    save_checkpoint(folder, spec, tensors, teacher, "float32")
    settings = {"objective": "distil", "distil.spans": "true", "distil.divergence": "k2", "model.dtype": "float32"}
    config = override(tiny_arithmetic(), {**settings, "distil.teacher": str(folder)})
    group = Group(ASKED, (Trajectory("p/0", "p", sample.columns),))
    batch = Selection((sample,), count_prompts([sample]), {})
    (filled,) = SpanTeacher(config, STUDENT, STUDENT.tokenizer.now).filled(batch, [group]).samples
    return filled, Decoder(spec, "float32").load(tensors.items())


STUDENT = Renderer(joined(["12"]))


def said(answer: Sequence[int]) -> Sample:
    before = STUDENT.prompt_tokens(ASKED.messages)
    mask = [False] * len(before) + [True] * len(answer)
    return Sample("p/0/0", "p", Columns.of(tokens=[*before, *answer], loss_mask=mask))


def test_spans_of_two_tokenisers(tmp_path: Path) -> None:
    """Tokens that cross each other's borders are no span, a character of two bytes is cut, or the teacher's sum is of
    tokens beside the span."""
    teacher = joined(["2 ", "é"])
    answer = STUDENT.answer_tokens(TEXT)
    # the student's:  12 | sp | = | C3 | A9 | end        the teacher's:  1 | 2sp | = | é | end
    assert [STUDENT.tokenizer.decode([one]) for one in answer[:3]] == ["12", " ", "="] and len(answer) == 6
    filled, model = compared(tmp_path / "teacher", teacher, said(answer))
    mask = filled.columns["loss_mask"]
    assert filled.columns["spans"][mask].tolist() == [0, 0, 1, 2, 2, 3]
    assert (filled.columns["spans"][~mask] == -1).all()
    renderer = Renderer(teacher)
    before, others = renderer.prompt_tokens(ASKED.messages), renderer.answer_tokens(TEXT)
    assert [teacher.decode([one]) for one in others[:4]] == ["1", "2 ", "=", "é"] and len(others) == 5
    tokens = torch.tensor([*before, *others])
    with torch.no_grad():
        logprobs = model.logits(model.forward(tokens, PackView([0, len(tokens)]))).double().log_softmax(-1)
    each = [float(logprobs[len(before) + place - 1, token]) for place, token in enumerate(others)]
    wanted = [0.0, each[0] + each[1], each[2], 0.0, each[3], each[4]]
    assert filled.columns["span_logprobs"][mask].tolist() == pytest.approx(wanted, abs=1e-4)


def test_what_is_in_no_span(tmp_path: Path) -> None:
    """Half a character is compared, the end of a cut answer is, or a teacher that writes small letters alone
    is compared over others."""
    cut = STUDENT.answer_tokens(TEXT)[:4]  # ends in the first byte of é
    filled, _ = compared(tmp_path / "cut", joined(["2 ", "é"]), said(cut))
    mask = filled.columns["loss_mask"]
    assert filled.columns["spans"][mask].tolist() == [0, 0, 1, -1]
    small = joined(["2 "], normalizer="Lowercase")
    for text, spans in (("OK", [-1, -1, -1]), ("ok", [0, 1, 2])):
        filled, _ = compared(tmp_path / text, small, said(STUDENT.answer_tokens(text)))
        mask = filled.columns["loss_mask"]
        assert filled.columns["spans"][mask].tolist() == spans
        assert np.count_nonzero(filled.columns["span_logprobs"]) == len(set(spans) - {-1})


def test_one_answer_alone(tmp_path: Path) -> None:
    """The teacher is told the prompt of a first turn and scores the last, and nobody hears of it."""
    answer = STUDENT.answer_tokens("7")
    columns = said(answer).columns
    later = np.concatenate([columns["tokens"], columns["tokens"]])
    mask = np.concatenate([np.zeros(len(columns), bool), columns["loss_mask"]])
    sample = Sample("p/0/0", "p", Columns.of(tokens=later, loss_mask=mask))
    with pytest.raises(ConfigError, match="p/0/0: distil.spans compares one answer to a prompt"):
        compared(tmp_path / "teacher", joined(["2 "]), sample)
