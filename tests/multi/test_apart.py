"""An engine in a process of its own: the same tokens, the same run, whatever becomes of the process."""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from tandem.columns import Columns
from tandem.config import override
from tandem.engine.config import EngineConfig
from tandem.engine.driver import Driver
from tandem.errors import ConfigError, DeliveryError, TandemWarning, WorkerDied, WorkerLied, WorkerStalled
from tandem.kernels.build.toolchain import compiler
from tandem.run import apart
from tandem.run.apart import RemoteEngine, RemoteReference
from tandem.run.config import RunConfig, WorkersConfig
from tandem.run.parts import Parts, build_parts
from tandem.run.workers import Local
from tandem.types import Request, Sampling, StopReason
from tests.grid import crossed
from tests.placed import (
    APART,
    STEPS,
    closes,
    drawn,
    patience_s,
    pid,
    requests,
    resumed,
    run,
    same,
    some,
    struck,
    tiny,
    tokens,
)

pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels are not batch-invariant")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> RunConfig:
    return tiny(tmp_path_factory.mktemp("apart"), write_model)


@contextmanager
def parts_of(config: RunConfig, workers: WorkersConfig = APART) -> Iterator[Parts]:
    with (
        closing(Local(workers)) as backend,
        closing(build_parts(config.model, config.engine, workers=backend)) as parts,
    ):
        yield parts


@contextmanager
def engine_of(config: RunConfig, workers: WorkersConfig = APART) -> Iterator[RemoteEngine]:
    with parts_of(config, workers) as parts:
        assert isinstance(parts.engine, RemoteEngine)
        yield parts.engine


@pytest.fixture(scope="module")
def here(config: RunConfig) -> list[Any]:
    """What an engine in this process draws."""
    found = drawn(build_parts(config.model, config.engine).engine.generate(requests()))
    assert len({one[1]["tokens"].tobytes() for one in found}) > 8 and any(len(one[1]) == 82 for one in found)
    return found


def test_tokens_and_logprobs_are_those_of_an_engine_here(config, here):
    """A request that changes on its way, or a value that is rounded."""
    with engine_of(config) as engine:
        assert tokens(drawn(engine.generate(requests()))) == tokens(here)
        assert pid(engine) != os.getpid() and engine.stats.finished == 12 and engine.stats.sampled_tokens > 100
        engine.check_integrity()
        engine.release_memory()
        assert tokens(drawn(engine.generate(requests()))) == tokens(here)


def test_what_cannot_run_is_refused_here(config):
    """A request whose refusal ends a worker, or comes as one of its faults."""
    with engine_of(config) as engine:
        with pytest.raises(ConfigError, match="token 7777, in place 0 of 1, is outside the vocabulary"):
            engine.submit(Request("far", "far", (7777,), Sampling(), seed=1))
        with pytest.raises(ConfigError, match="empty stop string"):
            engine.submit(Request("far", "far", (7,), Sampling(stop_strings=("",)), seed=1))
        assert not engine.has_work and engine.seat.worker.ask("rollout", "clock", deadline_s=60).result() > 0


def test_withdrawn_requests_give_what_they_have(config, here):
    """Tokens of a withdrawn request that are lost, or one that comes back after it was withdrawn."""
    with engine_of(config) as engine:
        for request in requests():
            engine.submit(request)
        never = engine.abort("r11")
        assert never is not None and never.stop_reason is StopReason.ABORTED and len(never.columns) == 0
        done = some(engine)
        assert len(done) < 11
        running = next(f"r{place}" for place in reversed(range(11)) if f"r{place}" not in {d.request_id for d in done})
        part = engine.abort(running)
        assert part is not None and part.stop_reason is StopReason.ABORTED and 0 < len(part.columns)
        whole = next(one for one in here if one[0] == running)[1]
        assert part.columns == whole.slice(0, len(part.columns))
        while engine.has_work:
            done += engine.step()
        assert {one.request_id for one in done} == {f"r{place}" for place in range(11)} - {running}
        assert engine.abort("r3") is None


