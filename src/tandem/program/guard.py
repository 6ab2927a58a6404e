"""Calls that may raise, hang or return nonsense, turned into values or Failures.

Code of a user, of reasoning-gym and of math-verify runs in a child process. A call that overruns its deadline costs
the child its life; a new one takes the calls that are left. Trusted rewards of linear cost run where they are called.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from tandem.errors import EnvironmentFailure, TaskError
from tandem.program.config import TaskConfig
from tandem.types import Failure

MAX_REWARD = 1e9  # squares of it, summed over a batch and over a model's weights, stay finite in fp32
START_DEADLINE_S = 120.0  # imports (reasoning-gym: 1 s warm, 4 s cold), the user's constructor and the held-out prompts

# What the child sends: ("value", x), ("raised", one line) or ("task_error", message).
Answer = tuple[str, Any]


def checked_reward(value: object) -> float | Failure:
    """`value` as a finite float, or why it is none."""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        return Failure("reward", f"returned {_clip(repr(value))}, not a number")
    try:
        number = float(value)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        return Failure("reward", f"returned a {type(value).__name__} that is not a finite number ({_clip(str(error))})")
    if math.isfinite(number) and abs(number) > MAX_REWARD:
        return Failure("reward", f"returned {number:g}; allowed is {-MAX_REWARD:g} to {MAX_REWARD:g}")
    return number if math.isfinite(number) else Failure("reward", f"returned {number}")


def inline_reward(reward: Callable[..., object], *arguments: Any) -> float | Failure:
    """A trusted reward, called here and now: its exceptions and odd values become Failures, its time is its own."""
    try:
        value = reward(*arguments)
    except Exception as error:  # noqa: BLE001 - recorded boundary: the reason travels with the trajectory
        return Failure("reward", one_line(error))
    return checked_reward(value)


def one_line(error: BaseException) -> str:
    """Type and message of an exception on one line of at most 200 characters."""
    return _clip(f"raised {type(error).__name__}: {error}" if str(error) else f"raised {type(error).__name__}")


class Guard:
    """A child process that holds the task of `config` and answers calls, each within a deadline.

    The child starts at once, so that its imports overlap with what the caller does next; only the first call waits.
    """

    def __init__(self, config: TaskConfig, start_deadline_s: float = START_DEADLINE_S) -> None:
        self.config = config
        self.start_deadline_s = start_deadline_s
        self.restarts = 0
        self._start_s = 0.0  # that the last child was waited for
        self._child: _Child | None = _Child(config)

    def call(
        self, method: str, where: str, arguments: Sequence[tuple[Any, ...]], until_s: float = math.inf
    ) -> list[Any]:
        """One answer for each of `arguments`, in order: what the child's `method` returned, or a Failure at `where`.

        Each call has config.reward_deadline_s, and none goes past `until_s` on time.monotonic's clock. Where that is
        too little for all, see `_Turns`. TaskError where the child finds the task itself at fault; EnvironmentFailure
        where it cannot start.
        """
        answers: dict[int, Any] = {}
        turns = _Turns(arguments, self.config.reward_deadline_s, until_s)
        while batch := turns.next():
            child = self._ready(until_s)
            if child is None or time.monotonic() >= until_s:
                break
            self._send(child, method, [arguments[place] for place in batch])
            for place in batch:
                began_s, limit_s = time.monotonic(), turns.limit_s(self._start_s)
                failure = self._receive(child, where, limit_s, place, answers)
                turns.took(place, time.monotonic() - began_s, limit_s, failure)
                if failure is not None:
                    answers[place] = failure
                    self._stop()
                    break
        late = Failure("deadline", f"no time was left for its {where} (rollout.deadline_s)")
        return [answers.get(place, late) for place in range(len(arguments))]

    def ready(self) -> None:
        """Wait until the task is built: TaskError where it is wrong, EnvironmentFailure where it does not come up."""
        self._ready(math.inf)

    def close(self) -> None:
        """Kill the child, if there is one."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _ready(self, until_s: float) -> _Child | None:
        """The child, its task built; None where it is still coming up at `until_s`."""
        if self._child is None:
            self._child = _Child(self.config)
            self.restarts += 1
        child = self._child
        if not child.started:
            began_s = time.monotonic()
            answer = child.receive(max(0.0, min(self.start_deadline_s, until_s - began_s)))
            ended = child.ended()
            if answer is None and child.alive() and time.monotonic() >= until_s:
                return None
            if answer is None or answer[0] != "value":
                self.close()
            if answer is None:
                limit = f"within {self.start_deadline_s:g} s"
                raise EnvironmentFailure(f"task {self.config.label}: its process did not come up {limit} ({ended})")
            _unwrap(answer, self.config.label)
            self._start_s = time.monotonic() - began_s
            child.started = True
        return child

    def _send(self, child: _Child, method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        try:
            child.connection.send((method, list(arguments)))
        except OSError:  # it died between calls; the receive that follows finds the end of the pipe
            return

    def _receive(
        self, child: _Child, where: str, limit_s: float, place: int, answers: dict[int, Any]
    ) -> Failure | None:
        """Set the answer of `place`, or return why the child must go."""
        answer = child.receive(limit_s)
        if answer is None and child.alive():
            short = limit_s < self.config.reward_deadline_s
            setting = "its share of rollout.deadline_s" if short else "task.reward_deadline_s"
            return Failure("deadline", f"{where} took longer than {limit_s:.3g} s ({setting})")
        if answer is None:
            return Failure(where, f"its process died ({child.ended()})")
        if answer[0] == "raised":
            answers[place] = Failure(where, answer[1])
        else:
            answers[place] = _unwrap(answer, self.config.label)
        return None

    def _stop(self) -> None:
        self.close()
        self._child = _Child(self.config)  # at once: its imports overlap with what comes next
        self.restarts += 1


class _Turns:
    """Who is called next, and for how long: a slow call costs itself before it costs the others.

    A call may take what remains of the time over those that remain, and twice the mean of those that came back: where
    all are slow, some are answered. What overruns that waits, behind those that ask of another prompt, until each has
    had its turn, and is called again where more is left for it than it had.
    """

    def __init__(self, arguments: Sequence[tuple[Any, ...]], deadline_s: float, until_s: float) -> None:
        self.arguments = arguments
        self.deadline_s = deadline_s
        self.until_s = until_s
        self.first = list(range(len(arguments)))
        self.again: list[tuple[int, float]] = []  # and the time that it had
        self.answered = self.overrun = 0
        self.answered_s = 0.0

    def next(self) -> list[int]:
        """The calls to send, in order; none where all have had their turns."""
        while not self.first and self.again and self.again[0][1] >= self.limit_s(0.0):
            self.again.pop(0)
        return list(self.first) or [place for place, _ in self.again[:1]]

    def limit_s(self, start_s: float) -> float:
        """Seconds for the next call, where a new child after it takes `start_s`."""
        left_s = max(0.0, self.until_s - time.monotonic())
        share_s = left_s / max(1, len(self.first) + len(self.again))
        if self.answered:
            typical_s = 2 * self.answered_s / self.answered
        else:
            typical_s = 0.0 if self.overrun else left_s / 4
        return min(self.deadline_s, left_s, max(share_s - start_s, share_s / 2, typical_s))

    def took(self, place: int, seconds: float, limit_s: float, failure: Failure | None) -> None:
        """Record how the next call went."""
        if not self.first:
            self.again.pop(0)
        else:
            self.first.remove(place)
        if failure is None:
            self.answered, self.answered_s = self.answered + 1, self.answered_s + seconds
            return
        self.overrun += 1
        if failure.where == "deadline" and limit_s < self.deadline_s:
            self.again.append((place, limit_s))
        self.first.sort(key=lambda other: self.arguments[other][0] is self.arguments[place][0])


class _Child:
    """One child process and the pipe to it."""

    def __init__(self, config: TaskConfig) -> None:
        self.started = False
        self.connection, theirs = multiprocessing.Pipe()
        # sys.path travels, so that the child finds the package and the user's modules wherever the parent did.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            f"from tandem.program.worker import main; main({theirs.fileno()}, {os.getpid()})"
        )
        # A session of its own: Ctrl-C is the parent's to answer, and the kill reaches what the child started.
        self.popen = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self._finalizer = weakref.finalize(self, _kill, self.popen, self.connection)
        self.connection.send(config)

    def receive(self, deadline_s: float) -> Answer | None:
        """The next message, or None at the deadline or the end of the child; `alive` tells which."""
        try:
            if not self.connection.poll(min(deadline_s, 1e6)):
                return None
            answer: Answer = self.connection.recv()
            return answer
        except (EOFError, OSError):
            _end(self.popen)
            return None
        except (AttributeError, ImportError, pickle.UnpicklingError) as error:
            return ("raised", f"its value holds an object that only the environment knows; use plain values ({error})")

    def alive(self) -> bool:
        return self.popen.returncode is None

    def ended(self) -> str:
        code = self.popen.returncode
        return "it hung" if code is None else f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        self._finalizer()


def _kill(popen: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    if popen.returncode is None:
        _end(popen)


def _end(popen: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the child's session, then reap it: until then nobody else can have its id."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, signal.SIGKILL)
    popen.wait()


def _unwrap(answer: Answer, label: str) -> Any:
    kind, value = answer
    if kind == "task_error":
        raise TaskError(value)
    if kind == "raised":
        raise EnvironmentFailure(f"task {label}: {value}")
    assert kind == "value", answer
    return value


def _clip(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:197] + "..."
