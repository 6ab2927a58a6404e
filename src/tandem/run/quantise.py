"""A model into a folder of quantised matrices, by round to nearest."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

import torch

from tandem import env
from tandem.errors import ConfigError
from tandem.models.checkpoint import open_checkpoint
from tandem.models.parts import expected_shapes
from tandem.models.peft import is_adapter
from tandem.models.quantised.write import Kind, kind_of, quantise_slot, slots_of, write
from tandem.numerics.blocks import Blocks, dequantise
from tandem.run.source import resolve_source


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a model."""

    kind: Kind
    matrices: int
    weights: int  # numbers of those matrices
    sqnr_db: float  # of all of them
    bytes: int  # of the new folder's weights


def quantise(source: str, out: Path, wanted: str, dtype: str) -> Made:
    """Write `source` into a new folder: matrices of layers by `wanted` (models/quantised/write.py:kind_of), the rest in
    `dtype`. ConfigError for an unknown format or a folder that is there; ModelError where the format does not fit."""
    kind = kind_of(wanted)
    if out.exists():
        raise ConfigError(f"{out} is there already. Choose another folder, or remove it.")
    torch.set_num_threads(env.num_threads())
    resolved = resolve_source(source)
    if is_adapter(Path(resolved)):
        raise ConfigError(
            f"{source} is an adapter, and what is quantised are whole weights. Fold it into its model first: tandem "
            f"convert merge {source} --out DIR; then quantise DIR."
        )
    checkpoint = open_checkpoint(resolved)
    spec = checkpoint.spec
    tensors = dict(checkpoint.tensors())
    codes: dict[str, Blocks] = {}
    signal = noise = 0.0
    for slot in slots_of(spec):
        weights = {name: tensors.pop(name) for name in slot.shapes()}
        codes |= quantise_slot(weights, kind)
        for name, weight in weights.items():
            signal += float(weight.double().square().sum())
            noise += float((weight.double() - dequantise(codes[name], kind.form).double()).square().sum())
    aside = out.with_name(f"{out.name}.part")
    with ExitStack() as leaving:
        leaving.callback(rmtree, aside, ignore_errors=True)
        write(aside, spec, tensors, kind, codes, checkpoint.load_tokenizer(), dtype)
        aside.rename(out)
    shapes = expected_shapes(spec)
    decibels = 10 * math.log10(signal / noise) if noise else math.inf
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return Made(kind, len(codes), sum(math.prod(shapes[name]) for name in codes), decibels, size)


def described(made: Made) -> dict[str, object]:
    """For people and JSON."""
    return {
        "file": made.kind.file,
        "format": made.kind.form.name,
        "matrices": made.matrices,
        "weights": made.weights,
        "bits": made.kind.form.bits,
        "sqnr_db": round(made.sqnr_db, 2),
        "bytes": made.bytes,
    }