def test_tokens_of_withdrawn_requests_are_counted(config):
    """A ledger that lacks what a worker drew in its last slice, where the last to be withdrawn had not begun."""
    first, *others, last = requests()
    with engine_of(config) as engine:
        for request in (first, *others):
            engine.submit(request)
        done = some(engine)
        engine.submit(last)
        parts = [engine.abort(request.id) for request in (first, *others, last)]
        assert not engine._live and sum(part is not None for part in parts) > 4
        while engine.has_work:
            done += engine.step()
        returned = [*done, *(part for part in parts if part is not None)]
        assert sorted(one.request_id for one in returned) == sorted(request.id for request in requests())
        assert engine.stats.sampled_tokens == sum(len(one.columns) for one in returned)


def test_tokens_of_a_worker_come_on_their_way_too(config, here, monkeypatch):
    """Who asks to hear of tokens ends the run, or hears of some twice, or of none before the end."""
    monkeypatch.setattr(apart, "SLICE_S", 1e-4)  # a step
    heard: dict[str, list[Columns]] = {}
    with engine_of(config) as engine:
        driver = Driver(engine).start()
        futures = [
            driver.submit(request, lambda columns, name=request.id: heard.setdefault(name, []).append(columns))
            for request in requests()
        ]
        for future in futures:
            future.result(60)
        driver.close(60)
    assert {name: Columns.concat(parts) for name, parts in heard.items()} == {one[0]: one[1] for one in here}
    assert max(map(len, heard.values())) > 3


def test_a_race_of_groups_is_the_same_with_a_worker(config, tmp_path):
    """Groups beyond a step's batch that only an engine of the loop's own process may have."""
    changes = {"rollout.extra_prompts": "2", "rollout.stop_strings": '["1", "2", "e"]', "evaluation.prompts": "0"}
    found = [
        [
            (row["weights"], row["reward"], row["tokens"])
            for row in run(override(config, changes | more), tmp_path / name)
        ]
        for name, more in (("here", {}), ("apart", {"workers.backend": "local"}))
    ]
    assert found[0] == found[1] and len({row[0] for row in found[0]}) == STEPS


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_another_worker_draws_the_same(config, here, fault):
    """Requests that are lost with a worker, drawn otherwise by the next, or given twice."""
    with engine_of(config, replace(APART, deadline_s=patience_s(fault))) as engine:
        first = pid(engine)
        for request in requests():
            engine.submit(request)
        done = some(engine)
        assert len(done) < 12
        os.kill(first, fault)
        said = r"worker engine, phase rollout: (its process ended \(killed by signal 9\)|no answer came within 8 s)"
        with pytest.warns(TandemWarning, match=f"{said}.* In its place another is started, and asked again for"):
            while engine.has_work:
                done += engine.step()
        by_id = {one.request_id: one for one in done}
        assert len(done) == 12 and pid(engine) != first and engine.seat.replaced == 1
        assert tokens(drawn([by_id[request.id] for request in requests()])) == tokens(here)
        assert engine.stats.finished >= 12


def test_what_fails_again_ends_the_run(config):
    """A worker that is started for ever, or requests that wait for one which will never come."""
    with engine_of(config, replace(APART, restarts=1)) as engine, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for request in requests():
            engine.submit(request)
        engine.step()
        os.kill(pid(engine), signal.SIGKILL)
        engine.step()
        os.kill(pid(engine), signal.SIGKILL)
        with pytest.raises(WorkerDied, match="worker engine, phase rollout: its process ended") as caught:
            for _ in range(20):
                engine.step()
        assert caught.value.phase == "rollout"
        left = engine.abort(next(iter(engine._live)))  # by the driver, of what it has to end
        assert left is not None and left.stop_reason is StopReason.ABORTED
        engine.release_memory()


class _Lies:
    """A worker whose answer to `receive` names another version."""

    def __init__(self, worker: Any) -> None:
        self.worker, self.spec = worker, worker.spec

    def ask(self, phase: str, method: str, *arguments: Any, deadline_s: float) -> Any:
        pending = self.worker.ask(phase, method, *arguments, deadline_s=deadline_s)
        if method != "receive":
            return pending

        class Lie:
            def result(self) -> Any:
                return replace(pending.result(), digest="0" * 32)

        return Lie()

    def end(self) -> None:
        self.worker.end()


