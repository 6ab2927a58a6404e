"""A router in a thread of the test's process, and engines that fail as they are told to."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tandem.config import override
from tandem.server.config import RouteConfig
from tandem.server.front.app import build
from tandem.server.front.engines import Engine
from tandem.server.front.front import Front
from tandem.server.listen import Listener, bound
from tests.serving import DEADLINE_S, wait_for

QUICK = {
    "route.health_s": 0.05,
    "route.health_deadline_s": 1,
    "route.lost_s": 2,
    "route.start_s": 10,
    "route.connect_s": 1,
    "server.port": 0,
    "server.drain_s": 5,
}
CHUNK = {"id": "one", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}


class Stub:
    """An engine that answers calls with its name, or does with each what `acts` says: called with the connection's
    handler and the body, in a thread of its own. `asked` are the bodies that came, `left` those whose client went."""

    def __init__(self, name: str, model: str = "tiny") -> None:
        self.name, self.model = name, model
        self.acts: Callable[[Any, Any], None] = plain
        self.health: Callable[[Any], None] = lambda handler: handler.tell(200, {"status": "ok"})
        self.look: dict[str, Any] | None = None
        self.asked: list[Any] = []
        self.verbs: list[tuple[str, Any]] = []
        self.verb: Callable[[str, Any], tuple[int, Any]] = lambda path, body: (200, {})
        self.metrics = ""
        self.ended = threading.Event()
        self.begin()

    def begin(self, port: int = 0) -> None:
        stub = self

        class Handler(_Handler):
            engine = stub

        self.ended.clear()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def end(self) -> None:
        """Connections are refused from now on; those that are open are cut by who holds them (`ended`)."""
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(DEADLINE_S)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine: Stub

    def log_message(self, format: str, *words: Any) -> None: ...

    def tell(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def stream(self) -> None:
        """The head of a stream of events, in chunks."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

    def chunk(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))

    def cut(self) -> None:
        """The connection breaks."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def gone(self) -> bool:
        """Waits until the client is gone."""
        self.connection.settimeout(DEADLINE_S)
        try:
            return self.connection.recv(1) == b""
        except OSError:
            return True

    def do_GET(self) -> None:
        engine = self.engine
        if engine.ended.is_set():
            self.cut()
        elif self.path == "/health":
            engine.health(self)
        elif self.path == "/v1/models":
            self.tell(200, {"object": "list", "data": [{"id": engine.model, "object": "model"}]})
        elif self.path == "/load" and engine.look is not None:
            self.tell(200, engine.look)
        elif self.path == "/metrics":
            self.tell(200, engine.metrics.encode(), {"content-type": "text/plain"})
        elif self.path.startswith(("/is_", "/weight")):
            self.tell(*engine.verb(self.path, None))
        else:
            self.tell(404, {"error": {"message": "no such path", "type": "x", "param": None, "code": "not_found"}})

    def do_POST(self) -> None:
        engine = self.engine
        if engine.ended.is_set():
            self.cut()
            return
        content = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.path.startswith(("/v1/", "/generate", "/tokenize")):
            engine.asked.append(json.loads(content))
            engine.acts(self, engine.asked[-1])
        else:
            engine.verbs.append((self.path, content))
            self.tell(*engine.verb(self.path, content))


def chat(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    return {"id": "one", "object": "chat.completion", "created": 1, "model": "tiny", "choices": [choice]}


def delta(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return b"data: " + json.dumps({**CHUNK, "choices": [choice]}).encode() + b"\n\n"


def plain(handler: Any, body: Any) -> None:
    """An answer whose words are the engine's name, streamed where that is asked for."""
    if not body.get("stream"):
        handler.tell(200, chat(handler.engine.name))
        return
    handler.stream()
    handler.chunk(delta(handler.engine.name))
    handler.chunk(delta("."))
    handler.chunk(b"data: [DONE]\n\n")
    handler.chunk(b"")


class Routed:
    """A router that listens at `url`."""

    def __init__(self, urls: Sequence[str], **settings: Any) -> None:
        self.config = override(RouteConfig(), {**QUICK, **settings})
        self.engines = [Engine(f"engine-{number}", url, self.config.route) for number, url in enumerate(urls, start=1)]
        self.front = Front(self.engines, self.config.server, self.config.route)
        self.listening = bound("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.listener: Listener | None = None
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            asyncio.run(self._served())
        except Exception as error:  # noqa: BLE001 - the test's thread raises it
            self.failure = error

    async def _served(self) -> None:
        try:
            await self.front.start()
            self.listener = Listener(build(self.front), self.front)
            await self.listener.serve([self.listening])
        finally:
            await self.front.close()

    def start(self) -> Routed:
        self.thread.start()
        wait_for("the router's start", lambda: self.failure or (self.listener is not None and self.listener.started))
        if self.failure is not None:
            raise self.failure
        wait_for("all engines to be ready", lambda: all(one.ready for one in self.engines))
        return self

    def stop(self) -> None:
        if self.listener is not None:
            self.listener.should_exit = True
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive(), "the router did not end"


@contextmanager
def routed(*engines: Any, **settings: Any) -> Iterator[Routed]:
    """Before engines with a `url`."""
    router = Routed([one.url for one in engines], **settings).start()
    try:
        yield router
    finally:
        router.stop()


@contextmanager
def stubs(count: int) -> Iterator[list[Stub]]:
    made = [Stub(f"s{number}") for number in range(1, count + 1)]
    try:
        yield made
    finally:
        for one in made:
            if not one.ended.is_set():
                one.end()
