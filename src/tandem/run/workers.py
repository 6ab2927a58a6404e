"""Processes of a run beside its loop, of one class each (run/roles.py), whichever way they are placed.

A backend starts them: `Local` as children of this process, run/ray.py as Ray's actors. A call to a worker names the
phase that it is of and has a deadline; what goes wrong by then is a WorkerError that names worker and phase, and the
worker is ended: what it held is in no known state.
"""

from __future__ import annotations

import contextlib
import importlib
import pickle
import queue
import threading
import time
import warnings
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tandem.errors import TandemError, TandemWarning, WorkerDied, WorkerError, WorkerFlooded, WorkerLied, WorkerStalled
from tandem.program.child import Child, child_of

if TYPE_CHECKING:
    from tandem.program.child import Home
    from tandem.program.config import TaskConfig
    from tandem.run.config import WorkersConfig

MOST_BYTES = 1 << 30  # of an answer: a step's completions, with the sets that they were drawn from
START = "start"  # the phase until its class is made


@dataclass(frozen=True, slots=True)
class Spec:
    """A worker that is to be started.

    >>> Spec("engine", "tandem.run.roles:EngineWorker", None).name
    'engine'
    """

    name: str  # by which errors name it
    role: str  # module:class, made of `given`; its methods are what may be asked
    given: Any


class Pending(Protocol):
    """An answer that is waited for."""

    def result(self) -> Any:
        """WorkerError by the call's deadline; a TandemError that the worker raised is raised here, of its type."""
        ...


class Worker(Protocol):
    """A process, as who started it knows it."""

    spec: Spec

    def ask(self, phase: str, method: str, *arguments: Any, deadline_s: float) -> Pending:
        """A call, behind those that were asked before."""
        ...

    def end(self) -> None:
        """Kill it. What was asked of it ends with WorkerDied."""
        ...


class Backend(Protocol):
    """Where workers are placed."""

    config: WorkersConfig

    @property
    def host(self) -> str:
        """This machine, as they reach it."""
        ...

    def start(self, spec: Spec, deadline_s: float) -> Worker:
        """Returns when it can be asked; WorkerError of phase START where it can't by the deadline."""
        ...

    def home(self, config: TaskConfig) -> Home:
        """A process for environments and rewards (program/workers.py), which ends with its pool."""
        ...

    def close(self) -> None:
        """End all that it started."""
        ...


def made(role: str, given: Any) -> Any:
    """The object that a worker is."""
    module, _, name = role.partition(":")
    return getattr(importlib.import_module(module), name)(given)


def raised(error: TandemError, worker: str, phase: str) -> TandemError:
    """What a worker's own code raised, as the caller gets it: of the same type, with the worker's name."""
    try:
        return type(error)(f"worker {worker}, phase {phase}: {error}")
    except TypeError:  # a type of other arguments
        return WorkerError(worker, phase, str(error))


def stalled(worker: str, phase: str, deadline_s: float) -> WorkerStalled:
    setting = f"workers.{'start_' if phase == START else ''}deadline_s"
    reason = f"no answer came within {deadline_s:g} s, so it was ended. Raise {setting}"
    return WorkerStalled(worker, phase, f"{reason} if that is too short for this model or machine.")


def flooded(worker: str, phase: str) -> WorkerFlooded:
    reason = f"its answer has more than {MOST_BYTES >> 20} MiB, and it was ended. Ask for fewer or shorter samples"
    return WorkerFlooded(worker, phase, f"{reason} at once.")


@dataclass(slots=True, eq=False)
class _Call:
    """A call, and its answer to come."""

    by: LocalWorker
    phase: str
    method: str
    arguments: tuple[Any, ...]
    deadline_s: float
    until_s: float
    future: Future[Any] = field(default_factory=Future)

    def result(self) -> Any:
        """As Pending says."""
        try:
            return self.future.result(max(0.0, self.until_s - time.monotonic()))
        except TimeoutError:
            self.by.end()
            raise stalled(self.by.spec.name, self.phase, self.deadline_s) from None


