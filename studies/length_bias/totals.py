"""Running totals of 2 to 52 digits: answers of 9 to 350 bytes, of which each step can go wrong."""

from __future__ import annotations

import random
import string

from tandem.program.environment import Environment
from tandem.program.reward import last_number
from tandem.types import Message, Prompt

LONG = 27  # digits from which a list is of the long half
LABELS = string.ascii_letters


class Totals(Environment):
    """`a3 b9 c8 =` is answered by `a3=3 b9=12 c8=20`: the total modulo 100 of a list whose digits have names.

    A step copies a digit after its name and adds it to the total before. Nothing else is to be known, so that a small
    model learns it, and an answer is right with about p^n, n its steps. Held-out lists are of the long half, so that
    the held-out accuracy is that of long answers.
    """

    def __init__(self, most: int = 52) -> None:
        self.most = most

    def prompt(self, split: str, index: int) -> Prompt:
        draws = random.Random(f"{split}/{index}")
        least = min(LONG, self.most) if split == "heldout" else 2
        digits = [draws.randrange(10) for _ in range(draws.randint(least, self.most))]
        asked = " ".join(f"{label}{digit}" for label, digit in zip(LABELS, digits, strict=False))
        record = {"answer": str(sum(digits) % 100), "digits": digits}
        return Prompt(f"Totals/{split}/{index}", (Message("user", f"{asked} ="),), record)

    def solution(self, prompt: Prompt) -> str:
        total, steps = 0, []
        for label, digit in zip(LABELS, prompt.record["digits"], strict=False):
            total = (total + digit) % 100
            steps.append(f"{label}{digit}={total}")
        return " ".join(steps)

    def reward(self, prompt: Prompt, text: str) -> float:
        return last_number(prompt, text.rpartition("=")[2])
