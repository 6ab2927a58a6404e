"""Runs that sample while they learn, their engines and learner in processes of their own: each is repeated in one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem.config import override
from tandem.errors import ConfigError, TandemWarning
from tandem.kernels.build.toolchain import compiler
from tandem.run import local
from tandem.run.apart import RemoteEngine
from tandem.run.config import RunConfig
from tandem.run.parts import Parts
from tests.display import Silent
from tests.grid import crossed
from tests.multi.test_asynchronous import FULL, STEPS, repeated, tiny
from tests.placed import closes, patience_s, pid

__all__ = ["tiny"]
pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels' bits depend on the batch")
TURNS = {"rollout.max_turns": "2"}
ENGINE = {"workers.backend": "local", "workers.deadline_s": "60"}
BOTH = {**ENGINE, "workers.learner": "apart", "evaluation.prompts": "4", "evaluation.every": "2"}
EVALUATED = {"evaluation.prompts": "4", "evaluation.every": "2"}


def trained(config: RunConfig, out: Path) -> list[str]:
    """The weights after each step."""
    code, folder = local.train(config, out=out, resume=None, display=Silent())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert code == 0 and [row["step"] for row in rows if row["step"]] == list(range(1, STEPS + 1))
    return [row["weights"] for row in rows if row["step"]]


def same_when_repeated(folder: Path, found: list[str]) -> None:
    """By one engine in this process, from the run's journal."""
    assert [(one.recorded, one.found, one.other_groups) for one in repeated(folder)] == [(one, one, 0) for one in found]


@pytest.mark.parametrize("where", [ENGINE, {**ENGINE, "workers.learner": "apart"}], ids=["engine", "both"])
def test_at_lag_0_it_is_the_loop_in_steps(tiny: RunConfig, tmp_path: Path, where: dict[str, str]) -> None:
    """An engine elsewhere that goes on with a program as another, or that draws before its weights have come."""
    config = override(tiny, TURNS)
    plain = trained(config, tmp_path / "sync")
    ahead = override(config, {"asynchrony.mode": "full", "asynchrony.lag": "0", **where})
    assert trained(ahead, tmp_path / "ahead") == plain and len(set(plain)) == STEPS
    closes(tmp_path / "ahead", in_flight=True)


ARMS: dict[str, dict[str, str]] = {
    "carry": {**FULL, **EVALUATED},
    "restart": {**FULL, "asynchrony.at_update": "restart"},
    "finish": {**FULL, "asynchrony.at_update": "finish"},
    "by load": {"asynchrony.mode": "full"},
    "stream": {**FULL, "asynchrony.stream": "true"},
    "two": {**FULL, "engine.replicas": "2"},
    "both": {**FULL, **BOTH},
    "both, int8": {**FULL, **BOTH, "engine.weights": "int8", "algo.correction.form": "decoupled"},
}


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_is_repeated_in_one_process(tiny: RunConfig, tmp_path: Path, arm: str) -> None:
    """Tokens, versions or an order that hang on where a run's parts lived; a token or a second without a fate."""
    found = trained(override(tiny, {**TURNS, **ENGINE, **ARMS[arm]}), tmp_path / "run")
    assert len(set(found)) == STEPS
    same_when_repeated(tmp_path / "run", found)
    closes(tmp_path / "run", in_flight=True)


def test_weights_that_change_under_running_requests(tiny: RunConfig, tmp_path: Path) -> None:
    """A version that a worker takes in the middle of a slice, or that is told of tokens which others drew."""
    found = trained(override(tiny, {**TURNS, **ENGINE, **FULL, "asynchrony.at_update": "keep"}), tmp_path / "run")
    assert len(set(found)) == STEPS
    closes(tmp_path / "run", in_flight=True)


@pytest.mark.parametrize(("phase", "fault"), crossed(["rollout", "publish"], [signal.SIGKILL, signal.SIGSTOP]))
def test_an_engine_that_is_lost_ahead(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, fault: signal.Signals
) -> None:
    """A thread that waits for a lost engine, and the learner for it; programs that are lost or go on twice."""
    hit: list[int] = []
    build = local.build_parts

    def watched(*given: Any, **named: Any) -> Parts:
        parts = build(*given, **named)
        engine = parts.engine
        assert isinstance(engine, RemoteEngine)
        engine.seat.ask = struck(engine, engine.seat.ask)  # type: ignore[method-assign]
        return parts

    def struck(engine: RemoteEngine, ask: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(asked: str, *given: Any, **named: Any) -> Any:
            if asked == phase and engine.version.step == 1 and not hit:
                hit.append(pid(engine))
                os.kill(hit[0], fault)
            return ask(asked, *given, **named)

        return faulty

    monkeypatch.setattr(local, "build_parts", watched)
    config = override(tiny, {**TURNS, **ENGINE, **FULL, "workers.deadline_s": f"{patience_s(fault)}"})
    with pytest.warns(TandemWarning, match=f"worker engine, phase {phase}: .* In its place another is started"):
        found = trained(config, tmp_path / "run")
    assert len(hit) == 1
    monkeypatch.undo()
    same_when_repeated(tmp_path / "run", found)
    closes(tmp_path / "run", in_flight=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({**ENGINE, "sync.lag": "1"}, "workers.backend is local and sync.lag 1"),
        ({**FULL, **BOTH, "asynchrony.stream": "true"}, "workers.learner is apart and asynchrony.stream True"),
        ({**FULL, **BOTH, "asynchrony.at_update": "keep"}, "workers.learner is apart and asynchrony.at_update keep"),
    ],
)
def test_what_does_not_go_together(tiny: RunConfig, tmp_path: Path, changes: dict[str, str], said: str) -> None:
    """A setting that is left out in silence, or that fails in the middle of a run."""
    with pytest.raises(ConfigError, match=said):
        trained(override(tiny, changes), tmp_path / "run")
