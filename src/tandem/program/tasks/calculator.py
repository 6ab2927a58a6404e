"""Arithmetic that a small model cannot do in its head, products and sums of three terms, and a tool that can."""

from __future__ import annotations

import ast
import operator
import random
from collections.abc import Callable
from typing import Any

from tandem.program.environment import Environment, Episode, tool
from tandem.program.reward import last_number_in
from tandem.types import Message, Prompt

MOST_CHARACTERS = 200  # of an expression
MOST = 10**15  # of a number on the way
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def evaluate(expression: str) -> int | float:
    """The value of an expression of numbers, + - * / // % and brackets; ValueError for anything else.

    >>> evaluate("12 * (3 + 4)"), evaluate("print(7 / 2)"), evaluate("-3 % 5")
    (84, 3.5, 2)
    """
    text = expression.strip()
    if text.startswith("print(") and text.endswith(")"):
        text = text[len("print(") : -1]
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"the expression has {len(text)} characters; allowed are {MOST_CHARACTERS}")
    try:
        return _value(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no expression") from error


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value: int | float = node.value  # type: ignore[assignment]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    else:
        raise ValueError(f"{ast.unparse(node)!r} is not allowed: numbers, + - * / // % and brackets are")
    if abs(value) > MOST:
        raise ValueError(f"a value beyond {MOST:g}")
    return value


# Said before the question: a model of 135 M parameters makes no call from a description alone (13 in 128 programs).
EXAMPLE = (
    Message("user", "What is 23 * 5?"),
    Message("assistant", "```python\n23 * 5\n```"),
    Message("tool", "115"),
    Message("assistant", "23 * 5 = 115"),
    Message("user", "What is 14 + 230 + 8?"),
    Message("assistant", "```python\n14 + 230 + 8\n```"),
    Message("tool", "252"),
    Message("assistant", "14 + 230 + 8 = 252"),
)


class WithCalculator(Episode):
    """Pays for the last number of the final answer."""

    has_state = False

    @tool
    def python(self, code: str) -> str:
        """Evaluates an arithmetic expression, such as 17 * 25."""
        return str(evaluate(code))

    def score(self, turns: tuple[Message, ...]) -> float:
        last = turns[-1]
        found = None if last.calls or last.faults else last_number_in(last.content)
        return float(found is not None and found == self.prompt.record["answer"])


class Calculator(Environment):
    """Questions such as `What is 47 * 83?` and `What is 312 + 94 + 578?`, as often the one as the other."""

    episodes = WithCalculator

    def __init__(self, digits: int = 3, example: bool = True, seed: int = 0) -> None:
        self.digits = digits  # of a sum's terms, at most
        self.shown = EXAMPLE if example else ()
        self.seed = seed

    def prompt(self, split: str, index: int) -> Prompt:
        rng = random.Random(f"{self.seed}/{split}/{index}")
        if rng.random() < 0.5:
            a, b = rng.randrange(11, 100), rng.randrange(11, 100)
            asked, answer = f"{a} * {b}", a * b
        else:
            terms = [rng.randrange(10, 10**self.digits) for _ in range(3)]
            asked, answer = " + ".join(map(str, terms)), sum(terms)
        return Prompt(
            f"{split}/{index}", (*self.shown, Message("user", f"What is {asked}?")), {"answer": answer, "asked": asked}
        )

    def solution(self, prompt: Prompt) -> str:
        return f"{prompt.record['asked']} = {prompt.record['answer']}"
