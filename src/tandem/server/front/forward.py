"""One call on its way through the router: asked of an engine, of another where that dies, and answered once.

What has sent its client no word yet may be asked again, since a token depends on nothing of the engine. An engine that
refuses for want of room, or is about to end, is passed over; one that dies, or fails at it (500), counts, and after
`route.deaths` of those the call is given up: it may be what they die of. A stream that breaks after its first word ends
with an error of OpenAI's shape.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response

from tandem.server.front.call import Call
from tandem.server.front.client import Answer, Lost
from tandem.server.front.engines import Engine
from tandem.server.front.front import Front
from tandem.server.refusal import Refusal
from tandem.server.wire import EventStream, attended, received

HOPS = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade host "
    b"content-length expect accept-encoding date server".split()
)  # headers that are of one connection, or that either side writes itself
END = re.compile(rb"\r?\n\r?\n")  # of a server-sent event
PASSED_OVER = (429, 503)  # it has no room, or takes no calls


async def forward(front: Front, request: Request) -> Response:
    """The answer of the engine that is chosen, byte for byte."""
    if front.draining:
        raise Refusal(503, "the router is about to end and takes no more calls.", "draining", retry_s=1)
    most = front.config.max_requests
    if front.open >= most:
        said = (
            f"there is no room for one more: {front.open} calls are on their way, {most} may be (server.max_requests)."
        )
        raise Refusal(429, f"{said} Wait.", "rate_limit_exceeded", retry_s=front.config.retry_after_s)
    front.open += 1
    try:
        body = await received(request, front.config.max_body_bytes, front.config.body_s)
        forwarded = Forwarded(front, Call(request, body, request.state.holder.tenant))
    except BaseException:
        front.open -= 1
        raise
    try:
        response = await attended(request, forwarded.begin())
    except BaseException:
        forwarded.withdraw()
        raise
    if not isinstance(response, EventStream):
        forwarded.withdraw()  # it is whole
    return response


class Forwarded:
    """A call, at one engine at a time."""

    def __init__(self, front: Front, call: Call) -> None:
        self.front, self.call, self.id = front, call, call.id
        self.gone = False  # the client is
        self._tried = list[Engine]()
        self._failures = 0
        self._said = ""  # why it was asked of another
        self._engine: Engine | None = None
        self._answer: Answer | None = None
        self._lost = ""
        self._over = False

    # A stream's client, and the engine's watch.

    def leave(self) -> None:
        self.gone = True
        self.lose("its client has gone")

    def withdraw(self) -> None:
        """It is over, whatever of it is left."""
        self._left()
        if not self._over:
            self._over = True
            self.front.open -= 1

    def lose(self, reason: str) -> None:
        self._lost = reason
        if self._answer is not None:
            self._answer.lose(reason)

    # Engines.

    async def begin(self) -> Response:
        """The whole answer, or one that streams. Refusal where no engine has one."""
        answer, body = await self._heard()
        if body is not None:
            return _response(answer, body)
        return EventStream(self.blocks(answer), self, self.front.config.send_s, _headers(answer))

    async def blocks(self, answer: Answer) -> AsyncIterator[bytes]:
        """A stream's events, each whole. Until the first that is no comment, another engine may be asked for it."""
        given = False
        while True:
            try:
                async for events in _events(answer, self.front.route.silence_s):
                    given = given or not all(one.startswith(b":") for one in END.split(events) if one)
                    yield events
                return
            except Lost as error:
                if self.gone:
                    return
                if given:
                    assert self._engine is not None
                    self._engine.counts["broken"] += 1
                    self._engine.failed(str(error))
                    raise Refusal(
                        502, f"the engine was lost amid the answer: {error}. Ask again.", "engine_lost"
                    ) from error
                self._fail(str(error))
            answer, body = await self._heard()
            if body is not None:  # what the other says is the last event of a stream that is open already
                yield b"data: " + b" ".join(body.split(b"\n")) + b"\n\ndata: [DONE]\n\n"
                return

    async def _heard(self) -> tuple[Answer, bytes | None]:
        """An engine's answer, one that streams or with its body. Refusal where no engine has one."""
        while True:
            answer = await self._asked()
            if answer.header(b"content-type").startswith(b"text/event-stream") and answer.status < 300:
                return answer, None
            try:
                body = await answer.whole(self.front.route.answer_s)
            except Lost as error:
                self._fail(str(error))
                continue
            if not self._again(answer):
                return answer, body

    async def _asked(self) -> Answer:
        """The head of an answer. Refusal where no engine is left to ask."""
        front, call = self.front, self.call
        while True:
            self._left()
            engine = front.choose(call, self._tried) if self._failures < front.route.deaths else None
            if self.gone or engine is None:
                raise self._given_up()
            self._enter(engine)
            headers = [pair for pair in call.headers if pair[0] not in HOPS]
            try:
                answer = await engine.client.ask(call.method, call.target, headers, call.body, front.route.answer_s)
            except Lost as error:
                self._fail(self._lost or str(error))
                continue
            self._answer = answer
            if self._lost:  # while it was asked
                answer.lose(self._lost)
            return answer

    def _enter(self, engine: Engine) -> None:
        self._engine, self._lost = engine, ""
        engine.open.add(self)
        engine.answers += self.call.answers
        engine.tokens += self.call.tokens
        engine.counts["calls"] += 1
        engine.counts["again"] += bool(self._tried)
        self._tried.append(engine)

    def _left(self) -> None:
        """The engine that had it has it no more."""
        engine, self._engine = self._engine, None
        if self._answer is not None:
            self._answer.close()
            self._answer = None
        if engine is not None:
            engine.open.discard(self)
            engine.answers -= self.call.answers
            engine.tokens -= self.call.tokens

    def _fail(self, reason: str) -> None:
        """The engine died, or was lost: it is asked for nothing new before it says that it is well."""
        engine = self._engine
        assert engine is not None
        self._failures += 1
        self._said = f"{engine.name}: {reason}"
        engine.counts["failed"] += 1
        engine.failed(reason)

    def _again(self, answer: Answer) -> bool:
        """Whether an engine's whole answer is one for which another is asked."""
        if answer.status not in PASSED_OVER and answer.status < 500:
            return False
        engine, front = self._engine, self.front
        assert engine is not None
        if answer.status not in PASSED_OVER:
            self._failures += 1
            engine.counts["failed"] += 1
        return self._failures < front.route.deaths and bool(front.left(self._tried))

    def _given_up(self) -> Refusal:
        front = self.front
        if self._failures >= front.route.deaths:
            said = f"{self._failures} engines failed at this call, and it was given up (route.deaths). {self._said}."
            return Refusal(502, said, "engines_failed")
        if self._said and front.draining:
            said = f"the router is about to end, and this call had no answer yet. {self._said}. Ask again."
            return Refusal(503, said, "draining", retry_s=1)
        if self._said:
            return Refusal(
                502, f"the engine was lost, and no other is left to ask. {self._said}. Ask again.", "engine_lost"
            )
        return front.none_left()


async def _events(answer: Answer, silence_s: float) -> AsyncIterator[bytes]:
    """Whole events, as many as have come; what is left at the stream's end, too."""
    held = b""
    async for part in answer.parts(silence_s):
        held += part
        end = max((found.end() for found in END.finditer(held)), default=0)
        if end:
            yield held[:end]
            held = held[end:]
    if held:
        yield held


def _headers(answer: Answer) -> dict[str, str]:
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in answer.headers
        if name not in HOPS and name != b"content-type"
    }


def _response(answer: Answer, body: bytes) -> Response:
    response = Response(body, answer.status)
    length = [pair for pair in response.raw_headers if pair[0] == b"content-length"]
    response.raw_headers = [pair for pair in answer.headers if pair[0] not in HOPS] + length
    return response