class LocalWorker:
    """A child of this process. A thread of its own sends and receives, so that no pipe that is full or half read can
    hold up who asks beyond a call's deadline."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.child = Child(f"worker {spec.name}", (spec.role, spec.given), "tandem.run.worker")
        self._asked: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._ended = ""  # why it takes nothing more
        threading.Thread(target=self._serve, name=f"worker {spec.name}", daemon=True).start()

    def ask(self, phase: str, method: str, *arguments: Any, deadline_s: float) -> _Call:
        """As Worker says."""
        call = _Call(self, phase, method, arguments, deadline_s, time.monotonic() + deadline_s)
        if self._ended:
            call.future.set_exception(self._died(phase))
        else:
            self._asked.put(call)
        return call

    def end(self) -> None:
        """As Worker says."""
        self._ended = self._ended or "it was ended"
        self.child.end()  # the thread finds the end of the pipe
        self._asked.put(None)

    def _serve(self) -> None:
        """Calls in the order in which they were asked, each answered before the next is sent."""
        number = 0
        while (call := self._asked.get()) is not None or not self._ended:
            if call is None:
                continue
            try:
                call.future.set_result(self._answer(call, number))
            except TandemError as error:
                call.future.set_exception(error)
            number += 1
        self.child.kill()
        with contextlib.suppress(queue.Empty):
            while True:
                if (left := self._asked.get_nowait()) is not None:
                    left.future.set_exception(self._died(left.phase))

    def _answer(self, call: _Call, number: int) -> Any:
        if self._ended:
            raise self._died(call.phase)
        name, phase, pipe = self.spec.name, call.phase, self.child.connection
        try:
            if number:  # the first was sent as it started
                if pipe.poll(0):
                    pipe.recv_bytes(MOST_BYTES)  # the end of the pipe is no message
                    raise _Odd
                pipe.send((number, call.method, call.arguments))
            told, kind, value = pickle.loads(pipe.recv_bytes(MOST_BYTES))
        except EOFError:
            raise self._died(phase) from None
        except _Odd:
            self._stop("it flooded")
            raise WorkerFlooded(name, phase, "it sent, before, what nobody asked for, and was ended.") from None
        except OSError as error:
            if "message length" not in str(error):
                raise self._died(phase) from None
            self._stop("it flooded")
            raise flooded(name, phase) from None
        except Exception as error:  # recorded boundary: what a pickle of a process gone wrong may raise
            self._stop("it lied")
            raise WorkerLied(name, phase, f"its answer cannot be read ({error}), and it was ended.") from error
        if told != number:
            self._stop("it lied")
            raise WorkerLied(name, phase, f"it answered call {told} and was asked {number}, so it was ended.")
        return answered(kind, value, name, phase)

    def _stop(self, why: str) -> None:
        self._ended = why
        self.child.end()

    def _died(self, phase: str) -> WorkerDied:
        """After the end of the pipe, or of the worker."""
        before = f", since {self._ended} earlier" if self._ended else ""
        self._ended = self._ended or "it died"
        self.child.end()
        return WorkerDied(self.spec.name, phase, f"its process ended ({self.child.ended()}{before}).")


class _Odd(Exception):
    """Something came that was not asked for."""


def answered(kind: str, value: Any, worker: str, phase: str) -> Any:
    """What an answer of run/worker.py says."""
    if kind == "value":
        return value
    if kind == "raised":
        raise raised(value, worker, phase)
    raise WorkerError(worker, phase, f"its code {value}")


class Local:
    """Children of this process."""

    host = "127.0.0.1"

    def __init__(self, config: WorkersConfig) -> None:
        self.config = config
        self._workers: list[LocalWorker] = []

    def start(self, spec: Spec, deadline_s: float) -> LocalWorker:
        """As Backend says."""
        worker = LocalWorker(spec)
        self._workers.append(worker)
        try:
            worker.ask(START, "", deadline_s=deadline_s).result()
        except TandemError:
            worker.end()
            raise
        return worker

    def home(self, config: TaskConfig) -> Home:
        """As Backend says."""
        return child_of(config)

    def close(self) -> None:
        """As Backend says."""
        for worker in self._workers:
            worker.end()


class Seat:
    """A worker, and another in its place where it fails, as often as `config.restarts` says."""

    def __init__(self, backend: Backend, spec: Spec) -> None:
        self.backend, self.spec, self.config = backend, spec, backend.config
        self.replaced = 0  # workers
        self.worker = backend.start(spec, self.config.start_deadline_s)

    def ask(self, phase: str, method: str, *arguments: Any, times: int = 1) -> Pending:
        """A call of `times` the deadline."""
        return self.worker.ask(phase, method, *arguments, deadline_s=times * self.config.deadline_s)

    def replace(self, error: WorkerError, again: str = "") -> None:
        """Another worker, as new; `again` says of what it is asked. Raises the last error where none may come."""
        self.worker.end()
        while self.replaced < self.config.restarts:
            self.replaced += 1
            warnings.warn(f"{error} In its place another is started{again}.", TandemWarning, stacklevel=3)
            try:
                self.worker = self.backend.start(self.spec, self.config.start_deadline_s)
                return
            except WorkerError as failed:
                error = failed
        raise error
