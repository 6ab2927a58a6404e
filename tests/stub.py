"""A server of HTTP that says what a test has it say."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Said:
    """An answer. sent: as it goes out, in place of `body` as JSON. length: that it is said to have; None: its own."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    sent: bytes | None = None
    length: int | None = None
    pause: threading.Event | None = None  # set before it goes out
    trickles_s: float = 0.0  # between two bytes


Says = Callable[[str, Any], Any]  # (path, body) -> Said, or what is answered as JSON


@dataclass
class Stub:
    url: str
    asked: list[tuple[str, Any]] = field(default_factory=list)  # path, body
    heads: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def stub(says: Says) -> Iterator[Stub]:
    """Listens while it is entered."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *given: Any) -> None: ...

        def do_GET(self) -> None:
            self._say(None)

        def do_POST(self) -> None:
            read = self.rfile.read(int(self.headers["content-length"]))
            self._say(json.loads(read) if self.headers["content-type"] == "application/json" else read)

        def _say(self, body: Any) -> None:
            found.asked.append((self.path, body))
            found.heads.append(dict(self.headers))
            said = says(self.path, body)
            said = said if isinstance(said, Said) else Said(said)
            if said.pause is not None:
                said.pause.wait(60)
            sent = json.dumps(said.body).encode() if said.sent is None else said.sent
            try:
                self.send_response(said.status)
                for name, value in said.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(sent) if said.length is None else said.length))
                self.end_headers()
                if not said.trickles_s:
                    self.wfile.write(sent)
                for place in range(len(sent) if said.trickles_s else 0):
                    self.wfile.write(sent[place : place + 1])
                    if over.wait(said.trickles_s):
                        return
            except OSError:  # nobody waits any more
                return

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    found = Stub(f"http://127.0.0.1:{listening.server_port}")
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        listening.shutdown()
        listening.server_close()
        thread.join(10)
