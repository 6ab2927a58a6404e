"""One run of an environment: what it says and what it pays while a program plays it, and the checks of both."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tandem.program.config import MAX_REWARD, half_character
from tandem.program.environment import Environment, Episode, Fold, Step
from tandem.program.reward import clipped
from tandem.types import Constraint, Failure, Message, Prompt, ToolCall

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES, MAX_CHARACTERS = 1000, 1 << 20  # of an observation: it is rendered while the engine waits


@dataclass(frozen=True, slots=True)
class Observed:
    """What an environment said after a turn, checked.

    >>> Observed(None).reward
    0.0
    """

    messages: tuple[Message, ...] | Fold | None  # None: the program ends
    reward: float = 0.0  # of the turn
    state: str = ""  # that the turn was taken in
    counts: Mapping[str, int] = field(default_factory=dict)  # of the program, what happened so far
    constraint: Constraint | None = None  # of the next turn


@dataclass(frozen=True, slots=True)
class Opened:
    """An episode that a process has not seen: new, or one without state that goes on in it.

    >>> Opened(Prompt("p", ())).earned
    0.0
    """

    prompt: Prompt
    counts: Mapping[str, int] = field(default_factory=dict)
    earned: float = 0.0


class Stateless(Episode):
    """An environment that keeps nothing between calls."""

    has_state = False

    def __init__(self, environment: Environment, prompt: Prompt) -> None:
        super().__init__(prompt)
        self.environment = environment

    def observe(self, turns: tuple[Message, ...]) -> Any:
        own = getattr(self.environment, "observe", None)
        return own(self.prompt, turns) if own is not None else None

    def score(self, turns: tuple[Message, ...]) -> Any:
        own = getattr(self.environment, "score", None)
        return own(self.prompt, turns) if own is not None else self.environment.reward(self.prompt, last_text(turns))


def open_episode(environment: Environment, prompt: Prompt) -> Episode:
    """A new run: the environment's own kind of Episode, or one without state around its methods."""
    own = getattr(environment, "episode", None)
    episode = own(prompt) if own is not None else None
    return Stateless(environment, prompt) if episode is None else episode


def last_text(turns: Sequence[Message]) -> str:
    """What the model said last."""
    return next(message.content for message in reversed(turns) if message.sampled)


def checked_step(value: Any) -> Observed:
    """What an environment observed; TypeError or ValueError where it is no messages, no text, or no reward."""
    step = value if isinstance(value, Step) else Step(value)
    if isinstance(earned := checked_reward(step.reward), Failure):
        raise ValueError(f"the reward of a Step {earned.reason}; a finite number is needed")
    if not isinstance(step.state, str):
        raise TypeError(f"the state of a Step is {clipped(step.state)}; text is needed")
    if half := half_character(step.state):
        raise ValueError(f"the state of a Step {half}")
    if not isinstance(step.constraint, Constraint | None):
        raise TypeError(f"the constraint of a Step is {clipped(step.constraint)}; a tandem.types.Constraint is needed")
    return Observed(_messages(step.messages), earned, step.state, constraint=step.constraint)


def _messages(value: Any) -> tuple[Message, ...] | Fold | None:
    messages = value.messages if isinstance(value, Fold) else value
    if messages is None:
        return None
    if not isinstance(messages, Message | str | bytes | Mapping) and isinstance(messages, Iterable):
        messages = tuple(messages)
    if not isinstance(messages, tuple) or not all(isinstance(message, Message) for message in messages):
        advice = '. Write [Message("user", TEXT)]' if isinstance(messages, str) else ""
        wanted = "a list of tandem.types.Message or None is needed"
        raise TypeError(f"observe returned {clipped(messages)}; {wanted}{advice}")
    if len(messages) > MAX_MESSAGES:
        raise ValueError(f"observe returned {len(messages):,} messages; allowed are {MAX_MESSAGES}")
    for message in messages:
        if wrong := fault(message):
            raise ValueError(f"what observe returned {wrong}")
    if (size := sum(len(message.content) for message in messages)) > MAX_CHARACTERS:
        raise ValueError(f"observe returned {size:,} characters; allowed are {MAX_CHARACTERS:,}. Cut it")
    messages = tuple(replace(one, sampled=False) if one.sampled else one for one in messages)  # a turn said again
    if isinstance(value, Fold):
        if not messages:
            raise ValueError("observe returned a Fold without messages; a context needs one")
        return Fold(messages)
    return messages or None


def checked_counts(counts: Mapping[Any, Any]) -> dict[str, int]:
    """An episode's counts as plain values."""
    return {str(name)[:60]: int(count) for name, count in list(counts.items())[:32]}


def fault(message: Message) -> str:
    """What is wrong with a message, or "".

    >>> fault(Message("user", "2 + 2")), fault(Message("tool", "4", call_id=7))
    ('', 'has call_id 7; text is needed')
    """
    for name in ("role", "content", "call_id"):
        if not isinstance(value := getattr(message, name), str):
            return f"has {name} {clipped(value)}; text is needed"
        if half := half_character(value):
            return half
    if message.role not in ROLES:
        return f"has role {clipped(message.role)}. Allowed: {', '.join(ROLES)}"
    if not isinstance(message.calls, tuple) or not all(isinstance(call, ToolCall) for call in message.calls):
        return f"has calls {clipped(message.calls)}; a tuple of tandem.types.ToolCall is needed"
    if not isinstance(message.faults, tuple) or not all(isinstance(one, str) for one in message.faults):
        return f"has faults {clipped(message.faults)}; a tuple of texts is needed"
    if not isinstance(message.more, Mapping) or not all(isinstance(key, str) for key in message.more):
        return f"has more {clipped(message.more)}; a dict with texts as keys is needed"
    if taken := {"role", "content", "tool_calls", "tool_call_id"} & message.more.keys():
        return f"has {min(taken)!r} among its further keys; give it as the message's own"
    calls = ((f"call of {call.name}", call.arguments) for call in message.calls)
    for name, plain in (("further keys", message.more), *calls):
        try:
            json.dumps(dict(plain))
        except (TypeError, ValueError, RecursionError) as error:
            return f"has in its {name} what JSON has not: {clip(str(error))}"
    return ""


def checked_reward(value: object) -> float | Failure:
    """`value` as a finite float, or why it is none."""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        return Failure("reward", f"returned {clip(repr(value))}, not a number")
    try:
        number = float(value)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        return Failure("reward", f"returned a {type(value).__name__} that is not a finite number ({clip(str(error))})")
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
    return clip(f"raised {type(error).__name__}: {error}" if str(error) else f"raised {type(error).__name__}")


def clip(text: str) -> str:
    line = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return line if len(line) <= 200 else line[:197] + "..."
