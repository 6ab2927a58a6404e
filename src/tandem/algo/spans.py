"""One text in the tokens of two models: the spans between places where both begin a token, and log-probs over them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tandem.columns import Array


def aligned(own: Sequence[int], other: Sequence[int]) -> list[tuple[int, int]]:
    """Ends of spans, as tokens of either side, of which both wrote the same characters; the fewest tokens a span.

    own, other: characters of each token (rollout/pieces.py); 0 for one that only begins a character, which belongs to
    the span of the token that ends it. What lies behind the last place that both reach is in no span.

    >>> aligned([2, 3, 1], [1, 1, 4]), aligned([0, 1, 1], [1, 1])
    ([(1, 2), (3, 3)], [(2, 1), (3, 2)])
    """
    ends = [_ends(side) for side in (own, other)]
    return [(ends[0][place], ends[1][place]) for place in sorted(ends[0].keys() & ends[1].keys())]


def _ends(lengths: Sequence[int]) -> dict[int, int]:
    """Characters so far -> tokens that wrote them, where a token ends there."""
    found: dict[int, int] = {}
    place = 0
    for count, length in enumerate(lengths, 1):
        place += length
        if length:
            found[place] = count
    return found


def numbered(spans: Sequence[int], tokens: int) -> Array:
    """Of each of so many tokens its span's number, by the spans' ends; -1 behind the last.

    >>> numbered([2, 3], 5).tolist()
    [0, 0, 1, -1, -1]
    """
    numbers = np.full(tokens, -1, np.int32)
    for number, (start, end) in enumerate(zip((0, *spans), spans, strict=False)):
        numbers[start:end] = number
    return numbers


def span_sums(values_N: Tensor, spans_N: Tensor, sample_N: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of tokens' values over each span [S], differentiable, and the place of each span's last token [S].

    Tokens of a span are side by side; those of number -1 are in none.
    """
    inside = spans_N >= 0
    changed = torch.ones_like(inside)
    changed[1:] = (spans_N[1:] != spans_N[:-1]) | (sample_N[1:] != sample_N[:-1])
    first_N = inside & changed
    number_N = first_N.cumsum(0) - 1
    places_S = torch.zeros(int(first_N.sum()), dtype=torch.long, device=spans_N.device)
    at = inside.nonzero()[:, 0]
    places_S.scatter_reduce_(0, number_N[at], at, "amax", include_self=False)
    zeros = torch.zeros(len(places_S), dtype=values_N.dtype, device=values_N.device)
    return zeros.index_add(0, number_N[at], values_N[at]), places_S
