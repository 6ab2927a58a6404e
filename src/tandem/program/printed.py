"""What child processes print, passed on to this process's stderr within bounds."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable
from typing import IO

MOST_BYTES = 16 << 10  # of a child in a minute; of what is more, the last are shown when the minute or the child ends
LAST_BYTES = 1 << 10
MINUTE_S = 60.0


class Printed:
    """Bytes of one child, counted.

    >>> seen = []
    >>> printed = Printed("task sums", lambda text: seen.append(len(text)))
    >>> printed.take(b"x" * MOST_BYTES, 0.0); printed.take(b"yes\\n", 61.0); seen
    [16384, 4]
    """

    def __init__(self, label: str, write: Callable[[bytes], None]) -> None:
        self.label = label
        self.write = write
        self.left, self.until_s = 0, -math.inf  # of this minute
        self.lost, self.last = 0, b""

    def take(self, text: bytes, now_s: float) -> None:
        """Something it printed."""
        if now_s >= self.until_s:
            self.tell()
            self.left, self.until_s = MOST_BYTES, now_s + MINUTE_S
        shown, rest = text[: self.left], text[self.left :]
        self.left -= len(shown)
        if shown:
            self.write(shown)
        if rest and not self.lost:
            more = "what it prints more is left out for a minute"
            self.write(f"\ntandem: {self.label} printed {MOST_BYTES >> 10} KiB; {more}\n".encode())
        self.lost += len(rest)
        self.last = (self.last + rest)[-LAST_BYTES:]

    def tell(self) -> None:
        """How much was left out, and its end: where a process died, why."""
        if self.lost:
            self.write(f"tandem: {self.label} printed {self.lost:,} bytes more; the last:\n".encode())
            self.write(self.last if self.last.endswith(b"\n") else self.last + b"\n")
        self.lost, self.last = 0, b""


def follow(stream: IO[bytes], label: str) -> threading.Thread:
    """A thread that passes on what comes out of `stream`, until its end."""

    def run() -> None:
        printed = Printed(label, _to_stderr)
        with stream:
            while text := os.read(stream.fileno(), 1 << 16):
                printed.take(text, time.monotonic())
        printed.tell()

    thread = threading.Thread(target=run, name=f"printed by {label}", daemon=True)
    thread.start()
    return thread


def _to_stderr(text: bytes) -> None:
    with contextlib.suppress(OSError):  # it is closed
        while text:
            text = text[os.write(2, text) :]
