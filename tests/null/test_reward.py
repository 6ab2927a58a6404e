"""Wrong numbers taken for right ones, or right ones for wrong, because of how they were written."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.program.config import REWARD_NAMES
from tandem.program.reward import INLINE, REWARDS, exact, extract_answer, last_number, last_number_in, math_verify
from tandem.types import Prompt


def asked(answer: object) -> Prompt:
    return Prompt("p", (), {"answer": answer})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 1,234.", "1234"),
        ("-5", "-5"),
        ("it costs $12.", "12"),
        ("-$3.50", "-3.5"),
        ("$-3.50", "-3.5"),
        ("10-8", "8"),
        ("10 - 12 = -2", "-2"),
        ("(4)-3", "3"),
        ("\u22127", "-7"),
        ("3, 4", "4"),
        ("1,2345", "2345"),
        (".5", "0.5"),
        ("+8", "8"),
        ("007", "7"),
        ("50%", "50"),
        ("12.0", "12"),
        ("1,234,567.25 in all", "1234567.25"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number_in(text: str, number: str | None) -> None:
    """A sign, a comma, a currency or a full stop is read as part of the number, or not, against how people write."""
    assert last_number_in(text) == (None if number is None else Decimal(number))


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{}.", "so {} it is", "{}.0", "= {:,}", "\\boxed{{{}}}"]))
def test_last_number_reads_what_was_written(value: int, form: str) -> None:
    """A number stops being found in one of its usual spellings."""
    assert last_number(asked(str(value)), "first 3, then " + form.format(value)) == 1.0
    assert last_number(asked(str(value + 1)), "first 3, then " + form.format(value)) == 0.0


def test_last_number_edges() -> None:
    """A text without a number counts as right, or a gold answer without one as a wrong answer of the model."""
    assert last_number(asked("3"), "I do not know") == 0.0
    assert last_number(asked(42), "42") == 1.0
    assert last_number(asked("#### 1,000"), "1000") == 1.0
    with pytest.raises(ValueError, match="holds no number"):
        last_number(asked("Paris"), "3")
    with pytest.raises(ValueError, match="no 'answer'"):
        last_number(Prompt("p", ()), "3")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a <answer> 4 </answer> b <answer>5</answer>.", "5"),
        ("<answer>4", "<answer>4"),
        ("</answer><answer>4", "</answer><answer>4"),
        ("\\boxed{1} then \\boxed{\\frac{1}{2}} ok", "\\frac{1}{2}"),
        ("\\boxed{3} and \\boxed{4", "3"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("work #### 41\n#### 42\nbye", "42"),
        ("x ####", ""),
        ("  plain ", "plain"),
    ],
)
def test_extract_answer(text: str, answer: str) -> None:
    """An earlier, unfinished or outer answer is taken for the one that the text gives."""
    assert extract_answer(text) == answer


def test_exact() -> None:
    """A right answer with other words around it passes, or a marked one does not."""
    assert exact(asked("Paris"), " Paris\n") == 1.0
    assert exact(asked("Paris"), "It is <answer>Paris</answer>, I think") == 1.0
    assert exact(asked("Paris"), "It is Paris") == 0.0


def test_math_verify() -> None:
    """Equal values in other forms count as different, or GSM8K's and LaTeX gold answers are not read."""
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    assert math_verify(asked("\\frac{1}{2}"), "so it is $0.5$") == 1.0
    assert math_verify(asked("steps #### 42"), "The answer is 42.") == 1.0
    assert math_verify(asked("42"), "#### 42") == 1.0
    assert math_verify(asked("42"), "\\boxed{43}") == 0.0
    assert math_verify(asked("\\left( 3, \\frac{\\pi}{2} \\right)"), "\\boxed{(3, \\pi/2)}") == 1.0
    assert math_verify(asked("42"), "no idea") == 0.0


def test_inline_rewards_are_linear() -> None:
    """A text made to be slow to read (64 KB) holds up a reward without a deadline: re-reading takes minutes."""
    for piece in ("\\boxed{", "<answer>", "1,111", "1,111,", "{", "}", "-", "####", "$"):
        for name in INLINE:
            assert REWARDS[name](asked("3"), piece * (65536 // len(piece))) == 0.0, piece


def test_config_knows_every_reward() -> None:
    """A reward is in the registry but the config refuses it, or the other way round."""
    assert set(REWARD_NAMES) == {"score", *REWARDS}
    assert set(REWARDS) >= INLINE
