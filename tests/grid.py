"""Grids of cases of which the diagonal is run unless all are asked for (--grids), to keep the suite short."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def crossed(*axes: Sequence[Any]) -> list[Any]:
    """All combinations, for `parametrize`. Those off the diagonal, which has each value of each axis, need --grids."""
    diagonal = [tuple(axis[place % len(axis)] for axis in axes) for place in range(max(map(len, axes)))]
    return [
        pytest.param(*each, marks=[] if each in diagonal else [pytest.mark.grid]) for each in itertools.product(*axes)
    ]
