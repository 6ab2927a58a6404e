"""What a rollout shows while it goes: a table redrawn in place on a terminal, a line now and then in a log."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tandem.report.live import sparkline
from tandem.report.units import count, decimal, duration

if TYPE_CHECKING:
    from tandem.rollout.watch import Progress

_LINE_S = 5.0  # between two lines of a log
_BINS = 20  # of the rewards' histogram
_REASONS = 5  # shown, the most frequent


class ProgramsTable:
    """Shows a Progress as it changes; a context manager. `quiet` shows nothing but notes on stderr."""

    def __init__(self, progress: Progress, title: str, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.progress = progress
        self.title = title
        self._stream = sys.stdout if stream is None else stream
        self._quiet = quiet
        self._started_s = time.monotonic()
        self._console = Console(file=self._stream)
        self._live: Live | None = None
        self._over = threading.Event()
        self._lines: threading.Thread | None = None
        if not quiet and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(get_renderable=self.render, console=self._console, refresh_per_second=4)

    def __enter__(self) -> ProgramsTable:
        self._started_s = time.monotonic()
        if self._live:
            self._live.start()
        else:
            print(self.title, file=sys.stderr if self._quiet else self._stream, flush=True)
        if not (self._live or self._quiet):
            self._lines = threading.Thread(target=self._write_lines, name="lines of a rollout", daemon=True)
            self._lines.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live:
            self._live.stop()
        if self._lines:
            self._over.set()
            self._lines.join()
            if self.progress.begun:  # else the task was wrong, and says why
                self._line()

    def _write_lines(self) -> None:
        while not self._over.wait(_LINE_S):
            if self.progress.begun:  # until then a model is loaded
                self._line()

    def _line(self) -> None:
        print("  ".join(f"{name} {text}" for name, text in self.facts()), file=self._stream, flush=True)

    def facts(self) -> list[tuple[str, str]]:
        """What is known now, by name."""
        seen, seconds = self.progress, max(time.monotonic() - self._started_s, 1e-9)
        tokens = seen.sampled()
        acting = f" ({count(seen.asked)} with their environment)" if seen.asked and seen.running else ""
        facts = [
            ("programs", f"{count(seen.ended)} of {count(seen.programs)} ended, {count(seen.running)} running{acting}"),
            ("turns", f"{count(seen.turns)} ({decimal(seen.turns / max(seen.begun, 1), 1)} a program)"),
            ("tokens", f"{count(tokens)} ({count(tokens / seconds)} tok/s)"),
            ("reward", decimal(statistics.fmean(seen.rewards)) if seen.rewards else "none yet"),
        ]
        if seen.failures:
            reasons = [f"{number} x {reason}" for reason, number in seen.failures.copy().most_common(_REASONS)]
            facts.append(("failed", f"{count(seen.failures.total())}: {'; '.join(reasons)}"))
        return facts

    def render(self) -> Group:
        """The table."""
        seen = self.progress
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        for name, text in self.facts():
            table.add_row(Text(name, "dim"), Text(text, "red" if name == "failed" else "", overflow="fold"))
        if rewards := sorted(seen.rewards):
            low, high = rewards[0], rewards[-1]
            bins = [0] * _BINS
            for reward in rewards:
                bins[min(_BINS - 1, int(_BINS * (reward - low) / (high - low))) if high > low else 0] += 1
            spread = Text.assemble(f"{low:g} ", (sparkline(bins, _BINS, low=0), "blue"), f" {high:g}")
            table.add_row(Text("spread", "dim"), spread)
        table.add_row(Text("time", "dim"), duration(time.monotonic() - self._started_s))
        return Group(Text(self.title, style="bold", no_wrap=True, overflow="ellipsis"), table)
