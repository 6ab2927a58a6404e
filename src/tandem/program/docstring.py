"""What a docstring says of a function's parameters, in the ways of Google, NumPy and Sphinx."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple


class _Style(NamedTuple):
    opens: re.Pattern[str]  # a list of parameters: a line and the next
    skips: int  # lines of its head
    entry: re.Pattern[str]  # a parameter's name, and what is said of it on its line


_STYLES = (
    _Style(re.compile(r"(?:Args|Arguments|Params|Parameters):\n"), 1, re.compile(r"\s+(\w+)\s*(?:\(.*?\))?:\s*(.*)")),
    _Style(re.compile(r"Parameters\n---+"), 2, re.compile(r"(\w+)(?:\s*:.*)?()$")),
    _Style(re.compile(r":(?:param|type) "), 0, re.compile(r":param (?:[^:]* )?(\w+):\s*(.*)")),
)
_RULED = re.compile(r"\S.*\n---+|\n---+")  # the head of another section, or its second line


def described(text: str, names: Collection[str]) -> tuple[str, dict[str, str]]:
    r"""`text`, a docstring without indentation, less its list of the parameters `names`; what that says of them.

    A list that names others too stays where it is.

    >>> described("Adds.\n\nArgs:\n    a (int): one,\n        first\n    b: other\n\nReturns:\n    it", ["a", "b"])
    ('Adds.\n\nReturns:\n    it', {'a': 'one, first', 'b': 'other'})
    >>> described("Adds.\n\n:param int a: one\n:type b: int\n:param b: other\n:return: it", ["a", "b"])
    ('Adds.\n\n:return: it', {'a': 'one', 'b': 'other'})
    >>> described("Adds.\n\nParameters\n----------\na : int\n    one\nb\n    other\n\nReturns\n-------\nit", ["a", "b"])
    ('Adds.\n\nReturns\n-------\nit', {'a': 'one', 'b': 'other'})
    """
    lines, kept, said, place = text.splitlines(), list[str](), dict[str, str](), 0
    while place < len(lines):
        style = next((style for style in _STYLES if style.opens.match(_two(lines, place))), None)
        end = place + 1 if style is None else _end(lines, place + style.skips, style)
        found = {} if style is None else _entries(lines[place + style.skips : end], style.entry)
        if found and found.keys() <= {*names}:
            said |= found
        else:
            kept += lines[place:end]
        place = end
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip(), said


def _two(lines: Sequence[str], place: int) -> str:
    return "\n".join([*lines, ""][place : place + 2])


def _end(lines: Sequence[str], place: int, style: _Style) -> int:
    """Where the list that goes on at `place` is over."""
    while place < len(lines) and not _RULED.match(_two(lines, place)):
        line = lines[place]
        if line and not line[0].isspace() and not style.entry.match(line) and not line.startswith(":type "):
            break
        place += 1
    return place


def _entries(lines: Sequence[str], entry: re.Pattern[str]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    depth = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    for line in lines:
        begins = entry.match(line) if line.strip() and not line[depth].isspace() else None
        if begins:
            found[begins[1]] = [begins[2]]
        elif found and line[:1].isspace():
            found[[*found][-1]].append(line.strip())
    return {name: " ".join(filter(None, words)) for name, words in found.items()}
