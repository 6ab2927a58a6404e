"""`tandem train` killed, interrupted, out of disk, and resumed to the weights of a run never stopped."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import random
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.config import override
from tandem.errors import EnvironmentFailure
from tandem.run import local, session
from tandem.run.config import CheckpointConfig
from tandem.run.folder import latest_checkpoint, saved_config
from tests.display import Silent

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


def train(
    *arguments: object, before: Callable[[], None] | None = None, halted: bool = False
) -> subprocess.CompletedProcess[str]:
    """halted: it goes on from a run that a signal held, for seconds that are of no phase where it was between two."""
    done = subprocess.run(**command(*arguments), check=False, timeout=WAIT_S, preexec_fn=before)
    assert halted or "does not close" not in done.stderr, done.stderr
    return done


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
    state, manifest = json.loads(files.pop("state.json")), json.loads(files.pop("manifest.json"))
    for name in ("ledger", "clock"):
        state["parts"].pop(name)
    manifest["xxh3_128"].pop("state.json")
    return {**files, "state": json.dumps([newest.name, state, manifest]).encode()}


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


def fates(folder: Path) -> dict[str, int]:
    """Tokens of a ledger that closes, but for what kills and resumes cost."""
    ledger = json.loads((folder / "ledger.json").read_text())
    tokens = ledger["tokens"]
    assert tokens.pop("total") == sum(tokens.values()) and "unaccounted" not in tokens
    for phases in ledger["nanoseconds"].values():
        assert phases.pop("wall") == sum(phases.values())
    assert {name: ledger["audit"][name] for name in ("lost", "strange", "beyond", "open", "waiting")} == {
        "lost": 0, "strange": 0, "beyond": 0, "open": 0, "waiting": 0
    }  # fmt: skip
    return {fate: number for fate, number in tokens.items() if fate not in ("discarded", "interrupted")}


def same_run(folder: Path, whole: Path) -> None:
    assert weights(folder) == weights(whole)
    assert saved(folder) == saved(whole)
    assert fates(folder) == fates(whole)


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
    result = train("--resume", folder, halted=True)  # which says all that the recipe did
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
    result = train(
        recipe, "--resume", folder, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit), halted=True
    )
    assert result.returncode == 1, result.stderr
    assert "could not be written" in result.stderr and f"step-{last}" in result.stderr
    assert "Traceback" not in result.stderr
    assert saved(folder) == before and not list((folder / "checkpoints").glob("*partial*"))
    result = train(recipe, "--resume", folder, halted=True)
    assert result.returncode == 0, result.stderr
    same_run(folder, whole)


def rows_within(folder: Path, count: int, running: subprocess.Popen[Any], drain: Callable[[], object]) -> None:
    """Wait until a run has written `count` rows; `drain` reads what it prints meanwhile."""
    until_s, metrics = time.monotonic() + WAIT_S, folder / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < count:
        assert running.poll() is None and time.monotonic() < until_s
        drain()


def test_a_closed_terminal_saves(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """The window is closed, or the connection lost: SIGHUP ends the run with nothing saved since the last interval."""
    ours, theirs = pty.openpty()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    folder = tmp_path / "run"
    asked = command(recipe, "--out", folder, "--set", "checkpoint.every=0")
    asked |= {"stdin": theirs, "stdout": theirs, "stderr": theirs, "preexec_fn": own_terminal}
    with subprocess.Popen(**asked) as running:
        os.close(theirs)
        rows_within(folder, 5, running, lambda: os.read(ours, 1 << 16))
        os.close(ours)
        assert running.wait(WAIT_S) == 128 + signal.SIGHUP
    last = max(weights(folder))
    assert 4 <= last < STEPS and latest_checkpoint(folder).step == last  # type: ignore[union-attr]
    result = train(recipe, "--resume", folder)
    assert result.returncode == 0, result.stderr
    same_run(folder, whole)


def test_a_closed_pipe_changes_nothing(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """`| head -2` ends the run at its third row; or it goes on, and nothing in its folder says why nobody saw it."""
    folder = tmp_path / "run"
    with subprocess.Popen(**{**command(recipe, "--out", folder), "stdout": subprocess.PIPE}) as running:
        assert running.stdout is not None and running.stderr is not None
        fcntl.fcntl(running.stdout, fcntl.F_SETPIPE_SZ, 4096)  # so that the run is not over before this reads
        for _ in range(2):
            assert json.loads(running.stdout.readline())["weights"]
        running.stdout.close()
        said = running.stderr.read()
        assert running.wait(WAIT_S) == 0 and "Traceback" not in said and "report.html" in said, said
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["output_lost"] == {"stdout": "Broken pipe"} and "output_lost" not in rows[0]
    same_run(folder, whole)


def test_without_a_checkpoint_nothing_is_lost(recipe: Path, whole: Path, interrupted: Path, tmp_path: Path) -> None:
    """A resume that finds no checkpoint replaces rows and trajectories in silence; a torn last row blocks it."""
    folder = shutil.copytree(interrupted, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    before = (folder / "metrics.jsonl").read_text()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "rew\n')
    kept = {path.name: path.read_bytes() for path in (folder / "trajectories").iterdir()}
    result = train(recipe, "--resume", folder)
    aside = folder / "set_aside" / "after-step-0.1"
    assert result.returncode == 0 and f"there is no checkpoint: what is there of step 0-{len(kept)}" in result.stderr
    assert (aside / "metrics.jsonl").read_text() == before and str(aside) in result.stderr
    assert {path.name: path.read_bytes() for path in aside.glob("step-*")} == kept
    ledger = json.loads((folder / "ledger.json").read_text())
    assert ledger["tokens"]["discarded"] == sum(json.loads(row)["drawn_tokens"] for row in before.splitlines()) > 0
    same_run(folder, whole)


def test_a_flipped_bit_is_named(recipe: Path, whole: Path, interrupted: Path, tmp_path: Path) -> None:
    """Moments or weights that the disk changed are trained on; or there is no way back to the checkpoint before."""
    folder = shutil.copytree(interrupted, tmp_path / "run")
    newest = latest_checkpoint(folder)
    assert newest is not None
    damaged = newest.path / "optimiser-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-random.SystemRandom().randrange(1, len(content) // 2)] ^= (
        0x10  # in a tensor, where its format sees nothing
    )
    damaged.write_bytes(content)
    before = (folder / "metrics.jsonl").read_bytes()
    result = train(recipe, "--resume", folder)
    assert result.returncode == 2 and f"{damaged} is not what was saved" in result.stderr, result.stderr
    assert f"Remove {newest.path} to go on" in result.stderr and "Traceback" not in result.stderr
    assert (folder / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(newest.path)
    result = train(recipe, "--resume", folder)
    assert result.returncode == 0 and "the newest checkpoint is of step" in result.stderr, result.stderr
    same_run(folder, whole)


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from tandem.cli.main import main
from tandem.run import folder
from tandem.train import checkpoint
calls, fatal = 0, int(sys.argv.pop(1))

def before(original):
    def wrapped(*given, **named):
        global calls
        calls += saving
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given, **named)
    return wrapped

saving = 0
save = checkpoint.save

def second(directory, decoder, optimisers, tokenizer, state):
    global saving
    saving = int(state.step > 3)
    save(directory, decoder, optimisers, tokenizer, state)

checkpoint.save = second
for module, name in ((os, "fsync"), (shutil, "rmtree"), (Path, "rename"), (checkpoint, "save_file"),
                     (checkpoint, "file_hash"), (Path, "write_text")):
    setattr(module, name, before(getattr(module, name)))
sys.exit(main())
"""


