"""Standard streams that end no run: what can be shown no more is dropped, and why is remembered."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any

STREAMS = ("stdin", "stdout", "stderr")
LOST: dict[str, str] = {}  # stream -> why nothing of it arrives any more


class Outlet(io.FileIO):
    """A descriptor that takes all that is written to it.

    At the first error (a pipe without a reader, a terminal that is gone, a full disk) it becomes /dev/null, for this
    process and for what it starts: nobody meets the error again, not the interpreter either as it ends.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(STREAMS.index(stream), "w", closefd=False)
        self._stream = stream

    def write(self, content: Any, /) -> int:
        try:
            count: int | None = None
            while (count := super().write(content)) is None:  # full, and somebody made it one that doesn't wait
                select.select((), (self,), ())
            return count
        except OSError as error:
            LOST[self._stream] = error.strerror or str(error)
            _to_null(self.fileno())
            return memoryview(content).nbytes


def outlive() -> None:
    """Put outlets under sys.stdout and sys.stderr where they are the process's own; closed ones lead to /dev/null.

    A descriptor left closed would be the next file's that is opened, and that file would get what others print.
    """
    for number, name in enumerate(STREAMS):
        try:
            os.fstat(number)
        except OSError:
            _to_null(number)
        stream = getattr(sys, name)
        if number == 0 or stream is not getattr(sys, f"__{name}__"):
            continue
        text = stream if isinstance(stream, io.TextIOWrapper) else io.TextIOWrapper(io.BytesIO(), "utf-8", "replace")
        at_once = text.line_buffering or text.write_through  # the latter with PYTHONUNBUFFERED
        outlet = io.BufferedWriter(Outlet(name))
        setattr(sys, name, io.TextIOWrapper(outlet, text.encoding, text.errors, line_buffering=at_once))


def _to_null(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)
    os.set_inheritable(number, True)
