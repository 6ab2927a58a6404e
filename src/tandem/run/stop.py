"""A signal that loses nothing: the first one asks, Ctrl-C after it insists."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

EXIT_SIGNAL = 128  # and the signal's number: the shell's code for what a signal ended, 130 for Ctrl-C


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class StopSignal:
    """Within the context, a signal that would end the process sets `received`; SIGINT after it is KeyboardInterrupt.

    The loop looks at `requested` between steps, saves and exits with `exit_code`. `notify` is called once, in the
    signal handler, with a line for the user. The earlier signal handlers come back on leaving. Outside the main thread
    Python takes no handlers: `requested` then stays False.

    A terminal that closes sends SIGHUP, often twice (from the system and from the shell), and batch systems send
    SIGTERM, SIGUSR1 or SIGXCPU ahead of SIGKILL: only SIGINT, which a person sends, insists. SIGQUIT stops at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

    def __init__(self, notify: Callable[[str], None] = _to_stderr) -> None:
        self.received: signal.Signals | None = None
        self.ahead = "this step is finished and saved first"  # what comes before the end, for the line
        self._notify = notify
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.received is not None

    @property
    def exit_code(self) -> int:
        return 0 if self.received is None else EXIT_SIGNAL + self.received

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue  # nohup
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = signal.Signals(number)
        again = "again " if number == signal.SIGINT else ""
        with contextlib.suppress(RuntimeError):  # it came in the middle of a print: a stream is not entered twice
            self._notify(f"Stopping ({self.received.name}): {self.ahead}. Press Ctrl-C {again}to stop at once.")
