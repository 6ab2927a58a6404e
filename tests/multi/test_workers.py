"""Workers: what each kind of fault, in each phase, is to who asked; no call outlives its deadline."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tandem.errors import CapacityError, WorkerDied, WorkerError, WorkerFlooded, WorkerLied, WorkerStalled
from tandem.run import workers
from tandem.run.config import WorkersConfig
from tandem.run.workers import Local, Spec
from tests.odd_workers import ODD

SOON_S, LONG_S = 2.0, 120.0  # a deadline that is to pass, and one that is not


@pytest.fixture
def local() -> Iterator[Local]:
    backend = Local(WorkersConfig("local"))
    yield backend
    backend.close()


def asked(worker, method: str, *arguments, phase: str = "rollout", deadline_s: float = LONG_S):
    return worker.ask(phase, method, *arguments, deadline_s=deadline_s).result()


def test_calls_are_answered_in_the_order_asked(local):
    """Answers that go to another call, or a value that changes on its way."""
    worker = local.start(Spec("one", ODD, ""), LONG_S)
    calls = [worker.ask("rollout", "echo", value, deadline_s=LONG_S) for value in (1, "two", b"3", (4, None))]
    assert [call.result() for call in reversed(calls)] == [(4, None), b"3", "two", 1]
    assert asked(worker, "pid") == worker.child.popen.pid


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ("exits", WorkerDied, r"worker engine 1, phase start: its process ended \(exit code 3\)"),
        ("dies", WorkerDied, r"worker engine 1, phase start: its process ended \(killed by signal 9\)"),
        (
            "stops",
            WorkerStalled,
            r"worker engine 1, phase start: no answer came within 5 s, .* workers\.start_deadline_s",
        ),
        (
            "sleeps",
            WorkerStalled,
            r"worker engine 1, phase start: no answer came within 5 s, .* workers\.start_deadline_s",
        ),
        ("refuses", CapacityError, r"^worker engine 1, phase start: 7 pages are too few; allowed: 8 or more\.$"),
        ("breaks", WorkerError, r"^worker engine 1, phase start: its code raised ValueError: seven lines$"),
        ("leaves", WorkerError, r"^worker engine 1, phase start: its code raised SystemExit: enough$"),
        ("half", WorkerStalled, "worker engine 1, phase start: no answer came within 5 s"),
    ],
)
def test_a_worker_that_does_not_come_up(local, given, kind, said):
    """A run that waits for a worker for ever, or an error that names neither worker nor phase, or leaves a process."""
    with pytest.raises(kind, match=said) as caught:
        local.start(Spec("engine 1", ODD, given), 5.0 if kind is WorkerStalled else LONG_S)
    if isinstance(caught.value, WorkerError):
        assert (caught.value.worker, caught.value.phase) == ("engine 1", "start")
    assert not local._workers[0].child.alive()


@pytest.mark.parametrize(
    ("method", "kind", "said"),
    [
        ("exits", WorkerDied, r"its process ended \(exit code 3\)"),
        ("dies", WorkerDied, r"its process ended \(killed by signal 9\)"),
        ("stops", WorkerStalled, r"no answer came within 2 s, so it was ended. Raise workers\.deadline_s"),
        ("half", WorkerStalled, "no answer came within 2 s"),
        ("floods", WorkerFlooded, "its answer has more than 0 MiB, and it was ended"),
        ("chatters", WorkerLied, "its answer cannot be read"),
        ("counts_wrong", WorkerLied, "it answered call 0 and was asked 1"),
    ],
)
def test_a_worker_that_goes_wrong(local, monkeypatch, method, kind, said):
    """A call that hangs or gives something untrue; a worker in an unknown state that is asked on."""
    monkeypatch.setattr(workers, "MOST_BYTES", 1 << 16)
    worker = local.start(Spec("engine", ODD, ""), LONG_S)
    with pytest.raises(kind, match=f"worker engine, phase publish: {said}") as caught:
        asked(worker, method, phase="publish", deadline_s=SOON_S if kind is WorkerStalled else LONG_S)
    assert (caught.value.worker, caught.value.phase) == ("engine", "publish")
    with pytest.raises(WorkerDied, match="worker engine, phase score: its process ended .*earlier") as caught:
        asked(worker, "echo", 1, phase="score")
    assert caught.value.phase == "score" and not worker.child.alive()


def test_a_worker_killed_between_calls(local):
    """A call that waits for a worker which is long dead."""
    worker = local.start(Spec("engine", ODD, ""), LONG_S)
    os.kill(worker.child.popen.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"worker engine, phase rollout: its process ended \(killed by signal 9\)\.$"):
        asked(worker, "echo", 1)


def test_a_worker_stopped_while_it_is_sent_much(local):
    """A sender that a full pipe holds up, beyond every deadline."""
    worker = local.start(Spec("engine", ODD, ""), LONG_S)
    os.kill(worker.child.popen.pid, signal.SIGSTOP)
    with pytest.raises(WorkerStalled, match="worker engine, phase score: no answer came within 2 s"):
        asked(worker, "echo", b"x" * (8 << 20), phase="score", deadline_s=SOON_S)


def test_a_worker_that_sends_what_nobody_asked_for(local):
    """An answer of earlier that is taken for the next call's."""
    worker = local.start(Spec("engine", ODD, ""), LONG_S)
    pipe = worker.child.connection
    pipe.send((1, "chatters", ()))
    assert pipe.poll(LONG_S) and pipe.recv_bytes() == b"hello" and pipe.poll(LONG_S)
    with pytest.raises(WorkerFlooded, match="worker engine, phase rollout: it sent, before, what nobody asked for"):
        asked(worker, "echo", 1)


def test_what_a_workers_own_code_raises(local):
    """A user's mistake that comes as a worker's fault, or a worker that is ended for it."""
    worker = local.start(Spec("engine", ODD, ""), LONG_S)
    with pytest.raises(
        CapacityError, match=r"^worker engine, phase rollout: 7 pages are too few; allowed: 8 or more\.$"
    ):
        asked(worker, "refuses")
    for method, said in (
        ("breaks", "raised ValueError: seven lines"),
        ("leaves", "raised SystemExit: enough"),
        ("is_strange", "raised Strange: 1 and 2"),
        ("nothing", "'Odd' object has no attribute 'nothing'"),
        ("keeps", "pickle"),
    ):
        with pytest.raises(WorkerError, match=f"^worker engine, phase rollout: its code .*{said}"):
            asked(worker, method)
    assert asked(worker, "echo", 7) == 7


def test_what_a_worker_prints_is_bounded(local, capfd):
    """A log that a worker fills, or a worker that stands still since nobody reads what it prints."""
    worker = local.start(Spec("engine", ODD, ""), LONG_S)
    asked(worker, "shouts")
    assert asked(worker, "echo", 1) == 1
    worker.end()
    worker.child.printed.join(LONG_S)
    said = capfd.readouterr().err
    assert "tandem: worker engine printed 16 KiB; what it prints more is left out for a minute" in said
    assert said.count("x") < 20_000
