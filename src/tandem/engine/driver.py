"""An engine that several drive: requests in from any thread, futures and tokens out.

    driver = Driver(engine).start()
    future = driver.submit(request, on_tokens=print)
    completion = future.result(timeout=60)
    driver.close(deadline_s=10)

What is asked (submit, abort, call) goes to an inbox, in order, and is applied between steps by whoever drives: a thread
of its own after `start`, or else the caller, by `progress`. A request's tokens are the same either way; the steps that
they come in are the same in each run only where one thread asks and drives.

A request that fails ends alone, with a completion that is FAILED. Where a whole step fails by a TandemError, the
requests in the engine end with it, and the driver lives on. By any other error it stops: all that waits ends with
EngineError, which says why, and so does all that is asked later.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from tandem.columns import Columns
from tandem.engine.share import Terms
from tandem.engine.space import Space
from tandem.errors import ConfigError, EngineError, TandemError
from tandem.types import Completion, Request

T = TypeVar("T")
OnTokens = Callable[[Columns], None]  # what a request drew in a step

IDLE_S = 1.0  # between two looks of an idle thread at its inbox, beside the notices it gets
GRACE_S = 10.0  # for the step that runs when a deadline has passed


class Drivable(Protocol):
    """What a driver needs of engine/engine.py."""

    @property
    def has_work(self) -> bool: ...

    def check(self, request: Request, /) -> None: ...

    def submit(self, request: Request, /) -> None: ...

    def abort(self, request_id: str, /) -> Completion | None: ...

    def finish_program(self, program_id: str, tenant: str = "", /) -> None: ...

    def on_restoring(self, told: Callable[[str], None], /) -> None: ...

    def space(self) -> Space | None: ...

    def loads(self) -> Mapping[str, float]: ...

    def promise(self, terms: Mapping[str, Terms], /) -> None: ...

    def step(self) -> list[Completion]: ...

    def drawn(self, request_id: str, first: int, /) -> Columns: ...

    # wakes_s, where it has one: seconds for which the last step ran nothing and the next would neither.


@dataclass(slots=True, eq=False)
class _Asked:
    """A request that has not ended."""

    request: Request
    future: Future[Completion]
    on_tokens: OnTokens | None
    given: int = 0  # tokens that on_tokens had


class Endpoint(Protocol):
    """What rollouts ask: a Driver, or several behind one Router (rollout/router.py)."""

    def submit(self, request: Request, on_tokens: OnTokens | None = None) -> Future[Completion]: ...

    def abort(self, request_id: str) -> None: ...

    def finish(self, program_id: str, tenant: str = "") -> None: ...

    def on_restoring(self, told: Callable[[str], None]) -> None: ...

    def wake(self) -> None: ...

    def progress(self, seen: int, wait_s: float) -> int: ...

    def close(self, deadline_s: float) -> None: ...


class Driver:
    """The one owner of an engine: nobody else steps it meanwhile."""

    def __init__(self, engine: Drivable) -> None:
        self.engine = engine
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()  # guards the next four
        self._inbox: deque[tuple[Callable[[], None], Future[Any] | None]] = deque()  # what to do, a call's future
        self._open: dict[str, _Asked] = {}  # by request id
        self._ended = 0  # requests and calls
        self._stopped: EngineError | None = None  # why nothing more is taken
        self._held = False  # no step is run, see hold
        self._running: dict[str, _Asked] = {}  # the engine has them; these two are the driving thread's alone
        self._streaming: dict[str, _Asked] = {}  # of these, with on_tokens

    def start(self) -> Driver:
        """A thread drives from now on."""
        assert self._thread is None, "a driver is started once"
        self._thread = threading.Thread(target=self._drive, name="engine driver", daemon=True)
        self._thread.start()
        return self

    def submit(self, request: Request, on_tokens: OnTokens | None = None) -> Future[Completion]:
        """Asks for a generation. Raises as Engine.submit does, and EngineError after the driver stopped.

        on_tokens: called by whoever drives, after each step that drew for it and before the future ends, with what is
        new. Where it raises, its request is withdrawn, and the future ends with what it raised.
        """
        self.engine.check(request)
        asked = _Asked(request, _future(), on_tokens)
        with self._changed:
            if request.id in self._open:
                raise ConfigError(f"request id {request.id!r} is in use by a live request; ids must be unique.")
            self._ask(partial(self._begin, asked), None)
            self._open[request.id] = asked
        return asked.future

    def abort(self, request_id: str) -> None:
        """Withdraws a request: its future ends with what it has, or with its end where that came first."""
        with self._changed:
            if request_id in self._open:
                self._inbox.append((partial(self._withdraw, request_id), None))
                self._changed.notify_all()

    def finish(self, program_id: str, tenant: str = "") -> None:
        """A program asks for nothing more: what is kept for it may go (engine/programs.py)."""
        with self._changed:
            if self._stopped is None:
                self._inbox.append((partial(self._finished, program_id, tenant), None))
                self._changed.notify_all()

    def on_restoring(self, told: Callable[[str], None]) -> None:
        """As Engine's: from whoever drives, in a step."""
        self.engine.on_restoring(told)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Runs a function between two steps: an update of the weights, a look at what is live."""
        future: Future[T] = _future()
        with self._changed:
            self._ask(partial(self._answer, function, future), future)
        return future

    def _ask(self, act: Callable[[], None], future: Future[Any] | None) -> None:
        if self._stopped is not None:
            raise EngineError(str(self._stopped)) from self._stopped.__cause__
        self._inbox.append((act, future))
        self._changed.notify_all()

    def wake(self) -> None:
        """Who waits in `progress` looks again."""
        self._count()

    def hold(self, held: bool) -> None:
        """Whether steps wait from the next one on. What is asked between them is applied; what runs stays."""
        with self._changed:
            self._held = held
            self._changed.notify_all()

    @property
    def stopped(self) -> EngineError | None:
        """Why nothing more is taken; None while it is."""
        return self._stopped

    @property
    def threaded(self) -> bool:
        """Whether a thread drives."""
        return self._thread is not None

    def apply(self) -> None:
        """What was asked, without a step; where no thread drives."""
        assert not self.threaded, "the thread does"
        self._turn(steps=False)

    def progress(self, seen: int, wait_s: float) -> int:
        """How many requests and calls have ended; waits, at most wait_s, for more than `seen`.

        Where no thread drives, the caller does: what was asked is applied and one step is run.
        """
        if self._thread is None:
            self._turn()
            self._rest(wait_s)
            return self._ended
        with self._changed:
            self._changed.wait_for(lambda: self._ended != seen or not (self._open or self._inbox), wait_s)
            return self._ended

    def close(self, deadline_s: float) -> None:
        """Takes nothing more; what was asked is run to its end, and withdrawn where that takes longer than deadline_s.

        Every future has ended then. EngineError where a step runs on for GRACE_S beyond that.
        """
        with self._changed:
            self._stopped = self._stopped or EngineError("the engine's driver was closed: it takes no more requests.")
            self._held = False
            self._changed.notify_all()
        self._finish(time.monotonic() + deadline_s)
        with self._changed:
            self._inbox += [(partial(self._withdraw, request_id), None) for request_id in self._open]
            self._changed.notify_all()
        self._finish(time.monotonic() + GRACE_S)
        if self._thread is not None:
            self._thread.join(GRACE_S)
        if self._open or self._inbox or (self._thread is not None and self._thread.is_alive()):
            late = EngineError(
                f"the engine is still in a step, with {len(self._open)} requests: waited {deadline_s:g} s for them to "
                f"end, and {GRACE_S:g} s for the step."
            )
            self._end_all(late)
            raise late

    def _finish(self, until_s: float) -> None:
        seen = -1
        while (self._open or self._inbox) and (wait_s := until_s - time.monotonic()) > 0:
            seen = self.progress(seen, wait_s)

    def _drive(self) -> None:
        while True:
            with self._changed:
                while not (self._inbox or (self._running and not self._held)):
                    if self._stopped is not None:
                        return
                    self._changed.wait(IDLE_S)
            try:
                self._turn()
                self._rest(IDLE_S)
            except Exception:  # noqa: BLE001 - recorded boundary: all who wait were told
                return
            except BaseException as error:  # noqa: BLE001 - recorded boundary: sys.exit in a callback ends the thread
                self._end_all(EngineError(f"the engine's thread ended: {type(error).__name__}: {error}"))
                return

    def _rest(self, most_s: float) -> None:
        """Where nothing may run yet, waits until it may, or something is asked."""
        wait_s = getattr(self.engine, "wakes_s", 0.0)
        if wait_s:
            with self._changed:
                self._changed.wait_for(lambda: self._inbox or self._stopped, min(wait_s, most_s))

    def _turn(self, steps: bool = True) -> None:
        """Applies what was asked, runs a step, and hands out what it gave."""
        try:
            for _ in range(len(self._inbox)):
                self._inbox.popleft()[0]()
            if self._running and steps and not self._held:
                self._step()
        except Exception as error:  # recorded boundary: the reason goes to all who wait
            stopped = EngineError(f"the engine stopped: {type(error).__name__}: {error}")
            stopped.__cause__ = error
            self._end_all(stopped)
            raise

    def _step(self) -> None:
        assert self.engine.has_work, f"the engine has no work, but {len(self._running)} requests have not come back"
        try:
            done = self.engine.step()
        except TandemError as error:
            self._fail(error)
            return
        ended = {completion.request_id for completion in done} if self._streaming else ()
        for request_id, asked in list(self._streaming.items()):
            if request_id not in ended:
                self._give(asked, self.engine.drawn(request_id, asked.given))
        for completion in done:
            self._complete(completion)

    def _give(self, asked: _Asked, drawn: Columns) -> None:
        """To on_tokens."""
        if asked.on_tokens is None or not len(drawn):
            return
        asked.given += len(drawn)
        try:
            asked.on_tokens(drawn)
        except Exception as error:  # noqa: BLE001 - recorded boundary: the caller's code; its future gets the reason
            self._end(asked, error)
            self._abort(asked.request.id)

    def _complete(self, completion: Completion) -> None:
        asked = self._running.get(completion.request_id)
        if asked is not None:  # else on_tokens raised as it ended
            self._give(asked, completion.columns.slice(asked.given))
            self._end(asked, completion)

    def _begin(self, asked: _Asked) -> None:
        try:
            self.engine.submit(asked.request)
        except TandemError as error:
            self._end(asked, error)
            return
        self._running[asked.request.id] = asked
        if asked.on_tokens is not None:
            self._streaming[asked.request.id] = asked

    def _withdraw(self, request_id: str) -> None:
        if request_id in self._running:
            completion = self._abort(request_id)
            if completion is not None:
                self._complete(completion)

    def _finished(self, program_id: str, tenant: str) -> None:
        self.engine.finish_program(program_id, tenant)
        with self._changed:  # who waits for an empty inbox looks again
            self._changed.notify_all()

    def _abort(self, request_id: str) -> Completion | None:
        try:
            return self.engine.abort(request_id)
        except TandemError as error:  # of a step that was waited for first; it is forgotten now
            completion = self.engine.abort(request_id)
            self._fail(error)
            return completion

    def _answer(self, function: Callable[[], T], future: Future[T]) -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # recorded boundary: the caller's code; its future gets the reason
            future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        self._count()

    def _fail(self, error: TandemError) -> None:
        """What the engine has ends with the error of a step, but for what had ended before: the next step gives it."""
        for request_id, asked in list(self._running.items()):
            if self.engine.abort(request_id) is not None:
                self._end(asked, error)

    def _end_all(self, error: EngineError) -> None:
        with self._changed:
            self._stopped = self._stopped or error
            acts, asked = list(self._inbox), list(self._open.values())
            self._inbox.clear()
        for one in asked:
            self._end(one, error)
        for _, future in acts:
            if future is not None:
                future.set_exception(error)
                self._count()

    def _end(self, asked: _Asked, outcome: Completion | Exception) -> None:
        with self._changed:
            if self._open.pop(asked.request.id, None) is None:
                return
        self._running.pop(asked.request.id, None)
        self._streaming.pop(asked.request.id, None)
        if isinstance(outcome, Completion):
            asked.future.set_result(outcome)
        else:
            asked.future.set_exception(outcome)
        self._count()

    def _count(self) -> None:
        with self._changed:
            self._ended += 1
            self._changed.notify_all()


def _future() -> Future[Any]:
    """One that cannot be cancelled: who waits asks the driver to abort."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future
