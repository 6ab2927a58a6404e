"""Rewards as plain functions of a prompt and the text that the model wrote: (Prompt, str) -> float.

The gold answer is `prompt.record["answer"]`. A reward raises ValueError where the gold answer is of no use to it:
that is a fault of the task and must not look like a wrong answer. docs/rewards.md has the tables of what is read how.
"""

from __future__ import annotations

import collections
import logging
import re
import textwrap
import unicodedata
from collections.abc import Callable, Mapping
from decimal import Decimal

from tandem.types import Prompt

Reward = Callable[[Prompt, str], float]

_FENCE = re.compile(
    r"^[ \t]*```[ \t]*(?:(?:python3?|py)\b[^\n]*)?\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL | re.IGNORECASE
)
_BRACE = re.compile(r"\\boxed\{|\{|\}")
_ONE_SIGN = str.maketrans(dict.fromkeys("\u2212\u2013", "-") | dict.fromkeys("\t\u00a0\u2007\u2009\u202f", " "))
_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹"

# A run of digits with what stands between them, of any script: a candidate, which `_WRITTEN` takes or refuses.
_RUN = re.compile(
    r"(?:[\d\u00bc-\u00be\u2150-\u215e]|(?<![^\W\d_])(?<!\.)\.(?=\d)|(?<=\d)[,\u066b\u066c](?=\d))+"
    r"(?:[eE][-+]?\d{1,3}(?!\w))?"
)
_WRITTEN = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?"
_ALONE = re.compile(rf"(?P<minus>-)? ?\+?\\?[$€£]?(?P<inner>-)?(?P<digits>{_WRITTEN}) ?\\?[%$]?\.?")
_CURRENCY = re.compile(r"(?:\\?\$|[€£])$")
_LOOK = 48  # characters before a number that are looked at
# What joins a number to what stands before it: 3/4, 2^3, 10-8, 2 x 3, 10:30, 1'000, 0x1F, 3e1000, \frac{1}{2}, \sqrt2.
_JOINED = re.compile(
    r"(?:(?:[/^√×÷·∕⁄±∓]|\+/-) *[({]?|[\d)\]}%²³¼½¾] *(?:[-+xX]|\*{1,2}) *\(?|\d(?:[:'’_~]|\.\.|[eE][-+]?)|[}\]^_]\{"
    r"|sqrt\(|\b0[xXoObB][\da-fA-F]*"
    r"|\\(?:[dtc]?frac|sqrt|[dt]?binom|times|cdot|div|pm|mp|over|log|ln|exp) *[{(]?"
    r"|\\(?!boxed|fbox|text|math)[a-zA-Z]+\{)$"
)
_HEX = re.compile(r"0[xX][\da-fA-F]")
_SPACED = re.compile(r"\d +$")
_OF_A_UNIT = re.compile(r"(?<![^\W\d_])(?:[cdkm]?m|in|ft|yd|mi|s|units?)\}?\^\{?$")
_FOLLOWED = re.compile(rf" ?\^|[{_RAISED}]| ?[π√]| ?\\(?:pi|sqrt|[dtc]?frac)\b")
_MINUS = re.compile(r"(?:(?<!\w)-|(?:^|[=(\[{<>,:≈$]) *- +)$")

# For math-verify.
_WRAPPED = re.compile(r"(?:\$\$?|\\\(|\\\[|\*\*)(?P<inside>[^*]*?)(?:\$\$?|\\\)|\\\]|\*\*)", re.DOTALL)
_WORDING = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\{([^{}]*)\}")
_SIGNS = str.maketrans({"×": "\\times ", "÷": "\\div ", "π": "\\pi ", "∞": "\\infty ", "°": "^\\circ "})
_GROUPED = re.compile(r"(?<![\d.,])(?:\d{1,3}(?:(?: |,?\\[,;:! ]|\{,\})\d{3})+|\d{1,2}(?:,\d\d)+,\d{3})(?![\d,]*\d)")
_MIXED, _MIXED_TEX = re.compile(r"(?<![\d./^{])(\d+) +(\d+)/(\d+)(?![\d/])"), r"\1\\frac{\2}{\3}"
_POWER, _POWER_TEX = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]\+?(-?\d{1,3})(?![\w.]*\w)"), r"\1\\times 10^{\2}"
_RATIO = re.compile(r"(?<![\d:])\d+:\d+(?![\d:])")
_NOT_FINITE = re.compile(r"(?i)[-+]?(?:nan|inf|infinity)")
_SENTENCE = re.compile(r"(?<![\\a-zA-Z])[^\W\d_]{2,}")


