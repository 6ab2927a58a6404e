"""`bench ahead` on a tiny model: what its runs measure, and what it says of one that was killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tandem.bench.ahead import config_of, kill_and_resume, open_config, run_arm
from tandem.kernels.build.toolchain import compiler
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.run.config import RunConfig
from tests.display import Silent

pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels' bits depend on the batch")
MODEL = ModelConfig("new:width=32,layers=2,heads=4,kv_heads=2,ff_width=48,max_position=256")


def tiny(config: RunConfig, waits: bool) -> RunConfig:
    task = TaskConfig("tandem.bench.slow_tools:SlowDigits", parameters=(("waits", waits),), heldout_size=1)
    asked = replace(config.rollout, samples_per_prompt=4, max_new_tokens=8, max_turns=2)
    return replace(config, model=MODEL, task=task, rollout=asked)


@pytest.mark.parametrize("mode", ["sync", "full"])
def test_a_run_is_measured(tmp_path: Path, mode: str) -> None:
    """Samples of steps in which a queue fills, or a worker whose seconds are in no phase."""
    config = replace(tiny(config_of(f"{mode}/none"), waits=False), steps=5)
    found = run_arm(config, tmp_path / "run", Silent())
    assert found["samples_s"] == pytest.approx(32 / found["step_s"]) and 0 < found["books"] < 1
    assert set(found["phases"]) == ({"main", "rollouts"} if mode == "full" else {"main"})
    for worker, phases in found["phases"].items():
        assert sum(phases.values()) == pytest.approx(found["step_s"], rel=0.2), worker


def test_killed_and_resumed() -> None:
    """A resume that is timed from another moment, or a loss that is not seen."""
    found = kill_and_resume(tiny(open_config(), waits=True), left_s=0.3)
    assert found["programs"] == 32 and found["first_token_s"] > 0
    assert found["finished"] >= 4
    assert (found["lost"], found["sampled_again"], found["trained_twice"]) == (0, 0, 0)
