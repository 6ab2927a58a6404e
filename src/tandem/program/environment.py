"""What a user writes to give tandem a task: a prompt, a reward and, for agents, what they see next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.types import Message, Prompt


@dataclass(frozen=True, slots=True)
class Fold:
    """An observation in whose place the context starts anew: what was said so far becomes a segment of its own.

    >>> Fold((Message("user", "So far: 3 of 5. Go on."),)).messages[0].role
    'user'
    """

    messages: Sequence[Message]  # rendered as a prompt is, with the prompt's tools


class Episode:
    """One run of an environment by one program: it may hold state (a sandbox, a game), and is used once.

    All calls come to one process, one after the other. A call that overruns `task.reward_deadline_s` ends that
    process; the other episodes in it fail with that reason. `turns` is what was said since the prompt, all of it, the
    model's last message at the end.
    """

    def observe(self, turns: tuple[Message, ...]) -> Sequence[Message] | Fold | None:
        """The messages that follow; a Fold to go on in a new context; None where the program ends."""
        return None

    def score(self, turns: tuple[Message, ...]) -> float:
        """The reward of the whole run: a finite number."""
        raise NotImplementedError(f"{type(self).__name__} must define score(self, turns)")

    def close(self) -> None:
        """Give back what it holds. Called once after anything else, unless its process has ended."""


class Environment:
    """A task. Only `prompt` and `reward` must be written.

    It lives in a process of its own, which is killed and started again when a call overruns
    `task.reward_deadline_s`, so nothing may depend on what an earlier call left behind, but in an `episode`. What a
    reward needs goes into `Prompt.record`. `task.parameters` become the keyword arguments of the class, and `seed`
    (task.seed) too where its constructor takes one.
    """

    def prompt(self, split: str, index: int) -> Prompt:
        """Prompt `index` (0, 1, ... without end) of "train" or "heldout"; the same arguments give the same prompt."""
        raise NotImplementedError(f"{type(self).__name__} must define prompt(self, split, index)")

    def reward(self, prompt: Prompt, text: str) -> float:
        """A finite number for the text that the model wrote, without its stop token."""
        raise NotImplementedError(f"{type(self).__name__} must define reward(self, prompt, text)")

    def solution(self, prompt: Prompt) -> str | None:
        """A right answer as the model should write it, steps and all; None: it is not known. For training on texts."""
        return None

    def score(self, prompt: Prompt, turns: tuple[Message, ...]) -> float:
        """The reward of a whole conversation after the prompt; unless written, that of the last thing it said."""
        said = [message.content for message in turns if message.role == "assistant"]
        return self.reward(prompt, said[-1])

    def observe(self, prompt: Prompt, turns: tuple[Message, ...]) -> Sequence[Message] | Fold | None:
        """The messages that follow `turns` (what was said since the prompt), or None where the program ends."""
        return None

    def episode(self, prompt: Prompt) -> Episode | None:
        """A run with state of its own, asked in place of `observe`, `score` and `reward`; None: there is no state."""
        return None