@pytest.mark.parametrize("part", range(2))
def test_killed_in_a_save(recipe: Path, whole: Path, tmp_path: Path, part: int) -> None:
    """A kill between two phases of a save leaves a checkpoint without its hashes, or none."""
    fatal = random.SystemRandom().randrange(1 + 14 * part, 15 + 14 * part)
    asked = command(recipe, "--out", tmp_path / "run")
    asked["args"][1:3] = ["-c", KILLED, str(fatal)]
    killed = subprocess.run(**asked, check=False, timeout=WAIT_S)
    assert killed.returncode == -signal.SIGKILL, (fatal, killed.stderr)
    result = train(recipe, "--resume", tmp_path / "run")
    assert result.returncode == 0, (fatal, result.stderr)
    same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("stage", ["rollout", "learn", "evaluate"])
def test_what_fails_between_updates_saves(
    recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """An environment that dies in step 5 takes steps 1 to 4 with it, and the ledger; half a step is saved as one."""
    config = saved_config(whole, local.RunConfig)
    config = override(config, {"checkpoint.every": "0", "evaluation.every": "5"})
    original = getattr(local.Session, stage)

    def fails(session: local.Session, step: int, *given: Any) -> Any:
        if step == 5:
            raise EnvironmentFailure("the environment is gone")
        return original(session, step, *given)

    monkeypatch.setattr(local.Session, stage, fails)
    with pytest.raises(EnvironmentFailure):
        local.train(config, out=tmp_path / "run", resume=None, display=Silent())
    assert fates(tmp_path / "run")["trained"] > 0
    newest, last = latest_checkpoint(tmp_path / "run"), 5 if stage == "evaluate" else 4
    assert newest is not None and newest.step == last == max(weights(tmp_path / "run"))
    assert json.loads((newest.path / "state.json").read_text())["weights"] == weights(whole)[last]


@pytest.mark.parametrize(
    ("minutes", "waited_s", "took_s", "due"),
    [
        (5.0, 299.0, 0.0, False),
        (5.0, 300.0, 1.4, True),
        (5.0, 300.0, 1.6, False),  # half a percent of the time since the last one
        (5.0, 321.0, 1.6, True),
        (0.0, 1e9, 0.0, False),
    ],
)
def test_when_a_save_is_due(
    monkeypatch: pytest.MonkeyPatch, minutes: float, waited_s: float, took_s: float, due: bool
) -> None:
    """Saves that take a share of a run's time that anyone would miss, or that never come."""
    config = SimpleNamespace(checkpoint=CheckpointConfig(minutes=minutes))
    session = SimpleNamespace(config=config, saved_s=1000.0, save_took_s=took_s)
    monkeypatch.setattr(local.time, "monotonic", lambda: 1000.0 + waited_s)
    assert local.Session.time_to_save(session) is due  # type: ignore[arg-type]


def test_a_save_by_time_that_fails_ends_nothing(
    recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk with room for one checkpoint ends, after five minutes, a run that would have been stored at its end."""
    config = override(saved_config(whole, local.RunConfig), {"checkpoint.every": "0", "steps": "5"})
    save, tried = session.saved_state.save, []

    def full(directory: Path, decoder: Any, optimisers: Any, tokenizer: Any, state: Any) -> None:
        save(directory, decoder, optimisers, tokenizer, state)
        tried.append(state.step)
        if state.step < 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(session.saved_state, "save", full)
    monkeypatch.setattr(local.Session, "time_to_save", lambda self: True)
    code, folder = local.train(config, out=tmp_path / "run", resume=None, display=Silent())
    assert code == 0 and tried == [1, 2, 3, 4, 5]
    assert [entry.name for entry in (folder / "checkpoints").iterdir()] == ["step-5"]
