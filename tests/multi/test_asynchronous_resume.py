"""Asynchronous runs killed, stopped and resumed: nothing finished is lost, nothing trained twice, and all repeats."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tandem.kernels.build.toolchain import compiler
from tandem.run.journal import Read
from tandem.run.replay import replay
from tests.multi.test_goldens import TASK
from tests.multi.test_resume import WAIT_S, command, halted, train

STEPS = 12
pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels' bits depend on the batch")
RECIPE = """
from pathlib import Path

from tandem.engine.config import EngineConfig
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.rollout.config import AsyncConfig, RolloutConfig
from tandem.run.config import CheckpointConfig, EvaluationConfig, RunConfig
from tandem.train.config import LearnerConfig

HERE = Path(__file__).parent


def tiny() -> RunConfig:
    return RunConfig(
        name="tiny",
        steps=%d,
        model=ModelConfig(str(HERE / "model")),
        task=TaskConfig(str(HERE / "sums.py") + ":Sums", heldout_size=8),
        rollout=RolloutConfig(prompts_per_step=3, samples_per_prompt=4, max_new_tokens=24, max_turns=2),
        engine=EngineConfig(kv_memory_bytes=4 << 20),
        learner=LearnerConfig(lr=3e-3, microbatch_tokens=300),
        evaluation=EvaluationConfig(prompts=0),
        checkpoint=CheckpointConfig(every=4),
        asynchrony=AsyncConfig(mode="full", lag=2, order="completion", by_load=False),
    )
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    write_model(folder / "model", scale=10.0)
    (folder / "sums.py").write_text(TASK)
    (folder / "tiny.py").write_text(RECIPE % STEPS)
    return folder / "tiny.py"


def whole(folder: Path) -> None:
    """A finished run whose journal tells all of it: repeated to the same weights, each group chosen once."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    read = Read(folder)
    assert not read.cut
    chosen = Counter(number for fact in read.facts if fact.kind == "choose" for number in fact["numbers"])
    assert set(chosen.values()) == {1} and len(chosen) == 3 * STEPS
    begun = [fact["number"] for fact in read.facts if fact.kind == "begin"]
    assert begun == list(range(len(begun)))
    ended = Counter(fact["number"] for fact in read.facts if fact.kind == "end")
    assert set(ended.values()) == {1} and set(chosen) <= set(ended)
    again = replay(folder, on_step=lambda _: None, note=lambda _: None)
    assert [one.found for one in again] == [row["weights"] for row in rows]
    assert all(one.same and not one.other_groups for one in again)


@contextmanager
def halted_from(recipe: Path, out: Path, how: tuple[str, ...], updates: int) -> Iterator[subprocess.Popen[str]]:
    """A run that has come to so many updates in its journal."""
    journal = out / "journal.jsonl"
    with subprocess.Popen(**command(recipe, *how, out)) as running:
        until_s = time.monotonic() + WAIT_S
        try:
            while not journal.is_file() or journal.read_bytes().count(b'"update"') < updates:
                if running.poll() is not None:
                    break
                assert time.monotonic() < until_s
                time.sleep(0.002)
            yield running
        finally:
            running.kill()
            running.wait()


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_moment_it_goes_on(recipe: Path, tmp_path: Path, seed: int) -> None:
    """A kill that loses a finished group, has one trained twice, or leaves a run that nobody can repeat."""
    drawn = random.Random(seed)
    out = tmp_path / "run"
    known: list[list[str]] = []
    for kill in range(2):
        wanted = drawn.randrange(1, 10) + (10 * kill)
        resumed = ("--resume",) if kill else ("--out",)
        with halted_from(recipe, out, resumed, wanted) as running:
            time.sleep(drawn.random() * 0.05)
            running.send_signal(signal.SIGKILL)
        facts = [json.loads(line) for line in (out / "journal.jsonl").read_bytes().splitlines() if line.endswith(b"}")]
        known.append([fact["weights"] for fact in facts if fact["fact"] == "update"])
    result = train(recipe, "--resume", out)
    assert result.returncode == 0, result.stderr
    final = [fact["weights"] for fact in Read(out).facts if fact.kind == "update"]
    for updates in known:
        assert final[: len(updates)] == updates
    whole(out)


def test_stopped_it_goes_on_where_it_stood(recipe: Path, tmp_path: Path) -> None:
    """Ctrl-C that drops what runs or waits: programs begin anew, or groups are asked for twice."""
    out = tmp_path / "run"
    with halted(recipe, out, rows=5) as running:
        running.send_signal(signal.SIGINT)
        running.send_signal(signal.SIGCONT)
        assert running.wait(WAIT_S) == 130
    result = train(recipe, "--resume", out)
    assert result.returncode == 0, result.stderr
    whole(out)
