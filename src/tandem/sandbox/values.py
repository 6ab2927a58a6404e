"""Values between the tests and the program under test, which run in two sandboxes: plain ones, as JSON.

Handed to both interpreters as text before `judge.py` and `played.py`: the standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

DEPTH = 100
MESSAGE_BYTES = 1 << 20  # of one call or answer
LARGE = 1 << 64  # from here on an integer goes as hexadecimal digits: decimal ones end at 4,300


def encode(value: Any, other: Callable[[Any], list[Any]], depth: int = DEPTH) -> Any:
    """`value` for `decode`; what is not plain as `other` says.

    >>> encode((1, [2.5, None], {"a": {3}}, b"x"), list)
    ['t', 1, ['l', 2.5, None], ['d', ['a', ['s', 3]]], ['b', '78']]
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and not -LARGE < (value := int(value)) < LARGE:
        return ["i", hex(value)]
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if depth == 0:
        raise ValueError("it is nested too deeply")
    for letter, kind in KINDS.items():
        if isinstance(value, kind):
            return [letter, *(encode(each, other, depth - 1) for each in value)]
    if isinstance(value, dict):
        pairs = [[encode(each, other, depth - 1) for each in pair] for pair in value.items()]
        return ["d", *pairs]
    if isinstance(value, bytes | bytearray):
        return ["b" if isinstance(value, bytes) else "y", bytes(value).hex()]
    if isinstance(value, complex):
        return ["c", value.real, value.imag]
    return other(value)


def decode(code: Any, other: Callable[[list[Any]], Any], depth: int = DEPTH) -> Any:
    """The value of a code; ValueError, TypeError, LookupError or RecursionError where it is none."""
    if not isinstance(code, list):
        if isinstance(code, dict):
            raise ValueError("no code of a value")
        return code
    letter, *rest = code
    if depth == 0:
        raise ValueError("it is nested too deeply")
    if letter in KINDS:
        return KINDS[letter](decode(each, other, depth - 1) for each in rest)
    if letter == "d":
        return {decode(key, other, depth - 1): decode(each, other, depth - 1) for key, each in rest}
    if letter in ("b", "y"):
        return (bytes if letter == "b" else bytearray).fromhex(rest[0])
    if letter == "i":
        return int(rest[0], 16)
    return complex(*rest) if letter == "c" else other(code)


KINDS: dict[str, Any] = {"l": list, "t": tuple, "s": set, "z": frozenset}
