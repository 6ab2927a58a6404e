"""What the endpoints share: bodies in, who asks, generations, and answers out as JSON or as server-sent events."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tandem.server import bodies, demand
from tandem.server.answers import version_spans
from tandem.server.config import ServerConfig, names_of
from tandem.server.counts import Counts
from tandem.server.desk import Call, Desk, log
from tandem.server.lineage import Lineage, arguments_of
from tandem.server.metrics import Metrics
from tandem.server.refusal import Refusal, misfit
from tandem.server.tenants import Access, Holder
from tandem.server.words import Words
from tandem.types import Completion, Constraint, Hints, Message, Sampling
from tandem.types import Request as Asked

T = TypeVar("T")
REMEMBERED = 4096  # labels of weights
SSE = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"
encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Asker:
    """Who makes a call, and for which program."""

    holder: Holder
    tenant: str
    program: str  # "": nobody said
    hints: Hints | None


@dataclass(frozen=True, slots=True)
class Prompt:
    """Of a call: its tokens, and the units by which its program is known again (lineage.py)."""

    tokens: tuple[int, ...]
    units: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Terms:
    """What is asked of each answer of a call, beside how it is drawn."""

    constraint: Constraint | None = None
    likely: int = 0  # most likely tokens beside each
    scored: bool = False  # and log-probs of the prompt


class Room:
    """A server's parts."""

    def __init__(self, desk: Desk, words: Words, config: ServerConfig, model: str) -> None:
        self.desk = desk
        self.words = words
        self.config = config
        self.names = names_of(config, model)
        self.model = self.names[0]
        self.created = int(time.time())
        self.access = Access(config)
        self.lineage = Lineage()
        self.labels: dict[int, str] = {}  # of versions of the weights, where an update gave one
        self.metrics = Metrics(desk, self.model)
        self.counts = Counts()
        desk.watchers.append(self.counts)

    @property
    def fingerprint(self) -> str:
        """Of the weights that answer now."""
        return self.desk.engine.version.digest[:16]

    def label(self, step: int) -> str:
        """What a version of the weights is called."""
        return self.labels.get(step, str(step))

    def labelled(self, step: int, label: str | None) -> None:
        """A version of the weights is called so from now on; by its number where there is no label."""
        self.labels.pop(step, None)
        if label is not None:
            self.labels[step] = label
        while len(self.labels) > REMEMBERED:
            del self.labels[next(iter(self.labels))]

    def spans(self, completion: Completion) -> list[dict[str, Any]]:
        """Which weights drew which tokens of an answer."""
        return version_spans(completion.columns["versions"].tolist(), self.label)

    async def read(self, request: Request, kind: type[T]) -> T:
        """The body of a call as `kind`. Refusal: too large, too slow, no JSON, or JSON of another kind."""
        sent = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if sent != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "a body must be plain JSON. Send the header Content-Type: application/json.", "not_json")
        body = await self.body(request, self.config.max_body_bytes, self.config.body_s)
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.ValidationError as error:
            raise misfit(error) from error
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise Refusal(400, f"the body is no JSON: {error}.", "invalid_json") from error

    async def body(self, request: Request, most: int, limit_s: float) -> bytes:
        """At most so many bytes, within so many seconds."""
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

    def asker(self, request: Request, body: bodies.Whose, messages: Sequence[Message] = ()) -> Asker:
        """Who asks, of body and headers, and for `messages`; the body is heard where both say."""
        holder = request.state.holder
        tenant = self.access.tenant(holder, body.tenant or request.headers.get("x-tenant"))
        if body.model is not None and body.model not in self.names:
            raise Refusal(
                404, f"there is no model {body.model}. Served here: {self.model}.", "model_not_found", "model"
            )
        program = body.program_id or request.headers.get("x-program-id", "")
        if len(program) > 256 or not program.isprintable():
            said = "program_id (X-Program-ID) is longer than 256 characters, or not printable."
            raise Refusal(400, said, "invalid_value", "program_id")
        hints = demand.hints_of(body.hints or self._hints(request))
        if called := arguments_of(messages):
            hints = replace(hints or Hints(), arguments=(hints and hints.arguments) or called)
        return Asker(holder, tenant, program, hints)

    def _hints(self, request: Request) -> bodies.Hints | None:
        """Of the header, which is the JSON that the body's field would be."""
        given = request.headers.get("x-hints")
        try:
            return None if given is None else msgspec.json.decode(given.encode("latin-1"), type=bodies.Hints)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Refusal(400, f"X-Hints: {error}. Send hints as JSON.", "invalid_value", "hints") from error

    def id_of(self, request: Request, kind: str) -> str:
        """Of a call: of what its X-Request-Id says, where it says something."""
        given = request.headers.get("x-request-id", "")
        if len(given) > 128 or not given.isprintable():
            raise Refusal(400, "X-Request-Id is longer than 128 characters, or not printable.", "invalid_value")
        return f"{kind}-{given or secrets.token_hex(12)}"

    async def ask(
        self,
        asker: Asker,
        id: str,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        streams: bool,
        terms: Terms = Terms(),
    ) -> Asking:
        """Asks the engine for answers to the prompts, as many to each as it has seeds. Refusal: none is on its way."""
        requests, owners, several = list[Asked](), list[Prompt](), sum(map(len, seeds)) > 1
        for prompt, own in zip(prompts, seeds, strict=True):
            asked = sampling.max_new_tokens or None
            most = demand.room(self.desk.engine, self.config, len(prompt.tokens), asked)
            program = asker.program or self.lineage.program(asker.tenant, prompt.units)
            for seed in own:
                named = f"{id}/{len(requests)}" if several else id
                drawn = replace(sampling, max_new_tokens=most)
                group = id if several else ""
                one = Asked(named, program, prompt.tokens, drawn, seed, asker.tenant, group=group, hints=asker.hints)
                asks = (terms.constraint, terms.likely, terms.scored)
                requests.append(replace(one, constraint=asks[0], likely=asks[1], scored=asks[2]) if any(asks) else one)
                owners.append(prompt)
        if terms.constraint is not None:  # reading a schema takes a while, once
            await self.words.aside(partial(self.desk.engine.check, requests[0]))
        call = await self.desk.ask(id, requests, streams)
        return Asking(call, owners, not asker.program)

    def remember(self, asking: Asking, place: int, units: Sequence[bytes]) -> None:
        """An answer came, and with it these units have been said: who goes on from them is of the same program."""
        request = asking.call.requests[place]
        if asking.inferred and len(units) > len(asking.prompts[place].units):
            self.lineage.answered(request.tenant, units, request.program_id)


