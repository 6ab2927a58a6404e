"""A driver that loses a request, hangs, gives one what another's are, or steps an engine from two threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.columns import Columns
from tandem.engine import driver as module
from tandem.engine.driver import Driver
from tandem.engine.engine import Engine
from tandem.errors import CapacityError, ConfigError, EngineError, NonFiniteError
from tandem.types import Completion, Request, StopReason, WeightVersion
from tests.null.paged_memory import STOP, Device, DeviceFailed, PagedMemory, check, group, make

WAIT_S = 30.0


@contextmanager
def driven(engine: Engine) -> Iterator[Driver]:
    """By a thread, which has ended afterwards."""
    driver = Driver(engine).start()
    try:
        yield driver
    finally:
        driver.close(WAIT_S)
        assert driver._thread is not None and not driver._thread.is_alive()


asked = st.tuples(
    st.just("submit"),
    st.lists(st.integers(0, 1), min_size=1, max_size=12),
    st.integers(1, 3),
    st.integers(1, 12),
    st.sampled_from([(), (STOP,)]),
    st.sampled_from([None, None, 0, 2]),
)
acts = st.one_of(
    asked,
    asked,
    st.tuples(st.just("abort"), st.integers(0, 5)),
    st.tuples(st.just("receive"), st.integers(0, 2)),
    st.tuples(st.just("wait")),
    st.tuples(st.just("fail")),
)


class Client(threading.Thread):
    """Plays a script on a driver; keeps what it asked and what came."""

    def __init__(self, name: str, driver: Driver, script: list[Any]) -> None:
        super().__init__(name=name, daemon=True)
        self.driver, self.script = driver, script
        self.futures: list[tuple[Request, Future[Completion]]] = []
        self.streams: dict[str, list[Columns]] = {}
        self.calls: list[Future[Any]] = []

    def run(self) -> None:
        engine = self.driver.engine
        assert isinstance(engine, Engine)
        for number, (verb, *rest) in enumerate(self.script):
            if verb == "submit":
                for request in group(f"{self.name}/{number}", *rest):
                    stream = self.streams.setdefault(request.id, [])
                    self.futures.append((request, self.driver.submit(request, stream.append)))
            elif verb == "abort" and self.futures:
                self.driver.abort(self.futures[rest[0] % len(self.futures)][0].id)
            elif verb == "receive":
                version = WeightVersion(rest[0], f"digest {rest[0]}")
                self.calls.append(self.driver.call(lambda version=version: engine.receive(version)))
            elif verb == "wait" and self.futures:
                self.futures[-1][1].exception(WAIT_S)
            elif verb == "fail" and isinstance(engine.runner, Device):
                self.calls.append(self.driver.call(lambda device=engine.runner: setattr(device, "fails", True)))


@settings(max_examples=150, deadline=None)
@given(
    memory=st.sampled_from([PagedMemory, Device]),
    scripts=st.lists(st.lists(acts, min_size=1, max_size=8), min_size=1, max_size=4),
    num_pages=st.integers(8, 40),
)
def test_every_future_ends_with_what_the_request_gives_alone(memory, scripts, num_pages) -> None:
    """A request lost between threads, a future that never ends, tokens of a neighbour, or a stream that lacks some."""
    engine, runner = make(num_pages, memory=memory, batch_tokens=9, max_sequences=4)
    engine._checked = lambda sampled, batch: sampled  # type: ignore[method-assign]  # a first draw may fail alone
    with driven(engine) as driver:
        clients = [Client(f"c{number}", driver, script) for number, script in enumerate(scripts)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(WAIT_S)
            assert not client.is_alive()
        for client in clients:
            for request, future in client.futures:
                error = future.exception(WAIT_S)
                got = Columns.concat([Columns.of(tokens=(), logprobs=(), versions=()), *client.streams[request.id]])
                if error is not None:
                    assert isinstance(error, DeviceFailed) and any(("fail",) in script for script in scripts)
                    continue
                completion = future.result()
                check(completion, request, runner)
                assert completion.request_id == request.id and got == completion.columns
            for call in client.calls:
                assert isinstance(call.exception(WAIT_S), DeviceFailed | None)
    if isinstance(runner, Device):
        runner.fails = False
    engine._land()
    engine.check_integrity()
    assert not engine.scheduler.live and not driver._running and not driver._streaming


def test_driven_by_its_caller_the_steps_are_generates() -> None:
    """A sync loop's schedule depends on a thread: cached and recomputed tokens differ from run to run."""
    requests = [r for n in range(4) for r in group(f"p{n}", [n, 1, 2, 3, 4, 5], 4, 3 + 4 * n, stop=())]
    plain, _ = make(12)
    wanted = plain.generate(requests)
    engine, _ = make(12)
    driver, seen = Driver(engine), 0
    futures = [driver.submit(request) for request in requests]
    while not all(future.done() for future in futures):
        seen = driver.progress(seen, 0.0)
    assert [future.result().columns for future in futures] == [completion.columns for completion in wanted]
    assert engine.stats == plain.stats and engine.stats.preemptions and seen == len(requests)