def test_a_worker_that_serves_other_weights_is_replaced(config, here):
    """Tokens of weights that nobody published."""
    with parts_of(config) as parts:
        engine = parts.engine
        assert isinstance(engine, RemoteEngine)
        engine.seat.worker = _Lies(engine.seat.worker)
        with pytest.warns(
            TandemWarning, match=r"worker engine, phase publish: it serves version 1 \(00000000\), where 1 \("
        ):
            version = parts.publisher.publish(1)
        assert engine.version == version and engine.seat.replaced == 1
        assert [one.columns["tokens"].tolist() for one in engine.generate(requests())] == [
            one[1]["tokens"].tolist() for one in here
        ]
    with parts_of(config, replace(APART, restarts=0)) as parts:
        engine = parts.engine
        assert isinstance(engine, RemoteEngine)
        engine.seat.worker = _Lies(engine.seat.worker)
        with pytest.raises(WorkerLied, match="Nothing was sampled from it") as caught:
            parts.publisher.publish(1)
        assert (caught.value.worker, caught.value.phase) == ("engine", "publish")


def test_weights_damaged_on_their_way_are_mended_or_named(config):
    """Damage that is served, or that ends a run which the next copy would have mended."""
    with parts_of(config) as parts:
        (remote,) = parts.publisher.receivers
        engine = parts.engine
        way = remote.sender  # type: ignore[attr-defined]
        damaged: list[Any] = []

        def damage(slot: Any) -> Callable[[Any], None]:
            """After its bytes are written, before a reader may look at them."""
            real = slot.tell

            def tell(notice: Any) -> None:
                real(notice)
                slot.image["layers.0.qkv"].view(torch.int16)[0, 5] ^= 1
                damaged.append(slot)

            return tell

        for slot in way.sender.slots:
            slot.tell = damage(slot)
        mend = pytest.MonkeyPatch()
        mend.setattr(way, "meet", lambda _: damaged[-1].image["layers.0.qkv"].view(torch.int16)[0, 5].bitwise_xor_(1))
        dict(parts.decoder.weights())["norm"].value[3] = 0.5
        version = parts.publisher.publish(1)
        assert engine.version == version and engine.seat.replaced == 0  # type: ignore[attr-defined]
        mend.undo()
        dict(parts.decoder.weights())["norm"].value[3] = 0.25
        with pytest.raises(DeliveryError, match=r"worker engine, phase publish: shared memory .*layers\.0\.qkv"):
            parts.publisher.publish(2)
        with pytest.raises(DeliveryError, match="the weights that came last were damaged"):
            engine.generate(requests())
        assert not engine.has_work and len(damaged) == 2


def test_a_worker_stopped_before_a_version_comes(config):
    """A learner that waits for a stopped engine, or an engine behind its learner."""
    with parts_of(config, replace(APART, deadline_s=patience_s(signal.SIGSTOP))) as parts:
        engine = parts.engine
        assert isinstance(engine, RemoteEngine)
        os.kill(pid(engine), signal.SIGSTOP)
        with pytest.warns(TandemWarning, match="worker engine, phase publish: no answer came within 8 s"):
            version = parts.publisher.publish(1)
        assert engine.version == version
        assert engine.seat.worker.ask("rollout", "clock", deadline_s=60).result() > 0
    with parts_of(config, replace(APART, deadline_s=patience_s(signal.SIGSTOP), restarts=0)) as parts:
        assert isinstance(parts.engine, RemoteEngine)
        os.kill(pid(parts.engine), signal.SIGSTOP)
        with pytest.raises(WorkerStalled) as caught:
            parts.publisher.publish(1)
        assert (caught.value.worker, caught.value.phase) == ("engine", "publish")


# --- whole runs


