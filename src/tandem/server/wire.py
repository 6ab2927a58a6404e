"""What a server of HTTP has whatever it serves: bodies in, answers and server-sent events out, errors as answers.

A model's server (app.py) and the router before several (front/) share it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tandem.errors import TandemError
from tandem.server.refusal import Refusal, refused
from tandem.server.tenants import Access

T = TypeVar("T")
SSE = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"
encode = msgspec.json.Encoder().encode
log = logging.getLogger("tandem.server")


def answer(body: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    return Response(encode(body), status, headers, "application/json")


def told(refusal: Refusal) -> Response:
    return answer(refusal.body(), refusal.headers(), refusal.status)


def event(body: Any) -> bytes:
    """A server-sent event without a name, as OpenAI's streams have them."""
    return b"data: " + encode(body) + b"\n\n"


def failure(refusal: Refusal) -> bytes:
    """What a stream ends with that goes on no more: OpenAI's client reads an error in an event, and would take the end
    of the stream, or a body of JSON, for an answer without words."""
    return event(refusal.body()) + DONE


async def received(request: Request, most: int, limit_s: float) -> bytes:
    """A call's body: at most so many bytes, within so many seconds. Refusal else."""
    said = f"the body is longer than {most} bytes (server.max_body_bytes; server.max_part_bytes for weights)."
    if int(request.headers.get("content-length") or 0) > most:
        raise Refusal(413, said, "body_too_large")
    parts, length = list[bytes](), 0
    try:
        async with asyncio.timeout(limit_s):
            async for part in request.stream():
                length += len(part)
                if length > most:
                    raise Refusal(413, said, "body_too_large")
                parts.append(part)
    except TimeoutError as error:
        raise Refusal(408, f"the body did not come within {limit_s:g} s.", "body_too_slow") from error
    return b"".join(parts)


def guarded(
    access: Access | None, endpoint: Callable[[Request], Awaitable[Response]], refusing: Callable[[Refusal], None]
) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint for who has a key (access None: for all), with what it raises as an answer; refusing: told of it."""

    async def called(request: Request) -> Response:
        try:
            if access is not None:
                request.state.holder = access.holder(request.headers)
            return await endpoint(request)
        except Refusal as refusal:
            refusing(refusal)
            return told(refusal)
        except TandemError as error:
            said = refused(error)
            if said.status >= 500:
                log.exception("%s %s failed", request.method, request.url.path)
            refusing(said)
            return told(said)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except Exception:
            log.exception("%s %s failed", request.method, request.url.path)
            said = Refusal(500, "the server failed at this call. Ask again.", "server_failed")
            refusing(said)
            return told(said)

    return called


async def no_such(request: Request, error: Exception) -> Response:
    """A path or a method that there is not."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        refusal = Refusal(405, f"{asked} is not served. Allowed there: {allowed}.", "method_not_allowed")
        return answer(refusal.body(), error.headers, 405)
    return told(Refusal(error.status_code, f"{asked} is not served. See /openapi.json.", "not_found"))


async def attended(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives, which ends where the client goes away before."""
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((doing, gone), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        gone.cancel()
        doing.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Leaving(Protocol):
    """What a stream is of: a call, or someone who looks."""

    id: str
    gone: bool

    def leave(self) -> None: ...

    def withdraw(self) -> None: ...


class Visit:
    """Someone who looks, until they leave."""

    def __init__(self, id: str = "page") -> None:
        self.id, self.gone = id, False
        self._left = asyncio.Event()

    def leave(self) -> None:
        self.gone = True
        self._left.set()

    def withdraw(self) -> None: ...

    async def wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._left.wait()
        except TimeoutError:
            pass


@dataclass(slots=True)
class Waits:
    """Of a task: when its wait began; None while it does not wait."""

    since_s: float | None = None

    async def of(self, what: Awaitable[None]) -> None:
        self.since_s = time.monotonic()
        await what
        self.since_s = None


@asynccontextmanager
async def patience(most_s: float) -> AsyncIterator[Waits]:
    """TimeoutError in a block of which one wait takes longer. One timer, set again as it fires: a timer a wait would
    cost as much as what is sent."""
    loop, waits, timer = asyncio.get_running_loop(), Waits(), list[asyncio.TimerHandle]()

    def look(limit: asyncio.Timeout) -> None:
        waited_s = 0.0 if waits.since_s is None else time.monotonic() - waits.since_s
        if waited_s >= most_s:
            limit.reschedule(loop.time())
        else:
            timer[:] = [loop.call_later(most_s - waited_s, look, limit)]

    async with asyncio.timeout(None) as limit:
        look(limit)
        try:
            yield waits
        finally:
            for one in timer:
                one.cancel()


class EventStream(Response):
    """Server-sent events as they come. The call is withdrawn as soon as its client is gone, or takes nothing; what it
    fails by on the way is an event too."""

    def __init__(self, blocks: AsyncIterator[bytes], call: Leaving, send_s: float, headers: Mapping[str, str]) -> None:
        super().__init__(None, 200, {**SSE, **headers})
        del self.headers["content-length"]
        self.blocks, self.call, self.send_s = blocks, call, send_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_gone(receive))
        gone.add_done_callback(lambda ended: None if ended.cancelled() else self.call.leave())
        try:
            async with patience(self.send_s) as waits:
                await waits.of(send({"type": "http.response.start", "status": 200, "headers": self.raw_headers}))
                async for block in self._told():
                    await waits.of(send({"type": "http.response.body", "body": block, "more_body": True}))
                if not self.call.gone:
                    await waits.of(send({"type": "http.response.body", "body": b"", "more_body": False}))
        except TimeoutError:
            log.warning("call %s: its client took nothing for %g s; it was withdrawn", self.call.id, self.send_s)
            scope["abort"]()
        finally:
            gone.cancel()
            self.call.withdraw()

    async def _told(self) -> AsyncIterator[bytes]:
        try:
            async for block in self.blocks:
                yield block
        except Refusal as refusal:
            yield failure(refusal)
        except Exception:
            log.exception("call %s failed", self.call.id)
            yield failure(Refusal(500, "the server failed at this call. Ask again.", "server_failed"))
