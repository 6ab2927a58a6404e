"""Calls of another engine's server over HTTP: each in a thread of its own, none beyond its deadline."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from tandem.errors import EngineError

CONNECT_S = 10.0  # for a server to take a connection
PAUSES_S = (0.5, 2.0, 5.0)  # before a call is made again that nobody answered
BUSY_S = 1.0  # before one is made again that was refused for want of room, where the server says no time
MOST_BYTES = 1 << 28  # of an answer
READ_BYTES = 1 << 20
SHOWN = 300  # characters of what a server said
BUSY, AWAY = 429, (0, 502, 503, 504)  # statuses of calls that may be made again; 0: no answer came


class CallError(EngineError):
    """A call that failed. status: of HTTP; 0 where no answer came."""

    def __init__(self, reason: str, status: int = 0) -> None:
        super().__init__(reason)
        self.status = status


class Call:
    """A call on its way. Its future ends with the answer, read as JSON, or a CallError."""

    def __init__(self, run: Callable[[Call], Any], name: str, within_s: float) -> None:
        self.name, self.within_s = name, within_s
        self.until_s = time.monotonic() + within_s
        self.future: Future[Any] = Future()
        self._run = run
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._connection: HTTPConnection | None = None
        threading.Thread(target=self._answer, name=f"call {name}", daemon=True).start()

    @property
    def left_s(self) -> float:
        """Until its deadline. CallError where that has passed, or the call was given up."""
        left_s = self.until_s - time.monotonic()
        if self._stop.is_set():
            raise CallError(f"{self.name}: the call was given up.")
        if left_s <= 0:
            raise self.late()
        return left_s

    def late(self) -> CallError:
        return CallError(f"{self.name}: no answer came within {self.within_s:g} s.")

    def pause(self, seconds: float) -> None:
        """Wait so long, or until it is given up."""
        self._stop.wait(min(seconds, self.left_s))

    def opened(self, connection: HTTPConnection) -> None:
        """What `cancel` closes from now on."""
        with self._lock:
            self._connection = connection

    def cancel(self) -> None:
        """Give it up: the connection is closed, by which servers know that nobody waits."""
        self._stop.set()
        with self._lock:
            held = self._connection.sock if self._connection is not None else None
        if held is not None:
            with suppress(OSError):
                held.shutdown(2)

    def result(self) -> Any:
        """Waits. CallError, at the latest by its deadline."""
        try:
            return self.future.result(max(0.0, self.until_s - time.monotonic()))
        except TimeoutError:
            self.cancel()
            raise self.late() from None

    def _answer(self) -> None:
        try:
            self.future.set_result(self._run(self))
        except CallError as error:
            self.future.set_exception(error)
        except Exception as error:  # noqa: BLE001 - recorded boundary: who waits is told
            self.future.set_exception(CallError(f"{self.name}: {type(error).__name__}: {error}"))


class Server:
    """Where calls go: `http://HOST:PORT`, with what is before its paths. key: a bearer's; "" for none."""

    def __init__(self, url: str, key: str = "") -> None:
        self.url = url.rstrip("/").removesuffix("/v1")  # as OpenAI's clients are given it
        self.place = urlsplit(self.url)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def begin(self, path: str, body: Mapping[str, Any] | bytes | None, within_s: float, again: bool = False) -> Call:
        """GET without a body, else POST of JSON, or of bytes. again: it may be made several times."""
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body, separators=(",", ":")).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        pauses_s = PAUSES_S if again else ()
        return Call(lambda call: self._tried(call, path, sent, kind, pauses_s), f"{self.url}{path}", within_s)

    def ask(self, path: str, body: Mapping[str, Any] | bytes | None = None, *, within_s: float) -> Any:
        """The answer to a call. CallError where there is none in time, or it is no success."""
        return self.begin(path, body, within_s).result()

    def _tried(self, call: Call, path: str, body: bytes | None, kind: str, pauses_s: tuple[float, ...]) -> Any:
        left = list(pauses_s)
        while True:
            try:
                return self._once(call, path, body, kind)
            except _Busy as busy:
                if not pauses_s:
                    raise CallError(str(busy), BUSY) from None
                call.pause(busy.again_s)
            except CallError as error:
                call.left_s  # noqa: B018 - raises where it is late, or given up
                if error.status not in AWAY or not left:
                    raise
                call.pause(left.pop(0))

    def _once(self, call: Call, path: str, body: bytes | None, kind: str) -> Any:
        opens = HTTPSConnection if self.place.scheme == "https" else HTTPConnection
        connection = opens(self.place.hostname or "", self.place.port, timeout=min(CONNECT_S, call.left_s))
        try:
            call.opened(connection)
            connection.connect()
            connection.sock.settimeout(call.left_s)
            headers = {**self._headers, "Content-Type": kind, "Connection": "close"}
            connection.request("GET" if body is None else "POST", self.place.path + path, body, headers)
            connection.sock.settimeout(call.left_s)
            response = connection.getresponse()
            text = _whole(response, connection, call)
        except TimeoutError:
            raise self._failed(path, "it takes no connection, or says nothing more") from None
        except (OSError, HTTPException) as error:
            raise self._failed(path, str(error) or type(error).__name__) from error
        finally:
            connection.close()
        if response.status == BUSY:
            raise _Busy(_after(response), f"{call.name} has no room: {_said(text)}")
        if not 200 <= response.status < 300:
            raise CallError(f"{call.name} answered {response.status}: {_said(text)}", response.status)
        try:
            return json.loads(text) if text.strip() else None
        except ValueError as error:
            raise CallError(f"{call.name} answered what is no JSON ({error}): {_said(text)}", response.status) from None

    def _failed(self, path: str, why: str) -> CallError:
        return CallError(f"{self.url}{path} cannot be asked: {why}. Look whether the server runs, and is reached here.")


class _Busy(Exception):
    def __init__(self, again_s: float, reason: str) -> None:
        super().__init__(reason)
        self.again_s = again_s


def _whole(response: HTTPResponse, connection: HTTPConnection, call: Call) -> bytes:
    """The body. CallError where it is too long, or cut."""
    parts, size = list[bytes](), 0
    while piece := response.read1(READ_BYTES):
        parts.append(piece)
        size += len(piece)
        if size > MOST_BYTES:
            raise CallError(f"{call.name} answered with more than {MOST_BYTES >> 20} MiB.", response.status)
        if connection.sock is not None:
            connection.sock.settimeout(call.left_s)
        call.left_s  # noqa: B018 - raises where it is late
    if response.length:
        raise CallError(f"{call.name}: the answer was cut, {response.length} bytes before its end.")
    return b"".join(parts)


def _after(response: HTTPResponse) -> float:
    given = response.headers.get("retry-after", "")
    return min(30.0, float(given)) if given.isdecimal() else BUSY_S


def _said(text: bytes) -> str:
    """The words of an error's body: OpenAI's shape, FastAPI's, or as it stands."""
    words = text.decode("utf-8", "replace")
    with suppress(ValueError):
        found = json.loads(words)
        for key in ("error", "message", "detail"):
            if isinstance(found, dict) and key in found:
                found = found[key]
        words = found if isinstance(found, str) else json.dumps(found)
    return " ".join(words.split())[:SHOWN] or "nothing more"
