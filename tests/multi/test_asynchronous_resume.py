"""Asynchronous runs killed, stopped and resumed: nothing finished is lost, nothing trained twice, and all repeats."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tandem.errors import RunFolderError
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


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    out = recipe.parent / "finished"
    result = train(recipe, "--out", out)
    assert result.returncode == 0, result.stderr
    return out


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


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.grid) for seed in range(2, 6))])
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


def test_under_other_settings_it_goes_on(recipe: Path, tmp_path: Path) -> None:
    """More steps, and so other learning rates: steps that are learned again have other weights than the journal, and a
    repetition has those of the last sitting throughout."""
    out, falls = tmp_path / "run", ("--set", "learner.schedule=linear")
    with halted_from(recipe, out, (*falls, "--out"), updates=6) as running:  # a checkpoint of step 4
        running.send_signal(signal.SIGKILL)
    result = train(recipe, "--resume", out, *falls, "--set", f"steps={STEPS + 2}")
    assert result.returncode == 0, result.stderr
    again = replay(out, on_step=lambda _: None, note=lambda _: None)
    assert len(again) == STEPS + 2 and all(one.same for one in again)


def test_an_earlier_ledger_is_no_ledger(finished: Path, tmp_path: Path) -> None:
    """A run that was resumed and killed shows the tokens of an earlier sitting as if they were all."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    assert (out / "ledger.json").is_file()
    how = ("--set", f"steps={STEPS + 40}", "--resume")
    with halted_from(finished.parent / "tiny.py", out, how, updates=STEPS + 2) as running:
        running.send_signal(signal.SIGKILL)
    assert not (out / "ledger.json").exists()


def damaged(folder: Path, how: str) -> None:
    """A journal as a disk or a person leaves it; the newest checkpoint of a run of 12 steps is its last."""
    path, groups = folder / "journal.jsonl", folder / "journal.bin"
    lines = path.read_bytes().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if b'"choose","step":3' in line)
    if how == "a line":
        lines[place] = b"\0" * (len(lines[place]) - 1) + b"\n"
    elif how == "its end":
        lines = lines[:place]
    elif how == "groups":
        groups.write_bytes(groups.read_bytes()[:1000])
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize("how", ["a line", "its end", "groups"])
def test_a_journal_that_lost_what_a_checkpoint_knew_is_left_alone(finished: Path, tmp_path: Path, how: str) -> None:
    """A resume that cuts the journal off behind a damaged line, and writes on as if nothing lacked."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    recipe = finished.parent / "tiny.py"
    damaged(out, how)
    before = (out / "journal.jsonl").read_bytes()
    result = train(recipe, "--resume", out, "--set", f"steps={STEPS + 2}")
    assert result.returncode == 2 and "move both away" in result.stderr and "Traceback" not in result.stderr
    assert (out / "journal.jsonl").read_bytes() == before


def test_a_journal_moved_away_begins_behind_its_checkpoint(finished: Path, tmp_path: Path) -> None:
    """A run whose journal was moved away, as an error says, does not go on, or is repeated as if it were whole."""
    out, recipe = tmp_path / "run", finished.parent / "tiny.py"
    shutil.copytree(finished, out)
    for name in ("journal.jsonl", "journal.bin"):
        (out / name).unlink()
    with halted_from(recipe, out, ("--set", f"steps={STEPS + 4}", "--resume"), updates=2) as running:
        running.send_signal(signal.SIGKILL)
    result = train(recipe, "--resume", out, "--set", f"steps={STEPS + 4}")
    assert result.returncode == 0, result.stderr
    with pytest.raises(RunFolderError, match="begins behind step 12: what came before is gone"):
        replay(out, on_step=lambda _: None, note=lambda _: None)


def drop(facts: list[dict[str, Any]], kind: str, place: int) -> None:
    del facts[[i for i, fact in enumerate(facts) if fact["fact"] == kind][place]]


CHANGES: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str]] = {
    "a group that never ended": (lambda facts: chosen(facts, 2)["numbers"].__setitem__(0, 999), "chooses group 999"),
    "a group twice": (
        lambda facts: chosen(facts, 3)["numbers"].append(chosen(facts, 2)["numbers"][0]),
        "dropped before",
    ),
    "no begin": (lambda facts: drop(facts, "begin", 2), "begins group 3 where group 2 is due"),
    "no update": (lambda facts: drop(facts, "update", 1), "choose of step 3 where the update of step 2"),
    "no choice": (lambda facts: drop(facts, "choose", 1), "chooses for step 3 where step 2 is due"),
}


def chosen(facts: list[dict[str, Any]], step: int) -> dict[str, Any]:
    return next(fact for fact in facts if fact["fact"] == "choose" and fact["step"] == step and fact["numbers"])


@pytest.mark.parametrize("change", CHANGES)
def test_a_journal_that_contradicts_itself_is_said(finished: Path, tmp_path: Path, change: str) -> None:
    """A repetition that ends in a traceback, or goes on over a fact that cannot be."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    path = out / "journal.jsonl"
    facts = [json.loads(line) for line in path.read_text().splitlines()]
    alter, said = CHANGES[change]
    alter(facts)
    path.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    with pytest.raises(RunFolderError, match=said):
        replay(out, on_step=lambda _: None, note=lambda _: None)
    if change != "no update":  # without a checkpoint all of it is lived through again
        shutil.rmtree(out / "checkpoints")
        result = train(finished.parent / "tiny.py", "--resume", out)
        assert result.returncode == 2 and re.search(said, result.stderr), result.stderr
