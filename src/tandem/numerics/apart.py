"""Two quantisers told apart: inputs at the edges of their rules, and the first block in which they differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.errors import ConfigError
from tandem.numerics.blocks import Format, block_scales, dequantise, quantise
from tandem.numerics.elements import Element, decode

POWERS = (-126, -60, -9, -1, 0, 1, 8, 60)


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
    first: Apart | None


def compare(one: Format, other: Format, tensors: Iterable[tuple[str, Tensor]]) -> Comparison:
    """Quantise each tensor [rows, columns] by both. ConfigError where their blocks are not of one size."""
    if (one.block, one.rows) != (other.block, other.rows):
        raise ConfigError(
            f"{one.name} has blocks of {one.rows} x {one.block} and {other.name} of {other.rows} x {other.block}: they "
            "differ everywhere. Compare formats of equal blocks."
        )
    numbers, differ, first = 0, 0, None
    for name, tensor in tensors:
        both = [quantise(tensor, form) for form in (one, other)]
        values = [dequantise(blocks, form) for blocks, form in zip(both, (one, other), strict=True)]
        apart = (values[0] != values[1]) & ~(values[0].isnan() & values[1].isnan())
        numbers, differ = numbers + tensor.numel(), differ + int(apart.sum())
        if first is None and bool(apart.any()):
            row, column = (int(place) for place in apart.nonzero()[0])
            size = tensor.shape[1] if one.block <= 0 else one.block
            start = column // size * size
            cut = slice(start, start + size)
            scales = []
            for blocks, form in zip(both, (one, other), strict=True):
                each = block_scales(blocks, form)
                flat = each.reshape(1, 1) if form.block == 0 else each
                scales.append(float(flat[min(row // form.rows, len(flat) - 1), start // size]))
            first = Apart(
                name,
                (row, start),
                tuple(tensor[row, cut].float().tolist()),
                (tuple(values[0][row, cut].tolist()), tuple(values[1][row, cut].tolist())),
                (tuple(both[0].codes[row, cut].tolist()), tuple(both[1].codes[row, cut].tolist())),
                (scales[0], scales[1]),
            )
    return Comparison(numbers, differ, first)


def edges(element: Element, columns: int) -> Iterator[tuple[str, Tensor]]:
    """Blocks whose largest lies on an edge of a rule and whose other numbers are ties, and normal numbers.

    The largest: powers of two and multiples of the element's largest number, with the fp32 numbers on both sides. Then
    100,000 normal numbers in bf16, which hits ties often, and in fp32, which hardly does.
    """
    values = decode(torch.arange(element.last + 1), element).double()
    ties = (values[1:] + values[:-1]) / 2
    rows = []
    for power in POWERS:
        for base in (1.0, 1.5, 1.75, 1.875, element.largest, element.largest * 1.25):
            top = torch.tensor(base * 2.0**power, dtype=torch.float32)
            for edge in (top, torch.nextafter(top, torch.tensor(0.0)), torch.nextafter(top, torch.tensor(torch.inf))):
                for first in range(0, len(ties), columns - 1):
                    scale = 2.0 ** int(torch.frexp(edge)[1] - 1 - element.most)
                    some = (ties[first : first + columns - 1] * scale).float()
                    rest = torch.nn.functional.pad(some, (0, columns - 1 - len(some)))
                    rows.append(torch.cat([edge[None], rest.clamp(-float(edge), float(edge))]))
    yield "edges", torch.stack(rows)
    drawn = torch.Generator().manual_seed(0)
    normal = torch.randn(100_000 // columns, columns, generator=drawn)
    yield "normal, in bf16", normal.to(torch.bfloat16).float()
    yield "normal", normal
