"""A repository with a bug, a failing test, and tools to find and mend it, graded by hidden tests (as SWE-bench).

A problem is a folder's files and its tests: planted (planted.py), or of the user's own (problems.py).
"""

from __future__ import annotations

import ast
import random
import re
from pathlib import Path

from tandem.errors import TaskError, nearest
from tandem.program.environment import Environment, Episode, tool
from tandem.program.tasks.planted import planted
from tandem.program.tasks.problems import read_problems
from tandem.sandbox.box import Sandbox
from tandem.sandbox.grade import Verdict, grade_tests
from tandem.sandbox.pool import SandboxPool
from tandem.types import Message, Prompt

PART = 0.2  # paid for a repair of a part, times the part
LINES = 120  # of a file that `read` shows
FOUND = 20  # lines that `search` shows
_TRIED = (Path(__file__).parent / "tried.py").read_text(encoding="utf-8")

# Repairs said before the question: a model of 135 M parameters makes no call from a description alone.
_DOUBLE = ("double.py", "def double(x):\n    return x * 3", "double(4) gives 12. It should be 8.")
_LONGEST = (
    "longest.py",
    "def longest(words):\n    return min(words, key=len)",
    "longest(['a', 'bcd']) gives 'a'. It should be 'bcd'.",
)
_WORKED = {
    "text": (
        (*_DOUBLE, "edit(path='double.py', old='x * 3', new='x * 2')", "done"),
        (*_LONGEST, "edit(path='longest.py', old='min(', new='max(')", "done"),
    ),
    "function": (
        (*_DOUBLE, "def double(x):\n    return x * 2", "all tests pass"),
        (*_LONGEST, "def longest(words):\n    return max(words, key=len)", "all tests pass"),
    ),
}


def asked(files: dict[str, str], issue: str) -> str:
    return "\n\n".join([*(f"{path}:\n{text.rstrip()}" for path, text in files.items()), issue])


def worked(edit: str) -> tuple[Message, ...]:
    """Two repairs."""
    said: list[Message] = []
    for path, text, issue, call, answer in _WORKED[edit]:
        said += [Message("user", asked({path: text}, issue)), Message("assistant", f"```python\n{call}\n```")]
        said += [Message("tool", answer), Message("assistant", "It is mended.")]
    return tuple(said)


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
            place = record.get("place") or "the problem"
            raise ValueError(f"{place}: none of its hidden tests fails before anything is mended")

    async def teardown(self) -> None:
        if self.box is not None:
            await self.box.close()

    @tool
    async def read(self, path: str) -> str:
        """Shows a file, or a test."""
        text = self._readable(path, self._shown()).splitlines()
        more = f"\n(cut: {LINES} of {len(text)} lines)" if len(text) > LINES else ""
        return "\n".join(f"{number}: {line}" for number, line in enumerate(text[:LINES], start=1)) + more

    @tool
    async def search(self, text: str) -> str:
        """Finds the lines that hold a text, in all files."""
        found = [
            f"{path}:{number}: {line}"
            for path, whole in sorted(self._shown().items())
            for number, line in enumerate(whole.splitlines(), start=1)
            if text in line
        ]
        more = f"\n(cut: {FOUND} of {len(found)} lines)" if len(found) > FOUND else ""
        return "\n".join(found[:FOUND]) + more if found else "nothing found"

    @tool
    async def run(self) -> str:
        """Runs the tests that can be read."""
        return await self._ran()

    async def score(self, turns: tuple[Message, ...]) -> float:
        """1 where all hidden tests pass; PART times the share of those that failed and pass now; 0 where one that
        passed was broken."""
        if self.files == self.prompt.record["files"]:
            return 0.0
        failing = {one.name for one in await self._graded() if not one.passed}
        if failing - self.failing:
            return 0.0
        return PART * (1.0 - len(failing) / len(self.failing)) if failing else 1.0

    async def _graded(self) -> list[Verdict]:
        return await grade_tests(self.sandbox, self.files, self.prompt.record["hidden"])

    async def _ran(self) -> str:
        assert self.box is not None
        modules = [path.removesuffix(".py").replace("/", ".") for path in sorted(self.prompt.record["tests"])]
        done = await self.box.run(["python", "-c", _TRIED, *modules])
        said = done.stdout.strip() or done.stderr.strip()[-500:] or f"ended with {done.exit_code}"
        return f"{said}\n({done.reason})" if done.reason else said

    async def _put(self, path: str, text: str) -> None:
        assert self.box is not None
        self.files[path] = text
        await self.box.write({path: text})

    def _shown(self) -> dict[str, str]:
        return {**self.files, **self.prompt.record["tests"]}

    def _changeable(self, path: str) -> str:
        if path in self.prompt.record["tests"]:
            raise ValueError(f"{path} is a test, which cannot be changed; there are {', '.join(sorted(self.files))}")
        return self._readable(path, self.files)

    def _readable(self, path: str, files: dict[str, str]) -> str:
        if path not in files:
            raise ValueError(f"there is no {path}; there are {', '.join(sorted(files))}")
        return files[path]


