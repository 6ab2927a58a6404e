"""What a model is asked, for the library and the command line: prompts and how answers are drawn, checked before a
weight is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tandem.config import typed
from tandem.errors import ConfigError, nearest
from tandem.program.config import half_character
from tandem.program.reward import clipped
from tandem.rollout.config import RolloutConfig
from tandem.types import Message

DRAWING = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "stop_strings")  # of RolloutConfig
MOST_SEED = 2**63 - 1  # as of any setting that is an integer


def drawing(
    values: Mapping[str, Any], samples: Any, seed: Any, called: Callable[[str], str] = str
) -> tuple[RolloutConfig, int, int]:
    """(The settings, greedy where `values` do not say, `samples`, `seed`); ConfigError calls a value `called(name)`.

    >>> drawing({"temperature": 1}, 2, 0)[0].temperature
    1.0
    """
    try:
        for name in values:
            if name not in DRAWING:
                raise ConfigError(f"generate takes no {name}.{nearest(name, (*DRAWING, 'samples', 'seed'))}")
        given = {"temperature": 0.0, "max_new_tokens": 256, **values}
        asked = RolloutConfig(**{name: typed(RolloutConfig, name, value, "rollout.") for name, value in given.items()})
        for string in asked.stop_strings:
            if half := half_character(string):
                raise ConfigError(f"rollout.stop_strings {half}")
        samples, seed = (_whole(*pair) for pair in (("samples", samples, 1), ("seed", seed, 0)))
        neutral = RolloutConfig()
        narrows = [name for name in ("top_p", "top_k", "min_p") if getattr(asked, name) != getattr(neutral, name)]
        if asked.temperature == 0 and (narrows or samples > 1):
            names = ", ".join(f"rollout.{name}" for name in [*narrows, *(["samples"] if samples > 1 else [])])
            raise ConfigError(
                f"{names}: at rollout.temperature 0 the most likely token is taken, so each answer would be the same. "
                "Give rollout.temperature 1, or another above 0."
            )
    except ConfigError as error:
        raise ConfigError(re.sub(r"rollout\.(\w+)", lambda found: called(found[1]), str(error))) from error
    return asked, samples, seed


def conversations(prompts: Any) -> list[tuple[Message, ...]]:
    """The conversations that a list of prompts asks for; ConfigError else."""
    if isinstance(prompts, str | bytes | Message | Mapping) or not isinstance(prompts, Iterable):
        raise ConfigError(
            f"prompts is {clipped(prompts)}. Give a list: a text, or a list of messages, for each prompt."
        )
    return [conversation(prompt, f"prompt {number}") for number, prompt in enumerate(prompts, start=1)]


def conversation(prompt: Any, place: str) -> tuple[Message, ...]:
    """A text, or messages as Message or {"role": TEXT, "content": TEXT}, as messages; ConfigError names the `place`."""
    if isinstance(prompt, Message) or (isinstance(prompt, Mapping) and "role" in prompt):
        raise ConfigError(
            f"{place} is the message {clipped(prompt)}. Give a list of messages for each prompt: [[...]]."
        )
    if not isinstance(prompt, str) and not (isinstance(prompt, Sequence) and not isinstance(prompt, bytes)):
        raise ConfigError(f"{place} is {clipped(prompt)}; text or a list of messages is needed.")
    messages = []
    for message in [Message("user", prompt)] if isinstance(prompt, str) else prompt:
        texts: tuple[Any, ...] = (message.role, message.content) if isinstance(message, Message) else (None,)
        if isinstance(message, Mapping):
            texts = message.get("role"), message.get("content")
        if not all(isinstance(text, str) for text in texts):
            raise ConfigError(f'{place}: the message {clipped(message)} is not {{"role": TEXT, "content": TEXT}}.')
        if half := half_character(texts[0]) or half_character(texts[1]):
            raise ConfigError(f"{place} {half}")
        messages.append(Message(*texts))
    if not any(message.content.strip() for message in messages):
        raise ConfigError(f"{place} is {clipped(prompt)}, which asks nothing. Give a text.")
    return tuple(messages)


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= int(value) <= MOST_SEED:
        raise ConfigError(f"rollout.{name} is {clipped(value)}. Allowed: an integer from {least} to 2^63 - 1.")
    return int(value)
