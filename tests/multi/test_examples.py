"""Regressions in examples/: a program that a user copies no longer runs, or no longer computes what it says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tandem import env
from tandem.algo.advantage import samples_from_groups
from tandem.algo.config import AlgoConfig
from tandem.columns import Columns
from tandem.types import Failure, Group, Prompt, Trajectory

LOOP = Path(__file__).parents[2] / "examples" / "rl_loop.py"


@pytest.fixture
def loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rl_loop", LOOP)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made_up(name: str, reward: float, sampled: int, failure: Failure | None = None) -> Trajectory:
    said = [False] * 3 + [True] * sampled
    columns = Columns.of(tokens=range(len(said)), loss_mask=said, logprobs=[-0.5] * len(said), versions=[0] * len(said))
    return Trajectory(name, name.partition("/")[0], columns, reward=reward, failure=failure)


def test_a_hundred_lines() -> None:
    """The loop that is shown as a hundred lines grows to more."""
    assert len(LOOP.read_text().splitlines()) <= 100


def test_credit_is_grpo(loop: ModuleType) -> None:
    """The example's own advantages, samples or denominators are other than those of algo.advantage=grpo."""
    failed = Failure("reward", "raised ValueError")
    groups = [
        Group(Prompt("p", ()), tuple(made_up(f"p/{n}", reward, 2 + n) for n, reward in enumerate((1.0, 0.0, 0.25)))),
        Group(Prompt("q", ()), (made_up("q/0", 1.0, 4), made_up("q/1", 0.0, 3), made_up("q/2", 0.0, 5, failed))),
        Group(Prompt("r", ()), (made_up("r/0", 1.0, 4), made_up("r/1", 1.0, 3))),
    ]
    samples, totals = loop.credit(groups)
    expected = samples_from_groups(AlgoConfig(advantage="grpo"), groups)
    assert [sample.id for sample in samples] == [sample.id for sample in expected.samples] and len(samples) == 5
    for ours, theirs in zip(samples, expected.samples, strict=True):
        assert ours.columns["advantages"].tolist() == pytest.approx(theirs.columns["advantages"].tolist(), rel=1e-4)
    assert sorted(totals, key=lambda one: one.prompt_id) == sorted(expected.prompts, key=lambda one: one.prompt_id)


def test_loop_runs() -> None:
    """The example ends with an error, samples by other weights than it trains, or trains nothing."""
    shrunk = "import rl_loop; rl_loop.PROMPTS = 4; rl_loop.main(2)"
    paths = env.child(PYTHONPATH=":".join([str(LOOP.parent), *filter(None, sys.path)]))
    done = subprocess.run(
        [sys.executable, "-c", shrunk], capture_output=True, text=True, env=paths, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^step (\d): reward \d\.\d+, mismatch 0\.0, (\w+)$", done.stdout, flags=re.MULTILINE)
    assert [step for step, _ in lines] == ["1", "2"] and lines[0][1] != lines[1][1], done.stdout
