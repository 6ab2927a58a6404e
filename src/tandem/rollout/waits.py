"""The answers that programs wait for, of the engine and of environments: futures that end into one queue."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, Literal

from tandem.engine.driver import GRACE_S, Endpoint, OnTokens
from tandem.rollout.program import Program
from tandem.trace import Trace
from tandem.types import Request

Asked = Literal["engine", "environment", "reward"]


class Waits:
    """The answers that programs wait for, of the engine and of environments."""

    def __init__(self, driver: Endpoint, trace: Trace) -> None:
        self.driver = driver
        self.trace = trace
        self.requests: dict[str, Program] = {}  # in the engine, by request id
        self.asked: dict[Program, Asked] = {}
        self._seen = 0
        self._ended: queue.SimpleQueue[tuple[Program, str, Future[Any]]] = queue.SimpleQueue()

    def ask(self, program: Program, asked: Asked, future: Future[Any]) -> None:
        """Wait for an environment."""
        self.asked[program] = asked
        future.add_done_callback(lambda ended: self._answered(program, ended))

    def submit(self, program: Program, request: Request, on_tokens: OnTokens | None = None) -> None:
        """Wait for the engine."""
        future = self.driver.submit(request, on_tokens)
        self.requests[request.id] = program
        self.asked[program] = "engine"
        future.add_done_callback(lambda ended: self._ended.put((program, request.id, ended)))

    def _answered(self, program: Program, ended: Future[Any]) -> None:
        self._ended.put((program, "", ended))
        if self.requests:
            self.driver.wake()

    def ended(self, wait_s: float) -> Iterator[tuple[Program, Asked, Future[Any]]]:
        """Those that ended since the last call. A step of the engine, or a wait of at most wait_s where it is idle.

        What is not taken of it comes with the next call.
        """
        if self._ended.empty():
            if self.requests:
                self._seen = self.driver.progress(self._seen, wait_s)
            else:
                acts = "environment" in self.asked.values()
                with self.trace.span("environment" if acts else "reward"):
                    self._wait(wait_s)
        for _ in range(self._ended.qsize()):
            program, request_id, future = self._ended.get()
            self.requests.pop(request_id, None)
            if (asked := self.asked.pop(program, None)) is not None:
                yield program, asked, future

    def drop(self, program: Program) -> bool:
        """Wait for its environment no more, or have the engine answer soon; whether nothing comes any more."""
        if self.asked[program] != "engine":
            del self.asked[program]
            return True
        self.driver.abort(program.request_id)
        return False

    def _wait(self, wait_s: float) -> None:
        with contextlib.suppress(queue.Empty):
            self._ended.put(self._ended.get(timeout=min(wait_s, 1e6)))

    def withdraw(self) -> list[tuple[Program, Asked, Future[Any] | None]]:
        """Ends all that is left, with what the engine has; None where an answer does not come in GRACE_S."""
        for request_id in self.requests:
            self.driver.abort(request_id)
        found: dict[Program, Future[Any]] = {}
        until_s = time.monotonic() + GRACE_S
        while len(found) < len(self.asked) and (left_s := until_s - time.monotonic()) > 0:
            if self._ended.empty():
                if any(program not in found for program in self.requests.values()):
                    self._seen = self.driver.progress(self._seen, left_s)
                else:
                    self._wait(left_s)
            while not self._ended.empty():
                program, _, future = self._ended.get()
                if program in self.asked:  # not dropped
                    found[program] = future
        left, self.asked, self.requests = self.asked, {}, {}
        return [(program, asked, found.get(program)) for program, asked in left.items()]


def known(future: Future[Any] | None) -> Any:
    """What has come, if it has."""
    return None if future is None or future.exception(0) is not None else future.result(0)
