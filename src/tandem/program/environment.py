"""What a user writes to give tandem a task: a prompt, a reward and, for agents, what they see next."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.program import tools
from tandem.program.tools import tool as tool
from tandem.types import Constraint, Message, Prompt


@dataclass(frozen=True, slots=True)
class Fold:
    """An observation in whose place the context starts anew: what was said so far becomes a segment of its own.

    >>> Fold((Message("user", "So far: 3 of 5. Go on."),)).messages[0].role
    'user'
    """

    messages: Sequence[Message]  # rendered as a prompt is, with the prompt's tools


@dataclass(frozen=True, slots=True)
class Step:
    """What follows a turn, with what the turn earned, for credit by step.

    >>> Step([Message("tool", "4")], reward=0.5).state
    ''
    """

    messages: Sequence[Message] | Fold | None = None  # None: the program ends
    reward: float = 0.0
    state: str = ""  # that the turn was taken in: turns of a group in equal states are compared (algo.credit)
    constraint: Constraint | None = None  # what the next turn has to be (docs/structured.md)


Observation = Sequence[Message] | Fold | Step | None


class Episode:
    """One run of an environment by one program: it may hold state (a sandbox, a game), and is used once.

    Methods marked with `tool` are what the model may call. Any method may be `async def` where the environment names
    the class as its `episodes`: then many live side by side in one process, each call with a deadline of its own. All
    calls of an episode come one after the other. A plain `def` that overruns `task.reward_deadline_s` ends its
    process; the other episodes in it fail with that reason. `turns` is what was said since the prompt, all of it, the
    model's last message at the end.
    """

    # False: what it says and pays hangs on its prompt, what was said, `counts` and `earned` alone, so that where its
    # process ends, or the run is killed, another goes on with it.
    has_state = True

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt

    def setup(self) -> Any:
        """Make what it holds. Called once, before anything else."""

    def observe(self, turns: tuple[Message, ...]) -> Any:
        """The messages that follow; a Fold to go on in a new context; a Step with a reward; None where it ends.

        Unless written: what the tools that were called answer, and the end where none was.
        """
        return self.respond(turns[-1])

    async def respond(self, message: Message) -> Step:
        """Run the tools that `message` calls."""
        answers, ends, counts = await tools.respond(self, message)
        self.counts.update(counts)
        return Step(None if ends or not answers else answers)

    def score(self, turns: tuple[Message, ...]) -> Any:
        """The reward of the whole run: a finite number. Unless written: the sum of what its steps earned."""
        return self.earned

    def teardown(self) -> Any:
        """Give back what it holds. Called once after anything else, unless its process has ended."""

    earned = 0.0  # by the steps so far

    @functools.cached_property
    def counts(self) -> Counter[str]:
        """Of what happened: tool_calls, tool_errors, tool_timeouts, malformed_calls and names of your own."""
        return Counter()


class Environment:
    """A task. Only `prompt` and `reward` must be written.

    It lives in a process of its own, which is killed and started again when a call overruns
    `task.reward_deadline_s`, so nothing may depend on what an earlier call left behind, but in an `episode`. What a
    reward needs goes into `Prompt.record`. `task.parameters` become the keyword arguments of the class, and `seed`
    (task.seed) too where its constructor takes one; `sandbox`, where it does, is a pool of sandboxes (task.sandbox).
    """

    episodes: type[Episode] | None = None  # the class of its runs, opened with the prompt; its tools are the prompt's

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
        said = [message.content for message in turns if message.sampled]
        return self.reward(prompt, said[-1])

    key: Callable[[Prompt], str] | None = None
    """What makes two prompts the same question, so that no held-out one is trained on; None: all that they say."""

    def observe(self, prompt: Prompt, turns: tuple[Message, ...]) -> Sequence[Message] | Fold | None:
        """The messages that follow `turns` (what was said since the prompt), or None where the program ends."""
        return None

    def episode(self, prompt: Prompt) -> Episode | None:
        """A run with state of its own, asked in place of `observe`, `score` and `reward`; None: there is no state.

        To be written where an episode takes more than its prompt.
        """
        return self.episodes(prompt) if self.episodes is not None else None
