"""A module with a bug, a failing test, and tools to find and mend it, graded by hidden tests (as SWE-bench).

A problem is a folder's files and its tests: planted (planted.py), or a line of a task file with `files` (path -> text),
`tests` (path -> text of test files that the program may run), `hidden` (one text of tests), `issue` (what is wrong)
and, where known, `failing` (names of the hidden tests that fail before; else they are run first, in each program).
"""

from __future__ import annotations

import random
from typing import Any

from tandem.errors import TaskError
from tandem.program.environment import Environment, Episode, tool
from tandem.program.reward import clipped
from tandem.program.tasks.lines import read_lines
from tandem.program.tasks.planted import planted
from tandem.sandbox.box import Sandbox
from tandem.sandbox.grade import Verdict, grade_tests
from tandem.sandbox.listed import test_names
from tandem.sandbox.pool import SandboxPool
from tandem.types import Message, Prompt

FIELDS = {"files": dict, "tests": dict, "hidden": str, "issue": str}
# Runs the test functions of the files given, without a test package: name and reason a line.
_RUN = """
import importlib, sys, traceback
failed = 0
for module in sys.argv[1:]:
    tests = vars(importlib.import_module(module))
    for name, test in list(tests.items()):
        if name.startswith("test") and callable(test):
            try:
                test()
            except BaseException as error:
                failed += 1
                place = traceback.extract_tb(error.__traceback__)[-1]
                print(f"FAILED {module}.{name}, line {place.lineno}: {place.line}  {type(error).__name__} {error}")
print("all tests pass" if not failed else f"{failed} failed")
"""
LINES = 120  # of a file that `read` shows
FOUND = 20  # lines that `search` shows


# Two repairs said before the question: a model of 135 M parameters makes no call from a description alone.
_ASKED = "A test of {path} fails. Find the bug and mend it with the tools.\n\n{path}:\n{text}\n\ntest_{path}:\n{test}"
EXAMPLE = tuple(
    message
    for path, text, test, old, new in (
        (
            "double.py",
            "def double(x):\n    return x * 3",
            "from double import double\n\ndef test_0():\n    assert double(4) == 8",
            "return x * 3",
            "return x * 2",
        ),
        (
            "smaller.py",
            "def smaller(a, b):\n    if a > b:\n        return a\n    return b",
            "from smaller import smaller\n\ndef test_0():\n    assert smaller(3, 7) == 3",
            "if a > b:",
            "if a < b:",
        ),
    )
    for message in (
        Message("user", _ASKED.format(path=path, text=text, test=test)),
        Message("assistant", f"```python\nedit(path={path!r}, old={old!r}, new={new!r})\n```"),
        Message("tool", "done"),
        Message("assistant", "It is mended."),
    )
)


