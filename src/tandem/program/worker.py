"""Inside a child process of program/pool.py: holds a task and its episodes, answers calls until its pipe closes.

A call is (number, method, arguments, seconds that it may take), an answer (number, kind, value, seconds that it
waited to be begun). Calls are answered one at a time, in order; where the environment's episodes are asynchronous, as
they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import os
import resource
import sys
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any, cast

from tandem.errors import SandboxError, TandemError, TaskError
from tandem.program import prompts
from tandem.program.child import GRACE_S, Call
from tandem.program.config import TaskConfig
from tandem.program.environment import Episode
from tandem.program.episode import (
    Observed,
    Opened,
    checked_counts,
    checked_reward,
    checked_step,
    last_text,
    one_line,
    open_episode,
)
from tandem.program.reward import REWARDS, Reward
from tandem.program.reward import math_verify as graded_by_math_verify
from tandem.program.tools import is_async
from tandem.types import Failure, Message, Prompt

PARENT_CHECK_S = 1.0
JUDGE_CLASS = "tandem.run.judge:Judge"  # by reference, as a user's class: it stands above, and torch comes with it
GONE = (EOFError, ConnectionResetError, BrokenPipeError)  # what a pipe raises whose other end is closed
METHODS = ("setup", "observe", "score", "teardown")


@dataclass(slots=True)
class _Play:
    """An episode and what was said in it."""

    episode: Episode
    prompt: Prompt
    turns: list[Message] = field(default_factory=list)
    task: asyncio.Task[Any] | None = None  # of its last call, where calls overlap


class Unplayed(Exception):
    """What an episode stands on failed, not the answer that it was to judge."""


def _awaits(kind: type[Episode]) -> bool:
    """Whether an episode has methods or tools that are `async def`; a `respond` of its own is."""
    return is_async(kind, METHODS) or kind.respond is not Episode.respond


def _judge(config: TaskConfig) -> Reward | None:
    """The reward model that pays, read now, so that no call pays for it out of its share; None where none does.

    TaskError where it is none, or this interpreter lacks what it takes to run one.
    """
    if not config.judge:
        return None
    try:
        where, name = JUDGE_CLASS.split(":")
        judge: Any = getattr(importlib.import_module(where), name)(config.judge)
        judge.load()
    except ImportError as error:
        advice = "Leave task.python empty, or install tandem-rl there."
        raise TaskError(f"task.reward={config.reward} needs what tandem itself needs ({error}). {advice}") from error
    except TandemError as error:
        raise TaskError(f"task.reward={config.reward}: {error}") from error
    paid: Reward = judge
    return paid


class Calls:
    """What the parent may ask for, by name. Each value can be pickled whatever the user's code returned."""

    def __init__(self, source: prompts.Prompts, config: TaskConfig) -> None:
        self.source = source
        self.config = config
        self.plays: dict[int, _Play] = {}  # by the episode's number
        kind = getattr(source.environment, "episodes", None)
        self.concurrent = kind is not None and _awaits(kind)
        self.reward = REWARDS.get(config.reward) or _judge(config)
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

    async def prepare(self, number: int, opened: Opened | None, news: tuple[Message, ...]) -> tuple[None, bool]:
        """Sets an episode up before its first call; whether it holds state."""
        return None, (await self._played(number, opened, news)).episode.has_state

    async def observe(
        self, number: int, opened: Opened | None, news: tuple[Message, ...], last: bool = False
    ) -> tuple[Observed, bool]:
        """What follows in an episode, and whether it holds state.

        `opened`: where it is new here. `last`: what it says is heard by nobody.
        """
        play = await self._played(number, opened, news)
        observed = checked_step(await _awaited(play.episode.observe(tuple(play.turns))))
        play.episode.earned += observed.reward
        if observed.messages is not None and not last:
            play.turns.extend(observed.messages if isinstance(observed.messages, tuple) else observed.messages.messages)
        return replace(observed, counts=checked_counts(play.episode.counts)), play.episode.has_state

    async def score(
        self, number: int, opened: Opened | None, news: tuple[Message, ...], unheard: int = 0
    ) -> tuple[float | Failure, bool, dict[str, int]]:
        """The named function's reward of the last text, or the episode's own; whether it holds state; its counts."""
        play = await self._played(number, opened, news)
        if self.reward is not None:
            paid = self.reward(play.prompt, last_text(play.turns))
        else:
            paid = await _awaited(play.episode.score(tuple(play.turns[: len(play.turns) - unheard])))
        return checked_reward(paid), play.episode.has_state, checked_counts(play.episode.counts)

    async def scores(self, asked: Sequence[tuple[Any, ...]]) -> list[tuple[str, Any]]:
        """`score` of several, which the reward model is asked for at once: of each what a call gives, and its kind. An
        answer that it cannot read fails alone."""
        found: list[_Play | tuple[str, Any]] = []
        for number, opened, news, *_ in asked:
            try:
                found.append(await self._played(number, opened, news))
            except BaseException as error:  # noqa: BLE001 - recorded boundary: sys.exit is no Exception
                found.append(_told(error))
        plays = [play for play in found if isinstance(play, _Play)]
        answers = [(play.prompt, last_text(play.turns)) for play in plays]
        try:
            paid: list[tuple[str, Any]] = [("value", reward) for reward in cast(Any, self.reward).rewards(answers)]
        except Exception:  # noqa: BLE001 - recorded boundary: one of them is too long
            paid = [_answer(lambda: cast(Any, self.reward)(*answer)) for answer in answers]  # noqa: B023
        left = iter(paid)
        return [_scored(one, *next(left)) if isinstance(one, _Play) else one for one in found]

    async def teardown(self, number: int) -> None:
        if (play := self.plays.pop(number, None)) is None:
            return
        if play.task is not None and not play.task.done():  # its program was withdrawn meanwhile
            play.task.cancel()
            grace_s = min(GRACE_S, self.config.reward_deadline_s / 2)  # the rest is for giving back what it holds
            await asyncio.wait([play.task], timeout=grace_s)
        await _awaited(play.episode.teardown())

    async def _played(self, number: int, opened: Opened | None, news: tuple[Message, ...]) -> _Play:
        if opened is not None:
            episode = open_episode(self.source.environment, opened.prompt)
            episode.earned = opened.earned
            episode.counts.update(opened.counts)
            if not self.concurrent and _awaits(type(episode)):
                name = type(episode).__name__
                raise TaskError(
                    f"{name} has methods that are `async def`, and its environment does not name it: write "
                    f"`episodes = {name}` in the environment's class."
                )
            self.plays[number] = _Play(episode, opened.prompt)
        play = self.plays[number]
        if play.task is not None and not play.task.done():
            raise Unplayed("an earlier call of it runs on: it swallowed its cancellation")
        play.task = asyncio.current_task() if self.concurrent else None
        if opened is not None:
            try:
                await _awaited(play.episode.setup())
            except Exception as error:
                raise Unplayed(one_line(error)) from error
        play.turns.extend(news)
        return play


