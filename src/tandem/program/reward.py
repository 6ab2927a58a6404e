"""Rewards as plain functions of a prompt and the text that the model wrote: (Prompt, str) -> float.

The gold answer is `prompt.record["answer"]`. A reward raises ValueError where the gold answer is of no use to it:
that is a fault of the task and must not look like a wrong answer.
"""

from __future__ import annotations

import collections
import logging
import re
from collections.abc import Callable, Mapping
from decimal import Decimal

from tandem.types import Prompt

Reward = Callable[[Prompt, str], float]

# A minus directly after a word, digit or bracket is an operator: "10-8" ends in 8, "= -8" in -8.
_NUMBER = re.compile(r"(?P<sign>(?<![\w)])[-+])?\$?(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")
_BRACE = re.compile(r"\\boxed\{|\{|\}")
_MINUS_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u00a0": " "})


def last_number_in(text: str) -> Decimal | None:
    """The last number written in `text`, with or without sign, dollar sign, thousands commas and decimals.

    >>> last_number_in("3 apples at $1,234.50.")
    Decimal('1234.50')
    """
    found = collections.deque(_NUMBER.finditer(text.translate(_MINUS_SIGNS)), maxlen=1)
    if not found:
        return None
    last = found[0]
    number = Decimal(last["digits"].replace(",", ""))
    return -number if last["sign"] == "-" else number


def extract_answer(text: str) -> str:
    """What `text` marks as its answer: the last <answer>...</answer>, the last \\boxed{...}, what follows the last
    "####" on its line, or else the whole text; stripped.

    >>> extract_answer("so \\\\boxed{\\\\frac{1}{2}} it is")
    '\\\\frac{1}{2}'
    """
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return text[start + len("<answer>") : end].strip()
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    if "####" in text:
        after = text.rsplit("####", 1)[1].strip()
        return after.splitlines()[0].strip() if after else ""
    return text.strip()


def last_number(prompt: Prompt, text: str) -> float:
    """1.0 where the last number in the text equals the gold one ("12.0" is "12"), else 0.0."""
    gold = last_number_in(_gold(prompt))
    if gold is None:
        raise ValueError(f"the answer {_gold(prompt)!r} of prompt {prompt.id} holds no number; use task.reward=exact")
    return float(last_number_in(text) == gold)


def exact(prompt: Prompt, text: str) -> float:
    """1.0 where the marked answer, or the whole text, is the gold answer letter for letter, else 0.0."""
    return float(extract_answer(text) == _gold(prompt))


def math_verify(prompt: Prompt, text: str) -> float:
    """1.0 where the package math-verify finds the text's answer equal to the gold one, else 0.0.

    The package's own time limits are signals, which work only in a main thread: they are switched off here, and the
    caller's deadline (tandem.program.guard) stands in for them.
    """
    import math_verify as package  # imports sympy, 0.3 s: only where it is asked for

    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    gold_text = _gold(prompt)
    gold = package.parse(f"\\boxed{{{gold_text}}}", parsing_timeout=None)
    if not gold:
        raise ValueError(f"math-verify cannot read the answer {gold_text!r} of prompt {prompt.id}")
    return float(package.verify(gold, package.parse(text, parsing_timeout=None), timeout_seconds=None))


REWARDS: Mapping[str, Reward] = {"last_number": last_number, "exact": exact, "math_verify": math_verify}

# Linear in the text, so they run where they are called; the others run in a process that can be killed.
INLINE = frozenset({"last_number", "exact"})


def _gold(prompt: Prompt) -> str:
    if "answer" not in prompt.record:
        raise ValueError(f"prompt {prompt.id} has no 'answer' in its record")
    return extract_answer(str(prompt.record["answer"]))


def _last_boxed(text: str) -> str | None:
    """What the complete \\boxed{...} that begins last holds, braces balanced."""
    begun: list[int | None] = []  # where each open brace's content begins; None for a brace that is not a box
    best = None
    for brace in _BRACE.finditer(text):
        if brace.group() != "}":
            begun.append(brace.end() if brace.group() != "{" else None)
        elif begun:
            start = begun.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, brace.start())
    return None if best is None else text[best[0] : best[1]]
