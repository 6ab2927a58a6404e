"""A learner in a process of its own: the same run; and where it is lost, an error that says so and a run to go on."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tandem.config import override
from tandem.errors import CheckpointError, ConfigError, NonFiniteError, WorkerDied, WorkerStalled
from tandem.kernels.build.toolchain import compiler
from tandem.run.config import CheckpointConfig, RunConfig
from tandem.run.parts import Parts
from tests.grid import crossed
from tests.placed import APART, STEPS, closes, patience_s, resumed, run, same, struck, tiny

pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels are not batch-invariant")
BOTH = replace(APART, learner="apart")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> RunConfig:
    config = tiny(tmp_path_factory.mktemp("learner"), write_model)
    return replace(config, checkpoint=CheckpointConfig(every=1, keep=9))


@pytest.fixture(scope="module")
def plain(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(config, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("transport", ["memory", "folder", "broadcast"])
def test_a_run_with_its_learner_apart_is_the_same_run(config, plain, tmp_path, transport):
    """A run whose weights hang on where its learner lives, or whose checkpoints lack what a resume here needs."""
    folder = str(tmp_path / "shared") if transport == "folder" else ""
    workers = replace(BOTH, transport=transport, folder=folder)
    out = tmp_path / "run"
    same(run(replace(config, workers=workers), out, last=STEPS - 1), plain[:STEPS])
    closes(out)
    assert not folder or list(Path(folder).iterdir()) == []
    plan = json.loads((out / "plan.json").read_text())
    assert plan["workers"] == "local" and plan["parameters"] > 10_000
    same(resumed(config, out), plain)  # by a learner here
    closes(out)


def test_a_run_goes_on_with_its_learner_apart(config, plain, tmp_path):
    """A learner elsewhere that begins anew where a run is taken up, or whose learning rate does."""
    out = tmp_path / "run"
    run(config, out, last=STEPS - 1)
    same(resumed(replace(config, workers=BOTH), out), plain)


def lost(phase: str, fault: signal.Signals, hit: list[int]) -> Callable[[Parts], None]:
    """The learner's process, when it is asked something of a phase after the first step."""

    def watch(parts: Parts) -> None:
        learner = parts.learner
        assert learner is not None
        ask = learner.ask

        def faulty(asked: str, method: str, *given: Any, **named: Any) -> Any:
            version = parts.publisher.version
            if asked == phase and not hit and version is not None and version.step == 1:
                hit.append(ask("start", "pid"))
                os.kill(hit[0], fault)
            return ask(asked, method, *given, **named)

        learner.ask = faulty  # type: ignore[method-assign]

    return watch


@pytest.mark.parametrize(("phase", "fault"), crossed(["learn", "publish", "save"], [signal.SIGKILL, signal.SIGSTOP]))
def test_a_run_whose_learner_is_lost_stops_and_resumes(config, plain, tmp_path, phase, fault):
    """A run that hangs with its learner, ends by a traceback, leaves half a checkpoint, or resumes to other weights."""
    hit, out = list[int](), tmp_path / "run"
    kind = WorkerDied if fault == signal.SIGKILL else WorkerStalled
    with pytest.raises(kind, match=f"worker learner, phase {phase}: ") as caught:
        run(replace(config, workers=replace(BOTH, deadline_s=patience_s(fault))), out, lost(phase, fault, hit))
    assert hit and (caught.value.worker, caught.value.phase) == ("learner", phase)
    saved = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert saved in (["step-1"], []) if phase == "save" else saved == ["step-1"], saved
    same(resumed(replace(config, workers=BOTH), out), plain)
    closes(out)


@pytest.mark.parametrize("updated", [False, True])
def test_what_is_saved_of_a_step_that_raised(config, tmp_path, updated):
    """Weights of a step that was half learned, saved as those of the step before; or a finished step that is not."""

    def watch(parts: Parts) -> None:
        learner = parts.learner
        assert learner is not None
        ask = learner.ask

        def raising(phase: str, method: str, *given: Any, **named: Any) -> Any:
            if method != "step" or learner.ask("learn", "updates") == 0:
                return ask(phase, method, *given, **named)
            if updated:
                ask(phase, method, *given, **named)
            raise NonFiniteError("the gradient norm is nan.")

        learner.ask = raising  # type: ignore[method-assign]

    once = replace(config, workers=BOTH, checkpoint=CheckpointConfig())
    with pytest.raises(NonFiniteError, match=r"^step 2: the gradient norm is nan\."):
        run(once, tmp_path / "run", watch)
    saved = [path.name for path in (tmp_path / "run").glob("checkpoints/*")]
    assert saved == ([] if updated else ["step-1"]), saved


@pytest.mark.parametrize("fault", [pytest.param(signal.SIGKILL, marks=pytest.mark.grid), signal.SIGSTOP])
def test_an_engine_lost_beside_a_learner_apart(config, plain, tmp_path, fault):
    """An engine that is met again by a learner elsewhere, and gets other weights or none."""
    hit: list[int] = []
    workers = replace(BOTH, transport="broadcast", deadline_s=patience_s(fault))
    with pytest.warns(match="worker engine, phase publish: .* In its place another is started"):
        rows = run(replace(config, workers=workers), tmp_path / "run", struck("publish", fault, hit))
    assert len(hit) == 1
    same(rows, plain)
    closes(tmp_path / "run")


def test_an_engine_that_departs_from_a_learner_apart(config, tmp_path):
    """An evaluation, which asks the learner's own policy, by the engine's rounded weights."""
    rounded = override(config, {"engine.weights": "int8", "algo.correction.form": "decoupled"})
    plain = run(rounded, tmp_path / "plain")
    same(run(replace(rounded, workers=BOTH), tmp_path / "run"), plain)
    closes(tmp_path / "run")


def test_a_checkpoint_that_cannot_be_written(config, tmp_path, monkeypatch):
    """A full disk that comes as a learner's fault, or that stops a run in silence."""

    def watch(parts: Parts) -> None:
        learner = parts.learner
        assert learner is not None
        save = learner.save
        monkeypatch.setattr(learner, "save", lambda directory, *given: save(Path("/proc/none"), *given))

    with pytest.raises(CheckpointError, match="worker learner, phase save: /proc/none could not be written"):
        run(replace(config, workers=BOTH), tmp_path / "run", watch)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workers.backend": "none", "workers.learner": "apart"}, "workers.learner is apart, and workers.backend none"),
        ({"algo.advantage": "gae"}, "a critic lives with the loop"),
    ],
)
def test_what_does_not_go_with_it(config, tmp_path, changes, said):
    """A setting that is left out in silence, or fails in the middle of a run."""
    base = replace(config, workers=BOTH)
    with pytest.raises(ConfigError, match=said):
        run(override(base, changes), tmp_path / "run")
