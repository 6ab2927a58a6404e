"""Which of some prompts a step asks, each with a probability that is known: weights by it undo the choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem.numerics.random import Stream, derive_seed, uniform, words
from tandem.rollout.belief import Belief
from tandem.types import Prompt

Floats = NDArray[np.float64]


def probabilities(scores: Sequence[float], count: int, floor: float) -> Floats:
    """[C]: of being among `count`, which they sum to. `floor` of it is dealt out evenly, so that each has at least
    floor * count / C; the rest goes by the scores, and what would be beyond 1 to the others.

    >>> probabilities([3.0, 1.0, 0.0, 0.0], 2, 0.5).tolist()
    [1.0, 0.5, 0.25, 0.25]
    """
    values = np.asarray(scores, dtype=np.float64)
    if count >= len(values):
        return np.ones(len(values))
    even = count * floor / len(values)
    found = np.full(len(values), even)
    left, open_ = count * (1.0 - floor), np.ones(len(values), dtype=bool)
    while left > 0.0 and open_.any():
        total = values[open_].sum()
        share = np.where(open_, values / total if total > 0.0 else 1.0 / open_.sum(), 0.0) * left
        full = open_ & (found + share >= 1.0)
        if not full.any():
            return found + share
        left -= (1.0 - found[full]).sum()
        found[full], open_ = 1.0, open_ & ~full
    return found


def systematic(chances: Floats, order: Floats, start: float) -> list[int]:
    """Places that are drawn, each with its chance, as many as the chances sum to.

    Laid end to end in a random order, the chances are hit by combs of distance 1 from a random `start` in [0, 1)
    (Madow 1949, "On the theory of systematic sampling, II").
    """
    places = np.argsort(order, kind="stable")
    ends = np.cumsum(chances[places])
    hits = np.floor(ends - start) - np.floor(np.concatenate(([0.0], ends[:-1])) - start)
    return sorted(int(place) for place in places[hits > 0.5])


@dataclass(frozen=True, slots=True)
class Choice:
    """A draw of prompts among candidates.

    >>> Choice((), {}, {}, {}).weight("p")
    1.0
    """

    prompts: tuple[Prompt, ...]  # drawn, in the candidates' order
    chances: Mapping[str, float]  # by id, of those: of having been drawn
    beliefs: Mapping[str, Belief]  # by id, of all candidates, when they were drawn
    repeated: Mapping[str, bool]  # by id, of those: asked before

    def weight(self, prompt_id: str) -> float:
        """(count / C) / chance: the mean of what is drawn, so weighed, has the expectation of the candidates' mean."""
        if prompt_id not in self.chances:
            return 1.0
        return len(self.prompts) / (len(self.beliefs) * self.chances[prompt_id])

    def mean(self, drawn: Mapping[str, float]) -> float | None:
        """An unbiased estimate of the candidates' mean of what was measured of those that were drawn: what is believed
        of all, and how far that was off for the drawn, by their chances. None where one was not measured."""
        if not self.prompts or not drawn.keys() >= self.chances.keys():
            return None
        off = sum((drawn[name] - self.beliefs[name].mean) / chance for name, chance in self.chances.items())
        return (sum(belief.mean for belief in self.beliefs.values()) + off) / len(self.beliefs)


def choose(
    candidates: Sequence[tuple[Prompt, Belief, bool]], count: int, floor: float, power: float, seed: int
) -> Choice:
    """`count` of the candidates (with what is believed of each, and whether it was asked before), by the predicted
    variance of their rewards to a power."""
    scores = [belief.variance**power for _, belief, _ in candidates]
    chances = probabilities(scores, count, floor)
    noise = uniform(words(seed, 0, np.arange(len(candidates) + 1), Stream.SELECTION))
    places = systematic(chances, noise[1:], float(noise[0]))
    drawn = [candidates[place] for place in places]
    return Choice(
        tuple(prompt for prompt, _, _ in drawn),
        {candidates[place][0].id: float(chances[place]) for place in places},
        {prompt.id: belief for prompt, belief, _ in candidates},
        {prompt.id: repeated for prompt, _, repeated in drawn},
    )


def selection_seed(run_seed: int, step: int, draw: int) -> int:
    """Of a step's draws, of which redraws make more than one."""
    return derive_seed(run_seed, step, "selection", draw)