@pytest.mark.parametrize("memory", [PagedMemory, Device])
def test_tokens_come_as_they_are_drawn(memory: type[PagedMemory]) -> None:
    """A stream that comes all at the end, twice, or after its future."""
    engine, _ = make(memory=memory)
    driver, came = Driver(engine), list[Columns]()
    (request,) = group("a", [1, 2, 3], 1, 5, stop=())

    def take(drawn: Columns) -> None:
        assert not future.done()
        came.append(drawn)

    future = driver.submit(request, take)
    while not future.done():
        driver.progress(0, 0.0)
    assert [len(drawn) for drawn in came] == [1] * 5
    assert Columns.concat(came) == future.result().columns


def test_what_cannot_run_is_refused_where_it_is_asked() -> None:
    """A bad request is found out in the engine's thread, or a refused one's id stays taken."""
    engine, runner = make(num_pages=4)
    driver = Driver(engine)
    (good, again) = (*group("a", [1], 1, 2, stop=()), *group("a", [2], 1, 2, stop=()))
    future = driver.submit(good)
    for bad, error, said in (
        (again, ConfigError, "'a/0' is in use"),
        (group("long", [1] * 30, 1, 2)[0], CapacityError, "4 pages"),
        (group("b", [], 1, 2)[0], ConfigError, "empty prompt"),
        (group("c", [-1], 1, 2)[0], ConfigError, "vocabulary"),
    ):
        with pytest.raises(error, match=said):
            driver.submit(bad)
    while not future.done():
        driver.progress(0, 0.0)
    check(future.result(), good, runner)
    assert not driver._open


def test_a_callers_error_is_its_own() -> None:
    """An on_tokens or a call that raises ends the engine's thread, or its neighbour's request."""
    engine, runner = make()
    bad, good = group("a", [1, 2, 3], 2, 6, stop=())

    def raises(drawn: object = None) -> None:
        raise KeyError("mine")

    with driven(engine) as driver:
        broken, fine, call = driver.submit(bad, raises), driver.submit(good), driver.call(raises)
        for future in (broken, call):
            with pytest.raises(KeyError, match="mine"):
                future.result(WAIT_S)
        check(fine.result(WAIT_S), good, runner)
        assert driver.call(lambda: list(engine.scheduler.live)).result(WAIT_S) == []


def test_a_callback_that_exits_ends_the_thread_and_nobody_waits() -> None:
    """sys.exit in on_tokens ends the engine's thread in silence: futures, and those of later requests, never end."""
    engine, _ = make()

    def leaves(drawn: object) -> None:
        raise SystemExit(3)

    driver = Driver(engine).start()
    one, other = (driver.submit(request, leaves) for request in group("a", [1, 2], 2, 6, stop=()))
    for future in (one, other):
        with pytest.raises(EngineError, match="the engine's thread ended: SystemExit: 3"):
            future.result(WAIT_S)
    with pytest.raises(EngineError, match="SystemExit"):
        driver.submit(*group("b", [1], 1, 1))
    driver.close(0.0)


@pytest.mark.parametrize("memory", [PagedMemory, Device])
def test_a_step_that_fails_by_name_ends_what_it_ran(memory: type[PagedMemory]) -> None:
    """Weights that are not finite leave the futures of a step waiting, or no later request is served."""
    engine, runner = make(memory=memory)
    with driven(engine) as driver:
        futures = [driver.submit(request) for request in group("a", [1, 2], 1, 3, broken=0)]
        for future in futures:
            with pytest.raises(NonFiniteError, match="a/0 broke"):
                future.result(WAIT_S)
        if isinstance(runner, Device):
            driver.call(runner.out.clear).result(WAIT_S)  # started behind the one that failed
        (request,) = group("b", [1, 2], 1, 3, stop=())
        check(driver.submit(request).result(WAIT_S), request, runner)