def last_number_in(text: str) -> Decimal | None:
    """The last number of `text`, with or without sign, currency, thousands commas, decimals and exponent; None where
    there is none, or where the last digits are a part of something else: 1/2, 10:30, 2^3, 3-5, 1 000.

    >>> last_number_in("3 apples at $1,234.50."), last_number_in("half of 3 is 3/2")
    (Decimal('1234.50'), None)
    """
    text = text.translate(_ONE_SIGN).replace("{,}", ",").replace("\\,", " ")
    found = collections.deque(_RUN.finditer(text), maxlen=2)
    if len(found) == 2 and _OF_A_UNIT.search(text, max(0, found[1].start() - _LOOK), found[1].start()):
        found.pop()  # 25 cm^2 is 25
    if not found or not re.fullmatch(_WRITTEN, found[-1].group()):
        return None
    start, end = found[-1].span()
    before, after = text[max(0, start - _LOOK) : start], text[end : end + 8]
    bare = _CURRENCY.sub("", before)
    joined = _JOINED.search(bare)
    bold = joined is not None and bare.endswith("*") and after.startswith("*")
    if (
        (joined and not bold)
        or (bare == before and _SPACED.search(before))
        or _FOLLOWED.match(after)
        or _HEX.match(text, start)
    ):
        return None
    number = Decimal(found[-1].group().replace(",", ""))
    return -number if _MINUS.search(bare) or _MINUS.search(before) else number


def one_number(answer: str) -> Decimal | None:
    """The number that `answer` is, or None where it is anything else or anything more.

    >>> one_number("$1,234.50"), one_number("1/2"), one_number("12 apples")
    (Decimal('1234.50'), None, None)
    """
    alone = _ALONE.fullmatch(answer.translate(_ONE_SIGN).strip())
    if alone is None:
        return None
    number = Decimal(alone["digits"].replace(",", ""))
    return -number if alone["minus"] or alone["inner"] else number


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


def extract_code(text: str, name: str = "") -> str:
    """The Python that `text` answers with: its last fenced block that defines `name` (or, without one, anything), else
    its first block; without a block the whole text.

    >>> extract_code("So:\\n```python\\ndef f(): return 1\\n```\\nand then\\n```\\nf()\\n```")
    'def f(): return 1\\n'
    """
    named = re.escape(name) or r"\w+"
    defines = re.compile(rf"^(?:(?:async[ \t]+)?def|class)[ \t]+{named}\b|^{named}[ \t]*=[^=]", re.MULTILINE)
    text = text.replace("\r\n", "\n")
    blocks = [textwrap.dedent(block) for block in _FENCE.findall(text)]
    return next((block for block in reversed(blocks) if defines.search(block)), blocks[0] if blocks else text)


def last_number(prompt: Prompt, text: str) -> float:
    """1.0 where the last number in the text equals the gold one ("12.0" is "12"), else 0.0."""
    gold = one_number(gold_answer(prompt))
    if gold is None:
        raise ValueError(refusal("last_number", prompt))
    return float(last_number_in(text) == gold)


def exact(prompt: Prompt, text: str) -> float:
    """1.0 where the marked answer, or the whole text, is the gold answer letter for letter, else 0.0."""
    return float(extract_answer(text) == gold_answer(prompt))


def math_verify(prompt: Prompt, text: str) -> float:
    """1.0 where the package math-verify finds the text's answer equal to the gold one, else 0.0.

    Both are respelt first, see `respelt`; the marked answer alone is looked at where there is one, and two words are
    compared as words. The package's own time limits are signals, which work only in a main thread: they are switched
    off here, and the caller's deadline (tandem.program.pool) stands in for them.
    """
    import math_verify as package  # imports sympy, 0.3 s: only where it is asked for

    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    marked = extract_answer(text)
    gold_text, answer = respelt(gold_answer(prompt)), respelt(marked)
    if answer == gold_text:
        return 1.0
    if _is_words(gold_text) and _is_words(answer):
        return float(gold_text.casefold() == answer.casefold())
    gold = package.parse(f"\\boxed{{{gold_text}}}", parsing_timeout=None)
    if not gold:
        raise ValueError(f"math-verify cannot read the answer {clipped(gold_text)} of prompt {prompt.id}")
    in_box = "\\boxed" in text or not _SENTENCE.search(answer)
    said = f"\\boxed{{{answer}}}" if in_box else respelt(marked, in_words=True)
    return float(package.verify(gold, package.parse(said, parsing_timeout=None), timeout_seconds=None))


