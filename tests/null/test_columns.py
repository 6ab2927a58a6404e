"""Columns against plain lists: a table of names to lists of values."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.columns import COLUMNS, Columns, ranges

Table = dict[str, list[Any]]

KINDS = {
    np.int32: st.integers(-(2**31), 2**31 - 1),
    bool: st.booleans(),
    np.float64: st.floats(),
    object: st.binary(max_size=8),
}
NEEDED = [name for name, column in COLUMNS.items() if column.absent is None and not column.absent_as]
NAMES = sorted(name for name, column in COLUMNS.items() if column.ndim == 1)
names = st.sets(st.sampled_from(NAMES))


def of_size(size: int, chosen: frozenset[str] = frozenset()) -> st.SearchStrategy[Table]:
    """Some columns, the `chosen` at least."""

    def values(named: set[str]) -> st.SearchStrategy[Table]:
        kinds = {name: KINDS[COLUMNS[name].dtype] for name in sorted(named | chosen)}
        return st.fixed_dictionaries({n: st.lists(kind, min_size=size, max_size=size) for n, kind in kinds.items()})

    return names.flatmap(values)


sizes = st.integers(0, 6)
tables = sizes.flatmap(of_size)
with_tokens = sizes.flatmap(lambda size: of_size(size, frozenset(("tokens",))))
pairs = sizes.flatmap(lambda size: st.tuples(of_size(size), of_size(size)))


def same(columns: Columns, table: Table) -> bool:
    """Value for value, NaN and the sign of zero included, in the declared dtypes."""
    assert all(array.dtype == COLUMNS[name].dtype for name, array in columns.arrays.items())
    return {name: repr(array.tolist()) for name, array in columns.arrays.items()} == {
        name: repr(values) for name, values in table.items()
    }


def frozen(columns: Columns) -> bool:
    """Nothing can be written to."""
    for array in columns.arrays.values():
        with pytest.raises(ValueError, match="read-only"):
            array[:] = array.copy()
    return True


@given(pairs, st.booleans())
def test_of_and_having(pair: tuple[Table, Table], arrays: bool) -> None:
    """A value is rounded or lost on the way in, a column takes another's place, or `having` changes what it is of."""
    table, more = pair
    columns = Columns.of(**{name: as_array(name, values) if arrays else values for name, values in table.items()})
    assert same(columns, table) and frozen(columns) and len(columns) == len(next(iter(table.values()), []))
    both = columns.having(**{name: tuple(values) for name, values in more.items()})
    assert same(both, table | more) and frozen(both) and same(columns, table)


def as_array(name: str, values: list[Any]) -> np.ndarray:
    return np.array(values, dtype=COLUMNS[name].dtype)


@given(with_tokens)
def test_the_callers_array_stays_theirs(table: Table) -> None:
    """Freezing a column makes the array that it was given read-only for its owner too."""
    given = {name: as_array(name, values) for name, values in table.items()}
    columns = Columns.of(**given)
    assert frozen(columns) and frozen(columns.having(**given))
    for array in given.values():
        assert array.flags.writeable
        array[:] = array.copy()


def filled(name: str, part: Table, size: int) -> list[Any]:
    """What stands for a column in a part, by the table's own words."""
    if name in part:
        return part[name]
    column = COLUMNS[name]
    return filled(column.absent_as, part, size) if column.absent_as else [column.absent] * size


@settings(max_examples=200)
@given(st.lists(with_tokens, max_size=5))
def test_concat(parts: list[Table]) -> None:
    """Values slip against their tokens where a part lacks a column, or another value stands for what it lacks."""
    present = {name for part in parts for name in part}
    lacked = [name for name in NEEDED if name in present and any(name not in part for part in parts)]
    columns = [Columns.of(**part) for part in parts]
    if lacked:
        with pytest.raises(AssertionError, match=f"some parts lack ({'|'.join(lacked)}), and nothing can stand for it"):
            Columns.concat(columns)
        return
    wanted = {name: [v for part in parts for v in filled(name, part, len(part["tokens"]))] for name in present}
    whole = Columns.concat(columns)
    assert same(whole, wanted) and frozen(whole)


def test_what_stands_for_an_absent_column_by_hand() -> None:
    """A token that was not sampled gets a version, a log-prob, a place in the mask or a set; a twin is not taken."""
    seen = Columns.of(tokens=(5, 2), loss_mask=(True, True), logprobs=(-0.1, -0.7), versions=(3, 4))
    filtered = seen.having(kept=(b"abcd", b"efgh"), unfiltered_logprobs=(-1.0, -2.0), advantages=(0.5, 0.5))
    whole = Columns.concat([Columns.of(tokens=(9,)), seen, filtered])
    assert {name: array.tolist() for name, array in whole.arrays.items()} == {
        "tokens": [9, 5, 2, 5, 2],
        "loss_mask": [False, True, True, True, True],
        "logprobs": [0.0, -0.1, -0.7, -0.1, -0.7],
        "versions": [-1, 3, 4, 3, 4],
        "kept": [b"", b"", b"", b"abcd", b"efgh"],
        "unfiltered_logprobs": [0.0, -0.1, -0.7, -1.0, -2.0],
        "advantages": [0.0, 0.0, 0.0, 0.5, 0.5],
    }
    for name in ("reference_logprobs", "proximal_logprobs", "source_logprobs"):
        with pytest.raises(AssertionError, match=f"lack {name}"):
            Columns.concat([seen, seen.having(**{name: (-1.0, -1.0)})])
    with pytest.raises(AssertionError, match="lack tokens"):
        Columns.concat([seen, seen.without("tokens")])


