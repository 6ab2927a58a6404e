"""Regression caught: an environment that runs code without the sandbox of its run, or starts where there is none."""

from __future__ import annotations

import asyncio
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from tandem.errors import TaskError
from tandem.program.config import TaskConfig
from tandem.program.pool import EnvironmentPool
from tandem.sandbox.config import SandboxConfig
from tandem.types import Failure, Message, Prompt

USER = """
from tandem.sandbox.pool import run_once
from tandem.types import Message, Prompt

class Runs:
    def __init__(self, sandbox):
        self.sandbox = sandbox

    def prompt(self, split, index):
        return Prompt("x", (Message("user", f"{split} {index}"),), {})

    def reward(self, prompt, text):
        if text.startswith("here:"):
            return float(len(eval(text[5:])))
        done = run_once(self.sandbox.config, ["python", "-S", "-c", text])
        return {"time": -1.0, "memory": -2.0, "output": -3.0}.get(done.reason, float(done.ok))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "runs.py").write_text(USER)
    return tmp_path / "runs.py"


def grades(config: TaskConfig, texts: list[str]) -> list[float | Failure]:
    pool = EnvironmentPool(config)
    try:
        pool.ready()
        episodes = [pool.episode(Prompt("p", (Message("user", "?"),), {}), math.inf) for _ in texts]
        for episode, text in zip(episodes, texts, strict=True):
            episode.said.append(Message("assistant", text, sampled=True))
        return [episode.score().result(60) for episode in episodes]
    finally:
        pool.close()


def test_it_is_given_the_sandbox_of_the_run(source: Path) -> None:
    """An environment with other limits than `task.sandbox`, or a failed program that fails its environment too."""
    limits = SandboxConfig(seconds=1.0, output_bytes=1000)
    texts = [
        "print(1)",
        "1/0",
        "while True: print(1)",
        "import time; time.sleep(9)",
        "import os; os.kill(1, 9); os._exit(0)",
    ]
    config = TaskConfig(f"{source}:Runs", heldout_size=1, workers=1, sandbox=limits)
    assert grades(config, texts) == [1.0, 0.0, -3.0, -1.0, 1.0]


def test_a_run_does_not_start_without_one(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox that can't start, and that shows at the first rollout, as a failure of each program."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TaskError, match="bwrap is not installed. Debian, Ubuntu: apt-get install bubblewrap"):
        grades(TaskConfig(f"{source}:Runs", heldout_size=1, workers=1), [])
    with pytest.raises(TaskError, match="task.sandbox.backend=refuse, and this task runs code"):
        grades(TaskConfig(f"{source}:Runs", heldout_size=1, workers=1, sandbox=SandboxConfig("refuse")), [])


def test_a_grader_that_explodes(source: Path) -> None:
    """A grader that takes the machine's memory for what a model wrote, or its process for a good text beside it."""
    open_to_all = SandboxConfig("unsandboxed_subprocess")
    config = TaskConfig(f"{source}:Runs", heldout_size=1, workers=1, memory_bytes=700 << 20, sandbox=open_to_all)
    found = grades(config, ["here: b'x' * (900 << 20)", "here: 'abc'"])
    assert found == [Failure("reward", "raised MemoryError"), 3.0]
    wide = TaskConfig(f"{source}:Runs", heldout_size=1, workers=1, memory_bytes=3 << 30, sandbox=open_to_all)
    assert grades(wide, ["here: b'x' * (900 << 20)"]) == [float(900 << 20)]


def test_the_page_grades(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The page's environment pays for a program that passes none of its tests."""
    from tandem.program.prompts import load_user

    page = (Path(__file__).parents[2] / "docs" / "run_untrusted_code.md").read_text()
    (tmp_path / "code_task.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.setattr(sys, "path", [*sys.path])
    task = load_user(TaskConfig(f"{tmp_path}/code_task.py:Code"))

    async def played(text: str) -> tuple[str, float]:
        episode: Any = task.episode(task.prompt("train", 0))
        await episode.setup()
        said = await episode.run(text + "\nprint('ran')")
        paid = await episode.score((Message("assistant", text, sampled=True),))
        await episode.teardown()
        return said, paid

    async def all_played() -> list[tuple[str, float]]:
        texts = ["def add(a, b): return a + b", "def add(a, b): return 5", "import os; os._exit(0)"]
        fenced = f"Like this:\n\n```python\n{texts[0]}\n```\n\nand so\n\n```python\nprint(add(2, 3))\n```\n"
        return [await played(text) for text in (*texts, fenced)]

    found = asyncio.run(all_played())
    assert found[:3] == [("ran\n", 1.0), ("ran\n", 0.5), ("", 0.0)]
    assert found[3][1] == 1.0  # in a block, as most models write it
