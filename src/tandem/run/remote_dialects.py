"""How the servers of other engines are asked for tokens, and how their answers are read: tandem's, vLLM's, SGLang's.

A request goes out with every value that a server would else take from its model's files. An answer is taken only whole:
ids and log-probs of all tokens, and an end that the request asks for.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tandem.columns import Columns
from tandem.numerics.random import derive_seed
from tandem.run.remote_config import Dialect
from tandem.types import Request, StopReason


class OddAnswer(ValueError):
    """What came is not an answer to what was asked; says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server drew.

    >>> Answer((5, 2), (-0.1, -0.7), "stop").labels
    ()
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # nats
    ended: str  # "stop" or "length"
    labels: tuple[tuple[str, int], ...] = ()  # of weights: how each is called there, and how many tokens it drew
    cached_tokens: int = 0
    more: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # further columns


@dataclass(frozen=True, slots=True)
class Speech:
    """A dialect. ask: (request, most new tokens) -> path and body. read: what came of it; OddAnswer."""

    ask: Callable[[Request, int], tuple[str, dict[str, Any]]]
    read: Callable[[Request, Any], Answer]
    exact: bool  # it gives kept sets, and takes the sampler's own seed
    holds: tuple[str, ...] = ()  # kinds of constraints that it takes


def ask_tandem(request: Request, most: int) -> tuple[str, dict[str, Any]]:
    drawn = request.sampling
    sampling = {
        "temperature": drawn.temperature,
        "top_k": drawn.top_k or -1,
        "top_p": drawn.top_p,
        "min_p": drawn.min_p,
        "max_new_tokens": most,
        "stop": list(drawn.stop_strings),
        "stop_token_ids": list(drawn.stop_token_ids),
        "ignore_eos": True,
        "noise_seed": request.seed,
    }
    if request.constraint is not None:
        sampling[request.constraint.kind] = request.constraint.text
    body: dict[str, Any] = {"input_ids": request.tokens, "sampling_params": sampling, "return_kept": True}
    if request.program_id:
        body["program_id"] = request.program_id[:256]
    if request.tenant:
        body["tenant"] = request.tenant
    if request.hints is not None:
        hints = {
            "tools": list(request.hints.tools),
            "turns_left": request.hints.turns_left,
            "tool_s": request.hints.tool_s,
        }
        body["hints"] = {name: value for name, value in hints.items() if value is not None}
    return "/generate", body


def read_tandem(request: Request, answer: Any) -> Answer:
    told = _table(answer, "meta_info")
    tokens = _ids(answer.get("output_ids"), "output_ids")
    logprobs = _numbers(told.get("output_logprobs"), "output_logprobs", len(tokens))
    labels = []
    for span in _list(told.get("weight_versions"), "weight_versions"):
        labels.append((str(span["version"]), int(span["end"]) - int(span["start"])))
    more: dict[str, Sequence[Any]] = {}
    if "output_kept" in told:
        kept = _list(told["output_kept"], "output_kept", len(tokens))
        try:
            more["kept"] = [base64.b64decode(one, validate=True) for one in kept]
        except (TypeError, binascii.Error) as error:
            raise OddAnswer(f"its output_kept cannot be read ({error})") from None
    if "output_unfiltered_logprobs" in told:
        found = told["output_unfiltered_logprobs"]
        more["unfiltered_logprobs"] = _numbers(found, "output_unfiltered_logprobs", len(tokens))
    ended = str(_table(told, "finish_reason").get("type"))
    return Answer(tokens, logprobs, ended, tuple(labels), _count(told.get("cached_tokens")), more)


def ask_vllm(request: Request, most: int) -> tuple[str, dict[str, Any]]:
    drawn = request.sampling
    return "/v1/completions", {
        "prompt": request.tokens,
        "max_tokens": most,
        "temperature": drawn.temperature,
        "top_k": drawn.top_k,
        "top_p": drawn.top_p,
        "min_p": drawn.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": list(drawn.stop_strings),
        "stop_token_ids": list(drawn.stop_token_ids),
        "ignore_eos": True,
        "seed": seed_there(request, 63),
        "logprobs": 0,
        "return_token_ids": True,
        "skip_special_tokens": False,
        "add_special_tokens": False,
    }


def read_vllm(request: Request, answer: Any) -> Answer:
    choices = _list(_mapping(answer).get("choices"), "choices", 1)
    choice = _mapping(choices[0])
    tokens = _ids(choice.get("token_ids"), "token_ids")
    logprobs = _numbers(_table(choice, "logprobs").get("token_logprobs"), "token_logprobs", len(tokens))
    usage = answer.get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
    return Answer(tokens, logprobs, str(choice.get("finish_reason")), (), cached)


