"""Functions to be written from signature and docstring, graded by hidden tests: HumanEval (Chen et al., 2107.03374) and
files of its form.

A line has `task_id`, `prompt` (the beginning of a Python file), `entry_point`, `test` (a function `check(candidate)` of
asserts) and, for training on texts, `canonical_solution`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from tandem.errors import TaskError
from tandem.program.environment import Environment, Episode, Step
from tandem.program.reward import clipped, extract_code
from tandem.program.tasks.lines import read_lines
from tandem.sandbox.grade import earned, grade_tests
from tandem.sandbox.pool import SandboxPool
from tandem.types import Message, Prompt

FIELDS = {"task_id": str, "prompt": str, "entry_point": str, "test": str}
MODULE = "solution"


def hidden_tests(row: dict[str, Any]) -> str:
    """The asserts of `check` as a test function each, so that a part of them can be passed.

    What stands between them is in every test after it. Helpers of the prompt are the prompt's own, not the answer's.
    """
    place, solution = f"task {row['task_id']}", row.get("canonical_solution") or "    pass\n"
    place += f", line {row['line']}" if "line" in row else ""
    if not isinstance(solution, str):
        raise TaskError(f"{place}: its 'canonical_solution' is {clipped(solution)}; wanted: str, or nothing.")
    try:
        body = ast.parse(row["test"]).body
        given = ast.parse(row["prompt"] + solution).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise TaskError(f"{place}: its prompt or test is no Python ({error}). Mend or remove the line.") from error
    if not any(isinstance(one, ast.FunctionDef) and one.name == row["entry_point"] for one in given):
        raise TaskError(f"{place}: its prompt defines no function {row['entry_point']!r}. Mend or remove the line.")
    check = next((one for one in body if isinstance(one, ast.FunctionDef) and one.name == "check"), None)
    if check is None or len(check.args.args) != 1:
        raise TaskError(f"{place}: its test has no function check(candidate). Mend or remove the line.")
    helpers = [one for one in given if not (isinstance(one, ast.FunctionDef) and one.name == row["entry_point"])]
    before = [*helpers, *(one for one in body if one is not check)]
    tests = list(_split(check.body))
    if not tests:
        raise TaskError(f"{place}: its check(candidate) asserts nothing. Mend or remove the line.")
    name = row["entry_point"]  # some tests call it by its own name
    entry = ast.parse(f"from {MODULE} import {name}\n{check.args.args[0].arg} = {name}").body
    return ast.unparse(ast.Module([*before, *entry, *tests], []))


def _split(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """A test for each statement with an assert in it, behind all statements before it that have none."""
    shared: list[ast.stmt] = []
    number = 0
    for statement in body:
        if isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Constant):
            continue  # `assert True`, which any program would be paid for
        if not any(isinstance(node, ast.Assert) for node in ast.walk(statement)):
            shared.append(statement)
            continue
        test = ast.parse(f"def test_{number}(): pass").body[0]
        assert isinstance(test, ast.FunctionDef)
        test.body = [*shared, statement]
        yield test
        number += 1


def program(prompt: str, entry_point: str, text: str) -> str:
    """The Python file that an answer amounts to: its code; where that does not define the function, behind the prompt.

    >>> program("def one():\\n", "one", "    return 1")
    'def one():\\n    return 1'
    """
    defines = re.compile(rf"^def {re.escape(entry_point)}\b", re.MULTILINE)
    code = extract_code(text, entry_point)
    if not defines.search(code):
        return prompt + code
    head = prompt[: found.start()] if (found := defines.search(prompt)) else ""
    return head + code  # imports and helpers of the prompt


class Writing(Episode):
    """An answer a turn, each after how many tests the one before passed, until all do (or `rollout.max_turns`)."""

    def __init__(self, prompt: Prompt, sandbox: SandboxPool, partial: bool) -> None:
        super().__init__(prompt)
        self.sandbox, self.partial = sandbox, partial
        self.graded: tuple[str, tuple[int, int]] | None = None  # what was graded last

    async def observe(self, turns: tuple[Message, ...]) -> Step:
        passed, count = await self._passed(turns[-1].content)
        if passed == count:
            return Step(None)
        return Step([Message("user", f"{passed} of {count} hidden tests pass. Write the whole function again.")])

    async def score(self, turns: tuple[Message, ...]) -> float:
        passed, count = await self._passed(turns[-1].content)
        return passed / count if self.partial else float(passed == count)

    async def _passed(self, text: str) -> tuple[int, int]:
        if self.graded is None or self.graded[0] != text:
            row = self.prompt.record
            code = program(row["prompt"], row["entry_point"], text)
            results = await grade_tests(self.sandbox, {f"{MODULE}.py": code}, row["tests"])
            self.graded = text, (round(earned(results) * len(results)), len(results))
        return self.graded[1]


class HumanEval(Environment):
    """Problems of a file, those of the end held out."""

    episodes = Writing

    def __init__(self, path: str, sandbox: SandboxPool, partial: bool = True) -> None:
        self.rows = read_lines(path, FIELDS)
        self.tests = [hidden_tests(row) for row in self.rows]
        self.sandbox, self.partial = sandbox, partial

    def prompt(self, split: str, index: int) -> Prompt:
        place = index % len(self.rows) if split == "train" else -1 - index % len(self.rows)
        row = self.rows[place]
        asked = (
            f"Complete this function. Answer with the whole function in a ```python block.\n\n{row['prompt'].strip()}\n"
        )
        record = {"prompt": row["prompt"], "entry_point": row["entry_point"], "tests": self.tests[place]}
        record["solution"] = row.get("canonical_solution") or ""
        return Prompt(row["task_id"], (Message("user", asked),), record)

    def episode(self, prompt: Prompt) -> Writing:
        return Writing(prompt, self.sandbox, self.partial)

    def solution(self, prompt: Prompt) -> str | None:
        written = prompt.record["solution"]
        return f"```python\n{prompt.record['prompt']}{written}```" if written else None
