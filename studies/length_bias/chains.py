"""Sums of 2 to 15 digits and their steps: reasoning-gym's chain_sum, which grow with the square of the terms."""

from __future__ import annotations

from typing import Any

from tandem.program.config import TaskConfig
from tandem.program.environment import Environment
from tandem.program.prompts import ReasoningGym
from tandem.program.reward import last_number
from tandem.types import Prompt

LONG = 9  # terms from which a sum is of the long half


class Chains(Environment):
    """`2 + 7 - 5 =` is answered by `2 + 7 - 5 = 9 - 5 = 4`: 8 to 512 bytes, each step one that can go wrong.

    Held-out sums are of the long half, so that the held-out accuracy is that of long answers.
    """

    def __init__(self, most_terms: int = 15) -> None:
        def sums(least_terms: int) -> ReasoningGym:
            parameters: tuple[tuple[str, Any], ...] = (("min_terms", least_terms), ("max_terms", most_terms))
            parameters += (("min_digits", 1), ("max_digits", 1))
            return ReasoningGym(TaskConfig(name="chain_sum", parameters=parameters, template="{expression} ="))

        self.every, self.long = sums(2), sums(min(LONG, most_terms))

    def of(self, split: str) -> ReasoningGym:
        return self.long if split == "heldout" else self.every

    def prompt(self, split: str, index: int) -> Prompt:
        return self.of(split).prompt(split, index)

    def solution(self, prompt: Prompt) -> str:
        return self.of(prompt.record["split"]).solution(prompt)

    def reward(self, prompt: Prompt, text: str) -> float:
        return last_number(prompt, text)
