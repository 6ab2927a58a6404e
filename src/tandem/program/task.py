"""The task as a run sees it: prompts by index, held-out prompts, grades and observations, each with a deadline."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

from tandem.errors import EnvironmentFailure, TandemWarning, TaskError
from tandem.program import tasks
from tandem.program.config import TaskConfig
from tandem.program.guard import Guard, inline_reward
from tandem.program.reward import INLINE, REWARDS, clipped
from tandem.types import Failure, Message, Prompt

FIRST_PROMPTS = 8  # training prompts whose answers are tried before a run, where there is no file of them

Conversation = tuple[Prompt, tuple[Message, ...]]  # a prompt and what was said since, the model's last text at the end


def make_environment(config: TaskConfig) -> Task:
    """The task of `config`. A jsonl file is read here; what needs a child process starts it and returns at once.

    TaskError where the task is wrong: here, or from `ready()` and the first use where a child process builds it.
    """
    return Task(config)


class Task:
    """Prompts and rewards of a run. Code that tandem does not vouch for runs in a child process, see guard.py."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = config
        # Reading a file is quick and needs no child; its math-verify rewards do, and start one when first asked.
        self._local = tasks.FileSource(config) if config.environment == "jsonl" else None
        self._untried = tasks.uncertain(config, self._local.prompts) if self._local is not None else []
        self._guard = Guard(config) if self._local is None or self._untried else None
        if config.environment == "reasoning_gym" and config.reward == "score" and config.name in tasks.GYM_FAULTS:
            fault = tasks.GYM_FAULTS[config.name]
            warnings.warn(f"reasoning-gym's {config.name}: {fault} (docs/rewards.md).", TandemWarning, stacklevel=3)

    def ready(self) -> None:
        """Wait until the task is built and its answers have been tried, so that a wrong one stops the run at once."""
        if self._guard is None:
            return
        self._guard.ready()
        if self._local is None and tasks.uses_math_verify(self.config):
            self._untried = tasks.uncertain(self.config, [*self.heldout, *self.batch(0, FIRST_PROMPTS)])
        while self._untried:  # few at a time: what never ends costs the deadline each
            some, self._untried = self._untried[:4], self._untried[4:]
            for prompt, answer in zip(some, self._guard.call("trial", "trial", [(p,) for p in some]), strict=True):
                if isinstance(answer, Failure):
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

    def solutions(self, prompts: Sequence[Prompt]) -> list[str]:
        """A right answer to each, written out. TaskError where the task has none."""
        if self._local is not None:
            return [tasks.solution(self._local, prompt) for prompt in prompts]
        return self._asked("solution", [(prompt,) for prompt in prompts])

    def grade(self, conversations: Sequence[Conversation], until_s: float = math.inf) -> list[float | Failure]:
        """A finite reward or a Failure for each; nothing runs past `until_s` on time.monotonic's clock."""
        if self.config.reward in INLINE:
            reward = REWARDS[self.config.reward]
            return [inline_reward(reward, prompt, tasks.last_text(turns)) for prompt, turns in conversations]
        return self._child().call("reward", "reward", conversations, until_s)

    def observe(
        self, conversations: Sequence[Conversation], until_s: float = math.inf
    ) -> list[tuple[Message, ...] | None | Failure]:
        """What the environment says next in each conversation, None where it ends, or a Failure."""
        if self._local is not None:
            return [None] * len(conversations)
        return self._child().call("observe", "environment", conversations, until_s)

    def close(self) -> None:
        """End the child process, if there is one."""
        if self._guard is not None:
            self._guard.close()

    def _child(self) -> Guard:
        if self._guard is None:
            self._guard = Guard(self.config)
        return self._guard

    def _asked(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Prompts from the child; a prompt that cannot be had stops the run, for there is nothing to train on."""
        answers = self._child().call(method, "environment", arguments)
        for values, answer in zip(arguments, answers, strict=True):
            if isinstance(answer, Failure):
                asked = values[0].id if values and isinstance(values[0], Prompt) else values[0] if values else None
                name = "held-out prompts" if asked is None else f"training prompt {asked}"
                raise EnvironmentFailure(f"task {self.config.label}, {name}: {answer.reason}")
        return answers
