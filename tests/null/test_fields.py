"""The kinds of values that a model's files may hold, and how any other is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.errors import ModelError
from tandem.models.fields import (
    Fields,
    Kind,
    flag,
    listed,
    number,
    optional,
    read_json,
    shown,
    table,
    text,
    token_id,
    token_ids,
    whole,
)

GOOD: list[tuple[Kind[Any], Any, Any]] = [
    (whole(), 0, 0),
    (whole(1), np.uint32(7), 7),
    (number(), 3, 3.0),
    (number(), np.float32(0.5), 0.5),
    (number(0.0), 0, 0.0),
    (flag, False, False),
    (text, "", ""),
    (table, {}, {}),
    (optional(whole()), None, None),
    (listed(whole()), [1, 2], (1, 2)),
    (listed(text), [], ()),
    (token_id(8), -1, None),
    (token_id(8), 2**32 - 1, None),
    (token_id(8), 7, 7),
    (token_ids(8), 5, (5,)),
    (token_ids(8), [5, -1, 7, 5], (5, 7)),
    (token_ids(8), None, ()),
]
BAD: list[tuple[Kind[Any], Any]] = [
    *(
        (whole(), value)
        for value in (True, None, "3", 3.0, -1, 2**31, [3], {}, math.nan, np.float32(3), np.bool_(True))
    ),
    *((number(), value) for value in (False, None, "0.1", math.nan, math.inf, 10**400, [0.1], np.array([0.1]))),
    *((number(above=0.0), value) for value in (0, -0.0, -1e-300)),
    *((number(0.0, 1.0), value) for value in (-1e-9, 1.1)),
    *((flag, value) for value in (0, 1, "false", None, [])),
    *((text, value) for value in (None, 3, b"x", ["x"])),
    *((table, value) for value in (None, [], "{}")),
    *((listed(text), value) for value in ("ab", None, ["a", 1], {"a": 1})),
    *((optional(whole()), value) for value in (True, "", [])),
    *((token_ids(8), value) for value in ("5", True, [5, None, [6]], 2**32, 5.0, {"a": 5}, 8, [5, 8], 2**31)),
    *((token_id(8), value) for value in (8, 2**31, [7])),
]


@pytest.mark.parametrize(("kind", "value", "wanted"), GOOD)
def test_values_of_a_kind(kind: Kind[Any], value: Any, wanted: Any) -> None:
    """A NumPy number refused, or a value handed on as another type than its kind's."""
    found = Fields("x.json", {"name": value}).take("name", kind)
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(("kind", "value"), BAD)
def test_values_of_another_kind(kind: Kind[Any], value: Any) -> None:
    """true is counted as 1, "false" is true, a NaN or 10^400 goes on into the model."""
    with pytest.raises(ModelError, match=r"^x\.json has name = (?s:.)*; .* is needed\. Mend the file"):
        Fields("x.json", {"name": value}).take("name", kind)


def test_what_is_absent() -> None:
    """A default stands in for a null, or a missing value for a default that nobody gave."""
    fields = Fields("x.json", {"a": None})
    assert fields.take("b", whole(), 3) == 3 and fields.take("b", optional(whole()), None) is None
    with pytest.raises(ModelError, match="has a = None; a whole number from 0 to 9 is needed"):
        fields.take("a", whole(0, 9), 3)
    with pytest.raises(ModelError, match="x.json lacks c; true or false is needed"):
        fields.take("c", flag)
    assert fields.taken == {"a", "b", "c"}


def test_a_value_in_a_message_is_short() -> None:
    """A message prints a megabyte, or a lone surrogate that the terminal refuses."""
    for value in ("x" * 10**6, list(range(10**5)), 10**4000, {"a": {"b": "y" * 10**5}}, np.zeros(10**6), "\ud800"):
        assert len(shown(value)) < 300
        shown(value).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"a": ' * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[1]", "holds a list, not an object"),
        (b"null", "holds a NoneType, not an object"),
    ],
)
def test_json_that_is_none(content: bytes, message: str, tmp_path: Path) -> None:
    """Deep nesting, an integer of 5,000 digits or bytes that are no text end in a traceback."""
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ModelError, match=f"x.json {message}"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ModelError, match="cannot be read"):
        read_json(tmp_path)
