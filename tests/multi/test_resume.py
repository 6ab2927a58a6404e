"""`tandem train` killed, interrupted, out of disk, and resumed to the weights of a run never stopped."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

STEPS = 16
WAIT_S = 120.0
SOURCES = Path(__file__).parents[2] / "src"
RECIPE = """
from pathlib import Path

from tandem.algo.config import AlgoConfig
from tandem.engine.config import EngineConfig
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.rollout.config import RolloutConfig
from tandem.run.config import CheckpointConfig, EvaluationConfig, RunConfig
from tandem.train.config import LearnerConfig

HERE = Path(__file__).parent


def tiny_sums() -> RunConfig:
    return RunConfig(
        name="tiny_sums",
        steps=%d,
        model=ModelConfig(str(HERE / "model")),
        task=TaskConfig("jsonl", path=str(HERE / "sums.jsonl"), reward="last_number", heldout_size=8),
        rollout=RolloutConfig(prompts_per_step=4, samples_per_prompt=8, max_new_tokens=12),
        engine=EngineConfig(kv_memory_bytes=4 << 20),
        algo=AlgoConfig(kl="k3", kl_weight=0.01),
        learner=LearnerConfig(lr=3e-3, warmup_steps=4, microbatch_tokens=400),
        evaluation=EvaluationConfig(prompts=4),
        checkpoint=CheckpointConfig(every=3),
    )
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Path:
    """A recipe file beside its model and its task."""
    folder = tmp_path_factory.mktemp("recipe")
    write_model(folder / "model")
    sums = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8) if a + b < 10]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    (folder / "tiny.py").write_text(RECIPE % STEPS)
    return folder / "tiny.py"


def command(*arguments: object) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCES), "MPLBACKEND": "agg"}
    return {
        "args": [sys.executable, "-m", "tandem.cli.main", "train", *map(str, arguments), "--json"],
        "env": environment,
        "text": True,
        "stderr": subprocess.PIPE,
        "stdout": subprocess.DEVNULL,
    }


def train(*arguments: object, before: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**command(*arguments), check=False, timeout=WAIT_S, preexec_fn=before)


@contextmanager
def halted(recipe: Path, out: Path, rows: int) -> Iterator[subprocess.Popen[str]]:
    """A run stopped in its tracks (SIGSTOP) once it has written `rows` rows, wherever it then is."""
    metrics = out / "metrics.jsonl"
    with subprocess.Popen(**command(recipe, "--out", out)) as running:
        try:
            until_s = time.monotonic() + WAIT_S
            while not metrics.is_file() or metrics.read_bytes().count(b"\n") < rows:
                assert running.poll() is None and time.monotonic() < until_s, running.stderr and running.stderr.read()
                time.sleep(0.002)
            running.send_signal(signal.SIGSTOP)
            yield running
        finally:
            running.kill()
            running.wait()


def weights(folder: Path) -> dict[int, str]:
    """The hash of the weights after each step; every step once."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)), steps
    return {row["step"]: row["weights"] for row in rows}


def saved(folder: Path) -> dict[str, bytes]:
    """The newest checkpoint, less the ledger's seconds."""
    newest = max((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    files = {str(path.relative_to(newest)): path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    state = json.loads(files.pop("state.json"))
    state.pop("ledger")
    return {**files, "state": json.dumps([newest.name, state]).encode()}


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """A run never stopped."""
    folder = recipe.parent / "whole"
    result = train(recipe, "--out", folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def interrupted(recipe: Path) -> Path:
    """A run that Ctrl-C ended after some steps."""
    folder = recipe.parent / "interrupted"
    with halted(recipe, folder, rows=6) as running:
        second = train(recipe, "--resume", folder)
        assert second.returncode == 2 and f"in use by process {running.pid}" in second.stderr, second.stderr
        running.send_signal(signal.SIGINT)
        running.send_signal(signal.SIGCONT)
        assert running.wait(WAIT_S) == 130
    return folder


def same_run(folder: Path, whole: Path) -> None:
    assert weights(folder) == weights(whole)
    assert saved(folder) == saved(whole)


def test_a_config_gives_its_weights(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """Two runs of a config differ: something random is not derived from the seed."""
    hashes = weights(whole)
    assert list(hashes) == list(range(STEPS + 1)) and len(set(hashes.values())) > STEPS // 2  # it did learn
    assert train(recipe, "--out", tmp_path / "again").returncode == 0
    same_run(tmp_path / "again", whole)


def test_killed_and_resumed(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """A run killed at any moment loses more than its last checkpoint, or resumes on another path."""
    rows = random.SystemRandom().randint(2, STEPS)
    with halted(recipe, tmp_path / "run", rows) as running:
        running.kill()
        assert running.wait(WAIT_S) == -signal.SIGKILL, rows
    result = train(recipe, "--resume", tmp_path / "run")
    assert result.returncode == 0, (rows, result.stderr)
    same_run(tmp_path / "run", whole)


def test_interrupted_and_resumed(recipe: Path, whole: Path, interrupted: Path, tmp_path: Path) -> None:
    """Ctrl-C loses the step, exits with 0 or is resumed elsewhere; a second process writes into a run in use."""
    folder = shutil.copytree(interrupted, tmp_path / "run")
    done = weights(folder)
    last = max(done)
    assert 5 <= last < STEPS and (folder / "checkpoints" / f"step-{last}").is_dir()
    assert done == {step: digest for step, digest in weights(whole).items() if step <= last}
    result = train(recipe, "--resume", folder)
    assert result.returncode == 0, result.stderr
    same_run(folder, whole)


def test_resume_with_another_config(recipe: Path, interrupted: Path) -> None:
    """A resumed run goes on with other settings in silence, or does not say which differ."""
    before = weights(interrupted)
    result = train(recipe, "--resume", interrupted, "--set", "learner.lr=0.5", "--set", "steps=99")
    assert result.returncode == 2
    assert "learner.lr: 0.003 -> 0.5" in result.stderr and "steps:" not in result.stderr
    assert "Traceback" not in result.stderr and weights(interrupted) == before


def test_full_disk(recipe: Path, whole: Path, interrupted: Path, tmp_path: Path) -> None:
    """A checkpoint that cannot be written damages the last good one, leaves a part, or ends in a traceback."""
    folder = shutil.copytree(interrupted, tmp_path / "run")
    before, last = saved(folder), max(weights(folder))
    largest = max(len(content) for content in before.values())
    assert (whole / "metrics.jsonl").stat().st_size < largest // 2  # so that only a checkpoint meets the limit
    limit = (largest // 2, largest // 2)
    result = train(recipe, "--resume", folder, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert result.returncode == 1, result.stderr
    assert "could not be written" in result.stderr and f"step-{last}" in result.stderr
    assert "Traceback" not in result.stderr
    assert saved(folder) == before and not list((folder / "checkpoints").glob("*partial*"))
    result = train(recipe, "--resume", folder)
    assert result.returncode == 0, result.stderr
    same_run(folder, whole)