def respelt(answer: str, in_words: bool = False) -> str:
    r"""`answer` in spellings that math-verify 0.9.0 reads as people do; `in_words`: they stand in a sentence.

    >>> respelt("$2 1/2$."), respelt("\u2212 1 000"), respelt("1.5e-3"), respelt("3\u00b2")
    ('2\\frac{1}{2}', '-1000', '1.5\\times 10^{-3}', '3^{2}')
    """
    text = answer.translate(_ONE_SIGN).strip()
    if not in_words:
        for _ in range(2):  # **$3$**
            wrapped = _WRAPPED.fullmatch(text.rstrip(" .,;:\\"))
            text = wrapped["inside"].strip() if wrapped else text.rstrip(" .,;:\\")
        text = re.sub(r"^- +(?=[\d\\.(])", "-", _WORDING.sub(r"\1", text))
    text = re.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0])), text).translate(_SIGNS)
    text = re.sub(f"[{_RAISED}]+", lambda raised: f"^{{{unicodedata.normalize('NFKC', raised[0])}}}", text)
    text = re.sub(r" ?([\u00bc-\u00be\u2150-\u215e])", _vulgar, text)
    text = _GROUPED.sub(lambda number: re.sub(r"\D", "", number[0]), text)
    if not in_words:
        return _POWER.sub(_POWER_TEX, _MIXED.sub(_MIXED_TEX, text))
    # Brackets of their own, so that they are read at all; not where a formula may stand around them.
    left, right = ("", "") if re.search(r"\$|\\[(\[]", text) else (r"\\(", r"\\)")
    for pattern, tex in ((_MIXED, _MIXED_TEX), (_POWER, _POWER_TEX), (_RATIO, r"\g<0>")):
        text = pattern.sub(left + tex + right, text)
    return re.sub(r"(?<=[=:(]) *- +(?=\d)", " -", text)


REWARDS: Mapping[str, Reward] = {"last_number": last_number, "exact": exact, "math_verify": math_verify}

# Linear in the text, so they run where they are called; the others run in a process that can be killed.
INLINE = frozenset({"last_number", "exact"})


def gold_answer(prompt: Prompt) -> str:
    """The answer in the prompt's record; ValueError where it has none."""
    if "answer" not in prompt.record:
        raise ValueError(f"prompt {prompt.id} has no 'answer' in its record")
    return extract_answer(str(prompt.record["answer"]))


def refusal(reward: str, prompt: Prompt) -> str:
    """Why `reward` can never pay for the prompt's answer, as far as its text says; empty where it may."""
    if reward not in REWARDS:
        return ""
    try:
        answer = gold_answer(prompt)
    except ValueError as error:
        return f"{error}; task.reward={reward} needs one."
    if reward == "last_number" and one_number(answer) is None:
        return (
            f"the answer {clipped(answer)} of prompt {prompt.id} is not one number, which task.reward=last_number "
            "needs. Write it as one, or use math_verify or exact."
        )
    if reward == "math_verify" and _NOT_FINITE.fullmatch(answer):
        return f"the answer {clipped(answer)} of prompt {prompt.id} is no finite number. Mend it, or use exact."
    return ""


def clipped(value: object) -> str:
    """`repr(value)` in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_words(text: str) -> bool:
    return re.fullmatch(r"[^\W\d_]{2,}(?:[ '-]+[^\W\d_]+)*|[^\W\d_]+(?:[ '-]+[^\W\d_]+)+", text) is not None


def _vulgar(found: re.Match[str]) -> str:
    over, under = unicodedata.normalize("NFKC", found[1]).split("\u2044")
    return f"\\frac{{{over}}}{{{under}}}"


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
