"""The server's sockets: uvicorn with httptools, patience with slow heads, and an end that lets calls finish."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from asyncio.events import TimerHandle
from types import FrameType
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tandem.errors import ConfigError
from tandem.server.config import ServerConfig
from tandem.server.refusal import Refusal
from tandem.server.wire import encode

HEAD_BYTES = 1 << 18  # of a request's head, and what of a body came with it
BACKLOG = 4096  # connections that the system takes while the loop is busy


def patient(head_s: float, send_s: float) -> type[HttpToolsProtocol]:
    """A protocol with an end to its patience: the head of a request has `head_s` and HEAD_BYTES, and who takes nothing
    of what is left to send as the connection closes, `send_s`. The scope's `abort` cuts the connection."""

    class Patient(HttpToolsProtocol):
        _due: TimerHandle | None = None
        _head = 0  # bytes that came while a head was not whole

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._due = self.loop.call_later(head_s, self._late)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if self._due is None:
                self._due = self.loop.call_later(head_s, self._late)

        def data_received(self, received: bytes) -> None:
            if self._due is not None and self._head > HEAD_BYTES:
                self.transport.abort()
                return
            self._head += len(received)
            super().data_received(received)

        def on_headers_complete(self) -> None:
            self._in_time()
            super().on_headers_complete()
            self.scope["abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]

        def send_400_response(self, msg: str) -> None:
            """What came is no HTTP."""
            content = encode(Refusal(400, f"no request can be read in what came: {msg}", "invalid_http").body())
            head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
            self.transport.write(f"{head}\r\nconnection: close\r\n\r\n".encode() + content)
            self.transport.close()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self.loop.call_later(send_s, self.transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            self._in_time()
            super().connection_lost(exc)

        def _in_time(self) -> None:
            if self._due is not None:
                self._due.cancel()
                self._due, self._head = None, 0

        def _late(self) -> None:
            self._due = None
            if not self.transport.is_closing():
                self.transport.close()

    return Patient


class Served(Protocol):
    """What is behind the application."""

    config: ServerConfig
    model: str  # that callers name

    @property
    def num_open(self) -> int:
        """Calls on their way."""

    async def drain(self) -> None:
        """Takes no more calls; those that are on their way have ended after it."""


class Listener(uvicorn.Server):
    """Ends at the first SIGTERM or SIGINT when its calls have; at the second without them."""

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self.served = served
        config = served.config
        super().__init__(
            uvicorn.Config(
                app,
                http=patient(config.head_s, config.send_s),
                ws="none",
                lifespan="on",
                log_level="error",
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_graceful_shutdown=5,
            )
        )
        self._ending: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            address, port = sockets[0].getsockname()[:2]
            print(f"tandem: {self.served.model} on http://{address}:{port}/v1", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._ending is not None:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # a trace of what is cut off says nothing
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self.end)

    def end(self) -> None:
        """On the loop: takes no more calls, and ends when those that are on their way have."""
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._drained())

    async def _drained(self) -> None:
        open_ = self.served.num_open
        if open_:
            print(f"tandem: ends when {open_} answers have, in {self.served.config.drain_s:g} s", file=sys.stderr)
        await self.served.drain()
        self.should_exit = True


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens. ConfigError where the address can't be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"server.host {host}, server.port {port}: {error.strerror or error}. Take another port, or end what has it."
        ) from error
    listening.set_inheritable(False)
    return listening
