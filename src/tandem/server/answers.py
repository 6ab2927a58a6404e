"""An answer as it comes: tokens to words, calls of tools, log-probs, and how it ended, in OpenAI's words."""

from __future__ import annotations

import secrets
from codecs import getincrementaldecoder
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

from tandem.columns import Columns
from tandem.engine.constraint import unmet
from tandem.program.formats.parsed import dumps
from tandem.server.desk import Piece
from tandem.server.text import Text
from tandem.server.turn import Delta, Turn
from tandem.server.words import Words
from tandem.types import Completion, Request, StopReason, ToolCall, likely_tokens

FINISHED: Mapping[StopReason, str] = {
    StopReason.STOP_TOKEN: "stop",
    StopReason.STOP_STRING: "stop",
    StopReason.LENGTH: "length",
    StopReason.ABORTED: "abort",
}


@dataclass(frozen=True, slots=True)
class Step:
    """What is new of an answer."""

    delta: Delta
    drawn: Columns  # the token that ended it too
    completion: Completion | None  # where it has ended


class Answer:
    """One answer of a call. `turn`: None where its text stands as it is."""

    def __init__(self, words: Words, request: Request, turn: Turn | None) -> None:
        sampling = request.sampling
        self._constraint = request.constraint
        self._text = Text(words.tokenizer.decode, sampling.stop_strings, words.ends(sampling))
        self._turn = turn
        self.called = 0  # tools

    def take(self, piece: Piece) -> Step:
        """The next of a stream."""
        return self._step(piece.columns, piece.completion)

    def whole(self, completion: Completion) -> Step:
        """All of it."""
        return self._step(completion.columns, completion)

    def unmet(self, completion: Completion) -> dict[str, str]:
        """Why an answer that came to its end is not what was asked, where it is not: no mask holds all of a schema."""
        if self._constraint is None or completion.stop_reason is not StopReason.STOP_TOKEN:
            return {}
        odd = unmet(self._constraint, self._text.given)
        return {"unmet": odd} if odd else {}

    def _step(self, drawn: Columns, completion: Completion | None) -> Step:
        text = self._text.feed(drawn["tokens"].tolist()) if len(drawn) else ""
        if completion is not None:
            text += self._text.finish(completion.stop_reason)
        if self._turn is None:
            return Step(Delta(content=text), drawn, completion)
        delta = self._turn.feed(text)
        if completion is not None:
            rest = self._turn.finish()
            delta = Delta(delta.reasoning + rest.reasoning, delta.content + rest.content, rest.calls)
        self.called += len(delta.calls)
        return Step(delta, drawn, completion)


def finish_reason(completion: Completion, called: bool = False) -> str:
    reason = FINISHED[completion.stop_reason]
    return "tool_calls" if called and reason == "stop" else reason


def usage(completions: Sequence[Completion], prompts: Sequence[int]) -> dict[str, Any]:
    """prompts: tokens of each prompt, which counts once, and of which were cached what its every answer found; as many
    completions of each, in order."""
    drawn, each = sum(len(one.columns) for one in completions), len(completions) // len(prompts)
    found = [one.cached_tokens for one in completions]
    cached = sum(min(found[place * each : (place + 1) * each]) for place in range(len(prompts)))
    return {
        "prompt_tokens": sum(prompts),
        "completion_tokens": drawn,
        "total_tokens": sum(prompts) + drawn,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def logprobs_of(drawn: Columns, scored: bool) -> list[float]:
    """Of what was drawn from; at temperature 0, where `scored`, the model's own."""
    return drawn["unfiltered_logprobs" if scored else "logprobs"].tolist() if len(drawn) else []


def chat_logprobs(words: Words, drawn: Columns, scored: bool, ends: frozenset[int]) -> dict[str, Any]:
    """As chat completions have them; the token that ended the turn is left out, as its text is."""
    tokens = drawn["tokens"].tolist() if len(drawn) else []

    def told(token: int, logprob: float) -> dict[str, Any]:
        spelt = words.token_bytes(token)
        return {"token": spelt.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(spelt)}

    rows = [
        {**told(token, logprob), "top_logprobs": [told(*one) for one in likely]}
        for token, logprob, likely in zip(tokens, logprobs_of(drawn, scored), likely_in(drawn), strict=True)
        if token not in ends
    ]
    return {"content": rows, "refusal": None}


def likely_in(drawn: Columns) -> list[list[tuple[int, float]]]:
    """The most likely tokens of each place; none where nobody asked."""
    found = drawn.get("likely")
    return [[] for _ in range(len(drawn))] if found is None else [likely_tokens(one) for one in found.tolist()]


class Places:
    """Where tokens begin in a text, in characters, from `start` on. What ends a character begins where that does."""

    def __init__(self, words: Words, start: int) -> None:
        self._bytes, self._decode = words.token_bytes, getincrementaldecoder("utf-8")("replace").decode
        self._at = start

    def of(self, tokens: Sequence[int]) -> list[int]:
        """Of the next ones."""
        places = list(accumulate((len(self._decode(self._bytes(token))) for token in tokens), initial=self._at))
        self._at = places.pop()
        return places


def plain_logprobs(words: Words, known: Columns, logprobs: Sequence[float | None], places: Places) -> dict[str, Any]:
    """Of tokens as plain completions have them, the one that ended the text too. None of a log-prob is of a token that
    nothing came before. A token is told of beside the likeliest, where it is none."""
    tokens = known["tokens"].tolist() if len(known) else []
    top: list[dict[str, float] | None] = []
    for token, logprob, likely in zip(tokens, logprobs, likely_in(known), strict=True):
        row = dict[str, float]()
        for one, value in likely if logprob is None else (*likely, (token, logprob)):
            row.setdefault(words.spelt(one), value)  # of two that read the same, the likelier
        top.append(row if logprob is not None else None)
    return {
        "tokens": [words.spelt(token) for token in tokens],
        "token_logprobs": list(logprobs),
        "top_logprobs": top if "likely" in known else None,
        "text_offset": places.of(tokens),
    }


def called(calls: Sequence[ToolCall], first: int, new_id: Callable[[], str]) -> list[dict[str, Any]]:
    """Calls as chat completions have them, in a delta with their place."""
    return [
        {
            "id": call.id or new_id(),
            "type": "function",
            "function": {"name": call.name, "arguments": dumps(call.arguments)},
            "index": place,
        }
        for place, call in enumerate(calls, start=first)
    ]


def call_id() -> str:
    """Nine characters: Mistral's templates take no other."""
    return secrets.token_hex(5)[:9]


def version_spans(versions: Sequence[int], label: Callable[[int], str]) -> list[dict[str, Any]]:
    """Which weights drew which tokens.

    >>> version_spans([3, 3, 4], str)
    [{'version': '3', 'start': 0, 'end': 2}, {'version': '4', 'start': 2, 'end': 3}]
    """
    spans, start = [], 0
    for step, run in groupby(versions):
        end = start + len(list(run))
        spans.append({"version": label(step), "start": start, "end": end})
        start = end
    return spans
