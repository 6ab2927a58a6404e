"""Environments in a pool of child processes, asked through futures, so that nobody waits for one.

Code of a user, of reasoning-gym and of math-verify runs in children, a call at a time in each. A call that overruns its
deadline costs its child its life; calls that wait go to another. An episode with state lives in one child and dies with
it; one without goes on in the next. A child more comes up, to `task.workers`, where one is busy and calls wait.
Trusted rewards of linear cost run where they are called.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
import time
import warnings
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from tandem.errors import EnvironmentFailure, TandemWarning, TaskError
from tandem.program import prompts
from tandem.program.child import Child, unwrapped
from tandem.program.config import TaskConfig
from tandem.program.episode import Observed, inline_reward, last_text
from tandem.program.reward import INLINE, REWARDS, clipped
from tandem.types import Failure, Message, Prompt

START_DEADLINE_S = 120.0  # imports (reasoning-gym: 1 s warm, 4 s cold), the user's constructor and the held-out prompts
CLOSE_S = 5.0  # for episodes to give back what they hold, at the end of a run
BUSY_S = 0.1  # of one call, until another child takes those that wait: most rewards take a millisecond
FIRST_PROMPTS = 8  # training prompts whose answers are tried before a run, where there is no file of them


class EnvironmentPool:
    """The task of a run: its prompts by index, held-out prompts, and episodes that answer with futures.

    A jsonl file is read here; what needs a child starts one and returns at once. TaskError where the task is wrong:
    here, or from `ready()` and the first use where a child builds it.
    """

    def __init__(self, config: TaskConfig, start_deadline_s: float = START_DEADLINE_S) -> None:
        self.config = config
        # Reading a file is quick and needs no child; its math-verify rewards do, and start one when first asked.
        self._local = prompts.FilePrompts(config) if config.environment == "jsonl" else None
        self._untried = prompts.uncertain(config, self._local.prompts) if self._local is not None else []
        self._workers = _Workers(config, start_deadline_s)
        self._ids = itertools.count()
        if self._local is None or self._untried:
            self._workers.grow()
        if config.environment == "reasoning_gym" and config.reward == "score" and config.name in prompts.GYM_FAULTS:
            fault = prompts.GYM_FAULTS[config.name]
            warnings.warn(f"reasoning-gym's {config.name}: {fault} (docs/rewards.md).", TandemWarning, stacklevel=2)

    def ready(self) -> None:
        """Wait until the task is built and its answers have been tried, so that a wrong one stops the run at once."""
        if self._local is not None and not self._untried:
            return
        self._asked("ready", [()])
        if self._local is None and prompts.uses_math_verify(self.config):
            self._untried = prompts.uncertain(self.config, [*self.heldout, *self.batch(0, FIRST_PROMPTS)])
        while self._untried:  # few at a time: what never ends costs the deadline each
            some, self._untried = self._untried[:4], self._untried[4:]
            trials = [self._workers.ask(_Call("trial", (prompt,), "trial")) for prompt in some]
            for prompt, trial in zip(some, trials, strict=True):
                if isinstance(answer := trial.result(), Failure):
                    place = f"line {prompt.record['line']}" if "line" in prompt.record else f"prompt {prompt.id}"
                    raise TaskError(
                        f"task {self.config.label}, {place}: the answer {clipped(prompt.record['answer'])} cannot be "
                        f"evaluated: {answer.reason}. Mend or remove it, or use task.reward=exact."
                    )

    @functools.cached_property
    def heldout(self) -> tuple[Prompt, ...]:
        """`task.heldout_size` prompts with distinct questions, none of which is a training prompt's."""
        if self._local is not None:
            return self._local.heldout
        (heldout,) = self._asked("heldout", [()])
        return tuple(heldout)

    def prompt(self, index: int) -> Prompt:
        """Training prompt `index`, counted from 0 over the whole run: the data cursor. Its id is unique."""
        return self.batch(index, 1)[0]

    def batch(self, start: int, count: int) -> list[Prompt]:
        """Training prompts [start, start + count), a function of (config, start, count)."""
        indices = range(start, start + count)
        if self._local is not None:
            return [self._local.train(index) for index in indices]
        return self._asked("train", [(index,) for index in indices])

    def solutions(self, asked: Sequence[Prompt]) -> list[str]:
        """A right answer to each, written out. TaskError where the task has none."""
        if self._local is not None:
            return [prompts.solution(self._local, prompt) for prompt in asked]
        return self._asked("solution", [(prompt,) for prompt in asked])

    def episode(self, prompt: Prompt, until_s: float = math.inf) -> RunningEpisode:
        """A new run, none of whose calls goes past `until_s` on time.monotonic's clock."""
        ask = None if self._local is not None else self._workers.ask
        return RunningEpisode(next(self._ids), prompt, until_s, self.config.reward, ask, self._workers.ask)

    def close(self) -> None:
        """End the children."""
        self._workers.close()

    def _asked(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Prompts from a child; a prompt that cannot be had stops the run, for there is nothing to train on."""
        futures = [self._workers.ask(_Call(method, values, "environment")) for values in arguments]
        answers = []
        for values, future in zip(arguments, futures, strict=True):
            if isinstance(answer := future.result(), Failure):
                asked = values[0].id if values and isinstance(values[0], Prompt) else values[0] if values else None
                name = "held-out prompts" if asked is None else f"training prompt {asked}"
                raise EnvironmentFailure(f"task {self.config.label}, {name}: {answer.reason}")
            answers.append(answer)
        return answers


class RunningEpisode:
    """An episode as the run sees it: what was said, and futures of what follows. One call at a time."""

    def __init__(self, number: int, prompt: Prompt, until_s: float, reward: str, observer: Any, scorer: Any) -> None:
        self.number = number
        self.prompt = prompt
        self.until_s = until_s
        self.said: list[
            Message
        ] = []  # since the prompt: who plays appends the model's; observations come by themselves
        self.home: Child | None = None  # that knows of it
        self.sent = 0  # of `said`, to its home
        self.lasts = False  # it has state, and ends with its home
        self._reward = reward
        self._observer, self._scorer = observer, scorer

    def observe(self) -> Future[Observed | Failure]:
        """What the environment says next, None where the program ends, or a Failure."""
        if self._observer is None:
            return _done(None)
        return self._observer(_Call("observe", (), "environment", self.until_s, self))

    def score(self) -> Future[float | Failure]:
        """The reward, or why there is none."""
        if self._reward in INLINE:
            return _done(inline_reward(REWARDS[self._reward], self.prompt, last_text(self.said)))
        return self._scorer(_Call("score", (), "reward", self.until_s, self))

    def close(self) -> None:
        """No call follows."""
        if self.home is not None and self.home.alive():
            self._scorer(_Call("close", (), "environment", episode=self))


@dataclass(slots=True, eq=False)
class _Call:
    """A call that waits or runs."""

    method: str
    arguments: tuple[Any, ...]
    where: str  # of its Failure
    until_s: float = math.inf
    episode: RunningEpisode | None = None
    future: Future[Any] = field(default_factory=Future)
    overran: Failure | None = None  # the first time, when it had
    had_s: float = 0.0

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
        self.first: deque[_Call] = deque()
        self.bound: dict[Child, deque[_Call]] = {}  # of episodes that this child knows
        self.again: deque[_Call] = deque()
        self.until_s = math.inf  # of the calls that the counts below are of
        self.answered = self.overrun = 0
        self.answered_s = 0.0

    def __len__(self) -> int:
        return len(self.first) + len(self.again) + sum(map(len, self.bound.values()))

    def add(self, call: _Call) -> None:
        """A call that has not been made yet."""
        if call.until_s != self.until_s and math.isfinite(call.until_s):  # another step
            self.until_s, self.answered, self.overrun, self.answered_s = call.until_s, 0, 0, 0.0
        home = call.episode.home if call.episode is not None else None
        if home is None or home not in self.bound:
            self.first.append(call)
        else:
            self.bound[home].append(call)

    def next(self, child: Child | None) -> _Call | None:
        """The call for `child` to make, out of those that wait."""
        for calls in (self.bound.get(child, ()) if child is not None else (), self.first, self.again):
            if calls:
                return calls.popleft()  # type: ignore[union-attr]
        return None

    def leave(self, child: Child) -> None:
        """`child` has ended: what it was to do is done by others, where it can be."""
        self.first.extendleft(reversed(self.bound.pop(child, ())))

    def limit_s(self, call: _Call, start_s: float, workers: int) -> float:
        """Seconds for `call`, which is no longer among those that wait, where a new child after it takes `start_s`."""
        left_s = max(0.0, call.until_s - time.monotonic())
        share_s = left_s * min(workers, len(self) + 1) / (len(self) + 1)
        if self.answered:
            typical_s = 2 * self.answered_s / self.answered
        else:
            typical_s = 0.0 if self.overrun else left_s / 4
        return min(self.deadline_s, left_s, max(share_s - start_s, share_s / 2, typical_s))

    def took(self, call: _Call, seconds: float, limit_s: float, failure: Failure | None) -> bool:
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


class _Workers:
    """Threads that hold a child each and take calls from one queue."""

    def __init__(self, config: TaskConfig, start_deadline_s: float) -> None:
        self.config = config
        self.start_deadline_s = start_deadline_s
        self.children: list[Child] = []  # one a thread
        self.threads: list[threading.Thread] = []
        self.idle = 0  # threads that wait for a call
        self._changed = threading.Condition()  # guards all but the children's pipes
        self._waiting = _Waiting(config.reward_deadline_s)
        self._start_s = 0.0  # that the last child was waited for
        self._closed = False
        self._leaving = 0  # episodes that are being closed

    def ask(self, call: _Call) -> Future[Any]:
        with self._changed:
            if self._closed:
                call.future.set_result(Failure(call.where, "the task was closed"))
                return call.future
            self._waiting.add(call)
            self._leaving += call.method == "close"
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
        for thread in self.threads:
            thread.join(10.0)
        for child in self.children:
            child.kill()
        while call := self._waiting.next(None):
            call.future.set_result(Failure(call.where, "the task was closed"))

    def _born(self) -> Child:
        child = Child(self.config)
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
            if call is None:
                return
            try:
                if (answer := self._made(call, place)) is not _AGAIN:
                    call.future.set_result(answer)
            except Exception as error:  # noqa: BLE001 - recorded boundary: a wrong task, to whom it concerns
                call.future.set_exception(error)
            if call.method == "close":
                with self._changed:
                    self._leaving -= 1
                    self._changed.notify_all()

    def _made(self, call: _Call, place: int) -> Any:
        """The answer of the child, a Failure, or _AGAIN where it is called once more."""
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
            if call.method == "close":
                return None
            if episode.lasts:
                return Failure("environment", f"its process ended with it: {episode.home.reason}")  # type: ignore[union-attr]
            episode.home, episode.sent = child, 0
        began_s = time.monotonic()
        child.send(call.method, self._arguments(call))
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
            return failure if over else _AGAIN
        if answer[0] == "raised":
            return Failure(call.where, answer[1])
        value = unwrapped(answer, self.config.label)
        return value if episode is None else self._heard(episode, call, value)

    def _arguments(self, call: _Call) -> tuple[Any, ...]:
        """Of an episode's call: what its child has not seen."""
        episode = call.episode
        if episode is None:
            return call.arguments
        if call.method == "close":
            return (episode.number,)
        opened, news = (episode.prompt if episode.sent == 0 else None), tuple(episode.said[episode.sent :])
        episode.sent = len(episode.said)
        return (episode.number, opened, news)

    def _heard(self, episode: RunningEpisode, call: _Call, value: Any) -> Any:
        if call.method == "close":
            return None
        result, episode.lasts = value
        if call.method == "observe" and result is not None:
            episode.said.extend(result if isinstance(result, tuple) else result.messages)
            episode.sent = len(episode.said)
        return result

    def _overrun(self, call: _Call, child: Child, limit_s: float) -> Failure:
        if not child.alive():
            return Failure(call.where, f"its process died ({child.ended()})")
        short = limit_s < self.config.reward_deadline_s
        setting = "its share of rollout.deadline_s" if short else "task.reward_deadline_s"
        return Failure("deadline", f"{call.where} took longer than {limit_s:.3g} s ({setting})")

    def _up(self, place: int, until_s: float) -> bool:
        """Whether the child is there, its task built; not where it is still coming up at `until_s`.

        TaskError where the task is wrong, EnvironmentFailure where it does not come up.
        """
        child = self.children[place]
        if child.started:
            return True
        began_s = time.monotonic()
        answer = child.receive(max(0.0, min(self.start_deadline_s, until_s - began_s)))
        ended = child.ended()
        if answer is None and child.alive() and time.monotonic() >= until_s:
            return False
        if answer is None or answer[0] != "value":
            with self._changed:
                self._replace(place, "it did not come up")
        if answer is None:
            limit = f"within {self.start_deadline_s:g} s"
            raise EnvironmentFailure(f"task {self.config.label}: its process did not come up {limit} ({ended})")
        unwrapped(answer, self.config.label)
        self._start_s, child.started = time.monotonic() - began_s, True
        return True

    def _replace(self, place: int, reason: str) -> None:
        """Another child for a thread, at once: its imports overlap with what comes next."""
        child = self.children[place]
        child.reason = reason
        child.kill()
        self._waiting.leave(child)
        if not self._closed:
            self.children[place] = self._born()


_AGAIN = object()


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
