"""Asynchronous runs: at lag 0 the loop in steps to the bit; repeated, killed and resumed to the same weights."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem.config import override
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.errors import RunFolderError, WorkerError, WorldError
from tandem.kernels.build.toolchain import compiler
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.rollout.config import RolloutConfig
from tandem.run import asynchronous, cores, local
from tandem.run.config import EvaluationConfig, RunConfig
from tandem.run.journal import FACTS, VERSION, Journal, Read
from tandem.run.replay import Repeated, replay
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


FULL = {"asynchrony.mode": "full", "asynchrony.lag": "2", "asynchrony.by_load": "false"}
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
    "stream": {**FULL, "asynchrony.stream": "true", "asynchrony.order": "completion", "asynchrony.replay_uses": "2"},
}


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_learns(tiny: RunConfig, tmp_path: Path, arm: str) -> None:
    """An arm that hangs, loses a group, trains one twice, counts a prompt that is run anew as run for the first time,
    or leaves a journal that tells less than what happened."""
    config = override(tiny, {**ARMS[arm], "rollout.max_turns": "2"})
    found = trained(config, tmp_path / "run")
    assert len(set(found)) == STEPS
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(row["tokens_per_s"] for row in rows)
    read = Read(tmp_path / "run")
    assert not read.cut
    updates = [fact["weights"] for fact in read.facts if fact.kind == "update"]
    assert updates == found
    chosen = [number for fact in read.facts if fact.kind == "choose" for number in fact["numbers"]]
    assert len(set(chosen)) == len(chosen)
    ended = {fact["number"] for fact in read.facts if fact.kind == "end"}
    assert set(chosen) <= ended
    if arm == "restart":
        assert json.loads((tmp_path / "run" / "ledger.json").read_text())["engine"]["repeated"] > 0
    if arm == "keep":
        with pytest.raises(RunFolderError, match="at_update=keep"):
            repeated(tmp_path / "run")
        return
    for workers in (1, 2):
        again = repeated(tmp_path / "run", workers)
        assert [(one.recorded, one.found, one.other_groups) for one in again] == [(one, one, 0) for one in found]


def repeated(folder: Path, workers: int = 1) -> list[Repeated]:
    return replay(folder, workers=workers, on_step=lambda _: None, note=lambda _: None)


def test_a_run_in_steps_is_repeated_too(tiny: RunConfig, tmp_path: Path) -> None:
    """A verb that knows asynchronous runs alone, or a run that hangs on more than its config."""
    found = trained(tiny, tmp_path / "run")
    assert [(one.recorded, one.found) for one in repeated(tmp_path / "run")] == [(one, one) for one in found]


def changed(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """The journal's facts, changed by hand."""
    path = folder / "journal.jsonl"
    facts = [json.loads(line) for line in path.read_text().splitlines()]
    change(facts)
    path.write_text("".join(json.dumps(fact) + "\n" for fact in facts))


def test_another_choice_parts_there(tiny: RunConfig, tmp_path: Path) -> None:
    """A repetition that reads the hashes from the journal, or that a changed choice does not reach."""
    config = override(tiny, {**FULL, "asynchrony.order": "completion", "rollout.max_turns": "2"})
    trained(config, tmp_path / "run")

    def change(facts: list[dict[str, Any]]) -> None:
        place, choice = next((i, f) for i, f in enumerate(facts) if f["fact"] == "choose" and f["step"] == 2)
        chosen = {number for fact in facts if fact["fact"] == "choose" for number in fact["numbers"]}
        left = [f["number"] for f in facts[:place] if f["fact"] == "end" and f["number"] not in chosen]
        later = next(f for f in facts[place + 1 :] if f["fact"] == "choose")
        if left:
            choice["numbers"][0] = left[0]
        else:  # all were chosen: two steps change a group that had ended by then
            ended = {f["number"] for f in facts[:place] if f["fact"] == "end"}
            at = next((i for i, number in enumerate(later["numbers"]) if number in ended), None)
            if at is None:
                choice["numbers"].pop()
            else:
                choice["numbers"][0], later["numbers"][at] = later["numbers"][at], choice["numbers"][0]

    changed(tmp_path / "run", change)
    same = [one.same for one in repeated(tmp_path / "run")]
    assert same == [True, False, False, False]


