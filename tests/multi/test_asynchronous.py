"""Asynchronous runs: at lag 0 the loop in steps to the bit; repeated, killed and resumed to the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem.config import override
from tandem.engine.config import EngineConfig
from tandem.kernels.build.toolchain import compiler
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.rollout.config import RolloutConfig
from tandem.run import local
from tandem.run.config import EvaluationConfig, RunConfig
from tandem.run.journal import Read
from tandem.train.config import LearnerConfig
from tests.display import Silent
from tests.multi.test_goldens import TASK

STEPS = 4
pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels' bits depend on the batch")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> RunConfig:
    folder = tmp_path_factory.mktemp("asynchronous")
    write_model(folder / "model", scale=10.0)
    (folder / "sums.py").write_text(TASK)
    return RunConfig(
        "tiny",
        STEPS,
        ModelConfig(str(folder / "model")),
        seed=3,
        task=TaskConfig(f"{folder / 'sums.py'}:Sums", heldout_size=4),
        rollout=RolloutConfig(prompts_per_step=3, samples_per_prompt=4, max_new_tokens=24),
        engine=EngineConfig(kv_memory_bytes=4 << 20),
        learner=LearnerConfig(lr=3e-3, microbatch_tokens=300),
        evaluation=EvaluationConfig(prompts=0),
    )


def trained(config: RunConfig, out: Path) -> list[str]:
    code, folder = local.train(config, out=out, resume=None, display=Silent())
    assert code == 0 and folder == out
    return weights(out)


def weights(folder: Path) -> list[str]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["weights"] for row in rows]


@pytest.mark.parametrize("turns", [1, 3])
def test_at_lag_0_it_is_the_loop_in_steps(tiny: RunConfig, tmp_path: Path, turns: int) -> None:
    """A thread, a queue or a carried request that changes a token, a seed or a batch."""
    config = override(tiny, {"rollout.max_turns": str(turns)})
    plain = trained(config, tmp_path / "sync")
    ahead = override(config, {"asynchrony.mode": "full", "asynchrony.lag": "0"})
    assert trained(ahead, tmp_path / "async") == plain and len(set(plain)) == STEPS


FULL = {"asynchrony.mode": "full", "asynchrony.lag": "2"}
ARMS: dict[str, dict[str, str]] = {
    "one off": {"asynchrony.mode": "one_off"},
    "fifo": FULL,
    "window": {**FULL, "asynchrony.order": "window", "asynchrony.window": "4"},
    "completion": {**FULL, "asynchrony.order": "completion"},
    "drop": {**FULL, "asynchrony.lag": "1", "asynchrony.order": "drop"},
    "restart": {**FULL, "asynchrony.at_update": "restart"},
    "finish": {**FULL, "asynchrony.at_update": "finish"},
    "keep": {**FULL, "asynchrony.at_update": "keep"},
    "again": {**FULL, "asynchrony.replay_uses": "2"},
}


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_learns(tiny: RunConfig, tmp_path: Path, arm: str) -> None:
    """An arm that hangs, loses a group, trains one twice, or leaves a journal that tells less than what happened."""
    config = override(tiny, {**ARMS[arm], "rollout.max_turns": "2"})
    found = trained(config, tmp_path / "run")
    assert len(set(found)) == STEPS
    read = Read(tmp_path / "run")
    assert not read.cut
    updates = [fact["weights"] for fact in read.facts if fact.kind == "update"]
    assert updates == found
    chosen = [number for fact in read.facts if fact.kind == "choose" for number in fact["numbers"]]
    assert len(set(chosen)) == len(chosen)
    ended = {fact["number"] for fact in read.facts if fact.kind == "end"}
    assert set(chosen) <= ended
