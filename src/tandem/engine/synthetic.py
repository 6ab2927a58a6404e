"""Drafts that stand at a given rate, for benches and tests: of requests that were answered before, to the letter.

The same request with the same seed gets the same tokens, so what it got the first time is known to stand. A share of
it is told wrongly, each position by itself. Nothing is drafted of a request that is asked for the first time.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from tandem.engine.draft import Drafter
from tandem.numerics.random import Stream, uniform, words

if TYPE_CHECKING:
    from tandem.engine.batch import Sequence


class Synthetic(Drafter):
    """rate: share of drafts that stand. kept: tokens of answers; the oldest go first."""

    def __init__(self, rate: float, kept: int) -> None:
        self.rate, self.kept = rate, kept
        self._told: OrderedDict[int, array[int]] = OrderedDict()  # request -> its whole text, some of it wrong
        self._tokens = 0

    def draft(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        drafts = []
        for sequence, count in zip(sequences, most, strict=True):
            told = self._told.get(_name(sequence)) if count else None
            known = len(sequence.tokens)
            drafts.append([] if told is None else told[known : known + count].tolist())
        return drafts

    def ended(self, sequence: Sequence) -> None:
        name = _name(sequence)
        before = self._told.get(name, ())
        if len(before) >= len(sequence.tokens):
            return
        tokens = np.array(sequence.tokens, dtype=np.int32)
        wrong = uniform(words(sequence.request.seed, 0, np.arange(len(tokens)), Stream.SYNTHETIC)) >= self.rate
        told = np.where(wrong, np.where(tokens, tokens - 1, 1), tokens)
        self._told[name] = array("i", told.tolist())
        self._tokens += len(tokens) - len(before)
        while self._tokens > self.kept:
            self._tokens -= len(self._told.popitem(last=False)[1])


def _name(sequence: Sequence) -> int:
    request = sequence.request
    return hash((request.tokens, request.seed, request.sampling.temperature, request.adapter, request.tenant))
