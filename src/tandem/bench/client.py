"""A client of an OpenAI server in a process of its own: streams of /v1/completions, each on a connection of its own.

    python -m tandem.bench.client < PLAN.json > RESULT.json

A stream's tokens are those that its usage says; its times are those at which events with a choice came. What came of
every call is told: answered, refused (a status that is no 200) or lost, which is all else.
"""

from __future__ import annotations

import asyncio
import sys
import time
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import msgspec


class Ask(msgspec.Struct, frozen=True):
    """One call: token ids in, so many out. due_s: when, from the start; None: as soon as there is a stream for it."""

    prompt: list[int]
    new: int
    due_s: float | None = None
    seed: int | None = None


class Plan(msgspec.Struct, frozen=True):
    """Calls, in order. streams: calls on their way at most; 0: any number. ids: whether answers come as token ids."""

    url: str
    model: str
    asks: list[Ask]
    streams: int = 0
    ids: bool = False
    deadline_s: float = 600.0


class Answered(msgspec.Struct):
    """What became of a call. Times in seconds from the start of the plan."""

    due_s: float
    sent_s: float
    came_s: list[float] = []  # of events with a choice
    end_s: float = 0.0
    tokens: int = 0
    outcome: str = "lost"  # answered, refused, lost
    said: str = ""  # why, where it was not answered
    ids: list[int] = []


class Result(msgspec.Struct):
    """Of a plan, in its order, with the seconds of processor time that the client took."""

    answers: list[Answered]
    cpu_s: float


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class _Stream(asyncio.Protocol):
    """One call. `over` is set when its connection has ended."""

    def __init__(self, request: bytes, answered: Answered, began_s: float) -> None:
        from httptools import HttpResponseParser

        self._request, self.answered, self._began_s = request, answered, began_s
        self._parser = HttpResponseParser(self)
        self._rest = b""
        self._now_s = 0.0  # of what came last
        self._finished = self._done = False
        self._transport: asyncio.Transport | None = None
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.answered.sent_s = time.perf_counter() - self._began_s
        transport.write(self._request)

    def data_received(self, received: bytes) -> None:
        self._now_s = time.perf_counter() - self._began_s
        try:
            self._parser.feed_data(received)
        except Exception as error:  # noqa: BLE001 - recorded boundary: what is no HTTP or no event is a lost answer
            self._fail(f"{type(error).__name__}: {error}")

    def on_body(self, body: bytes) -> None:
        if self._parser.get_status_code() != 200:
            self._rest += body
            return
        *events, self._rest = (self._rest + body).split(b"\n\n")
        chosen = False
        for event in events:
            if not event.startswith(b"data: "):
                continue
            if event == b"data: [DONE]":
                self._done = True
                continue
            found = _decode(event[6:])
            if found.error is not None:
                self._fail(str(found.error))
            if found.usage is not None:
                self.answered.tokens = found.usage.completion_tokens
            for choice in found.choices:
                chosen = True
                self._finished |= choice.finish_reason is not None
                self.answered.ids += choice.token_ids or ()
        if chosen:
            self.answered.came_s.append(self._now_s)

    def on_message_complete(self) -> None:
        self._complete()
        if self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None:  # where the end of the connection is that of the answer
            self._complete()
        if self.answered.outcome == "lost" and not self.answered.said:
            self.answered.said = f"the connection ended before the answer had: {exc or 'closed'}"
        if not self.over.done():
            self.over.set_result(None)

    def _complete(self) -> None:
        answered, status = self.answered, self._parser.get_status_code()
        if answered.outcome != "lost" or answered.said:
            return
        answered.end_s = self._now_s
        if status not in (0, 200):
            answered.outcome, answered.said = "refused", self._rest[:300].decode("utf-8", "replace")
        elif self._done and self._finished:
            answered.outcome = "answered"

    def _fail(self, said: str) -> None:
        self.answered.said = self.answered.said or said
        if self._transport is not None:
            self._transport.abort()

    def give_up(self, said: str) -> None:
        """Cuts the connection."""
        self._fail(said)


def request_of(plan: Plan, ask: Ask) -> bytes:
    """The bytes of a call."""
    body: dict[str, Any] = {
        "model": plan.model,
        "prompt": ask.prompt,
        "max_tokens": ask.new,
        "temperature": 1.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if ask.seed is not None:
        body["seed"] = ask.seed
    if plan.ids:
        body["return_token_ids"] = True
    sent = msgspec.json.encode(body)
    host = urlsplit(plan.url).netloc
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(sent)}\r\nconnection: close\r\n\r\n".encode() + sent


async def _call(plan: Plan, ask: Ask, answered: Answered, began_s: float) -> None:
    loop, where = asyncio.get_running_loop(), urlsplit(plan.url)
    assert where.hostname is not None and where.port is not None, plan.url
    left_s = began_s + plan.deadline_s - time.perf_counter()
    try:
        async with asyncio.timeout(left_s):
            _, stream = await loop.create_connection(
                partial(_Stream, request_of(plan, ask), answered, began_s), where.hostname, where.port
            )
            try:
                await asyncio.shield(stream.over)
            except asyncio.CancelledError:
                stream.give_up(f"not answered within the plan's {plan.deadline_s:g} s")
                raise
    except TimeoutError:
        answered.said = answered.said or f"not answered within the plan's {plan.deadline_s:g} s"
    except OSError as error:
        answered.said = f"no connection: {error}"
    if answered.outcome == "answered" and answered.tokens != ask.new:
        answered.outcome, answered.said = "lost", f"{answered.tokens} tokens came of {ask.new}"


async def run(plan: Plan) -> Result:
    """Asks, and gives what came. Every call has an outcome."""
    began_s, cpu_s = time.perf_counter(), time.process_time()
    answers: list[Answered] = []
    free = asyncio.Semaphore(plan.streams or len(plan.asks) or 1)
    tasks: list[asyncio.Task[None]] = []

    async def one(ask: Ask, answered: Answered) -> None:
        try:
            await _call(plan, ask, answered, began_s)
        finally:
            free.release()

    for ask in plan.asks:
        if ask.due_s is not None:
            await asyncio.sleep(max(0.0, began_s + ask.due_s - time.perf_counter()))
        await free.acquire()
        now_s = time.perf_counter() - began_s
        answers.append(Answered(now_s if ask.due_s is None else ask.due_s, now_s))
        tasks.append(asyncio.ensure_future(one(ask, answers[-1])))
    await asyncio.gather(*tasks)
    return Result(answers, time.process_time() - cpu_s)


def ask_all(plan: Plan) -> Result:
    """A plan to its end, in this process."""
    import uvloop

    return uvloop.run(run(plan))


def main() -> None:
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    sys.stdout.buffer.write(msgspec.json.encode(ask_all(plan)))


if __name__ == "__main__":
    main()
