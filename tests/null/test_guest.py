"""Children in an interpreter of their own (task.python), and what is said of one that cannot hold them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tandem.errors import ConfigError, TaskError
from tandem.program.config import TaskConfig
from tandem.program.pool import EnvironmentPool
from tandem.types import Message

USER = """
import importlib.util, sys
import corner, beside
from tandem.program.environment import Environment
from tandem.types import Message, Prompt

class Where(Environment):
    def prompt(self, split, index):
        others = [name for name in ("torch", "hypothesis", "numpy") if importlib.util.find_spec(name)]
        said = f"{corner.WHERE} {beside.WHERE} {sys.prefix} {others}"
        return Prompt(f"{split}{index}", (Message("user", said),))

    def reward(self, prompt, text):
        return float(text == corner.WHERE)
"""


def script(folder: Path, first: str) -> str:
    """An interpreter that runs `first` before its code."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import sys; {first}; exec(sys.argv[2])' \"$@\"\n")
    path.chmod(0o755)
    return str(path)


def test_its_own_packages_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's package is taken from tandem's virtual environment, or tandem's are not found from the other;
    others of tandem's, which packages import where they are there, come along."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python3*/site-packages")
    (site / "corner.py").write_text("WHERE = 'guest'")
    for name in ("corner", "beside"):
        (tmp_path / f"{name}.py").write_text("WHERE = 'parent'")
    (tmp_path / "where.py").write_text(USER)
    monkeypatch.syspath_prepend(str(tmp_path))
    task = TaskConfig("where:Where", heldout_size=0, workers=1, python=str(venv / "bin" / "python"))
    pool = EnvironmentPool(task)
    try:
        prompt = pool.prompt(0)
        assert prompt.messages[0].content == f"guest parent {venv} ['numpy']"
        episode = pool.episode(prompt)
        episode.said.append(Message("assistant", "guest", sampled=True))
        assert episode.score().result(30) == 1.0
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ('sys.implementation.cache_tag = "other-31"', "is other-31 and tandem runs in .*with the same Python"),
        ('sys.modules["msgspec"] = None', "cannot hold environments: .*python -m pip install msgspec"),
    ],
)
def test_an_interpreter_that_cannot_hold_them(tmp_path: Path, first: str, said: str) -> None:
    """A wrong interpreter is found after two minutes, or by an import error in the middle of numpy."""
    pool = EnvironmentPool(TaskConfig("where:Where", python=script(tmp_path, first)))
    try:
        with pytest.raises(TaskError, match=said):
            pool.ready()
    finally:
        pool.close()


def test_what_is_no_interpreter(tmp_path: Path) -> None:
    """A path that cannot be run shows as a traceback of subprocess."""
    for python in (tmp_path, tmp_path / "none"):
        with pytest.raises(TaskError, match="cannot be run: .*task.python=DIR/bin/python"):
            EnvironmentPool(TaskConfig("where:Where", python=str(python)))
    with pytest.raises(ConfigError, match=r"task.python holds \\udc80"):
        TaskConfig("where:Where", python="\udc80")
