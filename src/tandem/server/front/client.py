"""What the router asks engines with: HTTP/1.1 over kept connections, each wait with a deadline.

httptools, which reads what comes in at the server, reads here what comes back. An answer is bytes as the engine sent
them, and its end is known: one that breaks off is `Lost`, and never a short answer.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Any
from urllib.parse import urlsplit

import httptools

from tandem.errors import ConfigError

HIGH_BYTES = 1 << 18  # of an answer that nobody has taken yet, beyond which no more of it is read
RACE_S = 1.0  # in which the end of a kept connection may have crossed the call that was sent on it
IDLE_S = 4.0  # that a connection is kept: uvicorn closes after 5

Headers = list[tuple[bytes, bytes]]


class Lost(Exception):
    """An engine gave no answer, or none to its end."""


class Answer:
    """What an engine answers to one call. Used on the event loop alone."""

    def __init__(self, wire: _Wire) -> None:
        self.status = 0
        self.headers: Headers = []
        self.done = False  # to its end
        self.heard = False  # a byte of it came
        self._wire = wire
        self._parser = httptools.HttpResponseParser(self)
        self._parts = deque[bytes]()
        self._held = 0
        self._lost = ""
        self._wake = asyncio.Event()

    def header(self, name: bytes) -> bytes:
        """By its name in lower case; empty where there is none."""
        return next((value for key, value in self.headers if key == name), b"")

    # The parser's.

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._wake.set()

    def on_body(self, part: bytes) -> None:
        self._parts.append(part)
        self._held += len(part)
        if self._held > HIGH_BYTES:
            self._wire.pause(True)
        self._wake.set()

    def on_message_complete(self) -> None:
        self.done = True
        self._wire.release(self._parser.should_keep_alive())
        self._wake.set()

    # The connection's.

    def feed(self, received: bytes) -> None:
        self.heard = True
        try:
            self._parser.feed_data(received)
        except httptools.HttpParserError as error:
            self.lose(f"it answers in no HTTP: {error}")

    def ended(self, reason: str) -> None:
        """The connection has."""
        sized = any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers)
        if self.status and not sized:  # its length is the connection's
            self.done = True
        if not self.done:
            self._lost = self._lost or reason
        self._wake.set()

    # Who asked.

    def lose(self, reason: str) -> None:
        """It is waited for no longer: the engine sees its client go."""
        if not self.done:
            self._lost = self._lost or reason
            self._wire.abort()
            self._wake.set()

    def close(self) -> None:
        self.lose("it was withdrawn")

    async def head(self, limit_s: float) -> None:
        """Until its status and headers are there. Lost."""
        until_s = time.monotonic() + limit_s
        while not self.status:
            await self._wait(until_s - time.monotonic(), limit_s)

    async def parts(self, silence_s: float) -> AsyncIterator[bytes]:
        """Its body as it comes. Lost: it broke off, or nothing came for so long."""
        while True:
            while self._parts:
                part = b"".join(self._parts)
                self._parts.clear()
                self._held = 0
                self._wire.pause(False)
                yield part
            if self.done:
                return
            await self._wait(silence_s, silence_s)

    async def whole(self, limit_s: float) -> bytes:
        """All of its body. Lost."""
        until_s, parts = time.monotonic() + limit_s, list[bytes]()
        while not self.done or self._parts:
            parts += self._parts
            self._parts.clear()
            self._held = 0
            self._wire.pause(False)
            if not self.done:
                await self._wait(until_s - time.monotonic(), limit_s)
        return b"".join(parts)

    async def _wait(self, left_s: float, limit_s: float) -> None:
        if self._lost:
            raise Lost(self._lost)
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                await self._wake.wait()
        except TimeoutError as error:
            self.lose(f"nothing came for {limit_s:g} s")
            raise Lost(self._lost) from error
        self._wake.clear()
        if self._lost and not self._parts:
            raise Lost(self._lost)


class _Wire(asyncio.Protocol):
    """A connection, with one call on its way or none."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.answer: Answer | None = None
        self.transport: Any = None
        self.closed = self.paused = False
        self.cut = False  # from here
        self.free_s = 0.0  # since when

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, received: bytes) -> None:
        if self.answer is None:
            self.abort()  # nobody asked
        else:
            self.answer.feed(received)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self.client.wires.discard(self)
        if self.answer is not None:
            self.answer.ended(f"the connection broke: {error}" if error else "the connection was closed")

    def send(self, head: bytes, body: bytes) -> Answer:
        self.answer = Answer(self)
        self.transport.write(head)
        if body:
            self.transport.write(body)
        return self.answer

    def pause(self, paused: bool) -> None:
        if paused is not self.paused and not self.closed and self.answer is not None:
            self.paused = paused
            (self.transport.pause_reading if paused else self.transport.resume_reading)()

    def release(self, kept: bool) -> None:
        """Its answer is whole."""
        self.pause(False)
        self.answer = None
        if kept and not self.closed:
            self.free_s = time.monotonic()
            self.client.free.append(self)
        else:
            self.abort()

    def abort(self) -> None:
        self.cut = True
        if self.transport is not None:
            self.transport.abort()


