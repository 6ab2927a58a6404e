"""A sandbox with tight limits, and code in it; programs that are played by hand."""

from __future__ import annotations

import asyncio
import platform
import textwrap
from typing import Any

from tandem.program.pool import EnvironmentPool
from tandem.sandbox import calls
from tandem.sandbox.box import Result
from tandem.sandbox.config import SandboxConfig
from tandem.sandbox.grade import Verdict, grade_tests
from tandem.sandbox.pool import SandboxPool
from tandem.types import Message, Prompt

MB = 1 << 20
LIMITS = SandboxConfig(
    seconds=8.0,
    cpu_seconds=2,
    memory_bytes=96 * MB,
    processes=24,
    file_bytes=16 * MB,
    files=500,
    output_bytes=100_000,
)
GRADING = SandboxConfig(seconds=20.0, memory_bytes=128 * MB, output_bytes=100_000)
PRELUDE = """
import ctypes, errno, mmap, os, resource, signal, socket, struct, subprocess, sys, threading, time
leaks = []

def attempt(name, function, *arguments):
    try:
        value = function(*arguments)
    except Exception:
        return
    leaks.append((name, str(value)[:200]))

libc = ctypes.CDLL(None, use_errno=True)

def refused(*numbers, error=errno.EPERM):
    for number in numbers:
        if libc.syscall(number, -1, 1, 0, 0, 0, 0) != -1 or ctypes.get_errno() != error:
            leaks.append((number, ctypes.get_errno()))

def read(path):
    with open(path, "rb") as file:
        return file.read(10000)
"""


def refused(*names: str) -> str:
    """Code that makes the calls of these names."""
    column = list(calls.MACHINES).index(platform.machine())
    return f"refused({', '.join(str(calls.REFUSED[name][column]) for name in names)})"


def inside(work: Any, config: SandboxConfig = LIMITS) -> Any:
    """What `work(box)` gives, in a new sandbox."""

    async def ran() -> Any:
        async with SandboxPool(config, warm=0).sandbox() as box:
            return await work(box)

    return asyncio.run(ran())


def python(code: str, config: SandboxConfig = LIMITS) -> Result:
    return inside(lambda box: box.run(["python", "-S", "-c", PRELUDE + textwrap.dedent(code)]), config)


def graded(
    files: dict[str, str] | str, tests: str, test_seconds: float = 5.0, limits: SandboxConfig = GRADING
) -> list[Verdict]:
    """The verdicts of `tests` on a program; a text is its double.py."""
    files = {"double.py": files} if isinstance(files, str) else files

    async def ran() -> list[Verdict]:
        pool = SandboxPool(limits, warm=0)
        try:
            return await grade_tests(pool, files, textwrap.dedent(tests), test_seconds)
        finally:
            await pool.close()

    return asyncio.run(ran())


def played(made: EnvironmentPool, prompt: Prompt, *said: Message) -> tuple[list[str], float]:
    """What followed each turn, and the reward."""
    episode = made.episode(prompt, 1e12)
    told = []
    for message in said:
        episode.said.append(message)
        found = episode.observe(last=message is said[-1]).result(60)
        told += [one.content for one in found.messages or ()]
    reward = episode.score().result(60)
    episode.teardown()
    return told, reward
