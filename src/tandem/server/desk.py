"""What is on its way through the engine: calls in on the event loop, their tokens back from the engine's thread.

The engine's thread posts what a step drew, and wakes the loop once for all of it. A call takes what has come for it as
one piece, however many steps that were, so a client that reads slowly costs no more than its own answer.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Protocol

from tandem.columns import Columns
from tandem.engine.batch import Stats
from tandem.engine.driver import Driver
from tandem.engine.engine import Engine
from tandem.errors import EngineError, TandemError
from tandem.server.config import ServerConfig
from tandem.server.refusal import Refusal, refused
from tandem.server.wire import log
from tandem.types import Completion, Request, StopReason

FAILED = 3  # times in a row that the engine had to begin anew, after which it is called unhealthy
COUNTS = [one for one in fields(Stats) if one.name not in ("most_running", "resolved_s")]
PING_S = 15.0  # between two signs of life to a client that waits for a token


@dataclass(slots=True, eq=False)
class Open:
    """A generation on its way."""

    request: Request
    call: Call
    last_s: float | None = None  # when a token was last seen here, where it streams
    drawn: int = 0  # tokens seen here, where it streams


@dataclass(slots=True)
class Piece:
    """What is new of one answer of a call."""

    drawn: list[Columns] = field(default_factory=list)
    completion: Completion | None = None

    @property
    def columns(self) -> Columns:
        """What was drawn, one after another: mostly of one step, which is not copied."""
        if len(self.drawn) == 1:
            return self.drawn[0]
        return Columns.concat(self.drawn) if self.drawn else Columns({})


class Watcher(Protocol):
    """Who counts what is asked and answered."""

    def began(self, opened: Open) -> None: ...

    def ended(self, opened: Open, completion: Completion | None) -> None:
        """None: it failed with the engine."""


class Call:
    """The answers to one HTTP call."""

    def __init__(self, desk: Desk, id: str, requests: Sequence[Request]) -> None:
        self.id = id
        self.requests = requests
        self._desk = desk
        self._place = {request.id: place for place, request in enumerate(requests)}
        self._new: dict[int, Piece] = {}
        self._failure: Refusal | None = None
        self._left = len(requests)  # answers that have not ended
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None  # of signs of life
        self._came = True  # something, since the timer was set
        self.gone = False  # the client is

    def arrived(self, request_id: str, what: Columns | Completion | Refusal) -> None:
        """From the engine, on the loop."""
        self._came = True
        piece = self._new.setdefault(self._place[request_id], Piece())
        if isinstance(what, Columns):
            piece.drawn.append(what)
        else:
            self._left -= 1
            if isinstance(what, Completion):
                piece.completion = what
            else:
                self._failure = self._failure or what
        self._wake.set()

    @property
    def over(self) -> bool:
        """Nothing more comes."""
        return self.gone or (self._left == 0 and not self._new)

    async def pieces(self) -> dict[int, Piece]:
        """Place of an answer -> what is new of it; nothing where nothing came for PING_S at most, or the client has
        gone. Raises what an answer failed by: the others are withdrawn."""
        if not self._wake.is_set():
            if self._timer is None:
                self._watch(asyncio.get_running_loop())
            await self._wake.wait()
        self._wake.clear()
        new, self._new = self._new, {}
        if self._failure is not None:
            self.withdraw()
            raise self._failure
        return {} if self.gone else new

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wakes who waits for pieces where none come. One timer, set again as it fires: a timer a wait would cost as
        much as the piece."""
        if not self._came:
            self._wake.set()
        self._came = False
        self._timer = None if self.over else loop.call_later(PING_S / 2, self._watch, loop)

    async def completions(self) -> list[Completion]:
        """All of them, in order."""
        done: dict[int, Completion] = {}
        while not self.over:
            new = await self.pieces()
            done |= {place: piece.completion for place, piece in new.items() if piece.completion is not None}
        return [done[place] for place in sorted(done)]

    def leave(self) -> None:
        """The client has gone: who waits for pieces is told, and withdraws the call."""
        self.gone = True
        self._wake.set()

    def withdraw(self) -> None:
        for request in self.requests:
            self._desk.abort(request.id)


