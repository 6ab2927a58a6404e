"""Two quantisers told apart: inputs at the edges of their rules, and the first block in which they differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.errors import ConfigError
from tandem.numerics.blocks import WHOLE, Blocks, Format, block_scales, dequantise, quantise, shared
from tandem.numerics.elements import Element, decode

POWERS = (0, 1, -1, 8, -9, 60, -60)
LEAST = -126  # of the last edges: about fp32's denormals, where rules differ that are alike elsewhere


@dataclass(frozen=True, slots=True)
class Apart:
    """A block that two formats read back otherwise."""

    name: str  # of the tensor
    place: tuple[int, int]  # row and first column
    inputs: tuple[float, ...]
    values: tuple[tuple[float, ...], tuple[float, ...]]  # what each reads back
    codes: tuple[tuple[int, ...], tuple[int, ...]]
    scales: tuple[float, float]  # what the codes' elements are multiplied by


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of all tensors that were looked at."""

    numbers: int
    differ: int  # numbers that are read back otherwise
    recoded: int  # of these, by another code
    first: Apart | None  # the first block with another code; where there is none, that is read back otherwise


def compare(one: Format, other: Format, tensors: Iterable[tuple[str, Tensor]]) -> Comparison:
    """Quantise each tensor [rows, columns] by both. ConfigError where their blocks are not of one size."""
    if (one.block, one.rows) != (other.block, other.rows):
        raise ConfigError(
            f"{one.name} has a scale for each {shared(one)}, {other.name} for each {shared(other)}: they differ "
            "everywhere. Compare formats of equal blocks."
        )
    numbers, differ, recoded = 0, 0, 0
    valued: Apart | None = None
    coded: Apart | None = None
    for name, tensor in tensors:
        both = quantise(tensor, one), quantise(tensor, other)
        values = dequantise(both[0], one), dequantise(both[1], other)
        apart = (values[0] != values[1]) & ~(values[0].isnan() & values[1].isnan())
        others = apart & (both[0].codes != both[1].codes)
        numbers, differ, recoded = numbers + tensor.numel(), differ + int(apart.sum()), recoded + int(others.sum())
        if coded is None and bool(others.any()):
            coded = _block(name, tensor, others, (one, other), both)
        elif coded is None and valued is None and bool(apart.any()):
            valued = _block(name, tensor, apart, (one, other), both)
    return Comparison(numbers, differ, recoded, coded or valued)


def _block(
    name: str, tensor: Tensor, apart: Tensor, forms: tuple[Format, Format], both: tuple[Blocks, Blocks]
) -> Apart:
    """The block with the first number of `apart`."""
    row, column = (int(place) for place in apart.nonzero()[0])
    size = tensor.shape[1] if forms[0].block <= 0 else forms[0].block
    start = column // size * size
    cut = slice(start, start + size)
    scales, values, codes = [], [], []
    for blocks, form in zip(both, forms, strict=True):
        each = block_scales(blocks, form)
        flat = each.reshape(1, 1) if form.block == WHOLE else each
        scales.append(float(flat[min(row // form.rows, len(flat) - 1), start // size]))
        values.append(tuple(dequantise(blocks, form)[row, cut].tolist()))
        codes.append(tuple(blocks.codes[row, cut].tolist()))
    inputs = tuple(tensor[row, cut].float().tolist())
    return Apart(name, (row, start), inputs, (values[0], values[1]), (codes[0], codes[1]), (scales[0], scales[1]))


def edges(element: Element, columns: int, most: float = math.inf) -> Iterator[tuple[str, Tensor]]:
    """Blocks whose largest lies on an edge of a rule and whose other numbers are ties, and normal numbers.

    The largest: powers of two and multiples of the element's largest number, with the fp32 numbers on both sides; a
    tensor for each power, so that a scale of a whole tensor is not that of its largest power alone. Powers with numbers
    above `most` are left out. Then 100,000 normal numbers in bf16, which hits ties often, and in fp32, which hardly
    does; last the edges at fp32's least powers.
    """
    values = decode(torch.arange(element.last + 1), element).double()
    ties = (values[1:] + values[:-1]) / 2

    def around(power: int) -> Tensor:
        rows = []
        for base in (1.0, 1.5, 1.75, 1.875, element.largest, element.largest * 1.25):
            top = torch.tensor(base * 2.0**power, dtype=torch.float32)
            for edge in (top, torch.nextafter(top, torch.tensor(0.0)), torch.nextafter(top, torch.tensor(torch.inf))):
                for first in range(0, len(ties), columns - 1):
                    scale = 2.0 ** int(torch.frexp(edge)[1] - 1 - element.most)
                    some = (ties[first : first + columns - 1] * scale).float()
                    rest = torch.nn.functional.pad(some, (0, columns - 1 - len(some)))
                    rows.append(torch.cat([edge[None], rest.clamp(-float(edge), float(edge))]))
        return torch.stack(rows)

    for power in POWERS:
        made = around(power)
        if float(made.max()) <= most:
            yield f"edges at 2^{power}", made
    drawn = torch.Generator().manual_seed(0)
    normal = torch.randn(100_000 // columns, columns, generator=drawn)
    yield "normal, in bf16", normal.to(torch.bfloat16).float()
    yield "normal", normal
    yield f"edges at 2^{LEAST}", around(LEAST)
