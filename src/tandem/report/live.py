"""What a run shows while it goes: a live table on a terminal, a line a step in a log, JSON on request."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TextIO

from rich.bar import Bar
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tandem.report.advice import Advisor
from tandem.report.metrics import (
    Row,
    evaluations,
    loss_unit,
    measure,
    seconds_by_phase,
    series,
    step_s,
    time_left_s,
    training,
)
from tandem.report.units import BLANK, count, decimal, duration, gigabytes, percent

SPARKS = "▁▂▃▄▅▆▇█"
PHASE_COLOURS = ("blue", "dark_orange", "green", "magenta", "cyan")
_ROWS_SHOWN = 10
_LINES_AROUND = 12  # title, table frame, curves, time, progress, notes
_ADVISORIES_SHOWN = 3


def sparkline(values: Sequence[float], width: int, low: float | None = None, high: float | None = None) -> str:
    """One character a value; more values than `width` are averaged in equal bins. The scale is [low, high].

    >>> sparkline([0.0, 0.5, 1.0], 8)
    '▁▅█'
    """
    if not values:
        return ""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    low = min(values) if low is None else low
    high = max(values) if high is None else high
    span = high - low
    top = len(SPARKS) - 1
    # Half up, not to even: 0.5 of the scale must not depend on the parity of its level.
    levels = [int(top * (value - low) / span + 0.5) if span > 0 else 0 for value in values]
    return "".join(SPARKS[min(top, max(0, level))] for level in levels)


def step_line(row: Row, total_steps: int, left_s: float | None) -> str:
    """A step in one plain line, for logs."""
    width = len(str(total_steps))
    parts = [f"step {row['step']:>{width}}/{total_steps}"]
    if "reward" in row:
        parts.append(f"reward {decimal(row.get('reward'))}")
        parts.append(f"length {decimal(row.get('length'), 1)} (max {count(row.get('length_max'))})")
        parts.append(f"entropy {decimal(row.get('entropy'))}")
        parts.append(f"KL {divergence(row.get('kl'))}")
        if "explained_variance" in row:
            parts.append(f"critic {percent(row['explained_variance'])}")
        parts.append(f"{count(row.get('tokens_per_s'))} tok/s")
    elif "loss" in row:
        parts += [f"loss {decimal(row['loss'])}" + (f" ({row['loss_unit']})" if "loss_unit" in row else "")]
        parts += [f"length {decimal(row.get('length'), 1)}"]
        parts += [f"margin {decimal(row['reward_margin'], 2)}"] if "reward_margin" in row else []
        parts += [f"{count(row['tokens_per_s'])} tok/s"] if row.get("tokens_per_s") else []
    if "divergence" in row:
        parts.append(f"divergence {decimal(row['divergence'])}")
    if row.get("preemptions"):
        parts.append(f"preempted {count(row['preemptions'])} ({count(row.get('recomputed_tokens'))} tokens again)")
    if row.get("failed"):
        parts.append(failed(row))
    if alarms := row.get("alarms"):
        parts.append("alarms: " + ", ".join(alarm.split(maxsplit=1)[0] for alarm in alarms))
    if evaluation := row.get("evaluation"):
        parts.append("held-out " + ", ".join(filter(None, (held_out(evaluation), failed(evaluation)))))
    if heldout := row.get("heldout"):
        parts.append(f"held-out loss {decimal(heldout['loss'])}")
    if seconds := step_s(row):
        shares = [f"{phase} {percent(value / seconds)}" for phase, value in seconds_by_phase([row]).items()]
        parts.append(f"{duration(seconds)} ({', '.join(s for s in shares if not s.endswith(' 0 %'))})")
    if left_s is not None:
        parts.append(f"about {duration(left_s)} left")
    return "  ".join(parts)


def divergence(kl: float | None) -> str:
    """0 only where it is exactly 0.

    >>> divergence(0.0), divergence(2.5e-7)
    ('0', '2.5e-07')
    """
    return BLANK if kl is None else f"{kl:.2g}"


def held_out(evaluation: Row) -> str:
    """Accuracy, interval and mean reward: where rewards are between 0 and 1, the accuracy says little.

    >>> held_out({"accuracy": 0.62, "low": 0.55, "high": 0.685, "prompts": 200, "reward": 0.71})
    '62.0 % [55.0, 68.5] of 200, reward 0.710'
    """
    if evaluation.get("prompts") == 0:
        return "none could be graded"
    text = percent(evaluation["accuracy"], 1)
    if evaluation.get("low") is not None:
        text += f" [{100 * evaluation['low']:.1f}, {100 * evaluation['high']:.1f}]"
    text += f" of {evaluation['prompts']}" if evaluation.get("prompts") else ""
    return text + (f", reward {decimal(evaluation['reward'])}" if evaluation.get("reward") is not None else "")


def failed(row: Row) -> str:
    """How many trajectories of a step or an evaluation failed, and why most of them did; empty where none did.

    >>> failed({"failed": 3, "failures": ["2 x reward: ValueError: no", "1 x deadline: late"]})
    'failed 3 (2 x reward: ValueError: no, ...)'
    """
    if not row.get("failed"):
        return ""
    reasons = row.get("failures") or ()
    why = f" ({reasons[0]}{', ...' if len(reasons) > 1 else ''})" if reasons else ""
    return f"failed {count(row['failed'])}{why}"


def _scored(row: Row) -> str:
    """Of what is held out accuracy and mean reward, and the loss, for a column."""
    evaluation, heldout, parts = row.get("evaluation"), row.get("heldout"), list[str]()
    if evaluation and evaluation.get("prompts") == 0:
        parts.append(BLANK)
    elif evaluation:
        parts.append(f"{percent(evaluation['accuracy'], 1)}, {decimal(evaluation.get('reward'), 2)}")
    return ", ".join([*parts, f"loss {decimal(heldout['loss'])}"] if heldout else parts)


class LiveTable:
    """Shows a run's rows as they come; a context manager.

    On a terminal: a table redrawn in place. Elsewhere: a line a step. as_json: a JSON row a step, notes on stderr.
    `rows` are those of earlier sittings of a resumed run: they count in the curves and are not shown again.
    """

    def __init__(
        self,
        total_steps: int,
        stream: TextIO | None = None,
        title: str = "tandem",
        as_json: bool = False,
        rows: Sequence[Row] = (),
    ) -> None:
        self._total = total_steps
        self._stream = sys.stdout if stream is None else stream
        self._title = title
        self._as_json = as_json
        self._rows: list[Row] = list(rows)
        self._advisor = Advisor()
        for row in rows:
            self._advisor.take(row)
        self._note = ""
        self._started_s = time.monotonic()
        self._console = Console(file=self._stream)
        encoding = (getattr(self._stream, "encoding", None) or "utf-8").lower()
        drawable = encoding.startswith("utf") and not self._console.is_dumb_terminal
        self._live: Live | None = None
        if not as_json and self._console.is_terminal and drawable:
            # Four redraws a second keep the clock going; the cursor moves home and overwrites, nothing is cleared.
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)

    def __enter__(self) -> LiveTable:
        self._started_s = time.monotonic()
        if self._live:
            self._live.start()
        else:
            self.note(self._title)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def update(self, row: Row) -> None:
        """Show a step's row (see metrics.jsonl)."""
        self._rows.append(row)
        lost = {"step": row, "evaluation": row.get("evaluation") or {}}
        self._note = "; ".join(f"{name} {row['step']}: {failed(of)}" for name, of in lost.items() if failed(of))
        if self._live:
            self._live.refresh()
        elif self._as_json:
            self._print(json.dumps(row, default=str))
        else:
            left = time_left_s(self._rows, self._total)
            self._print(step_line(row, self._total, left))
        for advisory in self._advisor.take(row):
            self.note(f"advisory {advisory.advice()}")

    def note(self, text: str) -> None:
        """Show a line about what goes on. On a terminal it stays until the next row, and for good where it came before
        the table; safe in a signal handler."""
        self._note = text
        if self._as_json:
            print(text, file=sys.stderr, flush=True)
        elif self._live is None or not self._live.is_started:
            self._print(text)

    def _print(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), file=self._stream, flush=True)

    def _render(self) -> Group:
        parts: list[Any] = [Text(self._title, style="bold")]
        if training(self._rows):
            parts += [self._table(), *self._curves()]
        parts.append(self._progress())
        standing = self._advisor.standing[-_ADVISORIES_SHOWN:]
        parts += [Text(f"advisory {advisory.line()}", style="yellow") for advisory in standing]
        if self._note:
            parts.append(Text(self._note, style="italic"))
        for part in parts:
            if isinstance(part, Text):
                part.no_wrap, part.overflow = True, "ellipsis"
        return Group(*parts)

    def _table(self) -> Table:
        width = self._console.width
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
        name = measure(self._rows)
        columns = ["step", name, "length", "max", "entropy", "KL", "tok/s", "time"]
        if width >= 90:
            columns += ["equal groups", "failed", "gradient", "held-out"]
            if any("explained_variance" in row for row in self._rows):
                columns.insert(-1, "critic")
        if any("reward_margin" in row for row in self._rows):
            columns.insert(2, "margin")
        if name == "loss":  # nothing is sampled
            columns = [column for column in columns if column not in ("KL", "equal groups", "failed")]
            if not any(row.get("tokens_per_s") for row in self._rows):
                columns.remove("tok/s")
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        around = _LINES_AROUND + min(_ADVISORIES_SHOWN, len(self._advisor.standing))
        shown = max(1, min(_ROWS_SHOWN, self._console.height - around))
        for row in self._rows[-shown:]:
            cells = {
                "step": str(row["step"]),
                name: decimal(row.get(name)),
                "length": decimal(row.get("length"), 1),
                "max": count(row.get("length_max")),
                "entropy": decimal(row.get("entropy")),
                "KL": divergence(row.get("kl")),
                "tok/s": count(row.get("tokens_per_s")),
                "time": duration(step_s(row)),
                "equal groups": percent(row.get("zero_variance")),
                "failed": count(row.get("failed")),
                "gradient": decimal(row.get("grad_norm"), 2),
                "critic": percent(row.get("explained_variance")),
                "margin": decimal(row.get("reward_margin"), 2),
                "held-out": _scored(row),
            }
            table.add_row(*(cells[column] for column in columns), style="red" if row.get("failed") else "")
        return table

    def _curves(self) -> list[Any]:
        lines: list[Any] = [Text("")]
        width = max(10, min(60, self._console.width - 34))
        name = measure(self._rows)
        values = series(self._rows, name)[1]
        if values:
            line = Text.assemble((f"{name:<10}", "dim"), (sparkline(values, width), "blue"))
            unit = f" ({loss_unit(self._rows)})" if any("loss_unit" in row for row in self._rows) else ""
            lines.append(line.append(f"  {values[0]:.3f} to {values[-1]:.3f}{unit}"))
        evaluated = evaluations(self._rows)
        if evaluated:
            text = " to ".join(held_out(e) for e in (evaluated[:1] + evaluated[-1:])[-min(2, len(evaluated)) :])
            lines.append(Text.assemble(("held-out  ", "dim"), text))
        losses = [row["heldout"]["loss"] for row in self._rows if row.get("heldout")]
        if losses:
            text = " to ".join(map(decimal, (losses[:1] + losses[-1:])[-min(2, len(losses)) :]))
            lines.append(Text.assemble(("held-out  ", "dim"), f"loss {text}"))
        seconds = seconds_by_phase(self._rows)
        spent = sum(seconds.values())
        if spent:
            line = Text.assemble(("time      ", "dim"))
            largest = [(phase, value / spent) for phase, value in seconds.items() if phase != "other"]
            largest = largest[: len(PHASE_COLOURS) if self._console.width >= 100 else 3]
            rest = 1.0 - sum(share for _, share in largest)
            for colour, (phase, share) in zip(PHASE_COLOURS, largest, strict=False):
                line.append("█ ", colour).append(f"{phase} {percent(share)}  ")
            line.append("█ ", "bright_black").append(f"other {percent(rest)}")
            lines.append(line)
        return lines

    def _progress(self) -> Table:
        trained = training(self._rows)
        done = int(trained[-1]["step"]) if trained else 0
        facts = [f"step {done} of {self._total}", duration(time.monotonic() - self._started_s)]
        left = time_left_s(self._rows, self._total)
        if left is not None:
            facts.append(f"about {duration(left)} left" if done < self._total else "done")
        elif not self._note:
            facts.append("first step under way")
        peak = max(series(self._rows, "peak_memory_bytes")[1], default=None)
        if peak is not None:
            facts.append(f"peak {gigabytes(peak)}")
        line = Table.grid(padding=(0, 2, 0, 0))
        width = max(8, min(30, self._console.width - 60))
        bar = Bar(max(1, self._total), 0, done, width=width, color="green", bgcolor="grey23")
        line.add_row(bar, Text("   ".join(facts), no_wrap=True, overflow="ellipsis"))
        return line
