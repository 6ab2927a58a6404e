"""A run's rows in TensorBoard, trackio or W&B, each fed by a process of its own.

The run writes rows into a pipe without waiting, so a sink that raises, hangs or ends costs it nothing but the sink: its
last words are in track-NAME.log of the run folder, and one note says so. At the end a sink has FINISH_S to finish.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tandem import env
from tandem.errors import ConfigError

FINISH_S = 20.0
PENDING_BYTES = 1 << 23  # rows that a sink has not taken: some thousand


class Display(Protocol):
    """What a run shows its rows on; see run/local.py."""

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    def update(self, row: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...


def check_sinks(names: Sequence[str]) -> None:
    """ConfigError, before anything is loaded, for a sink whose package is not here."""
    if absent := [name for name in names if find_spec(name) is None]:
        raise ConfigError(
            f"track.to names {', '.join(absent)}, not installed here. pip install {' '.join(absent)}, or take it out."
        )


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a row, those of its parts under name/part.

    >>> flat({"reward": 0.5, "kl": float("nan"), "seconds": {"rollout": 2}, "failures": []})
    {'reward': 0.5, 'seconds/rollout': 2.0}
    """
    values: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            values[prefix + name] = float(value)
    return values


class Tracked:
    """A display that hands every row on to sinks as well. Their processes start with it, in `folder`.

    `title`: what the run is called there, by default as its folder. A resumed run goes on under the id that is in
    tracking.json.
    """

    def __init__(
        self, display: Display, sinks: Sequence[str], folder: Path, project: str, title: str, config: Mapping[str, Any]
    ) -> None:
        self._display = display
        self._names = sinks
        self._folder = folder
        self._about = {"project": project, "name": title or folder.resolve().name, "config": dict(config)}
        self._sinks: list[_Sink] = []

    def __enter__(self) -> Tracked:
        self._display.__enter__()
        about = {**self._about, "id": _run_id(self._folder / "tracking.json")}
        self._sinks = [_Sink(name, self._folder, about) for name in self._names]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._display.__exit__(kind, error, tb)
        until_s = time.monotonic() + FINISH_S
        for sink in self._sinks:
            sink.finish(until_s)
            if sink.failure:
                print(f"tracking by {sink.name} is incomplete: {sink.failure}", file=sys.stderr)

    def update(self, row: Mapping[str, Any]) -> None:
        self._display.update(row)
        values = {name: value for name, value in flat(row).items() if name != "step"}
        for sink in self._sinks:
            if sink.failure:
                continue
            sink.send({"step": row["step"], "values": values})
            if sink.failure:
                self.note(f"tracking by {sink.name} ended: {sink.failure}")

    def note(self, text: str) -> None:
        self._display.note(text)


def _run_id(path: Path) -> str:
    """The id under which sinks know this run, kept beside it."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    made = uuid.uuid4().hex[:12]
    with contextlib.suppress(OSError):  # a full disk ends the run elsewhere; a sink alone does not
        path.write_text(json.dumps({"id": made}) + "\n", encoding="utf-8")
    return made


class _Sink:
    """One process and what is still to be written to it."""

    def __init__(self, name: str, folder: Path, about: Mapping[str, Any]) -> None:
        self.name = name
        self.failure = ""
        self._log = folder / f"track-{name}.log"
        self._pending = bytearray()
        # sys.path travels, so that the process finds the package wherever this one did.
        places = [os.path.abspath(place) for place in sys.path]
        code = f"import sys; sys.path[:] = {places!r}\nfrom tandem.report.track import serve; serve({name!r})"
        try:
            with self._log.open("ab") as log:
                self._popen = subprocess.Popen(
                    [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                    env=env.tracking(), cwd=folder,
                )  # fmt: skip
        except OSError as error:
            self.failure = f"its process did not start: {error.strerror}"
            return
        assert self._popen.stdin is not None
        self._pipe = self._popen.stdin.fileno()
        os.set_blocking(self._pipe, False)
        self.send(about)

    def send(self, line: Mapping[str, Any]) -> None:
        """Hand on a line as far as the pipe takes it; `failure` is set where the sink is no more."""
        if self.failure:
            return
        self._pending += json.dumps(line).encode() + b"\n"
        self._write()
        if not self.failure and len(self._pending) > PENDING_BYTES:
            self._end("it takes no more rows")

    def finish(self, until_s: float) -> None:
        """Close the pipe and wait for the end of the process, on time.monotonic's clock."""
        while not self.failure and self._pending and time.monotonic() < until_s:
            self._write()
            time.sleep(0.01)
        if self.failure:
            return
        if self._pending:
            self._end(f"it did not take the last rows within {FINISH_S:g} s")
            return
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        try:
            self._popen.wait(max(0.0, until_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._end(f"it did not finish within {FINISH_S:g} s")
        else:
            if self._popen.returncode:
                self._end(self._last_words())

    def _write(self) -> None:
        try:
            while self._pending:
                del self._pending[: os.write(self._pipe, self._pending)]
        except BlockingIOError:
            return
        except OSError:  # its end of the pipe is closed
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(1.0)
            self._end(self._last_words())

    def _last_words(self) -> str:
        try:
            said = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            said = []
        return next((line.strip()[:200] for line in reversed(said) if line.strip()), "it ended") + f" (see {self._log})"

    def _end(self, why: str) -> None:
        self.failure = why
        self._pending.clear()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        assert self._popen.stdin is not None
        with contextlib.suppress(OSError):
            self._popen.stdin.close()


def serve(name: str) -> None:
    """The sink's process: what the run is, then its rows, from standard input until it is closed."""
    os.nice(10)
    about = json.loads(sys.stdin.readline())
    log, close = OPENERS[name](about)
    for line in sys.stdin:
        row = json.loads(line)
        log(int(row["step"]), row["values"])
    signal.alarm(int(2 * FINISH_S))  # nobody else would end it where the run was killed
    close()


Log = Callable[[int, Mapping[str, float]], None]
Opened = tuple[Log, Callable[[], None]]


def _tensorboard(about: Mapping[str, Any]) -> Opened:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter("tensorboard")  # of the run folder, where this process works
    begun = False

    def log(step: int, values: Mapping[str, float]) -> None:
        nonlocal begun
        if not begun:  # what an earlier sitting wrote of steps from here on is void
            start = SessionLog(status=SessionLog.START)
            writer.add_event(Event(step=step, wall_time=time.time(), session_log=start))
            begun = True
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        writer.add_event(Event(step=step, wall_time=time.time(), summary=summary))
        writer.flush()

    return log, writer.close


def _trackio(about: Mapping[str, Any]) -> Opened:
    import trackio

    name = f"{about['name']}-{about['id'][:6]}"  # its runs are known by name alone
    run = trackio.init(
        about["project"], name=name, config=about["config"], resume="allow", auto_log_gpu=False, auto_log_cpu=False
    )
    return (lambda step, values: run.log(dict(values), step=step)), trackio.finish


def _wandb(about: Mapping[str, Any]) -> Opened:
    import wandb

    run = wandb.init(
        project=about["project"], name=about["name"], id=about["id"], config=about["config"], resume="allow", dir="."
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")  # W&B's own count of rows only grows; a resumed run's steps may not
    return (lambda step, values: run.log({"step": step, **values})), run.finish


OPENERS: dict[str, Callable[[Mapping[str, Any]], Opened]] = {
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
}
