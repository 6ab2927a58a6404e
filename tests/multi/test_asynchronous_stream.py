"""Streamed batches: the plain step's numbers, and a run that is killed, fails or stops inside of one goes on."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.config import override
from tandem.engine.config import EngineConfig
from tandem.errors import ConfigError, NonFiniteError
from tandem.kernels.build.toolchain import compiler
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.rollout.config import RolloutConfig
from tandem.rollout.queue import Queue
from tandem.run import local
from tandem.run.config import CheckpointConfig, EvaluationConfig, RunConfig, check_training
from tandem.run.journal import Read
from tandem.run.kept import Kept
from tandem.run.replay import replay
from tandem.train.config import LearnerConfig
from tandem.train.step import Learner, Parts
from tests.display import Silent
from tests.multi.test_goldens import TASK

STEPS = 4
STREAM = {"asynchrony.mode": "full", "asynchrony.lag": "1", "asynchrony.stream": "true"}
pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels' bits depend on the batch")


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Each part is a group, whatever the machine's speed."""
    fresh = Queue._fresh
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Queue, "_fresh", lambda self, ended, count: fresh(self, ended, min(count, 1)))
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> RunConfig:
    folder = tmp_path_factory.mktemp("streamed")
    write_model(folder / "model", scale=10.0)
    (folder / "sums.py").write_text(TASK)
    return RunConfig(
        "tiny",
        STEPS,
        ModelConfig(str(folder / "model"), dtype="float32"),  # bf16 would round another order of sums away
        seed=3,
        task=TaskConfig(f"{folder / 'sums.py'}:Sums", heldout_size=4),
        rollout=RolloutConfig(prompts_per_step=3, samples_per_prompt=4, max_new_tokens=24, max_turns=2),
        engine=EngineConfig(kv_memory_bytes=4 << 20),
        learner=LearnerConfig(lr=3e-3, microbatch_tokens=300),
        checkpoint=CheckpointConfig(every=1, keep=STEPS),
        evaluation=EvaluationConfig(prompts=0),
    )


def train(config: RunConfig, out: Path | None = None, resume: Path | None = None, last: int | None = None) -> None:
    code, _ = local.train(config, out=out, resume=resume, display=Silent(), last=last)
    assert code == 0


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def parts(folder: Path) -> list[tuple[int, list[int]]]:
    return [(fact["step"], fact["numbers"]) for fact in Read(folder).facts if fact.kind == "choose"]


def whole(folder: Path) -> list[str]:
    """The weights of a finished run, each group of which was learned once, and which is repeated to the bit."""
    chosen = Counter(number for _, numbers in parts(folder) for number in numbers)
    assert set(chosen.values()) == {1} and len(chosen) == 3 * STEPS
    found = [row["weights"] for row in rows(folder)]
    again = replay(folder, on_step=lambda _: None, note=lambda _: None)
    assert [(one.recorded, one.found, one.other_groups) for one in again] == [(one, one, 0) for one in found]
    return found


def without_checkpoints(folder: Path, after: int) -> None:
    for step in range(after + 1, STEPS + 1):
        shutil.rmtree(folder / f"checkpoints/step-{step}", ignore_errors=True)


@pytest.fixture(scope="module")
def streamed(tiny: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("streamed-run") / "run"
    train(override(tiny, STREAM), out)
    return out


def test_it_is_the_plain_step_but_for_rounding(tiny: RunConfig, streamed: Path, tmp_path: Path) -> None:
    """A part that is lost or counted twice, a divisor that is not the batch's, rows of less than the batch."""
    train(tiny, tmp_path / "run", last=1)
    (plain,), first = rows(tmp_path / "run"), rows(streamed)[0]
    for name in ("loss", "grad_norm", "kl", "reward", "tokens", "trained_samples", "entropy"):
        assert first[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-9), name
    assert len(parts(streamed)) == 3 * STEPS
    whole(streamed)


def test_killed_inside_a_batch_it_goes_on(tiny: RunConfig, streamed: Path, tmp_path: Path) -> None:
    """A part that was chosen and not updated on is lost, or learned in another microbatch or twice."""
    out = tmp_path / "run"
    shutil.copytree(streamed, out)
    step, numbers = next((step, numbers) for step, numbers in parts(out) if step == 3)
    path = out / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if b'"choose","step":%d,' % step in line)
    path.write_bytes(b"".join(lines[: cut + 1]))
    without_checkpoints(out, step - 1)
    train(override(tiny, STREAM), resume=out)
    assert (step, numbers) in parts(out)
    assert whole(out)[: step - 1] == [row["weights"] for row in rows(streamed)][: step - 1]


def test_failed_inside_a_batch_it_goes_on(tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that is written on an error loses the parts that the step had, or the error's trajectories."""
    out, add = tmp_path / "run", Learner.add

    def failing(self: Learner, parts: Parts, *given: Any) -> None:
        if self.optimiser.updates and parts.samples:
            raise NonFiniteError("the loss is made up.")
        add(self, parts, *given)

    changes = {"asynchrony.lag": "0", "asynchrony.order": "completion", "checkpoint.every": "0"}
    config = override(tiny, {**STREAM, **changes, "checkpoint.minutes": "0"})
    with monkeypatch.context() as patched:
        patched.setattr(Learner, "add", failing)
        with pytest.raises(NonFiniteError, match=r"step \d: the loss is made up. The step's trajectories") as caught:
            train(config, out)
    step = int(str(caught.value).split()[1].rstrip(":"))
    before = parts(out)
    assert Kept.read(out / f"checkpoints/step-{step - 1}").due
    assert (out / f"trajectories/step-{step}.jsonl").is_file() and before[-1][0] == step
    train(config, resume=out)
    assert parts(out)[: len(before)] == before
    whole(out)


def test_stopped_while_it_is_lived_through_it_goes_on(tiny: RunConfig, streamed: Path, tmp_path: Path) -> None:
    """A checkpoint between facts that are lived through counts them from elsewhere."""
    out = tmp_path / "run"
    shutil.copytree(streamed, out)
    without_checkpoints(out, 1)
    train(override(tiny, STREAM), resume=out, last=2)
    before = Read(out).facts
    train(override(tiny, STREAM), resume=out)
    assert whole(out) == [row["weights"] for row in rows(streamed)]
    assert [fact.values for fact in Read(out).facts][: len(before)] == [fact.values for fact in before]


@pytest.mark.parametrize(
    "changes",
    [
        {"algo.advantage": "reinforce_pp"},
        {"algo.advantage": "reinforce_pp_baseline"},
        {"algo.advantage": "gae"},
        {"algo.updates_per_step": "2"},
        {"algo.fairness.weights": "inverse"},
        {"alarms.action": "correct", "algo.correction.form": "decoupled", "algo.correction.weight": "token_tis"},
    ],
)
def test_what_hangs_on_the_whole_batch_is_refused(tiny: RunConfig, changes: dict[str, str]) -> None:
    """A streamed part whose gradient would be another one had the rest of its batch been known."""
    check_training(override(tiny, STREAM))
    name = next(iter(changes))
    with pytest.raises(ConfigError, match=rf"{name} is .* and asynchrony.stream is on: .*Set {name} to "):
        check_training(override(tiny, {**STREAM, **changes}))