class ByText(Repairing):
    """Edits by a text and what stands in its place."""

    @tool
    async def edit(self, path: str, old: str, new: str) -> str:
        """Puts a new text in place of an old one, which must stand in the file exactly once."""
        before = self._changeable(path)
        if (count := before.count(old)) != 1 or not old:
            raise ValueError(f"{old!r} stands {count} times in {path}; once is needed")
        await self._put(path, before.replace(old, new))
        return "done"


class ByFunction(Repairing):
    """Edits by whole functions, as the code that a model writes of itself, in a tool that takes any code."""

    @tool
    async def python(self, code: str) -> str:
        """Puts functions or classes in the place of those of their names, and runs the tests."""
        try:
            written = ast.parse(code).body
        except _UNREADABLE as error:
            raise ValueError(f"it is no Python: {error}") from None
        for node in written:
            if not isinstance(node, _DEFINITIONS):
                raise ValueError(f"line {node.lineno} is no function or class; nothing else can be put in place")
        if not written:
            raise ValueError("there is no function in it")
        for node in written:
            assert isinstance(node, _DEFINITIONS)
            path, old = self._definition(node.name)
            await self._put(path, _replaced(self.files[path], old, code, node))
        return await self._ran()

    def _definition(self, name: str) -> tuple[str, _Definition]:
        """The file and the place of a function or class at the top of a file."""
        found: list[tuple[str, _Definition]] = []
        for path, text in self.files.items():
            try:
                body = ast.parse(text).body if path.endswith(".py") else []
            except _UNREADABLE:
                continue
            found += [(path, node) for node in body if isinstance(node, _DEFINITIONS) and node.name == name]
        if len(found) != 1:
            places = f" ({', '.join(path for path, _ in found)})" if found else ""
            raise ValueError(f"{name} is defined {len(found)} times{places}; once is needed")
        return found[0]


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # of ast.parse
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_KINDS: dict[str, type[Repairing]] = {"text": ByText, "function": ByFunction}


def _span(node: _Definition) -> slice:
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
    return slice(first - 1, node.end_lineno)


def _lines(text: str) -> list[str]:
    """As Python counts them, with their ends.

    >>> _lines("a = 1\\rb\\x0c = 2\\r\\nc")
    ['a = 1\\r', 'b\\x0c = 2\\r\\n', 'c']
    """
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text)


def _replaced(text: str, old: _Definition, code: str, new: _Definition) -> str:
    lines = _lines(text)
    lines[_span(old)] = ["".join(_lines(code)[_span(new)]).rstrip("\r\n") + "\n"]
    return "".join(lines)


class Repair(Environment):
    """Problems of a folder or a file, or planted ones, in functions of at most `most_lines` (0: of any length).

    edit: what an edit is, "text" (the usual one) or "function" (for small models). shows: the files stand in the
    prompt; example: so do two repairs.
    """

    episodes = Repairing

    def __init__(
        self,
        sandbox: SandboxPool,
        path: str = "",
        edit: str = "text",
        shows: bool = True,
        example: bool = False,
        most_lines: int = 0,
        seed: int = 0,
    ) -> None:
        if edit not in _KINDS:
            raise TaskError(f"task.parameters: edit is {edit!r}.{nearest(edit, tuple(_KINDS))}")
        if most_lines < 0:
            raise TaskError(f"task.parameters: most_lines is {most_lines}. Allowed: 0 (any) or more.")
        self.sandbox, self.shows, self.most_lines, self.seed = sandbox, shows, most_lines, seed
        self.episodes = _KINDS[edit]
        self.example = worked(edit) if example else ()
        self.rows = read_problems(path) if path else []

    def prompt(self, split: str, index: int) -> Prompt:
        if self.rows:
            record = self.rows[index % len(self.rows) if split == "train" else -1 - index % len(self.rows)]
        else:
            made = planted(random.Random(f"{self.seed}/{split}/{index}"), split, self.most_lines)
            record = {
                "files": {made.path: made.broken},
                "tests": {f"test_{made.path}": made.shown},
                "hidden": made.hidden,
                "failing": list(made.failing),
                "issue": made.issue,
                "line": made.line,
            }
        text = asked(record["files"] if self.shows else {}, record["issue"])
        return Prompt(f"{split}/{index}", (*self.example, Message("user", text)), record)

    def episode(self, prompt: Prompt) -> Repairing:
        return self.episodes(prompt, self.sandbox)

    def key(self, prompt: Prompt) -> str:
        """The same problem is the same question, whether its files are shown or not."""
        return asked(prompt.record["files"], prompt.record["issue"])