@dataclass(frozen=True, slots=True)
class Asking:
    """A call on its way."""

    call: Call
    prompts: Sequence[Prompt]  # of each answer
    inferred: bool  # nobody named the program

    @property
    def headers(self) -> dict[str, str]:
        return {"x-request-id": spelt(self.call.id), "x-program-id": spelt(self.call.requests[0].program_id)}


def spelt(name: str) -> str:
    """A name from a body as a header may have it.

    >>> spelt("ann/7 é\\r\\n")
    'ann/7 %C3%A9%0D%0A'
    """
    return quote(name, safe="!#$&'()*+,-./:;<=>?@[]^_`{|}~ ")


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


async def collected(call: Call) -> list[Completion]:
    """All answers of a call, which is withdrawn where nobody waits for them any more."""
    try:
        return await call.completions()
    finally:
        call.withdraw()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def answer(body: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    return Response(encode(body), status, headers, "application/json")


def event(body: Any) -> bytes:
    """A server-sent event without a name, as OpenAI's streams have them."""
    return b"data: " + encode(body) + b"\n\n"


class Leaving(Protocol):
    """What a stream is of: a call, or someone who looks."""

    id: str
    gone: bool

    def leave(self) -> None: ...

    def withdraw(self) -> None: ...


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
    """Server-sent events as they come. The call is withdrawn as soon as its client is gone, or takes nothing.

    What a call fails by on the way is an event too: OpenAI's client reads an error in it, and would take the end of the
    stream, or a body of JSON, for an answer without words.
    """

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
            yield event(refusal.body()) + DONE
        except Exception:  # noqa: BLE001 - recorded boundary: the client hears that it failed, the log why
            log.exception("call %s failed", self.call.id)
            yield event(Refusal(500, "the server failed at this call. Ask again.", "server_failed").body()) + DONE
