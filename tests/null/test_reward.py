"""Wrong numbers taken for right ones, or right ones for wrong, because of how they were written."""

from __future__ import annotations

import re
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.program.config import REWARD_NAMES
from tandem.program.reward import (
    INLINE,
    REWARDS,
    exact,
    extract_answer,
    last_number,
    last_number_in,
    math_verify,
    one_number,
    refusal,
)
from tandem.types import Prompt


def asked(answer: object) -> Prompt:
    return Prompt("p", (), {"answer": answer})


NUMBERS = {  # what a text is read as; docs/rewards.md has the same table
    "1/2": None, "6/2": None, "\\frac{1}{2}": None, "\\frac12": None, "\u00bd": None, "2\u00bd": None, "2 1/2": None,
    "10:30": None, "2024-01-02": None, "1/2/2024": None,
    "3^2": None, "3\u00b2": None, "2**3": None, "x^{2}": None, "5^x": None, "\\sqrt{2}": None, "3\u03c0": None,
    "3-5": None, "3\u20135": None, "(4)-3": None, "10-8": None, "10 - 8": None, "3 + 4": None, "3 * 4": None,
    "1 000": None, "1\u202f000": None, "3 4": None, "1,00,000": None, "1,2345": None, "(1,2)": None,
    "1.234,56": None, "0,5": None, "192.168.0.1": None, "\u0663\u066b\u0665": None, "3e1000": None,
    "2 x 3": None, "5x10": None, "5 X 10": None, "5 \u00b1 1": None, "5 +/- 1": None, "\u00b15": None, "5~10": None,
    "5..10": None, "1'000": None, "1\u2019000": None, "1_000": None, "0x1F": None, "0xFF": None, "0xA1E5": None,
    "0b101": None, "5'3": None,
    "No.5": "5", "p.12": "12", "2 x 3 = 6": "6", "0x1F = 31": "31", "5 ft 3 in": "3", "max 5": "5", "x 5": "5",
    "nan": None, "inf": None, "none": None, "": None,
    "1e5": "100000", "1.5e-3": "0.0015", "1{,}000": "1000", "1,234,567.25 in all": "1234567.25", ".5": "0.5",
    "007": "7", "12.0": "12", "\u0663": "3", "50%": "50", "5.": "5", "5!": "5", "The answer is 1,234.": "1234",
    "$5": "5", "5$": "5", "$5$": "5", "\u20ac5": "5", "it costs $12.": "12", "-$3.50": "-3.5", "$-3.50": "-3.5",
    "-5": "-5", "\u22127": "-7", "- 3": "-3", "= - 3": "-3", "+8": "8", "10 - 12 = -2": "-2", "$-3$": "-3",
    "The answer - 3": "3", "so:\n- 3": "3", "GPT-4": "4", "x2": "2", "2x": "2", "12cm": "12", "5 million": "5",
    "3, 4": "4", "3 or 4": "4", "Step 3: 4": "4", "25 cm^2": "25", "25 m\u00b2": "25", "**4**": "4", "2 **4**": "4",
    "\\boxed{4}": "4", "\\text{so } 4": "4",
}  # fmt: skip


@pytest.mark.parametrize(("text", "number"), NUMBERS.items())
def test_last_number_in(text: str, number: str | None) -> None:
    """The end of a fraction, time, power, range, date or grouping passes for a number, or a number is read otherwise
    than people write it."""
    assert last_number_in(text) == (None if number is None else Decimal(number))
    assert last_number_in(f"first 7, then\n{text}") == (
        Decimal(3)
        if text == "- 3"
        else None
        if number is None and re.search(r"\d|\u00bd", text)
        else Decimal(number or 7)
    )


@pytest.mark.parametrize("answer", [text for text, number in NUMBERS.items() if number is None] + [
    "12 apples", "12cm", "5 million", "The answer is 4", "3, 4", "3 or 4", "x2", "GPT-4", "25 cm^2", "NaN", "Infinity",
])  # fmt: skip
def test_answer_that_is_not_one_number(answer: str) -> None:
    """A reward of 1.0 for "2" where the answer is 1/2: the last digits of an answer pass for all of it."""
    assert one_number(answer) is None
    with pytest.raises(ValueError, match="is not one number"):
        last_number(asked(answer), "2")


@pytest.mark.parametrize("answer", ["5", "-5", "\u22125", "- 5", "$5", "-$5", "5%", "5.", "1,234", "1e5", ".5", "$5$"])
def test_answer_that_is_one_number(answer: str) -> None:
    """An answer of one number is refused, or differs from the same text of a model."""
    assert one_number(answer) == last_number_in(answer) != None  # noqa: E711 - of both at once
    assert last_number(asked(answer), f"It is\n= {answer}") == 1.0


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
    with pytest.raises(ValueError, match="is not one number"):
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


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below `heading` of docs/rewards.md."""
    section = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8").split(heading)[1]
    lines = re.search(r"^\|---.*\n((?:\|.*\n)+)", section, re.MULTILINE)
    assert lines
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[1].splitlines()]


def test_docs_of_last_number() -> None:
    """The page tells people that a text is read otherwise than it is."""
    for value, texts in rows("task.reward=last_number"):
        for text in re.findall(r"`(.*?)`", texts):
            number = None if value.startswith("–") else Decimal(value)
            assert last_number_in(text) == number, text
            assert number is not None or one_number(text) is None, text


def test_docs_of_math_verify() -> None:
    """The page, or tandem's respelling, no longer fits what math-verify makes of an answer's form."""
    package = pytest.importorskip("math_verify", reason="math-verify is not installed")
    assert f"math-verify {version('math-verify')} " in (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    table = rows("task.reward=math_verify")
    assert len(table) >= 30
    for gold, reply, alone, here in table:
        answer, text = gold.strip("`"), reply.strip("`")
        sides = [package.parse(side, parsing_timeout=None) for side in (f"\\boxed{{{answer}}}", text)]
        assert package.verify(*sides, timeout_seconds=None) == bool(int(alone)), (answer, text)
        assert math_verify(asked(answer), text) == float(here), (answer, text)


@pytest.mark.parametrize("answer", ["nan", "-inf", "Infinity"])
def test_answer_that_is_not_finite(answer: str) -> None:
    """NaN or infinity passes for the answer of a numeric reward."""
    assert "no finite number" in refusal("math_verify", asked(answer))
    assert "not one number" in refusal("last_number", asked(answer))
    assert refusal("exact", asked(answer)) == "" == refusal("score", asked(answer))


def test_inline_rewards_are_linear() -> None:
    """A text made to be slow to read (64 KB) holds up a reward without a deadline: re-reading takes minutes."""
    for piece in (
        "\\boxed{",
        "<answer>",
        "1,111",
        "1,111,",
        "1.1",
        "1e",
        "1-",
        "1 ",
        "1/",
        "cm^2",
        " ",
        "{",
        "}",
        "-",
        "####",
        "$",
    ):
        for name in INLINE:
            assert REWARDS[name](asked("3"), piece * (65536 // len(piece))) == 0.0, piece


def test_config_knows_every_reward() -> None:
    """A reward is in the registry but the config refuses it, or the other way round."""
    assert set(REWARD_NAMES) == {"score", *REWARDS}
    assert set(REWARDS) >= INLINE