def test_a_step_that_fails_as_it_is_waited_for_by_an_abort() -> None:
    """Who aborts is blamed for the step before, gets no answer, or stops the driver."""
    engine, runner = make(memory=Device)
    assert isinstance(runner, Device)
    driver = Driver(engine)
    mine, other = (driver.submit(request) for request in group("a", [1, 2, 3], 2, 9, stop=()))
    for _ in range(3):
        driver.progress(0, 0.0)
    runner.fails = True
    driver.abort("a/0")
    driver.progress(0, 0.0)
    assert mine.result(0).stop_reason is StopReason.ABORTED and isinstance(other.exception(0), DeviceFailed)
    (request,) = group("b", [1, 2], 1, 3, stop=())
    future = driver.submit(request)
    while not future.done():
        driver.progress(0, 0.0)
    check(future.result(), request, runner)


def test_who_waits_is_woken_by_the_first_end() -> None:
    """A rollout whose answer is there waits for the longest beside it, or for its deadline."""
    engine, runner = make()
    may_run, run = threading.Semaphore(2), runner.run
    runner.run = lambda batch: (may_run.acquire(timeout=WAIT_S), run(batch))[1]  # type: ignore[method-assign]
    with driven(engine) as driver:
        futures = [driver.submit(group(name, [1], 1, most, stop=())[0]) for name, most in (("a", 1), ("b", 40))]
        counts: list[int] = []
        waiting = threading.Thread(target=lambda: counts.append(driver.progress(0, 100 * WAIT_S)), daemon=True)
        waiting.start()
        waiting.join(WAIT_S)
        assert counts == [1] and [future.done() for future in futures] == [True, False]
        may_run.release(100)


@pytest.mark.parametrize("threaded", [True, False])
def test_an_engine_that_breaks_tells_all_who_wait(threaded: bool) -> None:
    """An engine's bug leaves futures waiting for ever, is tried again on a broken engine, or its reason is lost."""
    engine, runner = make()
    driver = Driver(engine)
    futures = [driver.submit(request) for request in group("a", [1, 2], 2, 3)]
    runner.run = None  # type: ignore[method-assign,assignment]
    if threaded:
        driver.start()
        driver._thread.join(WAIT_S)  # type: ignore[union-attr]
    else:
        with pytest.raises(TypeError, match="not callable"):
            driver.progress(0, 0.0)
    for future in futures:
        with pytest.raises(EngineError, match="the engine stopped: TypeError: .*not callable"):
            future.result(0)
    for late in (lambda: driver.submit(*group("b", [1], 1, 1)), lambda: driver.call(lambda: None)):
        with pytest.raises(EngineError, match="TypeError"):
            late()
    assert driver.progress(2, WAIT_S) == 2
    driver.abort("a/0")
    driver.close(0.0)


@pytest.mark.parametrize("deadline_s", [WAIT_S, 0.0])
def test_closing_ends_every_future(deadline_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A close that drops what was asked, takes more after it, or waits longer than it was told."""
    engine, runner = make(512)
    may_run, run = threading.Semaphore(3), runner.run

    def held(batch: Any) -> Any:
        assert may_run.acquire(timeout=WAIT_S)
        return run(batch)

    runner.run = held  # type: ignore[method-assign]
    requests = group("a", [1, 2, 3], 3, 200, stop=())
    driver = Driver(engine).start()
    futures = [driver.submit(request) for request in requests]
    closing = threading.Thread(target=driver.close, args=(deadline_s,))
    closing.start()
    while driver._stopped is None:
        pass
    with pytest.raises(EngineError, match="driver was closed"):
        driver.submit(*group("b", [1], 1, 1))
    may_run.release(400)
    closing.join(2 * WAIT_S)
    for request, future in zip(requests, futures, strict=True):
        completion = future.result(0)
        assert completion.stop_reason is (StopReason.LENGTH if deadline_s else StopReason.ABORTED)
        check(completion, request, runner)
    assert not engine.scheduler.live and not driver._thread.is_alive()  # type: ignore[union-attr]


def test_closing_names_the_step_that_it_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that hangs holds its process for ever, or the futures of what it ran."""
    monkeypatch.setattr(module, "GRACE_S", 0.05)
    engine, runner = make()
    may_run, run = threading.Event(), runner.run
    runner.run = lambda batch: (may_run.wait(WAIT_S), run(batch))[1]  # type: ignore[method-assign]
    driver = Driver(engine).start()
    future = driver.submit(*group("a", [1, 2], 1, 3))
    with pytest.raises(EngineError, match=r"in a step, with 1 requests: waited 0\.05 s .* and 0\.05 s for the step"):
        driver.close(0.05)
    with pytest.raises(EngineError, match="still in a step"):
        future.result(0)
    may_run.set()
    driver._thread.join(WAIT_S)  # type: ignore[union-attr]
    assert not driver._thread.is_alive()  # type: ignore[union-attr]
