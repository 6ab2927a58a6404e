"""Endpoints that ask nothing of the engine: models, health, tokens of a text and back."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from tandem.server import bodies, demand
from tandem.server.refusal import Refusal
from tandem.server.room import Room
from tandem.server.wire import answer
from tandem.server.words import messages_of, tools_of


async def models(room: Room, request: Request) -> Response:
    return answer({"object": "list", "data": [_card(room, name) for name in (room.model, *room.desk.engine.adapters)]})


async def model(room: Room, request: Request) -> Response:
    name = request.path_params["name"]
    room.check_model(name)
    return answer(_card(room, room.named(name)))


def _card(room: Room, name: str) -> dict[str, object]:
    card = {"id": name, "object": "model", "created": room.created, "owned_by": "tandem"}
    of = {"parent": room.model} if name in room.desk.engine.adapters else {}
    return {**card, "max_model_len": room.desk.engine.scheduler.max_context, **of}


async def health(room: Room, request: Request) -> Response:
    """200 while calls are taken, 503 while it drains or the engine fails at every step."""
    well = room.desk.well
    return answer(
        {"status": "ok" if well else "draining" if room.desk.draining else "failing"}, status=200 if well else 503
    )


async def metrics(room: Room, request: Request) -> Response:
    return Response(room.metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def tokenize(room: Room, request: Request) -> Response:
    body = await room.read(request, bodies.TokenizeBody)
    if (body.prompt is None) == (body.messages is None):
        raise Refusal(400, "give one of prompt and messages.", "invalid_value", "prompt")
    context = demand.context_of(room.desk.engine)
    if body.messages is not None:
        room.words.check_chat(body.messages, body.tools or (), context)
        tokens = await room.words.chat(messages_of(body.messages), tools_of(body.tools or ()))
    else:
        room.words.check_length(len(body.prompt or ""), context)
        tokens = await room.words.plain(body.prompt or "", body.add_special_tokens)
    spelt = room.words.tokenizer.backend.id_to_token
    told = {"count": len(tokens), "max_model_len": room.desk.engine.scheduler.max_context, "tokens": tokens}
    return answer({**told, "token_strs": [spelt(token) for token in tokens] if body.return_token_strs else None})


async def detokenize(room: Room, request: Request) -> Response:
    body = await room.read(request, bodies.DetokenizeBody)
    most, context = room.desk.engine.vocab_size, demand.context_of(room.desk.engine)
    if len(body.tokens) > context:
        said = f"there are {len(body.tokens)} tokens, and the context holds {context}. Give fewer at a time."
        raise Refusal(400, said, "context_length_exceeded", "tokens")
    for place, token in enumerate(body.tokens):
        if token >= most:
            said = f"tokens[{place}] is {token}, outside of the vocabulary. Allowed: 0 to {most - 1}."
            raise Refusal(400, said, "invalid_value", f"tokens[{place}]")
    return answer({"prompt": room.words.tokenizer.decode(body.tokens)})
