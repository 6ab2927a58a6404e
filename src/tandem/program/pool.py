"""Environments in a pool of child processes, asked through futures, so that nobody waits for one.

Code of a user, of reasoning-gym and of math-verify runs in children (program/workers.py). Trusted rewards of linear
cost run where they are called.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from tandem.errors import EnvironmentFailure, TandemWarning, TaskError
from tandem.program import prompts
from tandem.program.child import child_of
from tandem.program.config import TaskConfig
from tandem.program.episode import Observed, inline_reward, last_text
from tandem.program.reward import INLINE, REWARDS, clipped
from tandem.program.workers import START_DEADLINE_S, Asked, Workers
from tandem.types import Failure, Message, Prompt

if TYPE_CHECKING:
    from tandem.program.child import Home

FIRST_PROMPTS = 8  # training prompts whose answers are tried before a run, where there is no file of them


class EnvironmentPool:
    """The task of a run: its prompts by index, held-out prompts, and episodes that answer with futures.

    A jsonl file is read here; what needs a child starts one and returns at once. TaskError where the task is wrong:
    here, or from `ready()` and the first use where a child builds it. born: what makes a child, here or elsewhere.
    idle: it may never be asked, so no child is started before it is.
    """

    def __init__(
        self,
        config: TaskConfig,
        start_deadline_s: float = START_DEADLINE_S,
        born: Callable[[TaskConfig], Home] = child_of,
        idle: bool = False,
    ) -> None:
        self.config = config
        # Reading a file is quick and needs no child; its math-verify rewards do, and start one when first asked.
        self._local = prompts.FilePrompts(config) if config.environment == "jsonl" else None
        self._untried = prompts.uncertain(config, self._local.prompts) if self._local is not None else []
        self._workers = Workers(config, start_deadline_s, born)
        self._ids = itertools.count()
        self._held = self._local is None or bool(config.judge)  # by a child, which has to come up
        if not idle and (self._held or self._untried):
            self._workers.grow()
        if config.environment == "reasoning_gym" and config.reward == "score" and config.name in prompts.GYM_FAULTS:
            fault = prompts.GYM_FAULTS[config.name]
            warnings.warn(f"reasoning-gym's {config.name}: {fault} (docs/rewards.md).", TandemWarning, stacklevel=2)

    def ready(self) -> None:
        """Wait until the task is built and its answers have been tried, so that a wrong one stops the run at once."""
        if not (self._held or self._untried):
            return
        self._asked("ready", [()])
        if self._local is None and prompts.uses_math_verify(self.config):
            self._untried = prompts.uncertain(self.config, [*self.heldout, *self.batch(0, FIRST_PROMPTS)])
        while self._untried:  # few at a time: what never ends costs the deadline each
            some, self._untried = self._untried[:4], self._untried[4:]
            trials = [self._workers.ask(Asked("trial", (prompt,), "trial")) for prompt in some]
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
        return RunningEpisode(next(self._ids), prompt, until_s, self.config, ask, self._workers.ask)

    def close(self) -> None:
        """End the children."""
        self._workers.close()

    def _asked(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Prompts from a child; a prompt that cannot be had stops the run, for there is nothing to train on."""
        futures = [self._workers.ask(Asked(method, values, "environment")) for values in arguments]
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

    def __init__(
        self, number: int, prompt: Prompt, until_s: float, config: TaskConfig, observer: Any, ask: Any
    ) -> None:
        self.number = number
        self.prompt = prompt
        self.until_s = until_s
        self.said: list[
            Message
        ] = []  # since the prompt: who plays appends the model's; observations come by themselves
        self.counts: Mapping[str, int] = {}  # of what happened so far: tool_calls and their like
        self.earned = 0.0  # by the turns so far
        self.home: Home | None = None  # that knows of it
        self.sent = -1  # of `said`, to its home; -1: that has not set it up
        self._ready: Future[Any] | None = None  # that it is set up, where somebody asked for that
        self.lasts = False  # it has state, and ends with its home
        self._config = config
        self._observer, self._ask = observer, ask

    def recall(self, said: Sequence[Message], counts: Mapping[str, int], earned: float) -> None:
        """What came of it in another run of this program, with which it goes on."""
        self.said.extend(said)
        self.counts, self.earned = counts, earned

    def observe(self, last: bool = False) -> Future[Observed | Failure]:
        """What the environment says next, None where the program ends, or a Failure.

        `last`: no turn follows, so what it says is not added to what was said.
        """
        if self._observer is None:
            return _done(Observed(None))
        return self._behind(lambda: self._observer(Asked("observe", (last,), "environment", self.until_s, self)))

    def prepare(self) -> None:
        """Have it set up ahead of its first call, which waits for that. From any thread; nobody waits for it here."""
        if self._observer is not None and self._ready is None and self.home is None:
            self._ready = self._observer(Asked("prepare", (), "environment", self.until_s, self))

    def _behind(self, ask: Callable[[], Future[Any]]) -> Future[Any]:
        """What a call gives that is made when it is set up, or why it could not be."""
        ready, self._ready = self._ready, None
        return ask() if ready is None else _after(ready, ask)

    def score(self, unheard: int = 0) -> Future[float | Failure]:
        """The reward, or why there is none. `unheard`: messages at the end that the model has not read."""
        if self._config.reward in INLINE:
            found = inline_reward(REWARDS[self._config.reward], self.prompt, last_text(self.said))
            return _done(self.paid(found) if isinstance(found, Failure) else found)
        return self._behind(lambda: self._ask(Asked("score", (unheard,), "reward", self.until_s, self)))

    def paid(self, failure: Failure) -> float | Failure:
        """What task.reward_on_error gives for an answer that broke its grader."""
        if self._config.reward_on_error is None:
            return failure
        self.counts = {**self.counts, "scorer_errors": 1}
        return self._config.reward_on_error

    def teardown(self) -> None:
        """No call follows."""
        if self._ready is not None:
            ready, self._ready = self._ready, None
            ready.add_done_callback(lambda _: self.teardown())
        elif self.home is not None and self.home.alive():
            self._ask(Asked("teardown", (), "environment", episode=self))


def _after(ready: Future[Any], ask: Callable[[], Future[Any]]) -> Future[Any]:
    """What `ask` gives once `ready` is; where that failed, its failure."""
    future: Future[Any] = Future()

    def told(answer: Future[Any]) -> None:
        if (error := answer.exception()) is not None:
            future.set_exception(error)
        else:
            future.set_result(answer.result())

    def asked(answer: Future[Any]) -> None:
        if answer.exception() is not None or isinstance(answer.result(), Failure):
            told(answer)
        else:
            ask().add_done_callback(told)

    ready.add_done_callback(asked)
    return future


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