@given(tables, st.integers(-8, 8), st.none() | st.integers(-8, 8))
def test_slice(table: Table, start: int, stop: int | None) -> None:
    """An end is off by one, or a column is cut elsewhere than its neighbour."""
    cut = Columns.of(**table).slice(start, stop)
    assert same(cut, {name: values[start:stop] for name, values in table.items()}) and frozen(cut)


@given(with_tokens, st.lists(st.integers(0, 5), max_size=9))
def test_take(table: Table, drawn: list[int]) -> None:
    """Another order than that of the places, or a place that is asked for twice given once."""
    size = len(table["tokens"])
    places = [place for place in drawn if place < size]
    taken = Columns.of(**table).take(np.array(places, dtype=np.int64))
    assert same(taken, {name: [values[place] for place in places] for name, values in table.items()}) and frozen(taken)


@given(tables, names)
def test_without_get_and_in(table: Table, left_out: set[str]) -> None:
    """A column that is asked for is another, or one that is not there is made up."""
    columns = Columns.of(**table)
    assert same(columns.without(*left_out), {name: v for name, v in table.items() if name not in left_out})
    for name in COLUMNS:
        assert (name in columns) == (name in table)
        if name in table:
            assert columns.get(name) is columns[name] and repr(columns[name].tolist()) == repr(table[name])
        else:
            assert columns.get(name) is None
            with pytest.raises(KeyError, match=name):
                columns[name]
    widths = {np.int32: 4, bool: 1, np.float64: 8, object: 8}
    assert columns.nbytes == sum(widths[COLUMNS[name].dtype] * len(values) for name, values in table.items())


def test_names_that_are_no_columns() -> None:
    """A misspelt column is stored, looked up or left out, and nobody reads it."""
    columns = Columns.of(tokens=(1, 2))
    for wrong in (
        lambda: Columns.of(logprob=(0.0,)),
        lambda: columns.having(logprob=(0.0, 0.0)),
        lambda: columns.get("logprob"),
        lambda: columns.without("logprob"),
    ):
        with pytest.raises(AssertionError, match=r"logprob.*columns: tokens, loss_mask, logprobs"):
            wrong()


@given(st.integers(0, 4), st.integers(0, 4))
def test_unequal_lengths_are_refused(a: int, b: int) -> None:
    """Versions or log-probs that leave a token out belong to its neighbours from there on."""
    if a == b:
        assert len(Columns.of(tokens=[1] * a, versions=[0] * b)) == a
        return
    with pytest.raises(AssertionError, match=rf"different lengths: \{{'tokens': {a}, 'versions': {b}\}}"):
        Columns.of(tokens=[1] * a, versions=[0] * b)
    with pytest.raises(AssertionError, match="different lengths"):
        Columns.of(tokens=[1] * a).having(versions=[0] * b)
    with pytest.raises(AssertionError, match=r"tokens has shape \(2, 1\)"):
        Columns.of(tokens=[[1], [2]])


@given(tables, tables)
def test_equality(table: Table, other: Table) -> None:
    """Columns that differ in one value, name or length are taken for the same, or a NaN makes them differ."""
    columns = Columns.of(**table)
    assert columns == Columns.of(**{name: table[name] for name in reversed(table)})
    alike = table.keys() == other.keys() and all(
        len(a) == len(b) and all(x == y or (x != x and y != y) for x, y in zip(a, b, strict=True))
        for a, b in ((table[name], other[name]) for name in table)
    )
    assert (columns == Columns.of(**other)) == alike
    assert columns != table and columns != tuple(table)
    for name in table:
        assert columns != columns.without(name)
        for place, value in enumerate(table[name]):
            changed = table[name].copy()
            changed[place] = {bool: not value, object: b"another, longer"}.get(
                COLUMNS[name].dtype, 7 if value != 7 else 8
            )
            assert columns != columns.having(**{name: changed})


@given(tables)
def test_copies_are_the_same_and_frozen(table: Table) -> None:
    """What went to another process comes back with arrays that can be written to, or of another dtype."""
    columns = Columns.of(**table)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(columns.slice(0), protocol))
        assert same(again, table) and frozen(again) and again == columns
    for again in (copy.copy(columns), copy.deepcopy(columns)):
        assert same(again, table) and frozen(again)


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 5)), max_size=8))
def test_ranges(pairs: list[tuple[int, int]]) -> None:
    """A range of no length, or the first after one, begins elsewhere."""
    starts, lengths = (np.array([pair[i] for pair in pairs], dtype=np.int64) for i in range(2))
    assert ranges(starts, lengths).tolist() == [start + i for start, length in pairs for i in range(length)]


def test_the_table_is_sound() -> None:
    """A value that stands for an absent one changes in the column's dtype, or the stand-in is no column."""
    for name, column in COLUMNS.items():
        assert column.meaning and (column.absent is None or not column.absent_as), name
        assert not column.absent_as or COLUMNS[column.absent_as].dtype is column.dtype
        if column.absent is not None:
            (stored,) = Columns.of(**{name: [column.absent]})[name].tolist()
            assert stored == column.absent and type(stored) is type(column.absent)
    assert math.isnan(Columns.of(logprobs=[math.nan])["logprobs"][0])
