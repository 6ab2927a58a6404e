"""What a config makes of a teacher: the objective, the model itself or what was stored of one, and whether it fits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tandem.algo.distil import Distil, matched
from tandem.corpus.teacher import Origin, Stored, is_stored, read_header, words_hash
from tandem.errors import ConfigError, TandemError, TandemWarning
from tandem.kernels.weight import Weight
from tandem.models.checkpoint import Checkpoint, open_checkpoint
from tandem.models.codes import hold_codes
from tandem.models.decoder import DTYPES, Decoder, decoder_of
from tandem.numerics.digest import root_hash, tensor_hashes
from tandem.numerics.random import Stream, normal, word_rows
from tandem.run.source import Same, origin_of

if TYPE_CHECKING:
    from tandem.models.config import ModelConfig
    from tandem.models.tokenizer import Tokenizer
    from tandem.run.config import RunConfig
    from tandem.train.checkpoint import Part

PROJECTOR_SEED = 0x70726F6A  # of the weights that a learned projector begins with


def distil_of(config: RunConfig) -> Distil:
    """The objective. Reads no weight: the teacher is loaded when a step first asks for it."""
    asked, source = config.distil, config.distil.teacher
    if is_stored(source):
        return Distil(asked, partial(open_stored, config))
    load = partial(load_teacher, source, config.model)
    if asked.hidden == "none":
        return Distil(asked, load)
    student, teacher = (open_teacher(one).spec for one in (config.model.source, source))
    layers = matched(student.layers, teacher.layers)
    count = 0 if student.width == teacher.width else student.layers if asked.hidden == "layers" else 1
    projectors = [projector(index, teacher.width, student.width, config.model) for index in range(count)]
    return Distil(asked, load, projectors, layers)


def open_teacher(source: str) -> Checkpoint:
    """A model's files, without the adapter that it may wear."""
    return open_checkpoint(origin_of(source)[0])


def load_teacher(source: str, model: ModelConfig) -> Decoder:
    """A model that only answers, in the dtype and on the device of the student, with its adapter where it is one. Codes
    of a file stay codes, and what the student's products, keys and values are rounded to is the student's own."""
    base, worn = origin_of(source)
    checkpoint = open_checkpoint(base)
    decoder = decoder_of(checkpoint.spec, replace(model, weights="same", kv="same", logits="float32"))
    decoder.load(checkpoint.tensors(hold_codes(decoder, checkpoint)))
    for _, weight in decoder.weights():
        if weight is not decoder.embed:
            weight.serve()
    decoder.wear(None if worn is None else worn.onto(decoder))
    return decoder


def weights_hash(source: str) -> str:
    """Of a model's tensors as its files have them, read one at a time, and of its adapter where it is one."""
    base, worn = origin_of(source)
    hashes = tensor_hashes(open_checkpoint(base).tensors())
    if worn is not None:
        hashes |= {f"adapter {name}": found for name, found in tensor_hashes(worn.weights()[0]).items()}
        hashes["adapter"] = repr(worn.config)
    return root_hash(hashes)


def positions_of(config: RunConfig, own: int) -> int:
    """Most tokens of a text that is written: `own`, the model's positions, or its teacher's where those are fewer."""
    if config.objective != "distil" or config.distil.spans:  # whose teacher has tokens of its own
        return own
    source = config.distil.teacher
    if is_stored(source):
        return min(own, read_header(Path(source))[0].positions)
    return min(own, open_teacher(source).spec.max_position)


def check_corpus(config: RunConfig, digests: Mapping[str, str]) -> None:
    """ConfigError where stored log-probs are of other files or runs than a config's, whose digests go by their
    sources' names."""
    if config.objective != "distil" or not is_stored(config.distil.teacher):
        return
    folder = Path(config.distil.teacher)
    origin = read_header(folder)[0]
    for name, digest in digests.items():
        if digest not in origin.corpus.values():
            there = "was changed since, or is another of that name" if name in origin.corpus else "is not among them"
            raise ConfigError(
                f"distil.teacher {folder} holds log-probs of the sources {', '.join(origin.corpus)}, and {name} of "
                f"corpus.sources {there}. Write it again with `tandem convert teacher` and this config, or name the "
                f"teacher itself, {origin.teacher}."
            )


def saved_teacher(config: RunConfig) -> dict[str, Part]:
    """What a checkpoint has of a teacher."""
    if config.objective != "distil":
        return {}
    source = config.distil.teacher
    digest = read_header(Path(source))[0].digest if is_stored(source) else weights_hash(source)
    return {"teacher": Same(f"distil.teacher {source}", digest, "model.source")}


def open_stored(config: RunConfig) -> Stored:
    """ConfigError where the config wants of stored log-probs what they don't have."""
    asked, stored = config.distil, Stored(Path(config.distil.teacher))
    origin = stored.origin
    if config.corpus.on != bool(origin.corpus):
        of, sources = (", ".join(origin.corpus) or "the task's own texts"), ", ".join(config.corpus.sources)
        raise ConfigError(
            f"distil.teacher {stored.folder} holds log-probs of {of}, and corpus.sources is {sources or 'empty'}. "
            f"Set one of them otherwise, or distil.teacher to {origin.teacher}."
        )
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
        if origin.words != words_hash(own) or origin.vocab > student.spec.vocab_size:
            raise ConfigError(
                f"distil.teacher {source} was written for the tokens of another vocabulary than that of "
                f"{config.model.source}: its ids mean other texts. Write it again with this model."
            )
        _check_origin(source, origin)
        return None
    teacher = open_teacher(source)
    least = min(student.spec.vocab_size, teacher.spec.vocab_size)
    if config.distil.top_k > least:
        raise ConfigError(
            f"distil.top_k is {config.distil.top_k}, and the models have {least} tokens. Set it lower, or to 0 for all."
        )
    other = teacher.load_tokenizer().backend.get_vocab(True)
    if own != other and not config.distil.spans:
        raise ConfigError(
            f"distil.teacher {source} reads other tokens than {config.model.source}: {differs(own, other)}. "
            "Distributions over different tokens have no divergence. Choose a teacher of the student's family, or a "
            "student made of the teacher (`tandem convert prune`), or compare spans of text: distil.spans=true with "
            "distil.divergence=k1+."
        )
    return teacher


def _check_origin(folder: str, origin: Origin) -> None:
    """Warn where the teacher that was asked lies here, and is another now."""
    if not Path(origin.teacher).exists():
        return
    try:
        now = weights_hash(origin.teacher)
    except TandemError:
        return  # it is no model any more, and nothing is asked of it
    if now != origin.digest:
        warnings.warn(
            f"{folder} holds log-probs of {origin.teacher} as it was, with weights of the hash {origin.digest[:12]}; "
            f"there are others now, {now[:12]}. The run learns what was stored. To learn from the present ones, write "
            "it again with `tandem convert teacher`.",
            TandemWarning,
            stacklevel=2,
        )


def differs(own: dict[str, int], other: dict[str, int]) -> str:
    """In words, how two vocabularies do."""
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
