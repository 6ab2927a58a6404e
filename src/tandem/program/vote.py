"""What a text answers, for a vote of several texts that answer one prompt."""

from __future__ import annotations

from decimal import Decimal

from tandem.program.reward import extract_answer, last_number_in, one_number, respelt
from tandem.types import Prompt


def vote(prompt: Prompt, text: str) -> str | None:
    """The answer of `text`, spelt so that equal answers are equal; None where it has none, or the prompt no gold one.

    Where the gold answer is a number, it is the number that is marked, or the last one, however it is written. Else it
    is what is marked, or the whole text, without white space and in one spelling of signs and fractions; two formulas
    of one value are two answers.

    >>> sum_ = Prompt("p", (), {"answer": "12"})
    >>> vote(sum_, "so \\\\boxed{12.0} it is"), vote(sum_, "It is 1,200."), vote(sum_, "Twelve.")
    ('12', '1200', None)
    """
    if "answer" not in prompt.record:
        return None
    marked = extract_answer(text)
    if one_number(extract_answer(str(prompt.record["answer"]))) is None:
        return "".join(respelt(marked).split()) or None
    number = one_number(marked)
    if number is None:
        number = last_number_in(marked)
    return None if number is None else _plain(number)


def _plain(number: Decimal) -> str:
    """
    >>> _plain(Decimal("-0.0")), _plain(Decimal("1.50")), _plain(Decimal("1E+3"))
    ('0', '1.5', '1000')
    """
    text = f"{number:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text
