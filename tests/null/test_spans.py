"""Spans of text that two tokenisers write alike."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from tandem.algo.spans import aligned, numbered


@given(
    text=st.integers(0, 12),
    cuts=st.tuples(st.sets(st.integers(1, 12)), st.sets(st.integers(1, 12))),
    empty=st.tuples(st.sets(st.integers(0, 12)), st.sets(st.integers(0, 12))),
)
def test_spans_are_where_both_begin_a_token(
    text: int, cuts: tuple[set[int], set[int]], empty: tuple[set[int], set[int]]
) -> None:
    """A span ends within a token of one side, one that could be two is one, or a token is in no span or in two."""
    sides = []
    for places, holes in zip(cuts, empty, strict=True):
        ends = sorted({place for place in places if place < text} | ({text} if text else set()))
        lengths = [end - start for start, end in zip((0, *ends), ends, strict=False)]
        sides.append(
            [piece for at, length in enumerate(lengths) for piece in ([0, length] if at in holes else [length])]
        )
    found = aligned(*sides)
    sums = [list(accumulate(side, initial=0)) for side in sides]
    for own, other in found:
        assert sums[0][own] == sums[1][other] and sides[0][own - 1] and sides[1][other - 1]
    shared = (set(sums[0]) & set(sums[1])) - {0}
    assert [sums[0][own] for own, _ in found] == sorted(shared)
    numbers = numbered([own for own, _ in found], len(sides[0]) + 2).tolist()
    assert numbers[-2:] == [-1, -1] and all(number >= 0 for number in numbers[:-2])
    assert [sum(n == span for n in numbers) for span in range(len(found))] == [
        end - start for (start, end) in zip([0, *(own for own, _ in found)], [own for own, _ in found], strict=False)
    ]
