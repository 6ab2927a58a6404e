"""Inside a child process of program/pool.py: holds a task and its episodes, answers calls until its pipe closes."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from tandem.errors import TaskError
from tandem.program import prompts
from tandem.program.child import Answer
from tandem.program.config import TaskConfig
from tandem.program.environment import Episode
from tandem.program.episode import (
    Observed,
    Stateless,
    checked_messages,
    checked_reward,
    last_text,
    one_line,
    open_episode,
)
from tandem.program.reward import REWARDS
from tandem.program.reward import math_verify as graded_by_math_verify
from tandem.types import Failure, Message, Prompt

PARENT_CHECK_S = 1.0
GONE = (EOFError, ConnectionResetError, BrokenPipeError)  # what a pipe raises whose other end is closed


class Calls:
    """What the parent may ask for, by name. Each value can be pickled whatever the user's code returned."""

    def __init__(self, source: prompts.Prompts, config: TaskConfig) -> None:
        self.source = source
        self.config = config
        self.episodes: dict[int, tuple[Episode, Prompt, list[Message]]] = {}  # by number, with what was said
        if prompts.uses_math_verify(config):
            try:
                import math_verify  # noqa: F401 - now, so that no call pays for the import out of its share
            except ImportError as error:
                advice = "pip install math-verify"
                raise TaskError(f"task.reward={config.reward} needs math-verify ({error}): {advice}") from error

    def ready(self) -> None:
        """That it answers says it."""

    def heldout(self) -> tuple[Prompt, ...]:
        return self.source.heldout

    def train(self, index: int) -> Prompt:
        return self.source.train(index)

    def trial(self, prompt: Prompt) -> None:
        """Evaluate a prompt's answer beside another one; ValueError where the reward cannot read it."""
        graded_by_math_verify(prompt, "0")

    def solution(self, prompt: Prompt) -> str:
        return prompts.solution(self.source, prompt)

    def observe(self, number: int, opened: Prompt | None, news: tuple[Message, ...]) -> tuple[Observed, bool]:
        """What follows in an episode, and whether it holds state. `opened`: its prompt, where it is new here."""
        episode, _, turns = self._played(number, opened, news)
        observed = checked_messages(episode.observe(tuple(turns)))
        if observed is not None:
            turns.extend(observed if isinstance(observed, tuple) else observed.messages)
        return observed, not isinstance(episode, Stateless)

    def score(self, number: int, opened: Prompt | None, news: tuple[Message, ...]) -> tuple[float | Failure, bool]:
        """The reward: the named function of the last text, or the episode's own."""
        episode, prompt, turns = self._played(number, opened, news)
        named = self.config.reward != "score"
        value = REWARDS[self.config.reward](prompt, last_text(turns)) if named else episode.score(tuple(turns))
        return checked_reward(value), not isinstance(episode, Stateless)

    def close(self, number: int) -> None:
        if number in self.episodes:
            self.episodes.pop(number)[0].close()

    def _played(
        self, number: int, opened: Prompt | None, news: tuple[Message, ...]
    ) -> tuple[Episode, Prompt, list[Message]]:
        if opened is not None:
            self.episodes[number] = (open_episode(self.source.environment, opened), opened, [])
        self.episodes[number][2].extend(news)
        return self.episodes[number]


def main(fileno: int, parent: int) -> None:
    """Serve the pipe `fileno` until the parent closes it, an answer unread or not."""
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    with contextlib.suppress(*GONE):
        _serve(Connection(fileno))


def _serve(connection: Connection) -> None:
    """A TaskConfig first, then (method, arguments), one answer for each."""
    config: TaskConfig = connection.recv()
    os.dup2(2, 1)  # what a user's environment prints must not land between the parent's --json lines
    calls: list[Calls] = []
    connection.send(_answer(lambda: calls.append(Calls(prompts.make_prompts(config), config))))
    if not calls:
        return
    while True:
        method, arguments = connection.recv()
        answer = _answer(getattr(calls[0], method), *arguments)
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
