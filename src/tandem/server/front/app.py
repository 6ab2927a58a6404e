"""The router's endpoints: those of an engine, asked of one of several or of all, and its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tandem.server.front import looks, verbs
from tandem.server.front.forward import forward
from tandem.server.front.front import Front
from tandem.server.page import page
from tandem.server.wire import answer, guarded, no_such

FORWARDED = (
    ("POST", "/generate"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/{rest:path}"),
    ("GET", "/v1/{rest:path}"),
    ("GET", "/openapi.json"),
)


async def health(front: Front, request: Request) -> Response:
    """200 while an engine can be asked."""
    status = "ok" if front.well else "draining" if front.draining else "failing"
    return answer({"status": status}, status=200 if front.well else 503)


async def _page(front: Front, request: Request) -> Response:
    return page()


def build(front: Front) -> Starlette:
    """The application over a router that was started."""
    sums = looks.Sums(front)

    async def metrics(front: Front, request: Request) -> Response:
        return await looks.metrics(front, sums)

    opened = (("GET", "/health", health), ("GET", "/", _page))
    asked: list[tuple[str, str, Callable[[Front, Request], Awaitable[Response]]]] = [
        ("GET", "/events", looks.events),
        ("GET", "/load", looks.load),
        ("GET", "/metrics", metrics),
        ("POST", "/drain", verbs.drain),
        ("POST", "/undrain", verbs.undrain),
        *[("POST", path, verbs.everywhere) for path in verbs.POSTS],
        *[("GET", path, verbs.everywhere) for path in verbs.GETS],
        *[(method, path, forward) for method, path in FORWARDED],
    ]

    def counted(refusal: object) -> None:
        front.refusals[getattr(refusal, "code", None) or ""] += 1

    def route(method: str, path: str, endpoint: Callable[[Front, Request], Awaitable[Response]], free: bool) -> Route:
        call = guarded(None if free else front.access, partial(endpoint, front), counted)
        made = Route(path, call, methods=[method])
        if not free and made.methods is not None:
            made.methods.discard("HEAD")  # as at an engine
        return made

    routes = [route(*one, True) for one in opened] + [route(*one, False) for one in asked]
    return Starlette(routes=routes, exception_handlers={HTTPException: no_such})
