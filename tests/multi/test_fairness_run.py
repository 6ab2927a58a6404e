"""Runs whose groups are weighed by how likely they were to be kept: repeated, and resumed, to the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem.algo.advantage import samples_from_groups
from tandem.columns import Columns
from tandem.config import override
from tandem.engine.config import EngineConfig
from tandem.kernels.build.toolchain import compiler
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.rollout.config import RolloutConfig
from tandem.run import local
from tandem.run.config import CheckpointConfig, EvaluationConfig, RunConfig
from tandem.run.fairness import Fairness
from tandem.run.replay import replay
from tandem.train.config import LearnerConfig
from tandem.types import Group, Prompt, StopReason, Trajectory
from tests.display import Silent
from tests.multi.test_goldens import TASK

pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels' bits depend on the batch")
WEIGHED = {"algo.fairness.weights": "inverse"}
DROP = {
    "asynchrony.mode": "full",
    "asynchrony.lag": "1",
    "asynchrony.order": "drop",
    "asynchrony.by_load": "false",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> RunConfig:
    folder = tmp_path_factory.mktemp("fairness")
    write_model(folder / "model", scale=10.0)
    (folder / "sums.py").write_text(TASK)
    return RunConfig(
        "tiny",
        6,
        ModelConfig(str(folder / "model")),
        seed=3,
        task=TaskConfig(f"{folder / 'sums.py'}:Sums", heldout_size=4),
        rollout=RolloutConfig(prompts_per_step=8, samples_per_prompt=2, max_new_tokens=48),
        engine=EngineConfig(kv_memory_bytes=4 << 20, max_sequences=12),
        learner=LearnerConfig(lr=3e-3, microbatch_tokens=300),
        evaluation=EvaluationConfig(prompts=0),
        checkpoint=CheckpointConfig(every=3, keep=4),
    )


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def group_of(name: str, tokens: int) -> Group:
    """Two programs, one of which is right."""
    mask = (False, *(True for _ in range(tokens)))
    columns = Columns.of(
        tokens=range(1 + tokens), loss_mask=mask, logprobs=[-0.5] * (1 + tokens), versions=[0] * (1 + tokens)
    )
    programs = [Trajectory(f"{name}/{one}", name, columns, float(one), StopReason.STOP_TOKEN) for one in range(2)]
    return Group(Prompt(name, ()), tuple(programs))


def trained(config: RunConfig, out: Path) -> list[dict[str, Any]]:
    code, _ = local.train(config, out=out, resume=None, display=Silent())
    assert code == 0
    return rows_of(out)


def test_dropped_groups_are_counted_and_weighed(tiny: RunConfig, tmp_path: Path) -> None:
    """Groups that are dropped beyond the lag unseen by the test, weights that a repetition doesn't come to, or an age
    of tokens that were drawn under older weights of 0."""
    rows = trained(override(tiny, DROP | WEIGHED), tmp_path / "run")
    stale = sum(row["stale_groups"] for row in rows)
    lost = [sum(line["dispatched"] - line["kept"] for line in row["lengths"]) for row in rows]
    assert sum(lost) == 2 * stale > 0
    assert all((row["fairness"].get("z") is not None) <= bool(left) for row, left in zip(rows, lost, strict=True))
    assert max(line["age"] or 0.0 for row in rows for line in row["lengths"]) > 0.0
    assert max(row["fairness"]["weight_max"] for row in rows) > 1.0
    found = [row["weights"] for row in rows]
    again = replay(tmp_path / "run", workers=1, on_step=lambda _: None, note=lambda _: None)
    assert [(one.recorded, one.found) for one in again] == [(one, one) for one in found]


@pytest.mark.parametrize("arm", ["extra", "drop"])
def test_a_resumed_run_weighs_as_one_that_never_stopped(tiny: RunConfig, tmp_path: Path, arm: str) -> None:
    """A resumed run that has forgotten the groups of its last steps, and so weighs others."""
    config = override(tiny, WEIGHED | ({"rollout.extra_prompts": "4"} if arm == "extra" else DROP))
    whole = trained(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    code, _ = local.train(config, out=None, resume=tmp_path / "run", display=Silent())
    assert code == 0
    assert [row["weights"] for row in rows_of(tmp_path / "run")] == [row["weights"] for row in whole]
    assert [row["lengths"] for row in rows_of(tmp_path / "run")] == [row["lengths"] for row in whole] or arm == "extra"


def test_the_memory_is_bounded_and_comes_back(tiny: RunConfig) -> None:
    """A checkpoint that grows with the run, or one that forgets who was kept."""
    fairness = Fairness(override(tiny, DROP | WEIGHED | {"algo.fairness.steps": "2"}))
    fairness.past.extend([] for _ in range(5))
    other = Fairness(override(tiny, DROP | WEIGHED | {"algo.fairness.steps": "2"}))
    other.restore(json.loads(json.dumps(fairness.state())))
    assert len(fairness.past) == 2 and other.past == fairness.past
    assert fairness.lasts and not Fairness(tiny).lasts


def test_a_step_that_was_not_learned_is_weighed_again(tiny: RunConfig) -> None:
    """A step that fails behind its weights, whose groups then count twice in the estimate of those that are resumed, or
    whose dropped groups do not count at all."""
    config = override(tiny, DROP | WEIGHED)
    fairness = Fairness(config)
    groups = [group_of(f"p{place}/1", tokens) for place, tokens in enumerate((3, 5, 5, 8))]
    fairness.drop([groups[3]])
    kept = groups[:3]
    batch = samples_from_groups(config.algo, kept, 0.0)
    first = fairness.weigh(kept, batch)
    resumed = Fairness(config)
    resumed.restore(json.loads(json.dumps(fairness.state())))
    again = resumed.weigh(kept, batch)
    weights = [[sample.columns["selection_weights"].tolist() for sample in one.samples] for one in (first, again)]
    assert weights[0] == weights[1] and resumed.row(1, None) == fairness.row(1, None)
    assert resumed.row(1, None)["fairness"]["z"] is not None
    fairness.settle()
    assert len(fairness.past) == 1 and len(fairness.past[0]) == 4 and not fairness.stale
