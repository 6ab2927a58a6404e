"""Requests to several engines, asked as one: which engine has what, and what becomes of it where one dies or is late.

    router = Router([Replica("engine 1", Driver(one), lambda: one.version, capacity_tokens), ...])
    future = router.submit(request)

A request's tokens depend on its seed, its positions and the weights, never on the engine. So what an engine has when it
dies is asked of another; what it has not answered by a deadline is asked of another too, and whoever answers first has
answered: a future ends once. The answer that nobody waits for any more is dropped, and its tokens are told.

Which engine: by engine/affinity.py, with the load that is the tokens that its requests may come to hold, over those
that it has room for.

All serve one version. An engine that serves an older one than another does missed a publication: it is asked for
nothing until it has it. One that is late is asked last, until it answers.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from tandem.columns import Columns
from tandem.engine.affinity import Affinity, Prefixes
from tandem.engine.driver import GRACE_S, Driver, OnTokens
from tandem.engine.prefix import extend_keys, root_key
from tandem.engine.programs import Programs
from tandem.engine.space import Space
from tandem.errors import ConfigError, EngineError, TandemError, WorkerError
from tandem.rollout.balance import Balance
from tandem.types import Completion, Request, StopReason, WeightVersion

DEATHS = (EngineError, WorkerError)  # of an engine, not of a request

Died = Callable[["Replica", Exception], None]


class Replica:
    """An engine, as the router knows it."""

    def __init__(
        self,
        name: str,
        driver: Driver,
        serves: Callable[[], WeightVersion],
        capacity_tokens: int,
        page_tokens: int = 16,
    ) -> None:
        self.name, self.driver, self.serves = name, driver, serves
        self.capacity_tokens, self.page_tokens = capacity_tokens, page_tokens
        self.dead = ""  # why it is asked no more
        self.late = False  # it has not answered something in time, and nothing since
        self.open: dict[str, _Try] = {}  # by their own ids, those that nobody waits for among them
        self.tokens = 0  # that these may come to hold
        self.returned_tokens = 0  # in all that it answered
        self.counts = Counter[str]()  # since the last `settle`
        self.prefixes = Prefixes()

    def load(self, more_tokens: int = 0) -> float:
        """What it was asked for, over what it has room for.

        >>> from tandem.engine.batch import INITIAL
        >>> Replica("engine 1", None, lambda: INITIAL, 1000).load(250)
        0.25
        """
        return (self.tokens + more_tokens) / self.capacity_tokens

    def space(self) -> Space | None:
        """As it told last."""
        return self.driver.engine.space()


@dataclass(slots=True, eq=False)
class _Asked:
    """A request that has no answer yet."""

    request: Request
    on_tokens: OnTokens | None
    future: Future[Completion]
    tries: list[_Try] = field(default_factory=list)  # that have not come back
    tried: list[Replica] = field(default_factory=list)
    given: int = 0  # tokens that on_tokens had
    done: bool = False
    withdrawn: bool = False
    streaming: threading.Lock = field(default_factory=threading.Lock)

    @property
    def most_tokens(self) -> int:
        return len(self.request.tokens) + self.request.sampling.max_new_tokens


@dataclass(slots=True, eq=False)
class _Try:
    """A request at an engine."""

    id: str
    asked: _Asked
    replica: Replica
    until_s: float
    given: int = 0  # tokens that it streamed
    ended: bool = False


class Router:
    """What a Driver is to rollouts, over several. Who waits calls `progress`: it drives engines that have no thread,
    and looks at the deadlines.

    answer_s: after which what an engine has not answered is asked of another too. died: told of each engine that did,
    once, from whichever thread found out. dropped: told of tokens that came and that nobody waited for. balance: of
    tenants' shares over all engines.
    """

    def __init__(
        self,
        replicas: Iterable[Replica],
        answer_s: float = float("inf"),
        died: Died = lambda replica, error: None,
        dropped: Callable[[int], None] = lambda tokens: None,
        clock: Callable[[], float] = time.monotonic,
        balance: Balance | None = None,
    ) -> None:
        self.replicas = list(replicas)
        self.balance = balance
        self.answer_s = answer_s
        self.died, self.dropped = died, dropped
        self.clock = clock
        self._changed = threading.Condition()  # guards all that follows, and what replicas and requests have
        self._open: dict[str, _Asked] = {}  # by request id
        self._affinity = Affinity[Replica]()
        self._due: deque[_Try] = deque()  # in the order of their deadlines
        self._leaving: deque[tuple[float, _Asked]] = deque()  # withdrawn: until when an engine may take to say so
        self._unwanted = set[Replica]()  # that have what nobody waits for
        self._numbers = itertools.count(1)
        self._ended = 0
        self._stopped = ""

    def join(self, replica: Replica) -> None:
        """One more engine, or one in place of a dead one; its name is its own."""
        with self._changed:
            assert replica.name not in {one.name for one in self.replicas}, replica.name
            self.replicas.append(replica)
            waiting = [one for one in self._open.values() if all(there.replica.late for there in one.tries)]
        for asked in waiting:
            self._ask(asked)

    @property
    def living(self) -> list[Replica]:
        return [replica for replica in self.replicas if not replica.dead]

    def submit(self, request: Request, on_tokens: OnTokens | None = None) -> Future[Completion]:
        """As Driver's. EngineError where no engine is left."""
        future: Future[Completion] = Future()
        future.set_running_or_notify_cancel()
        asked = _Asked(request, on_tokens, future)
        with self._changed:
            if self._stopped:
                raise EngineError(self._stopped)
            if request.id in self._open:
                raise ConfigError(f"request id {request.id!r} is in use by a live request; ids must be unique.")
            self._open[request.id] = asked
        try:
            if not self._ask(asked):
                raise self._none_left()
        except TandemError:
            with self._changed:
                self._open.pop(request.id, None)
            raise
        return future

    def abort(self, request_id: str) -> None:
        """As Driver's; where no engine says within GRACE_S what it has, that is nothing."""
        with self._changed:
            asked = self._open.get(request_id)
            if asked is None or asked.withdrawn:
                return
            asked.withdrawn = True
            self._leaving.append((self.clock() + GRACE_S, asked))
            tries = list(asked.tries)
        for one in tries:
            one.replica.driver.abort(one.id)

    def finish(self, program_id: str, tenant: str = "") -> None:
        """As Driver's: of each engine, for it may have gone from one to another."""
        for replica in self.living:
            replica.driver.finish(program_id, tenant)

    def on_restoring(self, told: Callable[[str], None]) -> None:
        """As Driver's."""
        for replica in self.living:
            replica.driver.on_restoring(told)

    def wake(self) -> None:
        """As Driver's."""
        with self._changed:
            self._count()

    def progress(self, seen: int, wait_s: float) -> int:
        """As Driver's: each engine without a thread that has something makes a step."""
        driven = False
        if self.balance is not None:
            self.balance.look(self.living)
        for replica in [one for one in self.replicas if one.open and not one.driver.threaded]:
            driven = True
            with suppress(Exception):  # it stopped: its requests ended with the reason, and are elsewhere now
                replica.driver.progress(seen, wait_s)
        self._look()
        self._let_go()
        if not driven:
            with self._changed:
                until_s = min([one.until_s for one in itertools.islice(self._due, 1)] + [self._leaves_s()])
                left_s = max(0.0, min(wait_s, until_s - self.clock()))
                self._changed.wait_for(lambda: self._ended != seen or not self._open, min(left_s, 1e6))
            self._look()
        return self._ended

    def settle(self) -> dict[str, dict[str, int]]:
        """By engine, since the last call: requests that it was asked for, those of them that another had been asked for
        before (again) or that paused programs of another came with (moved), and tokens that it answered with."""
        with self._changed:
            found = {
                one.name: {name: one.counts[name] for name in ("requests", "again", "moved", "tokens")}
                for one in self.replicas
                if one.counts or not one.dead
            }
            for one in self.replicas:
                one.counts.clear()
        return found

    def close(self, deadline_s: float) -> None:
        """As Driver's."""
        with self._changed:
            self._stopped = "the router was closed: it takes no more requests."
        failed = []
        for replica in self.replicas:
            try:
                replica.driver.close(deadline_s)
            except EngineError as error:
                failed.append(error)
        if failed:
            raise failed[0]

    # Which engine.

    def _choose(self, asked: _Asked) -> Replica | None:
        """And that the group is there from now on."""
        living = self.living
        newest = max((one.serves().step for one in living), default=0)
        may = [one for one in living if one not in asked.tried and one.serves().step == newest]
        may = [one for one in may if not one.late] or may
        if not may:
            return None
        version, page_tokens = may[0].serves(), min(one.page_tokens for one in may)

        def keys() -> list[bytes]:
            found: list[bytes] = []
            extend_keys(found, root_key(version), asked.request.tokens, page_tokens)
            return found

        request = asked.request
        program = Programs.name(request.tenant, request.program_id)
        return self._affinity.choose(may, request.group, asked.most_tokens, keys, program)

    def _ask(self, asked: _Asked) -> bool:
        """Of an engine that was not asked yet; False where there is none."""
        while True:
            with self._changed:
                if asked.done or asked.withdrawn:
                    return True
                replica = self._choose(asked)
                if replica is None:
                    return False
                name = f"{asked.request.id}@{next(self._numbers)}"
                one = _Try(name, asked, replica, self.clock() + self.answer_s)
                again = bool(asked.tried)
                asked.tries.append(one)
                asked.tried.append(replica)
                replica.open[name] = one
                replica.tokens += asked.most_tokens
            stream = partial(self._stream, one) if asked.on_tokens is not None else None
            try:
                future = replica.driver.submit(dataclasses.replace(asked.request, id=name), stream)
            except TandemError as error:
                with self._changed:
                    self._leave(one)
                if not isinstance(error, DEATHS):
                    raise
                self._die(replica, error)
                continue
            with self._changed:
                replica.counts.update(requests=1, again=int(again))
                self._due.append(one)
                unwanted = asked.done or asked.withdrawn
            if unwanted:
                replica.driver.abort(name)
            future.add_done_callback(partial(self._came, one))
            return True

    # What comes back.

    def _stream(self, one: _Try, columns: Columns) -> None:
        """What nobody had yet, in order, whichever engine draws it first."""
        asked = one.asked
        with asked.streaming:
            one.given += len(columns)
            new = min(len(columns), one.given - asked.given)
            if asked.done or new <= 0 or asked.on_tokens is None:
                return
            asked.given = one.given
            asked.on_tokens(columns.slice(len(columns) - new))

    def _came(self, one: _Try, future: Future[Completion]) -> None:
        error, asked, replica = future.exception(), one.asked, one.replica
        died = bool(replica.dead) or isinstance(error, DEATHS)
        if isinstance(error, DEATHS):
            self._die(replica, error)
        outcome: Completion | BaseException | None = error if not died else None
        dropped = 0
        with self._changed:
            self._leave(one)
            if outcome is None and not died:
                outcome = dataclasses.replace(future.result(), request_id=asked.request.id)
                tokens = len(outcome.columns)
                replica.late = False
                replica.returned_tokens += tokens
                replica.counts["tokens"] += tokens
                dropped = tokens if asked.done else 0
        if dropped:
            self.dropped(dropped)
        if outcome is not None:
            self._end(asked, outcome)
        elif asked.withdrawn and not asked.tries:
            self._end(asked, self._nothing(asked))
        elif not asked.done and not self._ask(asked) and not asked.tries:
            self._end(asked, self._none_left())

    def _leave(self, one: _Try) -> None:
        """It is at its engine no more."""
        if not one.ended:
            one.ended = True
            del one.replica.open[one.id]
            one.replica.tokens -= one.asked.most_tokens
            one.asked.tries.remove(one)

    def _end(self, asked: _Asked, outcome: Completion | BaseException) -> None:
        """Once. Others that were asked are told that nobody waits."""
        with self._changed:
            if asked.done:
                return
            asked.done = True
            del self._open[asked.request.id]
            others = list(asked.tries)
        for one in others:
            one.replica.driver.abort(one.id)
            self._unwanted.add(one.replica)
        if isinstance(outcome, Completion):
            asked.future.set_result(outcome)
        else:
            asked.future.set_exception(outcome)
        with self._changed:
            self._count()

    def _die(self, replica: Replica, error: Exception) -> None:
        with self._changed:
            if replica.dead:
                return
            replica.dead = str(error)
        self.died(replica, error)

    def _none_left(self) -> EngineError:
        dead = "; ".join(f"{one.name}: {one.dead}" for one in self.replicas if one.dead)
        return EngineError(f"no engine is left to ask. {dead or 'All were asked for this request.'}")

    def _nothing(self, asked: _Asked) -> Completion:
        now = self.clock()
        nothing = Columns.of(tokens=(), logprobs=(), versions=())
        return Completion(asked.request.id, nothing, StopReason.ABORTED, now, now, now)

    def _count(self) -> None:
        self._ended += 1
        self._changed.notify_all()

    # Deadlines.

    def _look(self) -> None:
        now, late, left = self.clock(), list[_Try](), list[_Asked]()
        with self._changed:
            while self._due and (self._due[0].ended or self._due[0].until_s <= now):
                one = self._due.popleft()
                if not (one.ended or one.asked.done or one.asked.withdrawn):
                    one.replica.late = True
                    late.append(one)
            while self._leaving and (self._leaving[0][1].done or self._leaving[0][0] <= now):
                asked = self._leaving.popleft()[1]
                if not asked.done:
                    left.append(asked)
        for one in late:
            self._ask(one.asked)
        for asked in left:
            self._end(asked, self._nothing(asked))

    def _let_go(self) -> None:
        """Nothing that nobody waits for stays in an engine without a thread."""
        while self._unwanted:
            replica = self._unwanted.pop()
            if not replica.driver.threaded:
                with suppress(Exception):  # as above
                    replica.driver.apply()

    def _leaves_s(self) -> float:
        return self._leaving[0][0] if self._leaving else float("inf")
