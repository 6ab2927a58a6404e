"""The paths of segments that go on from one another, against each path written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from tandem.kernels.paths import Paths
from tandem.models.view import PackView
from tests.samples import Forest, forests


@settings(max_examples=200)
@given(forests())
def test_paths_of_segments(forest: Forest):
    """A path goes through another segment's rows, ends early or late, or a tree is cut into two tasks that race."""
    row_start, first, _, tables = forest
    found, wanted = Paths.of_segments(*map(np.array, forest[:3])), Paths.build(row_start, first, tables, 1)
    for name in ("row_start_S", "first_position_S", "table_SP", "component_start"):
        got = getattr(found, name)
        assert got.dtype == torch.int32 and got.is_contiguous() and torch.equal(got, getattr(wanted, name)), name
    assert found.page_tokens == 1 and found.num_rows == row_start[-1]
    view = PackView(*forest[:3])
    positions = {row: position for table in tables for position, row in enumerate(table)}
    assert view.positions_T.tolist() == [positions[row] for row in range(row_start[-1])]
    assert torch.equal(view.paths.table_SP, wanted.table_SP)


@pytest.mark.parametrize(
    ("first", "parents"),
    [
        ([0, 3, 0], [-1, 0, -1]),  # past the parent's end
        ([0, 1, 0], [-1, 1, -1]),  # of itself
        ([0, 1, 0], [-1, 2, -1]),  # of one that comes later
        ([0, 1, 0], [-1, -1, -1]),  # of nobody
        ([1, 0, 0], [-1, -1, -1]),
        ([0, 0, 1], [-1, -1, 0]),  # another tree lies between: two tasks would add to one row's gradient
    ],
)
def test_segments_that_are_no_trees_are_refused(first: list[int], parents: list[int]):
    """A segment attends to rows that nobody ran, or its gradient races with a neighbour's."""
    with pytest.raises(AssertionError):
        Paths.of_segments(np.array([0, 2, 4, 6]), np.array(first), np.array(parents))
