"""The server's endpoints, and what becomes of what goes wrong in one.

    app = build(room)

Bodies are read by bodies.py and not by FastAPI, strictly and at the speed of memory; the OpenAPI document has their
schemas. An error is an answer in OpenAI's shape with its status, never a trace.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import tandem
from tandem.server import bodies, load, plain, programs, shares, verbs
from tandem.server.chat import chat
from tandem.server.completions import completions
from tandem.server.generate import generate
from tandem.server.responses import responses
from tandem.server.room import Room
from tandem.server.wire import guarded, no_such

Endpoint = Callable[[Room, Request], Awaitable[Response]]
REF = "#/components/schemas/{name}"


class Route(NamedTuple):
    """An endpoint: what it takes, and what OpenAPI says of it."""

    method: str
    path: str
    endpoint: Endpoint
    said: str
    body: type[msgspec.Struct] | None = None
    streams: bool = False
    open: bool = False  # to callers without a key
    binary: bool = False  # its body is no JSON
    answers: str = "application/json"


ROUTES = (
    Route("GET", "/health", plain.health, "Whether it takes calls.", open=True),
    Route("GET", "/", load.page, "The page that shows load, tenants and programs.", open=True, answers="text/html"),
    Route("GET", "/events", load.events, "A look at them a second.", answers="text/event-stream"),
    Route("GET", "/load", load.load, "One look."),
    Route("GET", "/metrics", plain.metrics, "Counts and times, for Prometheus.", answers="text/plain"),
    Route("GET", "/v1/models", plain.models, "The model that is served."),
    Route("GET", "/v1/models/{name:path}", plain.model, "One model."),
    Route("POST", "/v1/chat/completions", chat, "A conversation answered.", bodies.ChatBody, streams=True),
    Route("POST", "/v1/completions", completions, "A text continued.", bodies.CompletionBody, streams=True),
    Route("POST", "/v1/responses", responses, "A conversation answered, in items.", bodies.ResponseBody, streams=True),
    Route("POST", "/generate", generate, "Token ids continued.", bodies.GenerateBody, streams=True),
    Route("POST", "/pause", verbs.pause, "Nothing new starts; ?mode=abort, wait or keep what is on its way."),
    Route("POST", "/resume", verbs.resume, "What was paused goes on."),
    Route("GET", "/is_paused", verbs.is_paused, "Whether it is."),
    Route("POST", "/pause_generation", verbs.pause_generation, "As /pause.", bodies.PauseBody),
    Route("POST", "/continue_generation", verbs.resume, "As /resume."),
    Route("POST", "/abort_requests", verbs.abort_requests, "Answers withdrawn by their ids.", bodies.AbortBody),
    Route("POST", "/abort_request", verbs.abort_requests, "As /abort_requests.", bodies.AbortBody),
    Route("POST", "/start_weight_update", verbs.start_weight_update, "Parts of other weights will come."),
    Route("POST", "/update_weights", verbs.update_weights, "A part of them, a safetensors file.", binary=True),
    Route("POST", "/finish_weight_update", verbs.finish_weight_update, "They are served.", bodies.FinishBody),
    Route("POST", "/update_weights_from_disk", verbs.update_weights_from_disk, "A folder's weights.", bodies.DiskBody),
    Route("GET", "/weight_info", verbs.weight_info, "Which weights are served."),
    Route("POST", "/weight_checker", verbs.weight_checker, "Hashes of what is served.", bodies.CheckerBody),
    Route("POST", "/v1/load_lora_adapter", verbs.load_lora_adapter, "An adapter is served.", bodies.LoadAdapterBody),
    Route("POST", "/v1/unload_lora_adapter", verbs.unload_lora_adapter, "It is no more.", bodies.UnloadAdapterBody),
    Route("POST", "/sleep", verbs.sleep, "The memory of keys and values is given back."),
    Route("POST", "/wake_up", verbs.wake_up, "Calls are answered again."),
    Route("GET", "/is_sleeping", verbs.is_sleeping, "Whether it sleeps."),
    Route("POST", "/release_memory_occupation", verbs.sleep, "As /sleep."),
    Route("POST", "/resume_memory_occupation", verbs.wake_up, "As /wake_up."),
    Route("GET", "/shares", shares.shares, "What tenants have here, for a router."),
    Route("POST", "/shares", shares.promise, "What they get here.", shares.SharesBody),
    Route("POST", "/programs", programs.programs, "How programs are scheduled from now on.", programs.ProgramsBody),
    Route("POST", "/finish_program", programs.finished, "A program asks for nothing more.", programs.FinishedBody),
    Route("POST", "/tokenize", plain.tokenize, "Token ids of a text or a conversation.", bodies.TokenizeBody),
    Route("POST", "/detokenize", plain.detokenize, "The text of token ids.", bodies.DetokenizeBody),
)


def build(room: Room, store: verbs.WeightStore | None = None) -> FastAPI:
    """The application over a room. Its engine starts and ends with it. store: how other weights come."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        room.desk.start()
        try:
            yield
        finally:
            room.desk.close()

    app = FastAPI(
        title="tandem",
        version=tandem.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.control = verbs.Control(room, store)
    for route in ROUTES:
        app.add_api_route(
            route.path,
            guarded(None if route.open else room.access, partial(route.endpoint, room), room.metrics.refused),
            methods=[route.method],
            openapi_extra=_described(route),
            operation_id=_named(route),
            summary=route.said,
            responses=_responses(route),
            response_class=Response,
        )
    app.add_exception_handler(HTTPException, no_such)
    described = app.openapi()
    schemas = described.setdefault("components", {}).setdefault("schemas", {})
    kinds = [route.body for route in ROUTES if route.body is not None]
    schemas.update(msgspec.json.schema_components(kinds, ref_template=REF)[1])
    schemas["Error"] = ERROR
    return app


ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
STATUSES = {
    400: "what was asked cannot be",
    401: "no API key, or an unknown one",
    403: "not for this API key",
    404: "no such model",
    408: "the body came too slowly",
    409: "the id is in use, or the server is in another state",
    413: "the body is too long",
    415: "the body is no plain JSON",
    429: "no room; retry-after says when to ask again",
    500: "the engine failed at it",
    503: "the server is about to end",
}


def _named(route: Route) -> str:
    name = route.path.strip("/").replace("/", "_") or "page"
    several = sum(one.path == route.path for one in ROUTES) > 1
    return f"{route.method.lower()}_{name}" if several else name


def _responses(route: Route) -> dict[int | str, dict[str, Any]]:
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"description": said, "content": {"application/json": {"schema": {"$ref": REF.format(name="Error")}}}}
        for status, said in STATUSES.items()
        if route.method == "POST" or status in (401, 403, 404, 500, 503)
    }
    kinds: dict[str, Any] = {route.answers: {"schema": {}}}
    if route.streams:
        kinds["text/event-stream"] = {"schema": {}}
    return {200: {"description": route.said, "content": kinds}, **refusals}


def _described(route: Route) -> dict[str, Any]:
    if route.binary:
        binary = {"schema": {"type": "string", "format": "binary"}}
        return {"requestBody": {"required": True, "content": {"application/octet-stream": binary}}}
    if route.body is None:
        return {}
    schema = {"$ref": REF.format(name=route.body.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
