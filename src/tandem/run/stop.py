"""Ctrl-C that loses nothing: the first signal asks, the second insists."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

EXIT_INTERRUPTED = 130  # the shell's code for a run ended by Ctrl-C


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class StopSignal:
    """Within the context, SIGINT or SIGTERM sets `requested`; a second one raises KeyboardInterrupt.

    The loop looks at `requested` between steps, saves and exits with `EXIT_INTERRUPTED`. `notify` is called once, in
    the signal handler, with a line for the user. The earlier signal handlers come back on leaving. Outside the main
    thread Python takes no handlers: `requested` then stays False.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, notify: Callable[[str], None] = _to_stderr) -> None:
        self.requested = False
        self._notify = notify
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._notify("Stopping: this step is finished and saved first. Press Ctrl-C again to stop at once.")
