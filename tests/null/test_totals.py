"""Regression caught: a study's task whose worked answer is not what its reward pays for."""

from __future__ import annotations

import re

from tandem.studies.length_bias.totals import LONG, Totals


def test_worked_answers_are_right_and_as_long_as_said() -> None:
    """A total that is off by a term or not modulo 100, answers longer than the page says, short lists held out."""
    totals = Totals()
    lengths = []
    for split, least in (("train", 2), ("heldout", LONG)):
        for index in range(200):
            prompt = totals.prompt(split, index)
            digits = [int(digit) for digit in re.findall(r"[a-zA-Z](\d)", prompt.messages[0].content)]
            answer = totals.solution(prompt)
            assert least <= len(digits) <= 52 and answer.endswith(f"={sum(digits) % 100}")
            assert totals.reward(prompt, answer) == 1.0 and totals.reward(prompt, f"{answer} z1=0x") == 0.0
            lengths.append(len(answer))
    assert 9 <= min(lengths) and max(lengths) <= 350
    assert totals.solution(totals.prompt("train", 0)) == totals.solution(Totals().prompt("train", 0))