class Repairing(Episode):
    """Tools to look, to change and to try."""

    box: Sandbox | None = None

    def __init__(self, prompt: Prompt, sandbox: SandboxPool) -> None:
        super().__init__(prompt)
        self.sandbox = sandbox

    async def setup(self) -> None:
        record = self.prompt.record
        self.files: dict[str, str] = dict(record["files"])
        self.box = await self.sandbox.open({**record["files"], **record["tests"]})
        self.failing = set(record.get("failing") or ())
        if not self.failing:
            self.failing = {one.name for one in await self._graded() if not one.passed}
        if not self.failing:
            raise ValueError("none of its hidden tests fails before anything is mended")

    async def teardown(self) -> None:
        if self.box is not None:
            await self.box.close()

    @tool
    async def read(self, path: str) -> str:
        """Shows a file."""
        text = self._file(path).splitlines()
        more = f"\n(cut: {LINES} of {len(text)} lines)" if len(text) > LINES else ""
        return "\n".join(f"{number}: {line}" for number, line in enumerate(text[:LINES], start=1)) + more

    @tool
    async def search(self, text: str) -> str:
        """Finds the lines that hold a text, in all files."""
        found = [
            f"{path}:{number}: {line}"
            for path in sorted(self.files)
            for number, line in enumerate(self.files[path].splitlines(), start=1)
            if text in line
        ]
        more = f"\n(cut: {FOUND} of {len(found)} lines)" if len(found) > FOUND else ""
        return "\n".join(found[:FOUND]) + more if found else "nothing found"

    @tool
    async def edit(self, path: str, old: str, new: str) -> str:
        """Puts a new text in place of an old one, which must stand in the file exactly once."""
        before = self._file(path)
        if (count := before.count(old)) != 1 or not old:
            raise ValueError(f"{old!r} stands {count} times in {path}; once is needed")
        assert self.box is not None
        self.files[path] = before.replace(old, new)
        await self.box.write({path: self.files[path]})
        return "done"

    @tool
    async def run(self) -> str:
        """Runs the tests."""
        assert self.box is not None
        modules = [path.removesuffix(".py").replace("/", ".") for path in sorted(self.prompt.record["tests"])]
        done = await self.box.run(["python", "-c", _RUN, *modules])
        said = done.stdout.strip() or done.stderr.strip()[-500:] or f"ended with {done.exit_code}"
        return f"{said}\n({done.reason})" if done.reason else said

    async def score(self, turns: tuple[Message, ...]) -> float:
        """The share of the failing hidden tests that pass now; 0 where one that passed was broken."""
        if self.files == self.prompt.record["files"]:
            return 0.0
        failing = {one.name for one in await self._graded() if not one.passed}
        return 0.0 if failing - self.failing else 1.0 - len(failing) / len(self.failing)

    async def _graded(self) -> list[Verdict]:
        return await grade_tests(self.sandbox, self.files, self.prompt.record["hidden"])

    def _file(self, path: str) -> str:
        if path not in self.files:
            raise ValueError(f"there is no {path}; there are {', '.join(sorted(self.files))}")
        return self.files[path]


def checked(path: str, row: dict[str, Any]) -> dict[str, Any]:
    """A line of a task file; TaskError where its files are no texts in the folder, or its tests are no Python."""
    place = f"{path}, line {row['line']}"
    for name, text in [*row["files"].items(), *row["tests"].items()]:
        if not isinstance(text, str) or name.startswith("/") or ".." in name.split("/"):
            raise TaskError(f"{place}: {name!r} is {clipped(text)}; wanted: a path inside the folder, and a text.")
    try:
        found = list(test_names(row["hidden"]))
    except (SyntaxError, ValueError) as error:
        raise TaskError(f"{place}: its hidden tests are no Python ({error}). Mend or remove the line.") from error
    if not found:
        raise TaskError(f"{place}: its hidden tests have no function whose name begins with test.")
    return row


class Repair(Environment):
    """Problems of a file, or planted ones. `shows`: the files and the tests stand in the prompt; `example`: so do two
    repairs."""

    episodes = Repairing

    def __init__(
        self, sandbox: SandboxPool, path: str = "", shows: bool = True, example: bool = False, seed: int = 0
    ) -> None:
        self.sandbox, self.shows, self.seed = sandbox, shows, seed
        self.example = EXAMPLE if example else ()
        self.rows = [checked(path, row) for row in read_lines(path, FIELDS)] if path else []

    def prompt(self, split: str, index: int) -> Prompt:
        if self.rows:
            row = self.rows[index % len(self.rows) if split == "train" else -1 - index % len(self.rows)]
            record: dict[str, Any] = {name: row.get(name) for name in (*FIELDS, "failing")}
        else:
            made = planted(random.Random(f"{self.seed}/{split}/{index}"))
            record = {
                "files": {made.path: made.broken},
                "tests": {f"test_{made.path}": made.shown},
                "hidden": made.hidden,
                "failing": list(made.failing),
                "issue": f"A test of {made.path} fails.",
                "line": made.line,
            }
        asked = [f"{record['issue']} Find the bug and mend it with the tools."]
        for path, text in {**record["files"], **record["tests"]}.items() if self.shows else ():
            asked.append(f"{path}:\n{text.rstrip()}")
        return Prompt(f"{split}/{index}", (*self.example, Message("user", "\n\n".join(asked))), record)

    def episode(self, prompt: Prompt) -> Repairing:
        return Repairing(prompt, self.sandbox)
