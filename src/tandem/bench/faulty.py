"""The command `tandem` with engines that fail as they are told: a soak's (soak.py).

    python -m tandem.bench.faulty serve MODEL --engines 2

SIGUSR2 has the next step of an engine's process raise what no engine should, if there is one soon.
"""

from __future__ import annotations

import runpy
import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING

from tandem import env

if TYPE_CHECKING:
    from tandem.server.config import ServeConfig
    from tandem.types import Completion

FAULT = signal.SIGUSR2
SOON_S = 2.0


class Fault:
    """Of one process."""

    def __init__(self) -> None:
        self.asked_s = -float("inf")

    def ask(self, number: int, frame: FrameType | None) -> None:
        self.asked_s = time.monotonic()

    def install(self) -> None:
        """Engines of this process, and of those that it starts, fail when they are told."""
        from tandem.engine.engine import Engine
        from tandem.run import served

        step, alike = Engine.step, served.alike

        def fails(engine: Engine) -> list[Completion]:
            serves = threading.current_thread() is not threading.main_thread()  # which measures it as it starts
            if serves and time.monotonic() < self.asked_s + SOON_S:
                self.asked_s = -float("inf")
                raise RuntimeError("a soak has this step fail")
            return step(engine)

        def as_this(config: ServeConfig) -> list[str]:
            return ["tandem.bench.faulty" if word == "tandem" else word for word in alike(config)]

        Engine.step = fails  # type: ignore[method-assign, assignment]
        served.alike = as_this
        signal.signal(FAULT, self.ask)


if __name__ == "__main__":
    env.limit_spinning()  # before torch is there
    Fault().install()
    runpy.run_module("tandem", run_name="__main__")
