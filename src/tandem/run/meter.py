"""A running count on disk, so that what a kill cuts off has its number: meter.json, written twice a second.

It survives the death of the process, not of the machine. A write is one of a fixed length over the last.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

NAME = "meter.json"
EVERY_S = 0.5
_LENGTH = 64  # bytes, the newline among them


class Reading(NamedTuple):
    """Of all sittings, with what resumes set aside."""

    sampled: int  # tokens, by all engines
    wall_s: float


class Meter:
    """Writes `read()` into a run's folder until it is closed."""

    def __init__(self, folder: Path, read: Callable[[], Reading]) -> None:
        self.path = folder / NAME
        self.read = read
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meter", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        # Never cut: until the first write, what the last sitting came to is what counts.
        with suppress(OSError), open(os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666), "wb", buffering=0) as file:
            while not self._closed.wait(EVERY_S):  # a full disk is for others to tell
                os.pwrite(file.fileno(), _line(self.read()), 0)
            os.pwrite(file.fileno(), _line(self.read()), 0)


def last_reading(folder: Path) -> Reading | None:
    """What the last sitting came to; None where it wrote nothing that can be read."""
    try:
        saved = json.loads((folder / NAME).read_bytes())
        return Reading(int(saved["sampled"]), float(saved["wall_s"]))
    except (OSError, ValueError, TypeError, LookupError):
        return None


def _line(reading: Reading) -> bytes:
    return json.dumps(reading._asdict()).ljust(_LENGTH - 1).encode() + b"\n"
