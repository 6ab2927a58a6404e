"""Regression caught: a run or an evaluation in which nothing could be graded, and that looks as if all were well."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem.cli.main import main

TASK = """
from tandem.program.environment import Environment
from tandem.types import Message, Prompt

class Broken(Environment):
    def __init__(self, good: int = 0):
        self.good = good

    def prompt(self, split, index):
        return Prompt(str(index), (Message("user", f"{split} {index}"),), {"index": index})

    def reward(self, prompt, text):
        return 1.0 if prompt.record["index"] < self.good else 1 / 0
"""


@pytest.fixture
def given(write_model: Callable[..., None], tmp_path: Path) -> list[str]:
    write_model(tmp_path / "model")
    (tmp_path / "task.py").write_text(TASK)
    settings = {
        "model.source": tmp_path / "model",
        "task.environment": f"{tmp_path}/task.py:Broken",
        "task.heldout_size": 2,
        "rollout.max_new_tokens": 2,
        "rollout.prompts_per_step": 2,
        "rollout.samples_per_prompt": 2,
        "evaluation.prompts": 2,
        "steps": 2,
    }
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


REASON = "reward: raised ZeroDivisionError: division by zero"


def test_a_run_without_a_reward_fails_and_says_why(given: list[str], tmp_path: Path, capsys) -> None:
    """A reward that always raises: exit 0, and its reason nowhere on the screen."""
    run = ["train", "smollm2_arithmetic_cpu", "--out", str(tmp_path / "run"), *given]
    assert main(run) == 1
    printed = capsys.readouterr()
    assert printed.out.count(f"failed 4 (4 x {REASON})") == 2  # each step's line
    assert f"none could be graded, failed 2 (2 x {REASON})" in printed.out
    assert f"no trajectory of steps 1 to 2 could be graded, so nothing was learned: 8 x {REASON}" in printed.out
    assert "report.html" in printed.out and (tmp_path / "run/checkpoints/step-2").is_dir()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "none could be graded" in capsys.readouterr().out


def test_one_graded_trajectory_makes_a_run(given: list[str], tmp_path: Path, capsys) -> None:
    """A run that fails for some rewards that could not be had, where others were."""
    given += ["--set", "task.parameters=good=1", "--json"]
    assert main(["train", "smollm2_arithmetic_cpu", "--out", str(tmp_path / "run"), *given]) == 0
    assert "no trajectory" not in capsys.readouterr().err


def test_an_evaluation_without_a_reward_fails_and_says_why(given: list[str], capsys) -> None:
    """An accuracy of 0.0 % and exit 0 where no answer could be graded, or where none was asked for."""
    assert main(["eval", "smollm2_arithmetic_cpu", *given]) == 1
    assert f"on Broken: none could be graded, failed 2 (2 x {REASON})" in capsys.readouterr().out
    assert main(["eval", "smollm2_arithmetic_cpu", *given, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["prompts"], found["failed"], found["failures"]) == (0, 2, [f"2 x {REASON}"])
    assert main(["eval", "smollm2_arithmetic_cpu", *given, "--set", "evaluation.prompts=0"]) == 2
    assert "evaluation.prompts is 0" in capsys.readouterr().err