class Client:
    """Of one engine. ConfigError for what is no address of one."""

    def __init__(self, url: str, connect_s: float) -> None:
        self.url, self.connect_s = url.rstrip("/"), connect_s
        try:
            parts = urlsplit(self.url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{url} is no address of a server: {error}.") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ConfigError(f"{url} is no address of a server. Write http://HOST:PORT.")
        self._host, self._tls = parts.hostname, parts.scheme == "https"
        self._port = port or (443 if self._tls else 80)
        path = parts.path.removesuffix("/v1")
        self.name, self._path = f"{self._host}:{self._port}{path}", path.encode()
        self._named = parts.netloc.encode()
        self.free = deque[_Wire]()
        self.wires = set[_Wire]()

    async def ask(
        self, method: str, target: bytes, headers: Iterable[tuple[bytes, bytes]], body: bytes, limit_s: float
    ) -> Answer:
        """The answer, once its status and headers are there. Lost where there is none within `limit_s`."""
        head = [b"%s %s%s HTTP/1.1\r\nhost: %s\r\n" % (method.encode(), self._path, target, self._named)]
        head += [b"%s: %s\r\n" % header for header in headers]
        if body or method != "GET":
            head.append(b"content-length: %d\r\n" % len(body))
        head.append(b"\r\n")
        while True:
            wire, kept = self._kept(), True
            if wire is None:
                wire, kept = await self._connected(), False
            answer, sent_s = wire.send(b"".join(head), body), time.monotonic()
            try:
                await answer.head(limit_s)
                return answer
            except Lost:
                crossed = kept and wire.closed and not (wire.cut or answer.heard)
                answer.close()
                if not crossed or time.monotonic() - sent_s > RACE_S:
                    raise  # a kept connection may have been closed as the call was sent: it is sent again
            except BaseException:
                answer.close()
                raise

    async def told(
        self,
        method: str,
        path: str,
        key: str = "",
        body: bytes = b"",
        limit_s: float = 5.0,
        kind: str = "application/json",
    ) -> tuple[int, bytes]:
        """Status and body of a call of the router's own. Lost."""
        headers = [(b"content-type", kind.encode())] if body else []
        if key:
            headers.append((b"authorization", f"Bearer {key}".encode()))
        answer = await self.ask(method, path.encode(), headers, body, limit_s)
        try:
            return answer.status, await answer.whole(limit_s)
        finally:
            answer.close()

    def close(self) -> None:
        for wire in list(self.wires):
            wire.abort()

    def _kept(self) -> _Wire | None:
        while self.free:
            wire = self.free.pop()
            if not wire.closed and time.monotonic() - wire.free_s < IDLE_S:
                return wire
            wire.abort()
        return None

    async def _connected(self) -> _Wire:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.connect_s):
                context = ssl.create_default_context() if self._tls else None
                _, wire = await loop.create_connection(lambda: _Wire(self), self._host, self._port, ssl=context)
        except TimeoutError as error:
            raise Lost(f"no connection to it within {self.connect_s:g} s") from error
        except OSError as error:
            said = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
            raise Lost(f"no connection to it: {said}") from error
        self.wires.add(wire)
        return wire
