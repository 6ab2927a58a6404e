"""What a config makes of a teacher: the objective, the model itself or what was stored of one, and whether it fits."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tandem.algo.distil import Distil, matched
from tandem.corpus.teacher import Stored, is_stored, words_hash
from tandem.errors import ConfigError
from tandem.kernels.weight import Weight
from tandem.models.checkpoint import Checkpoint, open_checkpoint
from tandem.models.codes import hold_codes
from tandem.models.decoder import DTYPES, Decoder
from tandem.numerics.random import Stream, normal, word_rows
from tandem.run.source import resolve_source

if TYPE_CHECKING:
    from tandem.models.config import ModelConfig
    from tandem.models.tokenizer import Tokenizer
    from tandem.run.config import RunConfig

PROJECTOR_SEED = 0x70726F6A  # of the weights that a learned projector begins with


def distil_of(config: RunConfig) -> Distil:
    """The objective. Reads no weight: the teacher is loaded when a step first asks for it."""
    asked, source = config.distil, config.distil.teacher
    if is_stored(source):
        return Distil(asked, partial(open_stored, config))
    load = partial(load_teacher, source, config.model)
    if asked.hidden == "none":
        return Distil(asked, load)
    student, teacher = (open_checkpoint(resolve_source(one)).spec for one in (config.model.source, source))
    layers = matched(student.layers, teacher.layers)
    count = 0 if student.width == teacher.width else student.layers if asked.hidden == "layers" else 1
    projectors = [projector(index, teacher.width, student.width, config.model) for index in range(count)]
    return Distil(asked, load, projectors, layers)


def load_teacher(source: str, model: ModelConfig) -> Decoder:
    """A model that only answers, in the dtype and on the device of the student. Codes of a file stay codes."""
    checkpoint = open_checkpoint(resolve_source(source))
    decoder = Decoder(checkpoint.spec, model.dtype, model.device, model.kernels)
    decoder.load(checkpoint.tensors(hold_codes(decoder, checkpoint)))
    for _, weight in decoder.weights():
        if weight is not decoder.embed:
            weight.serve()
    return decoder


def open_stored(config: RunConfig) -> Stored:
    """ConfigError where the config wants of stored log-probs what they don't have."""
    asked, stored = config.distil, Stored(Path(config.distil.teacher))
    origin = stored.origin
    for name, wrong, why in (
        ("temperature", asked.temperature != origin.temperature, f"they are of temperature {origin.temperature}"),
        ("top_k", asked.top_k not in (0, origin.top_k), f"they are of the {origin.top_k} most likely tokens"),
        ("hidden", asked.hidden != "none", "they have no hidden states"),
        ("spans", asked.spans, "they are of the student's own tokens"),
        ("divergence", asked.of_tokens, "they are distributions, and not of each text's own tokens"),
        ("on_policy", asked.on_policy, "they are of texts that were written before"),
    ):
        if wrong:
            raise ConfigError(
                f"distil.{name} is {getattr(asked, name)}, and distil.teacher {stored.folder} holds stored log-probs: "
                f"{why}. Set distil.{name} otherwise, or distil.teacher to {origin.teacher}."
            )
    return stored


def check_teacher(config: RunConfig, student: Checkpoint, tokenizer: Tokenizer) -> Checkpoint | None:
    """The teacher, opened, none where its log-probs are stored. ConfigError where it reads other tokens."""
    source, own = config.distil.teacher, tokenizer.backend.get_vocab(True)
    if is_stored(source):
        origin = open_stored(config).origin
        if origin.words != words_hash(own):
            raise ConfigError(
                f"distil.teacher {source} was written for the tokens of another vocabulary than that of "
                f"{config.model.source}: its ids mean other texts. Write it again with this model."
            )
        return None
    teacher = open_checkpoint(resolve_source(source))
    least = min(student.spec.vocab_size, teacher.spec.vocab_size)
    if config.distil.top_k > least:
        raise ConfigError(
            f"distil.top_k is {config.distil.top_k}, and the models have {least} tokens. Set it lower, or to 0 for all."
        )
    other = teacher.load_tokenizer().backend.get_vocab(True)
    if own != other and not config.distil.spans:
        raise ConfigError(
            f"distil.teacher {source} reads other tokens than {config.model.source}: {_differs(own, other)}. "
            "Distributions over different tokens have no divergence. Choose a teacher of the student's family, or a "
            "student made of the teacher (`tandem convert prune`), or compare spans of text: distil.spans=true with "
            "distil.divergence=k1+."
        )
    return teacher


def _differs(own: dict[str, int], other: dict[str, int]) -> str:
    apart = sorted(own.items() ^ other.items(), key=lambda one: (one[1], one[0]))
    token, number = apart[0]
    where = (
        f"as {own[token]} here and {other[token]} there"
        if token in own and token in other
        else f"on one side, as {number}"
    )
    return f"{len(own):,} and {len(other):,} of them, the first that differs {token!r}, {where}"


def projector(index: int, rows: int, columns: int, model: ModelConfig) -> Weight:
    """[rows, columns] of deviation 1 / sqrt(columns), a function of its place and shape."""
    count = rows * columns
    drawn = normal(word_rows([PROJECTOR_SEED], [index], count + count % 2, Stream.INITIAL)[0])[:count]
    values = torch.from_numpy(drawn / math.sqrt(columns)).view(rows, columns)
    return Weight(values.to(model.device, DTYPES[model.dtype]), matrix=True)
