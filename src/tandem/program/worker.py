"""The child process of program/guard.py: holds a task and answers calls until its pipe closes."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from tandem.errors import TaskError
from tandem.program import tasks
from tandem.program.config import TaskConfig
from tandem.program.guard import Answer, checked_reward, one_line
from tandem.program.reward import math_verify as graded_by_math_verify
from tandem.types import Failure, Message, Prompt

PARENT_CHECK_S = 1.0
GONE = (EOFError, ConnectionResetError, BrokenPipeError)  # what a pipe raises whose other end is closed


class Calls:
    """What the parent may ask for, by name. Each value can be pickled whatever the user's code returned."""

    def __init__(self, source: tasks.Source, config: TaskConfig) -> None:
        self.source = source
        self.config = config
        if tasks.uses_math_verify(config):
            try:
                import math_verify  # noqa: F401 - now, so that no call pays for the import out of its share
            except ImportError as error:
                advice = "pip install math-verify"
                raise TaskError(f"task.reward={config.reward} needs math-verify ({error}): {advice}") from error

    def heldout(self) -> tuple[Prompt, ...]:
        return self.source.heldout

    def train(self, index: int) -> Prompt:
        return self.source.train(index)

    def reward(self, prompt: Prompt, turns: tuple[Message, ...]) -> float | Failure:
        return checked_reward(tasks.score(self.source, self.config, prompt, turns))

    def trial(self, prompt: Prompt) -> None:
        """Evaluate a prompt's answer beside another one; ValueError where the reward cannot read it."""
        graded_by_math_verify(prompt, "0")

    def solution(self, prompt: Prompt) -> str:
        return tasks.solution(self.source, prompt)

    def observe(self, prompt: Prompt, turns: tuple[Message, ...]) -> tuple[Message, ...] | None:
        return tasks.observe(self.source, prompt, turns)


def main(fileno: int, parent: int) -> None:
    """Serve the pipe `fileno` until the parent closes it, an answer unread or not."""
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    with contextlib.suppress(*GONE):
        _serve(Connection(fileno))


def _serve(connection: Connection) -> None:
    """A TaskConfig first, then (method, list of arguments), one answer for each."""
    config: TaskConfig = connection.recv()
    os.dup2(2, 1)  # what a user's environment prints must not land between the parent's --json lines
    calls: list[Calls] = []
    connection.send(_answer(lambda: calls.append(Calls(tasks.make_source(config), config))))
    if not calls:
        return
    while True:
        method, arguments = connection.recv()
        for values in arguments:
            answer = _answer(getattr(calls[0], method), *values)
            try:
                connection.send(answer)
            except GONE:
                raise
            except Exception as error:  # noqa: BLE001 - recorded boundary: the user's record cannot be pickled
                connection.send(("raised", one_line(error)))


def _answer(function: Any, *values: Any) -> Answer:
    try:
        return ("value", function(*values))
    except TaskError as error:
        return ("task_error", str(error))
    except BaseException as error:  # noqa: BLE001 - recorded boundary: sys.exit is no Exception
        return ("raised", one_line(error))


def _leave_with(parent: int) -> None:
    """End this process when its parent has gone without closing the pipe's reader, as when it is killed."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)
