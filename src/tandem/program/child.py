"""A child process of program/pool.py, seen from its parent: sent calls, waited for within a deadline, killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import weakref
from multiprocessing.connection import Connection
from typing import Any

from tandem.errors import EnvironmentFailure, TaskError
from tandem.program.config import TaskConfig

Call = tuple[int, str, tuple[Any, ...], float]  # number, one of worker.Calls, its arguments, seconds that it may take
# What the child sends, behind the call's number: ("value", x), ("raised", one line), ("task_error", message) or, where
# it cancelled the call at its deadline, ("late", None); then the seconds that the call waited to be begun.
Answer = tuple[int, str, Any, float]


class Child:
    """One child process and the pipe to it. It starts at once, so that its imports overlap with what comes next."""

    def __init__(self, config: TaskConfig) -> None:
        self.started = False  # its task is built
        self.concurrent = False  # calls may overlap: its episodes are asynchronous
        self.reason = ""  # why it was ended
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

    def send(self, call: Call) -> None:
        """Ask."""
        try:
            self.connection.send(call)
        except OSError:  # it died between calls; the receive that follows finds the end of the pipe
            return

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
            return (
                0,
                "raised",
                f"its value holds an object that only the environment knows; use plain values ({error})",
                0.0,
            )

    def alive(self) -> bool:
        return self.popen.returncode is None

    def ended(self) -> str:
        code = self.popen.returncode
        return "it hung" if code is None else f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def end(self) -> None:
        """Kill it, and leave the pipe to who reads from it."""
        if self.alive():
            _end(self.popen)

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


def unwrapped(answer: Answer, label: str) -> Any:
    _, kind, value, _ = answer
    if kind == "task_error":
        raise TaskError(value)
    if kind == "raised":
        raise EnvironmentFailure(f"task {label}: {value}")
    assert kind == "value", answer
    return value