def test_a_journal_that_was_cut_is_repeated_to_the_cut(tiny: RunConfig, tmp_path: Path) -> None:
    """A torn line, or a group that was not written whole, taken for a fact; or a repetition that gives up."""
    found = trained(override(tiny, FULL), tmp_path / "run")
    path = tmp_path / "run" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    third = next(i for i, line in enumerate(lines) if b'"update","step":3' in line)
    path.write_bytes(b"".join(lines[:third]) + lines[third][:-7])
    notes: list[str] = []
    again = replay(tmp_path / "run", on_step=lambda _: None, note=notes.append)
    assert [one.found for one in again] == found[:2]
    assert "the journal was cut" in notes[0] and f"line {third + 1}" in notes[0]
    groups = tmp_path / "run" / "journal.bin"
    groups.write_bytes(groups.read_bytes()[:-5])
    read = Read(tmp_path / "run")
    assert all(fact["at"] + fact["bytes"] <= groups.stat().st_size for fact in read.facts if fact.kind == "end")


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    """Groups of another layout that are read for what they are not: another batch, told as repeated."""
    with Journal(tmp_path) as journal:
        journal.start("9f2c")
    path = tmp_path / FACTS
    assert not Read(tmp_path).cut
    path.write_text(path.read_text().replace(f'"version":{VERSION}', f'"version":{VERSION - 1}'))
    with pytest.raises(RunFolderError, match="another version of tandem"):
        Read(tmp_path)


@pytest.mark.parametrize("room", [26_000, 41_000, 52_000])
def test_a_disk_that_fills_ends_the_run_and_it_goes_on(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """A journal with half a fact in its midst, or an error of the thread that nobody sees."""
    config, write = override(tiny, FULL), os.write

    def full(descriptor: int, content: Any) -> int:
        nonlocal room
        if "journal" in os.readlink(f"/proc/self/fd/{descriptor}"):
            if room <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            room -= len(content)
            content = content[: max(1, room)]
        return write(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(WorldError, match="journal.*Free some space"):
            local.train(config, out=tmp_path / "run", resume=None, display=Silent())
    tokens = json.loads((tmp_path / "run" / "ledger.json").read_text())["tokens"]
    assert tokens.pop("total") == sum(tokens.values()) > 0 and "unaccounted" not in tokens
    before = len(Read(tmp_path / "run").facts)
    code, _ = local.train(config, out=None, resume=tmp_path / "run", display=Silent())
    read = Read(tmp_path / "run")
    assert code == 0 and not read.cut and len(read.facts) > before > 2
    assert all(one.same for one in repeated(tmp_path / "run"))


def test_an_engine_that_stands_still_is_said(tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the engine that never ends, and a learner that waits for it for ever."""
    monkeypatch.setattr(asynchronous, "LOOK_S", 0.05)
    monkeypatch.setattr(asynchronous, "GRACE_S", 0.1)
    stuck, step = threading.Event(), asynchronous.Taking.step

    def stand(self: Any) -> Any:
        return stuck.wait(60.0) if self.engine.stats.sampled_tokens > 500 else step(self)

    monkeypatch.setattr(asynchronous.Taking, "step", stand)
    config = override(tiny, {**FULL, "rollout.deadline_s": "2"})
    try:
        with pytest.raises(WorkerError, match="worker rollouts, phase .*: a step of the engine has taken 2 s"):
            local.train(config, out=tmp_path / "run", resume=None, display=Silent())
    finally:
        stuck.set()


def test_one_that_has_the_cores_is_said(tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner that waits for ever for the cores that a step of the engine does not give back."""
    monkeypatch.setattr(cores, "LOOK_S", 0.05)
    monkeypatch.setattr(asynchronous, "LOOK_S", 0.05)
    monkeypatch.setattr(asynchronous, "GRACE_S", 0.1)
    learns, stands, stuck = threading.Event(), threading.Event(), threading.Event()
    score, step = asynchronous.AsyncSession.score, Engine.step

    def scored(self: Any, batch: Any) -> Any:
        if self.settled[0] == 1:  # what began with the update before still runs
            learns.set()
            assert stands.wait(60.0)
        return score(self, batch)

    def stand(self: Any) -> Any:
        if learns.is_set():
            stands.set()
            stuck.wait(60.0)
        return step(self)

    monkeypatch.setattr(asynchronous.AsyncSession, "score", scored)
    monkeypatch.setattr(Engine, "step", stand)
    try:
        with pytest.raises(WorkerError, match="worker rollouts, phase .*: a step of the engine has taken 2 s"):
            config = override(tiny, {**FULL, "rollout.deadline_s": "2"})
            local.train(config, out=tmp_path / "run", resume=None, display=Silent())
    finally:
        stuck.set()
