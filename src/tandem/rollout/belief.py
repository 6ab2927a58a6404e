"""What a run believes of its prompts: how often each is answered right, from the run's own rewards.

The prompts of one shape have success rates p that are spread like a Beta, whose mean and within-prompt variance
E[p(1 - p)] are fitted by moments to the groups that were graded; a prompt's own rewards update it. Older rewards are of
an older policy and count less. A reward is read as a share of 1: below 0 as 0, above 1 as 1.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tandem.types import Group, Prompt

LEAST, MOST = 0.1, 50.0  # concentration of a shape's Beta: rates near 0 and 1 alone, rates all alike
PRIOR = 1.0  # groups that a shape is believed to have been like all, before any of its own
FORGOTTEN = 0.01  # a weight below which nothing is kept
SHOWN = 60  # characters of a shape; of a longer one, its hash


class Belief(NamedTuple):
    """Beta(right, wrong): where a prompt's success rate p lies.

    >>> Belief(1.0, 1.0).mean, round(Belief(1.0, 1.0).differs(2), 6), Belief(2.0, 2.0).after(1.0, 3.0)
    (0.5, 0.333333, Belief(right=3.0, wrong=5.0))
    """

    right: float
    wrong: float

    @property
    def mean(self) -> float:
        return self.right / (self.right + self.wrong)

    @property
    def variance(self) -> float:
        """E[p (1 - p)]: of a reward, within the group."""
        whole = self.right + self.wrong
        return self.right * self.wrong / (whole * (whole + 1.0))

    def differs(self, count: int) -> float:
        """Probability that `count` answers are not all right and not all wrong: 1 - E[p^n] - E[(1 - p)^n]."""
        return 1.0 - self.all_right(count) - Belief(self.wrong, self.right).all_right(count)

    def all_right(self, count: int) -> float:
        """E[p^n] = B(a + n, b) / B(a, b)."""
        found = 1.0
        for drawn in range(count):
            found *= (self.right + drawn) / (self.right + self.wrong + drawn)
        return found

    def after(self, right: float, wrong: float) -> Belief:
        return Belief(self.right + right, self.wrong + wrong)


@dataclass(slots=True)
class _Moments:
    """Discounted sums over graded groups.

    >>> moments = _Moments(); moments.add([1.0, 0.0, 0.0, 0.0]); moments.mean, moments.within
    (0.25, 0.25)
    """

    groups: float = 0.0
    mean: float = 0.0
    within: float = 0.0

    def add(self, shares: Sequence[float]) -> None:
        """A group of two or more: its mean, and its share of pairs of which one is right and the other is wrong, an
        unbiased estimate of p (1 - p)."""
        count, total, squares = len(shares), sum(shares), sum(share * share for share in shares)
        self.groups += 1.0
        self.mean += total / count
        self.within += ((count - 1) * total - total * total + squares) / (count * (count - 1))

    def belief(self, prior: Belief) -> Belief:
        """The Beta of these moments, PRIOR groups of `prior` among them."""
        weight = self.groups + PRIOR
        mean = (self.mean + PRIOR * prior.mean) / weight
        within = (self.within + PRIOR * prior.variance) / weight
        between = mean * (1.0 - mean) - within  # variance of p over the prompts
        whole = MOST if between <= 0.0 else min(max(within / between, LEAST), MOST)
        return Belief(mean * whole, (1.0 - mean) * whole)


@dataclass(slots=True)
class Beliefs:
    """All that is believed, and what a checkpoint keeps of it.

    half_life: steps after which a reward counts half. bucket: the field of a prompt's record that says how hard it is;
    empty: its shape, the question and the answer with each digit as 0.

    >>> from tandem.types import Message
    >>> Beliefs(5.0).shape(Prompt("p", (Message("user", "17 - 41 ="),), {"answer": "-24"}))
    '00 - 00 = | -00'
    """

    half_life: float
    bucket: str = ""
    all: _Moments = field(default_factory=_Moments)
    shapes: dict[str, _Moments] = field(default_factory=dict)
    prompts: dict[str, tuple[float, float]] = field(default_factory=dict)  # right, wrong

    def shape(self, prompt: Prompt) -> str:
        if self.bucket:
            return str(prompt.record.get(self.bucket, ""))
        text = f"{prompt.messages[-1].content} | {prompt.record.get('answer', '')}"
        shape = " ".join(re.sub(r"\d", "0", text).split())
        return shape if len(shape) <= SHOWN else _digest(shape)

    def of(self, prompt: Prompt) -> Belief:
        """Of a prompt's success rate now."""
        everything = self.all.belief(Belief(1.0, 1.0))
        moments = self.shapes.get(self.shape(prompt))
        right, wrong = self.prompts.get(_question(prompt), (0.0, 0.0))
        return (moments.belief(everything) if moments is not None else everything).after(right, wrong)

    def knows(self, prompt: Prompt) -> bool:
        """Whether it was asked, and not so long ago that it is forgotten."""
        return _question(prompt) in self.prompts

    def learn(self, groups: Iterable[Group], first: int) -> None:
        """A step's rewards. Moments are of each group's `first` programs, which ran whatever they earned; a prompt's
        own counts are of all of them."""
        self._fade()
        for group in groups:
            earned = shares(group)
            known = [share for share in earned if share is not None]
            right, wrong = self.prompts.get(_question(group.prompt), (0.0, 0.0))
            if known:
                found = right + sum(known), wrong + len(known) - sum(known)
                self.prompts[_question(group.prompt)] = found
            counted = [share for share in earned[:first] if share is not None]
            if len(counted) > 1:
                self.all.add(counted)
                self.shapes.setdefault(self.shape(group.prompt), _Moments()).add(counted)

    def _fade(self) -> None:
        left = 0.5 ** (1.0 / self.half_life)
        for moments in (self.all, *self.shapes.values()):
            moments.groups, moments.mean, moments.within = (
                moments.groups * left,
                moments.mean * left,
                moments.within * left,
            )
        self.shapes = {name: moments for name, moments in self.shapes.items() if moments.groups >= FORGOTTEN}
        faded = {name: (right * left, wrong * left) for name, (right, wrong) in self.prompts.items()}
        self.prompts = {name: counts for name, counts in faded.items() if sum(counts) >= FORGOTTEN}

    def state(self) -> dict[str, Any]:
        sums = {name: [one.groups, one.mean, one.within] for name, one in self.shapes.items()}
        return {"all": [self.all.groups, self.all.mean, self.all.within], "shapes": sums, "prompts": dict(self.prompts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.all = _Moments(*map(float, state["all"]))
        self.shapes = {str(name): _Moments(*map(float, sums)) for name, sums in state["shapes"].items()}
        self.prompts = {str(name): (float(counts[0]), float(counts[1])) for name, counts in state["prompts"].items()}


def shares(group: Group) -> list[float | None]:
    """What each program of a group earned, from 0 to 1; None where it failed."""
    firsts = [program[0] for program in group.programs]
    return [None if one.failure is not None else min(max(float(one.reward), 0.0), 1.0) for one in firsts]


def _question(prompt: Prompt) -> str:
    """The same wherever a task asks the same."""
    return _digest("\n".join(message.content for message in prompt.messages))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
