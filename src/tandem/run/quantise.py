"""A model into a folder of quantised matrices, by round to nearest or by a method that looks at texts or rotates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch

from tandem import env
from tandem.errors import ConfigError
from tandem.models.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from tandem.models.gguf_tokens import tokenizer_fields
from tandem.models.gguf_write import GgufKind, kept_fields, metadata, write_gguf
from tandem.models.peft import is_adapter
from tandem.models.quantised.scheme import refuse_blocks
from tandem.models.quantised.write import FILES, kind_of, slots_of, write
from tandem.models.tokenizer import Tokenizer
from tandem.numerics.blocks import format_of
from tandem.run.source import resolve_source
from tandem.surgery.quantise import Method, Quantised, check, quantised

SEQUENCE_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Asked:
    """By which method, over which texts.

    >>> Asked("hadamard+gptq").sequences
    128
    """

    method: str = "nearest"
    texts: Path | None = None  # a file of text
    sequences: int = 128  # pieces of SEQUENCE_TOKENS, taken evenly out of it


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a model."""

    file: str | None  # None: written as floats
    format: str | None  # None: nothing was rounded
    bits: float | None  # of a number, its share of scales among them
    matrices: int
    weights: int  # numbers of those matrices
    sqnr_db: float  # of all of them, beside what was rounded
    bytes: int  # of the new weights, or the new file
    damped: Mapping[str, float]  # matrices whose inputs needed more on the diagonal of their second moments
    cpu_s: Mapping[str, float]  # of this process, by phase


def quantise(source: str, out: Path, wanted: str, dtype: str | None = None, asked: Asked | None = None) -> Made:
    """Write `source` into a new folder, or a new GGUF file: matrices of layers by `wanted`, the rest in `dtype`.

    wanted: FILE or FILE:FORMAT (models/quantised/write.py:kind_of), gguf:TYPE, or a format of numbers alone, whose
    values are written as floats of `dtype`; "": none, where a method only writes the model otherwise. No dtype: that of
    gguf's floats, bfloat16 in another file, float32 without one. ConfigError for an unknown format or method and for
    what is there; ModelError where the format does not fit.
    """
    asked = asked or Asked()
    method, file = Method.read(asked.method), wanted.partition(":")[0]
    gguf = GgufKind.read(wanted) if file == "gguf" else None
    kind = kind_of(wanted) if file in FILES else None
    if gguf:
        form = format_of(gguf.type.like) if gguf.type else None
        if gguf.type is None and dtype not in (None, gguf.dtype):
            raise ConfigError(f"{wanted} is a file of {gguf.dtype}: leave out --dtype {dtype}, or choose another type.")
        gguf = replace(gguf, dtype=dtype or gguf.dtype)
    else:
        form = kind.form if kind else format_of(wanted) if wanted else None
    _check_out(out, gguf is not None)
    plain = gguf is not None and gguf.type is None and method == Method()
    if asked.texts is None and not plain:
        check(method, form, ())
    torch.set_num_threads(env.num_threads())
    checkpoint = _opened(source)
    spec, tokenizer = checkpoint.spec, checkpoint.load_tokenizer()
    if kind and kind.form.block > 0 and kind.form.rows == 1:
        for slot in slots_of(spec):
            refuse_blocks(slot.stored[0].name, slot.columns or 0, kind.form.block)
    fields = _gguf_fields(checkpoint, tokenizer) if gguf else {}
    types = gguf.types(spec) if gguf else None
    texts = pieces(asked, tokenizer, spec.max_position) if method.reads_texts else ()
    tensors = dict(checkpoint.tensors())
    made = Quantised(spec, tensors) if plain else quantised(spec, tensors, method, form, texts, types)
    aside = out.with_name(f"{out.name}.part")
    with ExitStack() as leaving:
        leaving.callback(_remove, aside)
        if gguf:
            write_gguf(aside, made.spec, made.tensors, made.coded, fields, gguf)
        elif kind:
            floats = {name: tensor for name, tensor in made.tensors.items() if name not in made.blocks}
            write(aside, made.spec, floats, kind, made.blocks, tokenizer, dtype or "bfloat16")
        else:
            save_checkpoint(aside, made.spec, made.tensors, tokenizer, dtype or "float32")
        aside.rename(out)
    coded = [one for one in made.coded.values() if one is not None]
    weights = sum(one.codes.numel() for one in made.blocks.values()) + sum(one.codes_NK.numel() for one in coded)
    bits = form.bits if form else None
    if coded:
        bits = sum(one.type.bits * one.codes_NK.numel() for one in coded) / weights
    name = gguf.name if gguf else form.name if form else None
    size = sum(path.stat().st_size for path in ([out] if gguf else out.glob("*.safetensors")))
    count = len(made.blocks) + len(coded)
    return Made(file if gguf or kind else None, name, bits, count, weights, made.sqnr_db, size, made.damped, made.cpu_s)


def _check_out(out: Path, one_file: bool) -> None:
    """ConfigError for what is there, and for the name of a GGUF file that no reader would take for one."""
    if one_file and out.suffix != ".gguf":
        raise ConfigError(f"--out {out}: a GGUF file's name ends with .gguf. Write --out {out}.gguf.")
    if out.exists():
        raise ConfigError(f"{out} is there already. Choose another {'file' if one_file else 'folder'}, or remove it.")


def _opened(source: str) -> Checkpoint:
    resolved = resolve_source(source)
    if is_adapter(Path(resolved)):
        raise ConfigError(
            f"{source} is an adapter, and what is quantised are whole weights. Fold it into its model first: tandem "
            f"convert merge {source} --out DIR; then quantise DIR."
        )
    return open_checkpoint(resolved)


def _gguf_fields(checkpoint: Checkpoint, tokenizer: Tokenizer) -> dict[str, Any]:
    """The metadata of a GGUF file: the tokeniser is that of the source where this is one too."""
    own = metadata(checkpoint.spec)
    if checkpoint.gguf is not None:
        return own | kept_fields(checkpoint.gguf)
    named = {"general.type": "model", "general.name": Path(checkpoint.origin).name}
    return own | named | tokenizer_fields(tokenizer, checkpoint.spec.vocab_size)


def _remove(path: Path) -> None:
    rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def pieces(asked: Asked, tokenizer: Tokenizer, most_tokens: int) -> list[Sequence[int]]:
    """A file's tokens in pieces, as many as are asked for, taken evenly; the last may be shorter."""
    assert asked.texts is not None
    try:
        tokens = tokenizer.encode(asked.texts.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--texts {asked.texts} cannot be read: {error}. Give a file of text.") from error
    size = min(SEQUENCE_TOKENS, most_tokens)
    found: list[Sequence[int]] = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    if not found:
        raise ConfigError(f"--texts {asked.texts} is empty. Give a file of text.")
    count = min(asked.sequences, len(found))
    return [found[index * len(found) // count] for index in range(count)]


def described(made: Made) -> dict[str, object]:
    """For people and JSON."""
    return {
        "file": made.file,
        "format": made.format,
        "matrices": made.matrices,
        "weights": made.weights,
        "bits": made.bits,
        "sqnr_db": round(made.sqnr_db, 2) if made.matrices else None,
        "bytes": made.bytes,
        "damped": dict(made.damped),
        "cpu_s": {name: round(spent, 3) for name, spent in made.cpu_s.items()},
    }
