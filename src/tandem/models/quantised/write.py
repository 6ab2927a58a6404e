"""Quantised matrices into files that other packages read.

    kind = kind_of("gptq:int4_g64")
    made = quantised(spec, tensors, Method(), kind.form)  # surgery/quantise.py
    write(folder, spec, {others by name}, kind, made.blocks, tokenizer)

Codes of one's own are `Blocks` of `kind.form`: its scales in the dtype that the file keeps, rounded before the codes
are chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tandem.errors import ConfigError, ModelError, nearest
from tandem.models.checkpoint import Packed, save_checkpoint
from tandem.models.families import FAMILIES
from tandem.models.parts import Slot, layer_slots
from tandem.models.quantised.compressed import CompressedTensors
from tandem.models.quantised.floats import Fp8, ModelOpt, Mxfp4
from tandem.models.quantised.integers import Awq, Gptq, Gptq2
from tandem.models.quantised.scheme import Scheme, grid_of, scales_fault
from tandem.models.spec import ModelSpec
from tandem.models.tokenizer import Tokenizer
from tandem.numerics.blocks import SCALE_DTYPES, WHOLE, Blocks, Format, format_of

# By the name that people give: the scheme, and the format where none is named.
FILES: dict[str, tuple[type[Scheme], str]] = {
    "compressed-tensors": (CompressedTensors, "int4_g128"),
    "awq": (Awq, "int4_g128_asym"),
    "gptq": (Gptq, "int4_g128"),
    "gptq_v2": (Gptq2, "int4_g128"),
    "fp8": (Fp8, "fp8_128x128"),
    "modelopt": (ModelOpt, "nvfp4"),
    "mxfp4": (Mxfp4, "mxfp4"),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """A file format and what its matrices are quantised to."""

    file: str
    scheme: type[Scheme]
    form: Format  # its scales of the dtype that the file keeps


def kind_of(text: str) -> Kind:
    """FILE or FILE:FORMAT, as awq or compressed-tensors:int4_g64; a format of numerics/blocks.py. ConfigError.

    >>> kind_of("gptq").form.name, kind_of("compressed-tensors:nvfp4").form.chain
    ('int4_g128', 'divided')
    """
    file, _, name = text.partition(":")
    if file not in FILES:
        raise ConfigError(
            f"{text!r} is no format of files; write FILE or FILE:FORMAT, as compressed-tensors:int4_g64. Files are "
            f"{', '.join(FILES)}.{nearest(file, FILES)}"
        )
    scheme, default = FILES[file]
    return Kind(file, scheme, scheme.form_of(format_of(name or default)))


def slots_of(spec: ModelSpec) -> Iterator[Slot]:
    """Of all layers, those that are quantised; the embedding and the head are not."""
    return (slot for slot in layer_slots(spec) if slot.columns is not None)


def write(
    folder: Path,
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    kind: Kind,
    quantised: Mapping[str, Blocks],
    tokenizer: Tokenizer | None = None,
    dtype: str = "bfloat16",
) -> None:
    """Write a model into `folder`: `quantised` by the rules of a kind, other tensors in `dtype`.

    Both by the decoder's names (models/parts.py), each name in one. Codes are those of `kind.form`, scales too: one a
    block [N, G], in the file's dtype (e4m3 and e8m0 as their bytes). ModelError for shapes or scales that the file
    can't hold; CheckpointError where the disk refuses.
    """
    both = sorted(set(tensors) & set(quantised))
    assert not both, both
    renaming = FAMILIES[spec.architecture].renaming
    parts: dict[str, Mapping[str, Tensor]] = {}
    for slot in slots_of(spec):
        wholes = {float(one.whole) for name in slot.shapes() if (one := quantised.get(name)) and one.whole is not None}
        if len(wholes) > 1:
            raise ModelError(
                f"{', '.join(slot.shapes())} have {len(wholes)} scales of the tensor, and readers of {kind.file} have "
                "one product for them and one scale. Quantise them together, as surgery/quantise.py does."
            )
    for name, blocks in quantised.items():
        _check(name, blocks, kind.form)
        if renaming is not None:
            blocks = _renamed(spec, name, blocks, kind.form)
        own = name if renaming is None else renaming.write_name(name)
        module = own.removesuffix(".weight")
        parts[name] = {_joined(kind, module, part): tensor for part, tensor in _parts(name, kind, blocks).items()}
    plain = [name.removesuffix(".weight") for name in ("lm_head.weight",)]
    shapes = {name: tuple(blocks.codes.shape) for name, blocks in quantised.items()}
    packed = Packed(parts, shapes, kind.scheme.config(kind.form, plain))
    save_checkpoint(folder, spec, tensors, tokenizer, dtype, packed=packed)


def _parts(name: str, kind: Kind, blocks: Blocks) -> dict[str, Tensor]:
    try:
        return kind.scheme.written(kind.form, blocks)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error


def _joined(kind: Kind, module: str, part: str) -> str:
    return f"{module}_{part}" if kind.scheme is Mxfp4 else f"{module}.{part}"


def _check(name: str, blocks: Blocks, form: Format) -> None:
    """ModelError unless these are blocks of the format."""
    rows, columns = blocks.codes.shape
    shape = grid_of(form, rows, columns)
    wanted = SCALE_DTYPES.get(form.scale, torch.uint8)
    if blocks.codes.dtype != torch.uint8 or tuple(blocks.scales.shape) != shape or blocks.scales.dtype != wanted:
        raise ModelError(
            f"{name}: codes of {blocks.codes.dtype} and scales of {blocks.scales.dtype} {tuple(blocks.scales.shape)}; "
            f"{form.name} has codes of {torch.uint8} and scales of {wanted} {shape}."
        )
    if (blocks.zeros is not None) != form.zero_point or (blocks.whole is not None) != (form.scale == "e4m3"):
        raise ModelError(f"{name}: zero points or a scale of the tensor are missing, or are not of {form.name}.")
    fault = scales_fault(blocks, form)
    if fault:
        raise ModelError(
            f"{name}: {fault} in {form.name}. Mend the weights, or choose a format whose scales have the range."
        )


def _renamed(spec: ModelSpec, name: str, blocks: Blocks, form: Format) -> Blocks:
    """In the layout of a family's own files, where that is another."""
    renaming = FAMILIES[spec.architecture].renaming
    assert renaming is not None
    if form.rows > 1 or form.block == WHOLE:
        raise ModelError(f"{spec.architecture} keeps rows in another order, and {form.name} has scales of many rows.")

    def turned(x: Tensor | None) -> Tensor | None:
        return None if x is None else renaming.write(spec, name, x)

    codes, scales = turned(blocks.codes), turned(blocks.scales)
    assert codes is not None and scales is not None
    return Blocks(codes, scales, blocks.whole, turned(blocks.zeros))
