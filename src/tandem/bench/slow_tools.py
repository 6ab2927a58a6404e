"""Tools that sleep: that of `bench agents` answers after 10 to 500 ms, those of `bench ahead` after 0.2 to 5 s."""

from __future__ import annotations

import asyncio
import functools
import math
import random
import statistics

from tandem.program.environment import Environment, Episode, Step
from tandem.program.tasks.calculator import Calculator, WithCalculator
from tandem.types import Message, Prompt

LEAST_S, MOST_S, MEDIAN_S = 0.01, 0.5, 0.04
LONG_S = (0.2, 5.0, 0.8)  # least, most, median
SIGMA = 1.2


def wait_s(program: str, turn: int) -> float:
    """Heavy-tailed: log-normal with sigma 1.2 around MEDIAN_S, cut off at LEAST_S and MOST_S; mean 78 ms.

    >>> round(sum(wait_s("p", turn) for turn in range(2000)) / 2000, 2)
    0.08
    """
    drawn = random.Random(f"{program}/{turn}").lognormvariate(math.log(MEDIAN_S), SIGMA)
    return min(max(drawn, LEAST_S), MOST_S)


def long_wait_s(rng: random.Random) -> float:
    """Heavy-tailed as well, 0.2 to 5 s; mean 1.4 s.

    >>> rng = random.Random(0)
    >>> round(sum(long_wait_s(rng) for _ in range(4000)) / 4000, 1)
    1.4
    """
    least_s, most_s, median_s = LONG_S
    return min(max(rng.lognormvariate(math.log(median_s), SIGMA), least_s), most_s)


@functools.cache
def longest_wait_s(programs: int, waits: int = 1) -> float:
    """The mean of the longest of so many programs' waits, where each waits so often; of 1,000 draws.

    >>> round(longest_wait_s(8), 1), round(longest_wait_s(64), 1)
    (3.8, 5.0)
    """
    rng = random.Random(0)
    drawn = (max(sum(long_wait_s(rng) for _ in range(waits)) for _ in range(programs)) for _ in range(1000))
    return statistics.fmean(drawn)


class Waits(Episode):
    """Answers every turn."""

    async def observe(self, turns: tuple[Message, ...]) -> list[Message]:
        await asyncio.sleep(wait_s(self.prompt.id, len(turns)))
        return [Message("user", f"The tool says {len(turns) * 7919 % 1000}. What follows? Explain the next step.")]

    def score(self, turns: tuple[Message, ...]) -> float:
        return float(len(turns))


class SlowTools(Environment):
    """One program a prompt."""

    episodes = Waits

    def prompt(self, split: str, index: int) -> Prompt:
        text = f"What is {index * 7 % 97} + {index * 13 % 89}, and why? Use the tool before you answer, step by step."
        return Prompt(f"{split}/{index}", (Message("user", f"Problem {split} {index}. {text}"),))


class _Sleeps:
    """Each answer of an episode comes after a wait of its own, where the task has waits."""

    waits = True

    async def sleep(self) -> None:
        if self.waits:
            await asyncio.sleep(long_wait_s(random.Random()))


class Calculating(_Sleeps, WithCalculator):
    """A calculator that takes its time."""

    async def respond(self, message: Message) -> Step:
        step = await super().respond(message)
        if step.messages is not None:
            await self.sleep()
        return step


class Digits(_Sleeps, Episode):
    """Hears the same once, whatever it says; pays for digits in what it says then."""

    async def observe(self, turns: tuple[Message, ...]) -> list[Message] | None:
        if len(turns) > 1:
            return None
        await self.sleep()
        return [Message("user", "again")]

    def score(self, turns: tuple[Message, ...]) -> float:
        said = [message.content for message in turns if message.sampled][-1]
        return min(1.0, sum(map(str.isdigit, said)) / DIGITS)


DIGITS = 6  # of full marks


class SlowCalculator(Calculator):
    """The calculator's questions; `waits=false` for the same without a wait."""

    episodes = Calculating

    def __init__(self, waits: bool = True, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.waits = waits

    def episode(self, prompt: Prompt) -> Calculating:
        episode = Calculating(prompt)
        episode.waits = self.waits
        return episode


class SlowDigits(Environment):
    """What a model of random weights learns in a few steps: to say digits."""

    episodes = Digits

    def __init__(self, waits: bool = True) -> None:
        self.waits = waits

    def prompt(self, split: str, index: int) -> Prompt:
        return Prompt(f"{split}/{index}", (Message("user", f"{split[0]}{index}"),))

    def episode(self, prompt: Prompt) -> Digits:
        episode = Digits(prompt)
        episode.waits = self.waits
        return episode
