"""A worker that does what it is told, also what none should."""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from tandem.errors import CapacityError

ODD = "tests.odd_workers:Odd"


class Strange(Exception):
    """One that cannot be made from a pickle."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


class Odd:
    def __init__(self, given: str) -> None:
        if given:
            getattr(self, given)()

    def echo(self, *values: Any) -> Any:
        return values[0] if len(values) == 1 else values

    def pid(self) -> int:
        return os.getpid()

    def exits(self) -> None:
        os._exit(3)

    def leaves(self) -> None:
        sys.exit("enough")

    def dies(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def stops(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def sleeps(self) -> None:
        time.sleep(600)

    def refuses(self) -> None:
        raise CapacityError("7 pages are too few; allowed: 8 or more.")

    def breaks(self) -> None:
        raise ValueError("seven\nlines")

    def is_strange(self) -> None:
        raise Strange(1, 2)

    def floods(self) -> bytes:
        return b"x" * (1 << 20)

    def floods_ray(self) -> bytes:
        """More than a limit that only this process has."""
        from tandem.run import ray as on_ray

        on_ray.MOST_BYTES = 1 << 16
        return self.floods()

    def keeps(self) -> Any:
        return lambda: None

    def shouts(self) -> None:
        print("x" * 100_000)

    def chatters(self) -> None:
        """Says something before its answer."""
        _pipe().send_bytes(b"hello")

    def counts_wrong(self) -> None:
        _pipe().send((0, "value", 1))

    def half(self) -> None:
        """Stops in the middle of a message."""
        pipe = _pipe()
        os.write(pipe.fileno(), (1 << 15).to_bytes(4, "big") + b"x")
        self.stops()


def _pipe() -> Connection:
    """This process's end of it."""
    import __main__

    return Connection(os.dup(__main__.theirs))  # type: ignore[attr-defined]