def _scored(play: _Play, kind: str, paid: Any) -> tuple[str, Any]:
    """What `score` gives of a reward that is there, or could not be had."""
    if kind != "value":
        return kind, paid
    return _answer(lambda: (checked_reward(paid), play.episode.has_state, checked_counts(play.episode.counts)))


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def main(fileno: int, parent: int) -> None:
    """Serve the pipe `fileno` until the parent closes it, an answer unread or not."""
    threading.Thread(target=leave_with, args=(parent,), daemon=True).start()
    with contextlib.suppress(*GONE):
        _serve(Connection(fileno))


def _serve(connection: Connection) -> None:
    """A TaskConfig first, answered with whether calls may overlap."""
    config: TaskConfig = connection.recv()
    resource.setrlimit(resource.RLIMIT_DATA, (config.memory_bytes, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # a pipe, and the end is by a signal
    calls: list[Calls] = []

    def build() -> bool:
        calls.append(Calls(prompts.make_prompts(config), config))
        return calls[0].concurrent

    connection.send((0, *_answer(build), 0.0))
    if not calls:
        return
    if calls[0].concurrent:
        _run(_serve_many(connection, calls[0]))
        return
    while True:
        number, method, arguments, _ = connection.recv()
        _send(connection, number, *_answer(lambda: driven(getattr(calls[0], method)(*arguments))), 0.0)  # noqa: B023


def _run(serving: Coroutine[Any, Any, None]) -> None:
    """As asyncio.run, and on from where a task of the user's ended the loop by sys.exit: who awaits it is told."""
    with asyncio.Runner() as runner:
        main_task = runner.get_loop().create_task(serving)
        while not main_task.done():
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                runner.get_loop().run_until_complete(main_task)


async def _serve_many(connection: Connection, calls: Calls) -> None:
    """Every call is a task of its own, cancelled at its deadline; one that does not end by that is left behind."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue[tuple[Call, float] | None]()

    def read() -> None:
        with contextlib.suppress(*GONE, RuntimeError):  # the loop has ended
            while True:
                call = connection.recv()
                loop.call_soon_threadsafe(arrived.put_nowait, (call, time.monotonic()))
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(arrived.put_nowait, None)

    async def serve(call: Call, came_s: float) -> None:
        number, method, arguments, limit_s = call
        waited_s = time.monotonic() - came_s
        task = loop.create_task(_answered(getattr(calls, method), arguments))
        if (await asyncio.wait([task], timeout=limit_s))[0]:
            kind, value = ("raised", "it was withdrawn") if task.cancelled() else task.result()
        else:
            task.cancel()
            ended, _ = await asyncio.wait([task], timeout=GRACE_S)
            kind, value = "late", "" if ended else "and swallowed its cancellation"
        _send(connection, number, kind, value, waited_s)

    threading.Thread(target=read, daemon=True).start()
    tasks: set[asyncio.Task[None]] = set()
    while (came := await arrived.get()) is not None:
        task = loop.create_task(serve(*came))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _answered(function: Any, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return ("value", await _awaited(function(*arguments)))
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # noqa: BLE001 - recorded boundary: sys.exit is no Exception
        return _told(error)


def _told(error: BaseException) -> tuple[str, Any]:
    if isinstance(error, TaskError):
        return ("task_error", str(error))
    if isinstance(error, Unplayed | SandboxError):
        return ("unplayed", str(error))
    return ("raised", one_line(error))


def driven(value: Any) -> Any:
    """What a call gives that waits for nothing: users' plain functions run outside of any event loop."""
    if not isinstance(value, Coroutine):
        return value
    try:
        value.send(None)
    except StopIteration as ended:
        return ended.value
    value.close()
    raise TaskError("a plain `def` of the episode gave an awaitable; write it as `async def`.")


def _send(connection: Connection, number: int, kind: str, value: Any, waited_s: float) -> None:
    try:
        connection.send((number, kind, value, waited_s))
    except GONE:
        raise
    except Exception as error:  # noqa: BLE001 - recorded boundary: the user's record cannot be pickled
        connection.send((number, "raised", one_line(error), waited_s))


def _answer(function: Any) -> tuple[str, Any]:
    try:
        return ("value", function())
    except BaseException as error:  # noqa: BLE001 - recorded boundary: sys.exit is no Exception
        return _told(error)


def leave_with(parent: int) -> None:
    """End this process when its parent has gone without closing the pipe's reader, as when it is killed."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)
