"""A call's body to requests of the engine: how tokens are drawn, and by whom they are asked for."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from tandem.engine.engine import Engine
from tandem.errors import ConfigError
from tandem.numerics.random import derive_seed
from tandem.program.reward import clipped
from tandem.server import bodies, structured
from tandem.server.config import ServerConfig
from tandem.server.refusal import Refusal
from tandem.types import Constraint, Hints, Sampling

# Field -> the values at which it changes nothing. Others are refused: nothing here does what they ask for.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "reasoning_effort": (),
    "verbosity": (),
    "suffix": (),
}


def neutral(body: Any, allowed: Mapping[str, tuple[Any, ...]], prefix: str = "") -> None:
    """400 for a field of these with a value that is none of those allowed, nor null."""
    for name, values in allowed.items():
        value = getattr(body, name, None)
        if value is not None and value not in values:
            few = ", ".join(map(repr, values)) or "none but null"
            said = f"{prefix}{name} is {clipped(value)}, which is not served. Allowed: {few}."
            raise Refusal(400, said, "unsupported_value", f"{prefix}{name}")


def unserved(body: Any) -> None:
    """400 for a field with a value that asks for what this engine does not do."""
    neutral(body, NEUTRAL)


def chosen(tools: Sequence[bodies.Tool], choice: str | bodies.Chosen | None) -> Sequence[bodies.Tool]:
    """The tools that the model is told of."""
    return () if choice == "none" else tools


def constraint_of(body: bodies.Drawing) -> Constraint | None:
    """What a body says that the answer as a whole has to be. 400 where that is nothing, or two things."""
    with heard("response_format"):
        return structured.of_fields({name: getattr(body, name) for name in structured.FIELDS})


def called_as(
    tools: Sequence[bodies.Tool], choice: str | bodies.Chosen | None, several: bool | None, call_format: str
) -> Constraint | None:
    """What calls of tools have to be, where one is forced or a tool is strict. 400 where that can't be held."""
    told = [{"function": msgspec.to_builtins(tool.function)} for tool in tools]
    with heard("tool_choice" if choice not in (None, "auto", "none") else "tools"):
        return structured.of_tools(told, msgspec.to_builtins(choice), several is not False, call_format)


def either(whole: Constraint | None, calls: Constraint | None, tools: Sequence[bodies.Tool]) -> Constraint | None:
    """Of an answer. 400 where it is to be of a form and tools may be called too: no text is both."""
    if whole is not None and tools:
        said = "a form of the whole answer and tools were given, and a call of one has another form. Give one of them."
        raise Refusal(400, said, "unsupported_value", "tools")
    return whole if whole is not None else calls


@contextmanager
def heard(param: str) -> Iterator[None]:
    """What is wrong with a field, as a caller hears it."""
    try:
        yield
    except ConfigError as error:
        raise Refusal(400, str(error), "invalid_value", param) from error


def sampling_of(body: bodies.Drawing, most: int | None, stop_token_ids: Sequence[int], scored: bool) -> Sampling:
    """How OpenAI's body asks for tokens to be drawn. `most`: new tokens at most; None: to the end of the context.

    scored: log-probs are wanted. At temperature 0 the model's own are then known, as the set kept is the one token.
    """
    temperature = 1.0 if body.temperature is None else body.temperature
    greedy = temperature == 0 and scored
    return Sampling(
        temperature=1.0 if greedy else temperature,
        top_k=1 if greedy else max(0, body.top_k or 0),
        top_p=1.0 if body.top_p is None or greedy else body.top_p,
        min_p=0.0 if body.min_p is None or greedy else body.min_p,
        max_new_tokens=most or 0,
        stop_token_ids=stops(stop_token_ids, body.stop_token_ids, bool(body.ignore_eos)),
        stop_strings=strings(body.stop),
    )


def stops(own: Sequence[int], asked: Sequence[int] | None, ignored: bool) -> tuple[int, ...]:
    """Tokens that end an answer: the model's own, unless they are ignored, and what the call adds."""
    return tuple(dict.fromkeys((*(() if ignored else own), *(asked or ()))))


def strings(stop: bodies.Stops) -> tuple[str, ...]:
    return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)


def context_of(engine: Engine) -> int:
    """Tokens of the longest context: those that the model has positions for, and the page memory holds."""
    scheduler = engine.scheduler
    held = scheduler.layout.capacity_tokens(scheduler.pool.num_pages, scheduler.config.page_tokens) + 1
    return min(held, scheduler.max_context or held)


def room(engine: Engine, config: ServerConfig, prompt: int, asked: int | None) -> int:
    """New tokens at most behind a prompt of so many. 400 for a prompt, or a number, beyond what the server allows."""
    context = context_of(engine)
    if config.max_prompt_tokens and prompt > config.max_prompt_tokens:
        said = f"the prompt has {prompt} tokens, and {config.max_prompt_tokens} are allowed (server.max_prompt_tokens)."
        raise Refusal(400, said, "context_length_exceeded", "prompt")
    if asked is not None and prompt + asked > context:
        said = (
            f"the prompt has {prompt} tokens and {asked} more were asked for: {prompt + asked}, where context and page "
            f"memory hold {context}. Shorten the prompt or ask for fewer."
        )
        raise Refusal(400, said, "context_length_exceeded", "max_tokens")
    if config.max_new_tokens and (asked or 0) > config.max_new_tokens:
        said = f"{asked} tokens were asked for, and {config.max_new_tokens} are allowed (server.max_new_tokens)."
        raise Refusal(400, said, "invalid_value", "max_tokens")
    return asked or max(1, min(context - prompt, config.max_new_tokens or context))


def seed_of(given: int | None) -> int:
    """64 bits. Those of a call without one are drawn by the system."""
    return secrets.randbits(63) if given is None else given % 2**64


def seeds(seed: int, prompt: int, count: int) -> list[int]:
    """Of the answers to a call's prompt: as `tandem generate --seed` has them."""
    return [derive_seed(seed, 0, str(prompt), sample) for sample in range(count)]


def hints_of(given: bodies.Hints | None) -> Hints | None:
    return None if given is None else Hints(tuple(given.tools), given.turns_left, given.tool_s, given.arguments)


def choices(config: ServerConfig, prompts: int, n: int) -> int:
    """400 for more answers than one call may ask for."""
    if prompts * n > config.max_choices:
        answers = f"{prompts} prompts times n {n} are {prompts * n} answers"
        said = f"{answers}; {config.max_choices} are allowed in one call (server.max_choices)."
        raise Refusal(400, said, "invalid_value", "n")
    return prompts * n


def needs(name: str, other: str, value: str) -> None:
    """400 for a field that another one gives a meaning."""
    raise Refusal(400, f"{name} needs {other}={value}.", "invalid_value", name)
