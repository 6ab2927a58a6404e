"""What programs do while they do it: environments that count."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tandem.rollout.program import Episodes, Playing
from tandem.types import Failure, Message, Prompt


@dataclass(slots=True)
class Progress:
    """How far a rollout has come; another thread may look at any time."""

    programs: int  # that there will be
    begun: int = 0
    ended: int = 0
    asked: int = 0  # that wait for their environment now
    turns: int = 0
    rewards: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    sampled: Callable[[], int] = int  # tokens so far, asked of the engine

    @property
    def running(self) -> int:
        return self.begun - self.ended


class Watched:
    """Episodes of `pool`, counted in `progress`; `goes_on` is told the prompt of each whose turn was answered."""

    def __init__(self, pool: Episodes, progress: Progress, goes_on: Callable[[Prompt], None] | None = None) -> None:
        self.pool = pool
        self.progress = progress
        self.goes_on = goes_on
        self.lock = threading.Lock()  # environments answer on threads of their own

    def episode(self, prompt: Prompt, until_s: float, /) -> Playing:
        with self.lock:
            self.progress.begun += 1
        return _Episode(self, prompt, self.pool.episode(prompt, until_s), until_s)


class _Episode:
    def __init__(self, by: Watched, prompt: Prompt, playing: Playing, until_s: float) -> None:
        self.by = by
        self.prompt = prompt
        self.playing = playing
        self.said = playing.said
        self.until_s = until_s
        self.turns = 0
        self.known = False  # its reward, or why there is none

    def recall(self, said: Sequence[Message], counts: Mapping[str, int], earned: float) -> None:
        self.playing.recall(said, counts, earned)

    def prepare(self) -> None:
        self.playing.prepare()

    def observe(self, last: bool = False) -> Future[Any]:
        future = self._ask(partial(self.playing.observe, last), rewards=False)
        if (told := self.by.goes_on) is not None and not last:
            future.add_done_callback(lambda _: told(self.prompt))
        return future

    def score(self, unheard: int = 0) -> Future[float | Failure]:
        return self._ask(partial(self.playing.score, unheard), rewards=True)

    @property
    def counts(self) -> Mapping[str, int]:
        return self.playing.counts

    def teardown(self) -> None:
        with self.by.lock:
            self._spoken()
            self.by.progress.ended += 1
            if not self.known:
                self.by.progress.failures["engine or deadline"] += 1
        self.playing.teardown()

    def _ask(self, call: Callable[[], Future[Any]], rewards: bool) -> Future[Any]:
        with self.by.lock:
            self._spoken()
            self.by.progress.asked += 1
        future = call()
        future.add_done_callback(lambda ended: self._answered(ended, rewards))
        return future

    def _answered(self, future: Future[Any], rewards: bool) -> None:
        answer = None if future.cancelled() or future.exception() else future.result()
        with self.by.lock:
            self.by.progress.asked -= 1
            if isinstance(answer, Failure):
                self.known = True
                self.by.progress.failures[f"{answer.where}: {answer.reason}"] += 1
            elif rewards and answer is not None:
                self.known = True
                self.by.progress.rewards.append(answer)

    def _spoken(self) -> None:
        turns = sum(message.sampled for message in self.said)
        self.by.progress.turns += turns - self.turns
        self.turns = turns
