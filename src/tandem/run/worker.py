"""Inside a child process of run/workers.py: an object of its role, asked for its methods until the pipe closes."""

from __future__ import annotations

import contextlib
import pickle
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tandem import env
from tandem.errors import TandemError
from tandem.program.episode import one_line
from tandem.program.worker import GONE, leave_with
from tandem.run.workers import made


def main(fileno: int, parent: int) -> None:
    """Serve the pipe `fileno` until the parent closes it or ends."""
    threading.Thread(target=leave_with, args=(parent,), daemon=True).start()
    env.limit_spinning()
    with contextlib.suppress(*GONE):
        serve(Connection(fileno))


def serve(connection: Connection) -> None:
    """(role, what it is made of) first, then calls: (number, method, arguments), answered one at a time, in order."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # a pipe, and the end is by a signal
    role, given = connection.recv()
    works: list[Any] = []
    connection.send_bytes(written(0, *answer(lambda: works.append(made(role, given)))))
    if not works:
        return
    while True:
        number, method, arguments = connection.recv()
        told = answer(lambda: getattr(works[0], method)(*arguments))  # noqa: B023
        connection.send_bytes(written(number, *told))


def answer(function: Callable[[], Any], show: Callable[[], None] = traceback.print_exc) -> tuple[str, Any]:
    """("value", what it gives), ("raised", a TandemError), ("failed", any other in a line, in full by `show`)."""
    try:
        return ("value", function())
    except TandemError as error:
        return ("raised", error)
    except BaseException as error:  # noqa: BLE001 - recorded boundary: who asked is told; sys.exit is no Exception
        show()
        return ("failed", one_line(error))


def written(number: int, kind: str, value: Any) -> bytes:
    """A message."""
    try:
        return pickle.dumps((number, kind, value))
    except Exception as error:  # noqa: BLE001 - recorded boundary: a value that cannot be pickled
        return pickle.dumps((number, "failed", one_line(error)))
