"""The environment of `bench agents`: a tool that answers after 10 to 500 ms, whatever was said."""

from __future__ import annotations

import asyncio
import math
import random

from tandem.program.environment import Environment, Episode
from tandem.types import Message, Prompt

LEAST_S, MOST_S, MEDIAN_S = 0.01, 0.5, 0.04


def wait_s(program: str, turn: int) -> float:
    """Heavy-tailed: log-normal with sigma 1.2 around MEDIAN_S, cut off at LEAST_S and MOST_S; mean 78 ms.

    >>> round(sum(wait_s("p", turn) for turn in range(2000)) / 2000, 2)
    0.08
    """
    drawn = random.Random(f"{program}/{turn}").lognormvariate(math.log(MEDIAN_S), 1.2)
    return min(max(drawn, LEAST_S), MOST_S)


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
