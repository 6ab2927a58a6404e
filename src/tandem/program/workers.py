"""The child processes of an EnvironmentPool, and who is called next.

Where episodes are plain, a child has one call at a time. A call that overruns its deadline costs its child its life;
calls that wait go to another. An episode with state lives in one child and dies with it; one without goes on in the
next. A child more comes up, to `task.workers`, where one is busy and calls wait.

Where episodes are asynchronous, a child has all its calls at once and cancels those that overrun their deadline; one
that swallows its cancellation is left behind, and only its program fails. A child that says nothing of a late call for
GRACE_S and ANSWER_S is held up by some call, and ends with all its episodes.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tandem.errors import EnvironmentFailure
from tandem.program.child import GRACE_S, Answer, Home, unwrapped
from tandem.program.config import TaskConfig
from tandem.program.episode import Opened
from tandem.types import Failure

if TYPE_CHECKING:
    from tandem.program.pool import RunningEpisode

START_DEADLINE_S = 120.0  # imports (reasoning-gym: 1 s warm, 4 s cold), the user's constructor and the held-out prompts
CLOSE_S = 5.0  # for episodes to give back what they hold, at the end of a run
TOGETHER = 32  # answers that a reward model is asked for at once, at most
BUSY_S = 0.1  # of one call, until another child takes those that wait: most rewards take a millisecond
ANSWER_S = 2.0  # after GRACE_S, for an asynchronous child to answer that a call was late
POLL_S = 0.5  # between looks at deadlines, where no answer comes


@dataclass(slots=True, eq=False)
class Asked:
    """A call that waits or runs."""

    method: str
    arguments: tuple[Any, ...]
    where: str  # of its Failure
    until_s: float = math.inf
    episode: RunningEpisode | None = None
    future: Future[Any] = field(default_factory=Future)
    overran: Failure | None = None  # the first time, when it had
    had_s: float = 0.0
    broken: bool = False  # what failed was the call itself, not what was around it
    alone: bool = False  # it was made with others, and not answered in time: it is made by itself

    @property
    def prompt(self) -> Any:
        return self.episode.prompt if self.episode is not None else next(iter(self.arguments), None)


class _Waiting:
    """Who is called next, and for how long: a slow call costs itself before it costs the others.

    A call may take what remains of the time over those that remain, and twice the mean of those that came back: where
    all are slow, some are answered. What overruns that waits, behind those that ask of another prompt, until each has
    had its turn, and is called again where more is left for it than it had.
    """

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.first: deque[Asked] = deque()
        self.bound: dict[Home, deque[Asked]] = {}  # of episodes that this child knows
        self.again: deque[Asked] = deque()
        self.until_s = math.inf  # of the calls that the counts below are of
        self.answered = self.overrun = 0
        self.answered_s = 0.0

    def __len__(self) -> int:
        return len(self.first) + len(self.again) + sum(map(len, self.bound.values()))

    def add(self, call: Asked) -> None:
        """A call that has not been made yet."""
        if call.until_s != self.until_s and math.isfinite(call.until_s):  # another step
            self.until_s, self.answered, self.overrun, self.answered_s = call.until_s, 0, 0, 0.0
        home = call.episode.home if call.episode is not None else None
        if home is None or home not in self.bound:
            self.first.append(call)
        else:
            self.bound[home].append(call)

    def next(self, child: Home | None) -> Asked | None:
        """The call for `child` to make, out of those that wait."""
        for calls in (self.bound.get(child, ()) if child is not None else (), self.first, self.again):
            if calls:
                return calls.popleft()  # type: ignore[union-attr]
        return None

    def also(self, call: Asked, child: Home) -> list[Asked]:
        """Of those that wait for `child` next, what it can be asked for together with `call`, a reward."""
        found: list[Asked] = []
        for calls in (self.bound.get(child, deque[Asked]()), self.first):
            while calls and len(found) + 1 < TOGETHER and self._joins(calls[0], call, child):
                found.append(calls.popleft())
        return found

    def _joins(self, one: Asked, call: Asked, child: Home) -> bool:
        free = one.episode is not None and (one.episode.home is child or not one.episode.lasts)
        return one.method == call.method and one.until_s == call.until_s and free and not (one.alone or one.overran)

    def leave(self, child: Home) -> None:
        """`child` has ended: what it was to do is done by others, where it can be."""
        self.first.extendleft(reversed(self.bound.pop(child, ())))

    def limit_s(self, call: Asked, start_s: float, workers: int) -> float:
        """Seconds for `call`, which is no longer among those that wait, where a new child after it takes `start_s`."""
        left_s = max(0.0, call.until_s - time.monotonic())
        share_s = left_s * min(workers, len(self) + 1) / (len(self) + 1)
        if self.answered:
            typical_s = 2 * self.answered_s / self.answered
        else:
            typical_s = 0.0 if self.overrun else left_s / 4
        return min(self.deadline_s, left_s, max(share_s - start_s, share_s / 2, typical_s))

    def took(self, call: Asked, seconds: float, limit_s: float, failure: Failure | None) -> bool:
        """Record how a call went; whether it is over."""
        if failure is None:
            self.answered, self.answered_s = self.answered + 1, self.answered_s + seconds
            return True
        self.overrun += 1
        self.first = deque(sorted(self.first, key=lambda other: other.prompt is call.prompt))
        if failure.where != "deadline" or limit_s >= self.deadline_s or (call.episode and call.episode.lasts):
            return True
        call.overran, call.had_s = failure, limit_s
        self.again.append(call)
        return False


class _Flight:
    """The calls that a concurrent child has, by number."""

    def __init__(self, child: Home) -> None:
        self.child = child
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._calls: dict[int, tuple[Asked, float]] = {}  # with the seconds that it may take
        self._due_s: dict[int, float] = {}
        self._ended = False

    def begin(self, call: Asked, arguments: tuple[Any, ...], limit_s: float) -> bool:
        """Whether it could be: the child may have ended meanwhile."""
        with self._lock:
            if self._ended:
                return False
            number = next(self._numbers)
            self._calls[number] = call, limit_s
            self._due_s[number] = time.monotonic() + limit_s + GRACE_S + ANSWER_S
        self.child.send((number, call.method, arguments, limit_s))
        return True

    def end(self, number: int) -> tuple[Asked, float] | None:
        with self._lock:
            self._due_s.pop(number, None)
            return self._calls.pop(number, None)

    def stuck(self, now_s: float) -> list[tuple[Asked, float]]:
        """Calls that should have been answered long ago."""
        with self._lock:
            return [self._calls[number] for number, due_s in self._due_s.items() if due_s < now_s]

    def rest(self) -> list[tuple[Asked, float]]:
        """All that are left; none can begin from now on."""
        with self._lock:
            self._ended = True
            left, self._calls = list(self._calls.values()), {}
            self._due_s.clear()
            return left


class Workers:
    """Threads that hold a child each and take calls from one queue."""

    def __init__(self, config: TaskConfig, start_deadline_s: float, born: Callable[[TaskConfig], Home]) -> None:
        self.config, self.born = config, born
        self.start_deadline_s = start_deadline_s
        self.children: list[Home] = []  # one a thread
        self.threads: list[threading.Thread] = []
        self.idle = 0  # threads that wait for a call
        self._changed = threading.Condition()  # guards all but the children's pipes
        self._waiting = _Waiting(config.reward_deadline_s)
        self._flights: dict[Home, _Flight] = {}  # of the concurrent ones that live
        self._receivers: list[threading.Thread] = []  # of their answers
        self._start_s = 0.0  # that the last child was waited for
        self._closed = False
        self._leaving = 0  # episodes that are being closed

    def ask(self, call: Asked) -> Future[Any]:
        with self._changed:
            if self._closed:
                call.future.set_result(Failure(call.where, "the task was closed"))
                return call.future
            self._waiting.add(call)
            self._leaving += call.method == "teardown"
            self._changed.notify_all()
        if not self.threads:
            self.grow()
        return call.future

    def grow(self) -> None:
        """A thread and a child more, whose imports begin at once, unless there are enough."""
        with self._changed:
            if self._closed or len(self.threads) >= self.config.workers:
                return
            place = len(self.threads)
            self.children.append(self._born())
            self.threads.append(threading.Thread(target=self._work, args=(place,), name=f"task {place}", daemon=True))
        self.threads[place].start()

    def close(self) -> None:
        """Kill the children, when episodes that end have given back what they hold; calls that wait fail."""
        with self._changed:
            self._changed.wait_for(lambda: not self._leaving, CLOSE_S)
            self._closed = True
            self._changed.notify_all()
            for child in self.children:
                child.end()  # its thread finds the end of the pipe
        for thread in (*self.threads, *self._receivers):
            thread.join(10.0)
        for child in self.children:
            child.kill()
            child.join(1.0)
        while call := self._waiting.next(None):
            call.future.set_result(Failure(call.where, "the task was closed"))

    def _born(self) -> Home:
        child = self.born(self.config)
        self._waiting.bound[child] = deque()
        return child

    def _work(self, place: int) -> None:
        """Takes calls for children[place] until the pool is closed."""
        while True:
            with self._changed:
                self.idle += 1
                while (call := self._waiting.next(self.children[place])) is None and not self._closed:
                    self._changed.wait()
                self.idle -= 1
                child = self.children[place]
                judged = call is not None and call.method == "score" and self.config.judge and child.started
                with_others = judged and not (child.concurrent or call.alone or call.overran)  # type: ignore[union-attr]
                others = self._waiting.also(call, child) if call is not None and with_others else []
            if call is None:
                return
            if others:
                self._make_together([call, *others], place)
            else:
                self._settle(call, lambda: self._made(call, place))

    def _settle(self, call: Asked, made: Callable[[], Any]) -> None:
        """Give what `made` gives to who waits for it, unless it is _LATER."""
        try:
            if (answer := made()) is _LATER:
                return
            if isinstance(answer, Failure) and call.method == "score" and call.episode is not None:
                answer = call.episode.paid(answer) if call.broken else answer
            call.future.set_result(answer)
        except Exception as error:  # noqa: BLE001 - recorded boundary: a wrong task, to whom it concerns
            call.future.set_exception(error)
        if call.method == "teardown":
            with self._changed:
                self._leaving -= 1
                self._changed.notify_all()

    def _made(self, call: Asked, place: int) -> Any:
        """The answer of the child, a Failure, or _LATER where it comes by itself or the call is made once more."""
        late = call.overran or Failure("deadline", f"no time was left for its {call.where} (rollout.deadline_s)")
        if not self._up(place, call.until_s) or time.monotonic() >= call.until_s:
            return late
        child = self.children[place]
        with self._changed:
            limit_s = self._waiting.limit_s(call, self._start_s, self.config.workers)
        if call.overran and call.had_s >= limit_s:
            return late
        episode = call.episode
        if episode is not None and episode.home is not child:
            if call.method == "teardown":
                return None
            if episode.lasts:
                return Failure("environment", f"its process ended with it: {episode.home.reason}")  # type: ignore[union-attr]
            episode.home, episode.sent = child, -1
        if child.concurrent:
            limit_s = min(self.config.reward_deadline_s, max(0.0, call.until_s - time.monotonic()))
            flight = self._flights.get(child)  # none: it has ended meanwhile
            begun = flight is not None and flight.begin(call, self._arguments(call), limit_s)
            return _LATER if begun else Failure(call.where, f"its process ended: {child.reason}")
        began_s = time.monotonic()
        child.send((0, call.method, self._arguments(call), limit_s))
        answer = child.receive(min(BUSY_S, limit_s))
        if answer is None and child.alive() and limit_s > BUSY_S:
            if len(self._waiting) > self.idle:
                self.grow()
            answer = child.receive(limit_s - BUSY_S)
        failure = self._overrun(call, child, limit_s) if answer is None else None
        with self._changed:
            over = self._waiting.took(call, time.monotonic() - began_s, limit_s, failure)
            if failure is not None:
                self._replace(place, failure.reason)
            self._changed.notify_all()
        if answer is None:
            return failure if over else _LATER
        return self._answered(call, answer, limit_s)

    def _make_together(self, calls: list[Asked], place: int) -> None:
        """Rewards of a model, in one call for as long as all of them may take. Where they take longer, or the child
        dies of them, each is made by itself."""
        child = self.children[place]
        for call in calls:
            assert call.episode is not None, call
            if call.episode.home is not child:
                call.episode.home, call.episode.sent = child, -1
        with self._changed:
            share_s = sum(self._waiting.limit_s(call, self._start_s, self.config.workers) for call in calls)
        began_s = time.monotonic()
        limit_s = min(share_s, max(0.0, calls[0].until_s - began_s))
        child.send((0, "scores", ([self._arguments(call) for call in calls],), limit_s))
        answer = child.receive(limit_s)
        with self._changed:
            if answer is None:
                for call in calls:
                    call.alone = True
                self._waiting.first.extendleft(reversed(calls))
                self._replace(place, "rewards asked for together were not there in time")
            for call in calls if answer is not None else ():
                self._waiting.took(call, (time.monotonic() - began_s) / len(calls), limit_s, None)
            self._changed.notify_all()
        if answer is None:
            return
        _, kind, value, _ = answer
        for call, one in zip(calls, value if kind == "value" else [(kind, value)] * len(calls), strict=True):
            self._settle(call, lambda: self._answered(call, (0, *one, 0.0), limit_s))  # noqa: B023

    def _answered(self, call: Asked, answer: Answer, limit_s: float) -> Any:
        """What a child's answer says."""
        _, kind, value, waited_s = answer
        if waited_s > BUSY_S:
            self.grow()
        if kind in ("raised", "unplayed"):
            call.broken = kind == "raised"
            return Failure(call.where if call.broken else "environment", value)
        if kind == "late":
            return self._late(call, limit_s, value)
        found = unwrapped(answer, self.config.label)
        if call.episode is not None:
            found = self._heard(call.episode, call, found)
        call.broken = isinstance(found, Failure)  # a reward that is no number
        return found

    def _fly(self, place: int) -> None:
        """Takes the answers of a concurrent child until it ends, and puts another in its place."""
        child = self.children[place]
        flight = self._flights[child]
        stuck: list[tuple[Asked, float]] = []
        while not stuck and (child.alive() or not self._closed):
            answer = child.receive(POLL_S)
            if answer is None and not child.alive():
                break
            if answer is None:
                stuck = flight.stuck(time.monotonic())
            elif (found := flight.end(answer[0])) is not None:
                self._settle(found[0], functools.partial(self._answered, found[0], answer, found[1]))
        late = {call: self._late(call, limit_s) for call, limit_s in stuck}
        reason = next((failure.reason for failure in late.values()), f"it died ({child.ended()})")
        with self._changed:
            self._replace(place, "the task was closed" if self._closed else reason)
            self._changed.notify_all()
        self._flights.pop(child, None)
        for call, _ in flight.rest():
            if call.episode is not None:
                call.episode.lasts = True  # what it held is gone
            failure = late.get(call) or Failure(call.where, f"its process ended: {child.reason}")
            self._settle(call, lambda: failure)  # noqa: B023

    def _arguments(self, call: Asked) -> tuple[Any, ...]:
        """Of an episode's call: what its child has not seen."""
        episode = call.episode
        if episode is None:
            return call.arguments
        if call.method == "teardown":
            return (episode.number,)
        opened = Opened(episode.prompt, episode.counts, episode.earned) if episode.sent < 0 else None
        news = tuple(episode.said[max(0, episode.sent) :])
        episode.sent = len(episode.said)
        return (episode.number, opened, news, *call.arguments)

    def _heard(self, episode: RunningEpisode, call: Asked, value: Any) -> Any:
        if call.method == "teardown":
            return None
        if call.method == "score":
            result, episode.lasts, episode.counts = value
            return result
        result, lasts = value
        if call.method == "prepare":  # nothing is lost with it yet
            return None
        episode.lasts = lasts
        if call.method == "observe":
            episode.counts = result.counts
            episode.earned += result.reward
            if (messages := result.messages) is not None and not call.arguments[0]:
                episode.said.extend(messages if isinstance(messages, tuple) else messages.messages)
                episode.sent = len(episode.said)
        return result

    def _overrun(self, call: Asked, child: Home, limit_s: float) -> Failure:
        if not child.alive():
            call.broken = True
            return Failure(call.where, f"its process died ({child.ended()})")
        return self._late(call, limit_s)

    def _late(self, call: Asked, limit_s: float, what: str = "") -> Failure:
        short = limit_s < self.config.reward_deadline_s
        call.broken = not short
        setting = "its share of rollout.deadline_s" if short else "task.reward_deadline_s"
        return Failure(
            "deadline", f"{call.where} took longer than {limit_s:.3g} s ({setting}){f', {what}' * bool(what)}"
        )

    def _up(self, place: int, until_s: float) -> bool:
        """Whether the child is there, its task built; not where it is still coming up at `until_s`.

        TaskError where the task is wrong, EnvironmentFailure where it does not come up.
        """
        child = self.children[place]
        if child.started:
            return True
        began_s = time.monotonic()
        answer = child.receive(max(0.0, min(self.start_deadline_s, until_s - began_s)))
        ended, hung = child.ended(), child.alive()
        if answer is None and hung and time.monotonic() >= until_s:
            return False
        if answer is None or answer[1] != "value":
            with self._changed:
                self._replace(place, "it did not come up")
        if answer is None:
            late = f"did not come up within {self.start_deadline_s:g} s" if hung else "ended as it came up"
            raise EnvironmentFailure(f"task {self.config.label}: its process {late} ({ended})")
        child.concurrent = unwrapped(answer, self.config.label)
        self._start_s, child.started = time.monotonic() - began_s, True
        if child.concurrent:
            self._flights[child] = _Flight(child)
            self._receivers.append(threading.Thread(target=self._fly, args=(place,), daemon=True))
            self._receivers[-1].start()
        return True

    def _replace(self, place: int, reason: str) -> None:
        """Another child for a thread, at once: its imports overlap with what comes next."""
        child = self.children[place]
        child.reason = reason
        child.kill()
        self._waiting.leave(child)
        if not self._closed:
            self.children[place] = self._born()


_LATER = object()
