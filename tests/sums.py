"""The run of recipes/tiny_arithmetic.py on sums that are drawn here: importing reasoning-gym takes a second of each
process that holds its task. Those who look at that data set itself take the recipe's own."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from tandem.program.config import TaskConfig
from tandem.program.environment import Environment
from tandem.program.worked import chain_steps
from tandem.types import Message, Prompt

if TYPE_CHECKING:
    from tandem.run.config import RunConfig


class Sums(Environment):
    """Two or three terms of one or two digits, as reasoning-gym's chain_sum."""

    def prompt(self, split: str, index: int) -> Prompt:
        drawn = random.Random(f"{split} {index}")
        terms = [str(drawn.randint(1, 99))]
        for _ in range(drawn.randint(1, 2)):
            terms += [drawn.choice("+-"), str(drawn.randint(1, 99))]
        expression = " ".join(terms)
        record = {"expression": expression, "answer": str(eval(expression))}
        return Prompt(f"{split}/{index}", (Message("user", f"{expression} ="),), record)

    def solution(self, prompt: Prompt) -> str:
        return chain_steps({"metadata": prompt.record, "answer": prompt.record["answer"]})

    def reward(self, prompt: Prompt, text: str) -> float:
        return float(text.strip() == prompt.record["answer"])


def tiny_arithmetic() -> RunConfig:
    """The recipe's run, of these sums."""
    from tandem.recipes.tiny_arithmetic import tiny_arithmetic as recipe  # the class's process needs none of it

    return replace(recipe(), task=TaskConfig("tests.sums:Sums", reward="last_number", heldout_size=256))
