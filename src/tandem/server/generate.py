"""POST /generate: token ids in and out, in SGLang's names, for programs that keep their own tokens."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tandem.columns import Columns
from tandem.server import answers, bodies, demand
from tandem.server.lineage import of_tokens
from tandem.server.refusal import Refusal
from tandem.server.room import Asking, Prompt, Room, Terms, collected
from tandem.server.wire import DONE, EventStream, answer, attended, event
from tandem.types import Completion, Constraint, Sampling, StopReason
from tandem.types import Request as Asked


async def generate(room: Room, request: Request) -> Response:
    body = await room.read(request, bodies.GenerateBody)
    if body.return_kept and body.stream:
        raise Refusal(400, "return_kept goes with a whole answer. Leave stream out.", "invalid_value", "return_kept")
    id = body.rid or room.id_of(request, "gen")
    asking = await attended(request, asked(room, request, body, id))
    if body.stream:
        return EventStream(blocks(room, asking), asking.call, room.config.send_s, asking.headers)
    done = await attended(request, collected(asking.call))
    told = [ended(room, asking, place, completion, body.return_kept) for place, completion in enumerate(done)]
    return answer(told if body.sampling_params.n > 1 else told[0], asking.headers)


async def asked(room: Room, request: Request, body: bodies.GenerateBody, id: str) -> Asking:
    """The engine has it."""
    given, tokens = body.sampling_params, tuple(body.input_ids)
    asker = room.asker(request, body)
    demand.choices(room.config, 1, given.n)
    scored = given.temperature == 0 and body.return_logprob
    sampling = Sampling(
        temperature=1.0 if scored else given.temperature,
        top_k=1 if scored else max(0, given.top_k),
        top_p=1.0 if scored else given.top_p,
        min_p=0.0 if scored else given.min_p,
        max_new_tokens=given.max_new_tokens,
        stop_token_ids=demand.stops(room.words.renderer.stop_token_ids, given.stop_token_ids, given.ignore_eos),
        stop_strings=demand.strings(given.stop),
    )
    seeds = demand.seeds(demand.seed_of(given.sampling_seed), 0, given.n)
    if given.noise_seed is not None:
        if given.n > 1 or given.sampling_seed is not None:
            said = "noise_seed is of one answer: give n 1 and no sampling_seed with it."
            raise Refusal(400, said, "invalid_value", "noise_seed")
        seeds = [given.noise_seed]
    if given.json_schema is not None and given.regex is not None:
        raise Refusal(400, "json_schema and regex ask for two forms of one answer. Give one of them.", "invalid_value")
    constraint = Constraint("regex", given.regex) if given.regex is not None else None
    if given.json_schema is not None:
        constraint = Constraint("json_schema", given.json_schema)
    prompts = [Prompt(tokens, of_tokens(tokens))]
    return await room.ask(asker, id, prompts, sampling, [seeds], body.stream, Terms(constraint))


def ended(room: Room, asking: Asking, place: int, completion: Completion, with_kept: bool) -> dict[str, Any]:
    """An answer, whole."""
    request = asking.call.requests[place]
    room.remember(asking, place, of_tokens((*request.tokens, *completion.tokens)))
    answered = told(room, request, completion.columns, completion)
    if with_kept and (kept := completion.columns.get("kept")) is not None:
        answered["meta_info"]["output_kept"] = [b64encode(one).decode() for one in kept]
    return answered


def told(room: Room, request: Asked, drawn: Columns, completion: Completion | None) -> dict[str, Any]:
    """What was drawn, and what is known of it. Log-probs are of what was drawn from; beside them, where a filter left
    tokens out, those before it, and of greedy draws the model's own."""
    tokens = drawn["tokens"].tolist() if len(drawn) else []
    marks: dict[str, Any] = {"id": request.id, "prompt_tokens": len(request.tokens)}
    marks["weight_versions"] = answers.version_spans(drawn["versions"].tolist(), room.label) if tokens else []
    marks["output_logprobs"] = drawn["logprobs"].tolist() if tokens else []
    if (unfiltered := drawn.get("unfiltered_logprobs")) is not None:
        marks["output_unfiltered_logprobs"] = unfiltered.tolist()
    marks["finish_reason"] = None
    if completion is not None:
        marks["finish_reason"] = finish(completion, tokens)
        marks["completion_tokens"] = len(completion.columns)
        marks["cached_tokens"] = completion.cached_tokens
        marks["weight_version"] = room.label(room.desk.engine.version.step)
    return {"output_ids": tokens, "meta_info": marks}


def finish(completion: Completion, tokens: list[int]) -> dict[str, Any]:
    """Why it ended, in SGLang's words."""
    if completion.stop_reason is StopReason.STOP_TOKEN:
        return {"type": "stop", "matched": tokens[-1] if tokens else None}
    if completion.stop_reason is StopReason.LENGTH:
        return {"type": "length", "length": len(completion.columns)}
    return {"type": answers.FINISHED[completion.stop_reason]}


async def blocks(room: Room, asking: Asking) -> AsyncIterator[bytes]:
    """The events of a stream: what is new of each answer."""
    call = asking.call
    while not call.over:
        new = await call.pieces()
        events = [] if new else [b": waiting\n\n"]
        for place, piece in new.items():
            drawn, request = piece.columns, call.requests[place]
            events.append(event({**told(room, request, drawn, piece.completion), "index": place}))
            if piece.completion is not None:
                room.remember(asking, place, of_tokens((*request.tokens, *piece.completion.tokens)))
        if events and not call.gone:
            yield b"".join(events)
    if not call.gone:
        yield DONE
