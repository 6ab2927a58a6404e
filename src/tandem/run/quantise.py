"""A model into a folder of quantised matrices, by round to nearest or by a method that looks at texts or rotates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tandem import env
from tandem.errors import ConfigError, TandemWarning, nearest
from tandem.models.aside import written_aside
from tandem.models.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from tandem.models.fields import read_json
from tandem.models.gguf import FORMATS
from tandem.models.gguf_tokens import tokenizer_fields
from tandem.models.gguf_write import GgufKind, kept_fields, metadata, write_gguf
from tandem.models.peft import is_adapter
from tandem.models.quantised.opened import take_scheme
from tandem.models.quantised.scheme import refuse_blocks
from tandem.models.quantised.write import FILES, kind_of, slots_of, write
from tandem.models.tokenizer import Tokenizer
from tandem.numerics.blocks import FORMATS as NUMBERS
from tandem.numerics.blocks import Format, format_of
from tandem.run.source import resolve_source
from tandem.run.texts import Pieces, pieces
from tandem.surgery.quantise import Method, Quantised, check, check_finite, quantised


@dataclass(frozen=True, slots=True)
class Asked:
    """By which method, over which texts.

    >>> Asked("hadamard+gptq").sequences
    128
    """

    method: str = "nearest"
    texts: Path | None = None  # a file of run/texts.py
    sequences: int = 128  # pieces of it, at most


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
    read: Pieces | None  # of the texts; None: nothing was looked at
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
        form = kind.form if kind else _format(wanted) if wanted else None
    _check_out(out, gguf is not None)
    if asked.texts is not None and not method.reads_texts:
        raise ConfigError(f"--texts {asked.texts}: {asked.method} looks at no text. Leave it out, or give a --method.")
    plain = gguf is not None and gguf.type is None and method == Method()
    if asked.texts is None and not plain:
        check(method, form, ())
    torch.set_num_threads(env.num_threads())
    checkpoint = _opened(source, form is not None)
    spec, tokenizer = checkpoint.spec, checkpoint.load_tokenizer()
    if kind and kind.form.block > 0 and kind.form.rows == 1:
        for slot in slots_of(spec):
            refuse_blocks(slot.stored[0].name, slot.columns or 0, kind.form.block)
    fields = _gguf_fields(checkpoint, tokenizer) if gguf else {}
    types = gguf.types(spec) if gguf else None
    read = _read(asked, tokenizer, spec.max_position) if method.reads_texts else None
    tensors = dict(checkpoint.tensors())
    if plain:
        check_finite(spec, tensors)
        made = Quantised(spec, tensors)
    else:
        made = quantised(spec, tensors, method, form, read.taken if read else (), types)
    with written_aside(out) as aside:
        if gguf:
            write_gguf(aside, made.spec, made.tensors, made.coded, fields, gguf)
        elif kind:
            floats = {name: tensor for name, tensor in made.tensors.items() if name not in made.blocks}
            write(aside, made.spec, floats, kind, made.blocks, tokenizer, dtype or "bfloat16")
        else:
            save_checkpoint(aside, made.spec, made.tensors, tokenizer, dtype or "float32")
    coded = [one for one in made.coded.values() if one is not None]
    weights = sum(one.codes.numel() for one in made.blocks.values()) + sum(one.codes_NK.numel() for one in coded)
    bits = form.bits if form else None
    if coded:
        bits = sum(one.type.bits * one.codes_NK.numel() for one in coded) / weights
    name = gguf.name if gguf else form.name if form else None
    size = sum(path.stat().st_size for path in ([out] if gguf else out.glob("*.safetensors")))
    count = len(made.blocks) + len(coded)
    written = file if gguf or kind else None
    return Made(written, name, bits, count, weights, made.sqnr_db, size, read, made.damped, made.cpu_s)


def _format(wanted: str) -> Format:
    try:
        return format_of(wanted)
    except ConfigError as error:
        close = nearest(wanted.partition(":")[0], (*FILES, "gguf", *NUMBERS))
        close = close if "Did you mean" in close else ""
        raise ConfigError(f"{error} Files are {', '.join(FILES)} and gguf.{close}") from error


def _check_out(out: Path, one_file: bool) -> None:
    """ConfigError for what is there, and for the name of a GGUF file that no reader would take for one."""
    if one_file and out.suffix != ".gguf":
        raise ConfigError(f"--out {out}: a GGUF file's name ends with .gguf. Write --out {out}.gguf.")
    if out.exists():
        raise ConfigError(f"{out} is there already. Choose another {'file' if one_file else 'folder'}, or remove it.")


def _opened(source: str, rounds: bool) -> Checkpoint:
    resolved = resolve_source(source)
    if is_adapter(Path(resolved)):
        raise ConfigError(
            f"{source} is an adapter, and what is quantised are whole weights. Fold it into its model first: tandem "
            f"convert merge {source} --out DIR; then quantise DIR."
        )
    checkpoint = open_checkpoint(resolved)
    if kept := _few_bits(checkpoint):
        told = f"{source} has its matrices in few bits already ({kept}): what these lost is lost"
        told += ", and they are rounded again" if rounds else ""
        warnings.warn(f"{told}. Better take the model that they were made of.", TandemWarning, stacklevel=3)
    return checkpoint


def _few_bits(checkpoint: Checkpoint) -> str:
    """What a model's files keep matrices as; empty for floats."""
    if checkpoint.gguf is not None:
        kinds = {FORMATS[entry.format][0] for entry in checkpoint.gguf.entries.values()}
        return ", ".join(sorted(kinds - {"F32", "F16", "BF16"}))
    config = Path(checkpoint.origin).expanduser() / "config.json"
    scheme = take_scheme(config.parent, read_json(config)) if config.is_file() else None
    return "" if scheme is None else scheme.method


def _gguf_fields(checkpoint: Checkpoint, tokenizer: Tokenizer) -> dict[str, Any]:
    """The metadata of a GGUF file: the tokeniser is that of the source where this is one too."""
    own = metadata(checkpoint.spec)
    if checkpoint.gguf is not None:
        return own | kept_fields(checkpoint.gguf)
    named = {"general.type": "model", "general.name": Path(checkpoint.origin).name}
    return own | named | tokenizer_fields(tokenizer, checkpoint.spec.vocab_size)


def _read(asked: Asked, tokenizer: Tokenizer, most_tokens: int) -> Pieces:
    assert asked.texts is not None
    found = pieces(asked.texts, asked.sequences, tokenizer, most_tokens)
    if len(found.taken) < asked.sequences:
        told = f"--texts {asked.texts} has {found.of:,} pieces ({found.tokens:,} tokens), {asked.sequences:,} are asked"
        warnings.warn(f"{told} for: the method sees no more. Give more text.", TandemWarning, stacklevel=3)
    return found


def described(made: Made) -> dict[str, object]:
    """For people and JSON."""
    return {
        "file": made.file,
        "format": made.format,
        "matrices": made.matrices,
        "weights": made.weights,
        "bits": made.bits,
        "sqnr_db": round(made.sqnr_db, 2) if made.matrices and math.isfinite(made.sqnr_db) else None,
        "bytes": made.bytes,
        "pieces": len(made.read.taken) if made.read else 0,
        "tokens": made.read.tokens if made.read else 0,
        "damped": dict(made.damped),
        "cpu_s": {name: round(spent, 3) for name, spent in made.cpu_s.items()},
    }
