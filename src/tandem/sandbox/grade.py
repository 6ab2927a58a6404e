"""Tests run against a program that may try anything to pass them.

Two sandboxes: the tests run in one (`judge.py`), the program in the other (`played.py`), and what they say to each
other goes through here, as values. So the program never has a test, an expected value or the verdict in its reach.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tandem.errors import SandboxError, TaskError
from tandem.sandbox.box import Conversation, Sandbox
from tandem.sandbox.listed import test_names
from tandem.sandbox.pool import SandboxPool
from tandem.sandbox.values import MESSAGE_BYTES

TOLD = "told.json"  # in the tests' sandbox: an argument may have 128 KB
TEST_S = 2.0  # of one test: some that hang leave time for the others


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one test; `reason` says why it failed.

    >>> Verdict("test_add", False, "AssertionError: ").passed
    False
    """

    name: str
    passed: bool
    reason: str = ""


async def grade_tests(
    pool: SandboxPool, files: Mapping[str, str], tests: str, test_seconds: float = TEST_S
) -> list[Verdict]:
    """Run the `test...` functions and the methods of test classes in the source `tests` against the program `files`.

    docs/run_untrusted_code.md has what they may be; one of a kind that is not run fails, and its reason says so.

    The tests import the program's modules by their names in `files` and compare plain values: what a call returned,
    an exception's kind, an argument that it changed. All together have the time of one command
    (`task.sandbox.seconds`). A test that no verdict came of has failed. TaskError where the source holds no test.
    """
    try:
        names = [test.title for test in test_names(tests)]
    except (SyntaxError, ValueError, RecursionError) as error:
        raise TaskError(f"the tests are no Python: {error}") from error
    if not names:
        raise TaskError("the tests have no function whose name begins with test")
    modules = sorted({path.partition("/")[0].removesuffix(".py") for path in files})
    told = {"tests": tests, "modules": modules, "test_seconds": test_seconds}
    async with pool.sandbox({TOLD: json.dumps(told)}) as bench, pool.sandbox(files) as stage:
        relay = _Relay(stage, await bench.talk(["python", "-I", "-c", _text("judge")]))
        left = "no time was left for it"
        try:
            verdicts = await relay.verdicts()
        finally:
            with suppress(SandboxError):
                ended = await relay.judge.end()
                if ended.reason != "time":
                    left = f"the tests had ended ({ended.reason or f'exit code {ended.exit_code}'})"
    return [_result(name, verdicts.get(name, left)) for name in names]


def _result(name: str, reason: str) -> Verdict:
    return Verdict(name, not reason, reason)


class _Relay:
    """Carries calls to the program and answers to the tests. Believes the tests alone."""

    def __init__(self, stage: Sandbox, judge: Conversation) -> None:
        self.stage, self.judge = stage, judge
        self.program: Conversation | None = None
        self.hearing: asyncio.Task[None] | None = None
        self.asked = False  # a call waits for its answer

    async def verdicts(self) -> dict[str, str]:
        """Test -> why it failed, or "". Those that were reached."""
        found: dict[str, str] = {}
        await self.start()
        try:
            while (line := await self.judge.line(MESSAGE_BYTES)) is not None:
                message = json.loads(line)
                if "ask" in message:
                    self.asked = True
                    assert self.program is not None
                    await self.program.send(json.dumps(message["ask"]).encode() + b"\n")
                elif "again" in message:
                    await self.stop()
                    await self.start()
                    await self.judge.send(b'{"fresh": true}\n')
                elif "test" in message:
                    found[message["test"]] = message["reason"]
                else:
                    break
        finally:
            await self.stop()
        return found

    async def start(self) -> None:
        self.program = await self.stage.talk(["python", "-I", "-c", _text("played")])
        self.hearing = asyncio.create_task(self.hear(self.program))

    async def stop(self) -> None:
        if self.hearing is not None and self.program is not None:
            self.hearing.cancel()
            await asyncio.wait({self.hearing})
            await self.program.end()
            self.hearing = self.program = None

    async def hear(self, program: Conversation) -> None:
        """Pass answers on, one a call: what the program says unasked is dropped."""
        while (line := await program.line(MESSAGE_BYTES)) is not None:
            if self.asked:
                self.asked = False
                await self.judge.send(line + b"\n")
        await self.judge.send(b'{"gone": "ended, or answered with more than a message may have"}\n')


@cache
def _text(name: str) -> str:
    """The source of the program in a sandbox, with the modules that it needs."""
    folder = Path(__file__).parent
    lines = ["from __future__ import annotations"]
    for each in ("values", "listed", name):
        text = (folder / f"{each}.py").read_text(encoding="utf-8")
        lines += [line for line in text.splitlines() if not line.startswith(("from tandem", "from __future__"))]
    return "\n".join([*lines, {"judge": f"Judge(json.load(open({TOLD!r}))).run()", "played": "play()"}[name]])


def earned(results: list[Verdict]) -> float:
    """The share of tests passed.

    >>> earned([Verdict("a", True), Verdict("b", False)])
    0.5
    """
    return sum(each.passed for each in results) / len(results)
