"""What an engine did with programs and why, appended to a file as JSON lines.

Each line says what it is (`at`), by which engine (`by`) and when (`t`, the engine's clock); the first of an engine, the
schema, the settings and what else its decisions rest on. A decision stands with the question that was asked: `repeated`
asks all of them again. Lines are whole: several engines may append to one file, and a torn last line is left out.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tandem.engine.config import ProgramsConfig
from tandem.engine.policies import Balance, Keep, ParkCost, Room, TurnEnd, balance, keep, park
from tandem.errors import ConfigError, TandemWarning

if TYPE_CHECKING:
    from tandem.engine.batch import Sequence
    from tandem.types import StopReason

SCHEMA = 1
BUFFERED_BYTES, FLUSH_S = 1 << 16, 1.0
_engines = itertools.count()


class Record:
    """Where lines go. A file that can no longer be written ends the record and nothing else, with a warning."""

    def __init__(self, path: str, config: ProgramsConfig, num_pages: int, page_tokens: int) -> None:
        self.by = f"{os.getpid()}-{next(_engines)}"
        self._encode = msgspec.json.Encoder().encode
        self._lines = bytearray()
        self._flushed_s = 0.0
        try:
            self._file: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"engine.programs.record is {path!r}, which cannot be written: {error.strerror}. Choose another file."
            ) from None
        self._last = weakref.finalize(self, _last, self._file, self._lines)
        self.write("head", 0.0, schema=SCHEMA, config=config, num_pages=num_pages, page_tokens=page_tokens)
        self.flush()

    def write(self, at: str, now: float, **values: Any) -> None:
        if self._file is None:
            return
        self._lines += self._encode({"at": at, "by": self.by, "t": round(now, 6), **values}) + b"\n"
        if len(self._lines) >= BUFFERED_BYTES or now - self._flushed_s >= FLUSH_S:
            self._flushed_s = now
            self.flush()

    def turn(self, program: str, sequence: Sequence, reason: StopReason, now: float, **more: Any) -> None:
        """A turn ended: what its request was, found and took."""
        request, started_s = sequence.request, sequence.started_s
        first_s = sequence.first_s if sequence.first_s is not None else now
        times = {
            "queue_s": (started_s if started_s is not None else now) - sequence.submitted_s,
            "prefill_s": first_s - started_s if started_s is not None else 0.0,
            "decode_s": now - first_s,
        }
        self.write(
            "turn",
            now,
            program=program,
            tenant=request.tenant,
            request=request.id,
            prompt=len(request.tokens),
            cached=sequence.cached_tokens,
            recomputed=sequence.recomputed_tokens,
            output=sequence.num_drawn,
            stop=reason.value,
            seed=request.seed,
            weights=[step for step, _ in sequence.spans],
            **{name: round(seconds, 6) for name, seconds in times.items()},
            **more,
        )

    def flush(self) -> None:
        """One write a call, so that lines of several engines stay whole."""
        if self._file is None or not self._lines:
            return
        try:
            written = os.write(self._file, self._lines)
            if written != len(self._lines):
                raise OSError(0, f"{written} of {len(self._lines)} bytes were taken")
        except OSError as error:
            warnings.warn(TandemWarning(f"the record of programs ends: {error.strerror}"), stacklevel=2)
            self.close()
        self._lines.clear()

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            self._last.detach()
            os.close(file)


def _last(file: int, lines: bytearray) -> None:
    """What was not written yet, as an engine goes or the process ends."""
    with contextlib.suppress(OSError):
        os.write(file, lines)
    os.close(file)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a record. ConfigError where it is none, or of a later schema."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    for number, line in enumerate(lines, start=1):
        try:
            values = msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError):
            if number == len(lines) and not line.endswith(b"\n"):
                return
            raise ConfigError(f"{path}: line {number} is no JSON object; is it a record of programs?") from None
        if number == 1 and (values.get("at") != "head" or values.get("schema") != SCHEMA):
            raise ConfigError(
                f"{path} does not begin as a record of programs of schema {SCHEMA} does: its first line has "
                f"at={values.get('at')!r}, schema={values.get('schema')!r}."
            )
        yield values


def repeated(lines: Iterator[dict[str, Any]]) -> tuple[int, list[dict[str, Any]]]:
    """(decisions asked again, lines of those that come out otherwise)."""
    count, other = 0, []
    for line in lines:
        if line["at"] == "keep":
            count += 1
            same = keep(msgspec.convert(line["asked"], TurnEnd)) == _keep(line["answer"])
        elif line["at"] == "balance":
            count += 1
            same = balance(msgspec.convert(line["asked"], Room)) == msgspec.convert(line["answer"], Balance)
        elif line["at"] == "park":
            count += 1
            same = park(msgspec.convert(line["asked"], ParkCost)) == line["answer"]
        else:
            continue
        if not same:
            other.append(line)
    return count, other


def _keep(answer: dict[str, Any]) -> Keep:
    """JSON has no infinity, and writes it as null."""
    kept = answer["keep_s"]
    return msgspec.convert(answer | {"keep_s": float("inf") if kept is None else kept}, Keep)
