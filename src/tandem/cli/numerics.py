"""`tandem numerics`: number formats of few bits, and two of them told apart."""

from __future__ import annotations

import dataclasses
import json as jsonlib
from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor


class Kind(str, Enum):
    FORMATS = "formats"
    COMPARE = "compare"


KIND_HELP = "formats: a table of those that are known; compare: two of them, and the first input that separates them"
NAMES_HELP = "Of compare: two formats; then, in place of inputs at the edges of their rules, a model's matrices"
SHOWN = 8  # numbers of a block that are printed


def numerics(
    kind: Annotated[Kind, typer.Argument(metavar="formats|compare", help=KIND_HELP)],
    names: Annotated[list[str] | None, typer.Argument(metavar="[A B [MODEL]]", help=NAMES_HELP)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> int:
    """Show number formats, or tell two of them apart."""
    from tandem.errors import ConfigError

    names = names or []
    if kind is Kind.FORMATS:
        if names:
            raise ConfigError(f"`numerics formats` takes no names; {' '.join(names)} were given. Leave them out.")
        return _formats(json)
    if len(names) not in (2, 3):
        raise ConfigError(f"`numerics compare` takes two formats and maybe a model; {len(names)} names were given.")
    return _compare(names[0], names[1], names[2] if len(names) == 3 else "", json)


def _formats(json: bool) -> int:
    from tandem.numerics.blocks import FORMATS, properties

    rows = [properties(form) for form in FORMATS.values()]
    if json:
        print(jsonlib.dumps(rows))
        return 0
    texts = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(texts[0]))]
    for row in texts:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _compare(one: str, other: str, model: str, json: bool) -> int:
    from tandem.numerics.apart import compare, edges
    from tandem.numerics.blocks import format_of

    first, second = format_of(one), format_of(other)
    columns = max(2, first.block if first.block > 0 else 128)
    tensors = _matrices(model) if model else edges(first.element, columns)
    found = compare(first, second, tensors)
    if json:
        print(jsonlib.dumps({"a": one, "b": other, **dataclasses.asdict(found)}))
        return 0
    print(f"{found.differ:,} of {found.numbers:,} numbers are read back otherwise by {one} and by {other}")
    if found.first is not None:
        apart = found.first
        at = next(i for i, pair in enumerate(zip(*apart.values, strict=True)) if pair[0] != pair[1])
        cut = slice(max(0, at - SHOWN // 2), max(0, at - SHOWN // 2) + SHOWN)
        print(f"the first of {apart.name}, row {apart.place[0]}, from column {apart.place[1] + cut.start} on:")
        print(f"  inputs  {_numbers(apart.inputs[cut])}  (the block's largest {max(map(abs, apart.inputs)):.9g})")
        for name, values, codes, scale in zip((one, other), apart.values, apart.codes, apart.scales, strict=True):
            written = " ".join(f"{code:02x}" for code in codes[cut])
            print(f"  {name}: {_numbers(values[cut])}  codes {written}  x {scale:.9g}")
    return 0


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.9g}" for value in values)


def _matrices(model: str) -> Iterator[tuple[str, Tensor]]:
    from tandem.models.checkpoint import open_checkpoint
    from tandem.run.source import resolve_source

    for name, tensor in open_checkpoint(resolve_source(model)).tensors():
        if tensor.ndim == 2:
            yield name, tensor