class Desk:
    """All calls of a server, and the engine that they share. Used on the event loop alone, but for what says otherwise.

    watchers: told of every generation that is asked for and that ends, before its caller.
    """

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        self.config = config
        self.driver = Driver(engine)
        self.open: dict[str, Open] = {}
        self.tenants: Counter[str] = Counter()  # generations on their way
        self.watchers: list[Watcher] = []
        self.gap: Callable[[float], None] = lambda seconds: None  # told of those between two tokens of a stream
        self.draining = False
        self.failures = 0  # of the engine, since an answer came through
        self.renewals = 0  # of the engine, in all
        self.weightless = False  # its weights were dropped, or are not those that were sent: nothing may be drawn
        self._before = Stats()  # of the engines before this one
        self.paused = False  # what is asked from now on waits
        self.gated: dict[str, Open] = {}  # generations that wait for the end of a pause
        self._ungated = asyncio.Event()  # of the gate as it is: another one after each change
        self._posted: deque[tuple[str, Columns | Future[Completion]]] = deque()
        self._woken = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def engine(self) -> Engine:
        engine = self.driver.engine
        assert isinstance(engine, Engine)
        return engine

    def start(self) -> None:
        """On the event loop that it is used on from now on."""
        self._loop = asyncio.get_running_loop()
        self.driver.start()

    def total(self) -> Stats:
        """Counts since the server's start."""
        now = self.engine.stats
        return replace(now, **{one.name: getattr(now, one.name) + getattr(self._before, one.name) for one in COUNTS})

    @property
    def num_running(self) -> int:
        """From any thread."""
        return len(self.engine.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Generations that have not started. From any thread."""
        return max(0, len(self.open) - self.num_running) + len(self.gated)

    @property
    def well(self) -> bool:
        """Whether it takes calls, and answers them."""
        return not self.draining and self.failures < FAILED

    def admit(self, tenant: str, count: int) -> None:
        """Refuses `count` generations more where there is no room for them: 503 while it drains, 429."""
        config = self.config
        if self.draining:
            raise Refusal(503, "the server is about to end and takes no more calls.", "draining", retry_s=1)
        for most, present, what in (
            (config.max_requests, len(self.open) + len(self.gated), "server.max_requests"),
            (config.max_waiting, self.num_waiting, "server.max_waiting"),
            (config.tenant_requests or config.max_requests, self.tenants[tenant], "server.tenant_requests"),
        ):
            if present + count > most:
                said = f"there is no room for {count} more: {present} are on their way, {most} may be ({what}). Wait."
                raise Refusal(429, said, "rate_limit_exceeded", retry_s=config.retry_after_s)

    async def ask(self, id: str, requests: Sequence[Request], streams: bool) -> Call:
        """Asks for generations of one call. Raises Refusal; none is on its way then."""
        tenant, count = requests[0].tenant, len(requests)
        self.admit(tenant, count)
        for one in requests:
            if one.id in self.open or one.id in self.gated:
                said = f"request id {one.id!r} is in use by a call on its way. Choose another."
                raise Refusal(409, said, "id_in_use")
        call = Call(self, id, requests)
        self.tenants[tenant] += count
        self.gated |= {one.id: Open(one, call) for one in requests}
        try:
            while self.paused and any(one.id in self.gated for one in requests):
                await self._ungated.wait()
            for request in requests:
                if request.id in self.gated:  # nobody withdrew it meanwhile
                    self._submit(request, streams)
        except BaseException:
            call.withdraw()
            raise
        return call

    def _left(self, tenant: str, count: int) -> None:
        """So many generations of a tenant are on their way no more; a name without any is forgotten."""
        self.tenants[tenant] -= count
        if not self.tenants[tenant]:
            del self.tenants[tenant]

    def _submit(self, request: Request, streams: bool) -> None:
        """Of one that is gated, which it is no more."""
        if self.weightless:  # it is about to end
            raise Refusal(503, "the server has no weights, and is about to end.", "no_weights", retry_s=1)
        post = partial(self._post, request.id)
        self.renew()
        try:
            future = self.driver.submit(request, post if streams else None)
        except TandemError as error:
            raise refused(error) from error
        self.open[request.id] = opened = self.gated.pop(request.id)
        for watcher in self.watchers:
            watcher.began(opened)
        future.add_done_callback(post)

    def _post(self, request_id: str, what: Columns | Future[Completion]) -> None:
        """From the engine's thread."""
        self._posted.append((request_id, what))
        if not self._woken:
            self._woken = True
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # before the queue is read: who posts after that wakes again
        while self._posted:
            request_id, what = self._posted.popleft()
            opened = self.open[request_id]
            if isinstance(what, Columns):
                now = time.monotonic()
                if opened.last_s is not None:
                    self.gap(now - opened.last_s)
                opened.last_s = now
                opened.drawn += len(what)
                opened.call.arrived(request_id, what)
            else:
                self._end(opened, what)

    def _end(self, opened: Open, future: Future[Completion]) -> None:
        request = opened.request
        del self.open[request.id]
        self._left(request.tenant, 1)
        error = future.exception()
        completion = None if error is not None else future.result()
        for watcher in self.watchers:
            watcher.ended(opened, completion)
        if completion is not None:
            self.failures = 0
            if completion.failure:
                said = f"no token could be drawn: {completion.failure}"
                opened.call.arrived(request.id, Refusal(500, said, "not_finite"))
            else:
                opened.call.arrived(request.id, completion)
        elif error is not None:
            log.error("request %s failed: %s", request.id, error, exc_info=error.__cause__)
            told = refused(error) if isinstance(error, TandemError) and not isinstance(error, EngineError) else None
            opened.call.arrived(
                request.id,
                told or Refusal(500, "the engine failed, and this request with it. Ask again.", "engine_failed"),
            )
            self.renew()

    def renew(self) -> None:
        """An engine whose step raised what it should not is in no known state: another begins on the same weights."""
        if isinstance(self.driver.stopped, EngineError) and not self.draining:
            self.failures += 1
            self.renewals += 1
            self._before = self.total()
            log.error("the engine begins anew: %s", self.driver.stopped)
            self.driver = Driver(self.engine.renewed()).start()

    def abort(self, request_id: str) -> None:
        """Withdraws a generation, if it is on its way; one that waits for the end of a pause has nothing."""
        if request_id in self.open:
            self.driver.abort(request_id)
        elif (opened := self.gated.pop(request_id, None)) is not None:
            self._left(opened.request.tenant, 1)
            now, nothing = time.monotonic(), Columns.of(tokens=(), logprobs=(), versions=())
            opened.call.arrived(request_id, Completion(request_id, nothing, StopReason.ABORTED, now, now, now))
            self._tell()

    def pause(self) -> None:
        """What is asked from now on waits."""
        self.paused = True

    def resume(self) -> None:
        self.paused = False
        self._tell()
        self.driver.hold(False)

    def _tell(self) -> None:
        """Who waits at the gate looks again."""
        self._ungated.set()
        self._ungated = asyncio.Event()

    async def idle(self, deadline_s: float, given_up: Callable[[], bool] = lambda: False) -> bool:
        """Waits for all that is on its way to end; whether it has by the deadline, or until this is given up."""
        until_s = time.monotonic() + deadline_s
        while (self.open or (self.gated and not self.paused)) and not given_up() and time.monotonic() < until_s:
            await asyncio.sleep(0.02)
        return not self.open

    async def drain(self) -> None:
        """Takes nothing more, and waits for what is on its way; what takes longer than server.drain_s is withdrawn."""
        self.draining = True
        for request_id in list(self.open) if self.weightless else ():
            self.driver.abort(request_id)
        self.resume()
        if not await self.idle(self.config.drain_s):
            for request_id in list(self.open):
                self.driver.abort(request_id)
            await self.idle(self.config.drain_s)

    def close(self) -> None:
        self.draining = True
        self.driver.close(0.0)