@pytest.fixture(scope="module")
def plain(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(config, tmp_path_factory.mktemp("plain") / "run")


def test_a_run_with_its_engine_apart_is_the_same_run(config, plain, tmp_path):
    """A run whose weights hang on where its engine lives."""
    assert len(plain) == STEPS + 1 and len({row["weights"] for row in plain}) == STEPS + 1
    same(run(replace(config, workers=APART), tmp_path / "run"), plain)
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["workers"] == "local"


@pytest.mark.parametrize(
    ("phase", "fault"), crossed(["rollout", "publish", "release"], [signal.SIGKILL, signal.SIGSTOP])
)
def test_a_run_whose_engine_is_stopped_or_killed_is_the_same_run(config, plain, tmp_path, phase, fault):
    """A run that hangs, loses a trajectory, trains one twice or has tokens without a fate when its engine's process is
    lost."""
    hit: list[int] = []
    with pytest.warns(TandemWarning, match=f"worker engine, phase {phase}: .* In its place another is started"):
        workers = replace(APART, deadline_s=patience_s(fault))
        rows = run(replace(config, workers=workers), tmp_path / "run", struck(phase, fault, hit))
    assert len(hit) == 1
    same(rows, plain)
    assert (closes(tmp_path / "run")["crashed"] > 0) == (phase == "rollout")


def test_a_run_whose_engine_cannot_come_back_stops_and_resumes(config, plain, tmp_path):
    """A run that ends by a traceback, hangs, loses its newest steps with its engine, or cannot be taken up again."""
    out, hit = tmp_path / "run", list[int]()
    with pytest.raises(WorkerDied, match="worker engine, phase rollout: its process ended"):
        run(replace(config, workers=replace(APART, restarts=0)), out, struck("rollout", signal.SIGKILL, hit))
    saved = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert saved[-1] == "step-1", saved
    same(resumed(replace(config, workers=APART), out), plain)
    found = closes(out)
    assert (
        found["interrupted"] + found["crashed"] > 0
    )  # of what came back in the step that was cut off, and what did not


TWO = EngineConfig(kv_memory_bytes=4 << 20, replicas=2)


def test_two_engines_apart_learn_what_one_does_here(config, plain, tmp_path):
    """Replicas that no request reaches, that miss a version, or of which the ledger knows one."""
    rows = run(replace(config, engine=TWO, workers=APART), tmp_path / "run")
    same(rows, plain)
    asked = {name: sum(row["engines"][name]["tokens"] for row in rows) for name in ("engine 1", "engine 2")}
    assert all(asked.values()), asked
    assert closes(tmp_path / "run")["crashed"] == 0


@pytest.mark.parametrize("phase", ["rollout", "publish", "release"])
def test_one_of_two_engines_cannot_come_back(config, plain, tmp_path, phase):
    """A run that stops with an engine while another lives, or whose ledger has what the dead one drew twice."""
    hit, seen = list[int](), list[Parts]()

    def watch(parts: Parts) -> None:
        seen.append(parts)
        struck(phase, signal.SIGKILL, hit, times=2)(parts)

    with pytest.warns(TandemWarning, match=f"worker engine 1, phase {phase}: .* In its place another is started"):
        rows = run(replace(config, engine=TWO, workers=replace(APART, restarts=1)), tmp_path / "run", watch)
    assert len(hit) == 2
    same(rows, plain)
    assert [engine.dead for engine in seen[0].sampling] == [True, False]
    assert (closes(tmp_path / "run")["crashed"] > 0) == (phase == "rollout")


@pytest.mark.parametrize("fault", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.grid)])
def test_a_run_whose_reference_is_stopped_or_killed_is_the_same_run(config, plain, tmp_path, monkeypatch, fault):
    """A run that hangs with its reference policy, or goes on without its part of the loss."""
    hit: list[int] = []
    score = RemoteReference.score

    def faulty(self: RemoteReference, *given: Any) -> Any:
        if not hit:
            hit.append(self.seat.ask("score", "pid").result())
            os.kill(hit[0], fault)
        return score(self, *given)

    monkeypatch.setattr(RemoteReference, "score", faulty)
    with pytest.warns(
        TandemWarning, match="worker reference, phase score: .* another is started, and asked again for 24"
    ):
        rows = run(replace(config, workers=replace(APART, deadline_s=patience_s(fault))), tmp_path / "run")
    assert hit
    same(rows, plain)
    closes(tmp_path / "run")