def ask_sglang(request: Request, most: int) -> tuple[str, dict[str, Any]]:
    drawn = request.sampling
    sampling = {
        "temperature": drawn.temperature,
        "top_k": drawn.top_k or -1,
        "top_p": drawn.top_p,
        "min_p": drawn.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_new_tokens": most,
        "stop": list(drawn.stop_strings),
        "stop_token_ids": list(drawn.stop_token_ids),
        "sampling_seed": seed_there(request, 31),  # ignore_eos would have it ignore stop_token_ids too
        "skip_special_tokens": False,
    }
    return "/generate", {"input_ids": request.tokens, "sampling_params": sampling, "return_logprob": True}


def read_sglang(request: Request, answer: Any) -> Answer:
    told = _table(answer, "meta_info")
    pairs = _list(told.get("output_token_logprobs"), "output_token_logprobs")
    if not all(isinstance(pair, list) and len(pair) >= 2 for pair in pairs):
        raise OddAnswer("its output_token_logprobs are no pairs of a log-prob and a token")
    tokens = _ids([pair[1] for pair in pairs], "output_token_logprobs")
    logprobs = _numbers([pair[0] for pair in pairs], "output_token_logprobs", len(tokens))
    label = told.get("weight_version")
    labels = ((str(label), len(tokens)),) if label is not None else ()
    ended = str(_table(told, "finish_reason").get("type"))
    return Answer(tokens, logprobs, ended, labels, _count(told.get("cached_tokens")))


SPEECHES: Mapping[Dialect, Speech] = {
    "tandem": Speech(ask_tandem, read_tandem, exact=True, holds=("json_schema", "regex")),
    "vllm": Speech(ask_vllm, read_vllm, exact=False),
    "sglang": Speech(ask_sglang, read_sglang, exact=False),
}


def seed_there(request: Request, bits: int) -> int:
    """For an engine whose noise begins anew with each request, where tandem's is keyed by position: the turns of a
    program, which have one seed, would begin with the same draws."""
    return derive_seed(request.seed, len(request.tokens), "", 0) % 2**bits


def stop_reason(request: Request, answer: Answer, most: int) -> StopReason:
    """Why it ended. OddAnswer where the request asks for no such end."""
    drawn, tokens = request.sampling, answer.tokens
    if answer.ended == "length":
        if len(tokens) != most:
            raise OddAnswer(f"it was cut after {len(tokens)} of {most} tokens")
        last = tokens[-1] in drawn.stop_token_ids
        return StopReason.STOP_TOKEN if last else StopReason.LENGTH
    if answer.ended != "stop":
        raise OddAnswer(f"it ended by {answer.ended!r}: the server withdrew it, or failed")
    if tokens and tokens[-1] in drawn.stop_token_ids:
        return StopReason.STOP_TOKEN
    if drawn.stop_strings:
        return StopReason.STOP_STRING
    token = f"token {tokens[-1]}" if tokens else "no token at all"
    raise OddAnswer(
        f"it stopped at {token}, which is none of the model's stop tokens {list(drawn.stop_token_ids)}: the server's "
        "model has others in its generation_config.json, or hides the token that it stopped at"
    )


def columns_of(answer: Answer, versions: Sequence[int], vocab_size: int) -> Columns:
    """What is known of each token. OddAnswer where one is outside the vocabulary."""
    if answer.tokens and max(answer.tokens) >= vocab_size:
        raise OddAnswer(
            f"it drew token {max(answer.tokens)}, and the model here has {vocab_size}: the server has another model"
        )
    return Columns.of(tokens=answer.tokens, logprobs=answer.logprobs, versions=versions, **answer.more)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise OddAnswer(f"it is {type(value).__name__}, not a table")
    return value


def _table(value: Any, name: str) -> Mapping[str, Any]:
    found = _mapping(value).get(name)
    if not isinstance(found, dict):
        raise OddAnswer(f"it has no {name}")
    return found


def _list(value: Any, name: str, count: int | None = None) -> list[Any]:
    if not isinstance(value, list):
        raise OddAnswer(f"it has no {name}")
    if count is not None and len(value) != count:
        raise OddAnswer(f"it has {len(value)} {name}, where {count} belong")
    return value


def _ids(value: Any, name: str) -> tuple[int, ...]:
    found = _list(value, name)
    if not all(type(one) is int and one >= 0 for one in found):
        raise OddAnswer(f"its {name} are no token ids")
    return tuple(found)


def _numbers(value: Any, name: str, count: int) -> tuple[float, ...]:
    found = _list(value, name, count)
    if not all(isinstance(one, int | float) and math.isfinite(one) for one in found):
        raise OddAnswer(f"its {name} are no finite numbers: log-probs are missing")
    return tuple(map(float, found))


def _count(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0
