"""The journal of an asynchronous run: each fact that scheduling and the outside decided, in order.

    journal.jsonl     a fact a line: start, begin, end, choose, update, resume
    journal.bin       the groups that ended, whole; an `end` says where, and their hash

Weights, seeds and these facts fix all tokens and all later weights. An `end` names which version drew how many tokens
of each program; an `update` names the hash of the weights, so that a repetition is checked at each step.

A line counts where it is whole, and an `end` where its group is: a run that was killed in the middle of one goes on,
and is repeated, up to there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec
import numpy as np
import xxhash

from tandem.errors import RunFolderError, WorldError
from tandem.rollout.flow import Ended

T = TypeVar("T")
_INTEGER, _TEXT = 1, 2  # extensions of MessagePack
FACTS, GROUPS = "journal.jsonl", "journal.bin"
VERSION = 2  # of what is packed: the first had no mark on what a model sampled
NEEDS: Mapping[Any, set[str]] = {  # fact -> what one says
    "start": {"version", "weights"},
    "resume": {"step", "under"},
    "begin": {"number", "group", "step", "prompt", "version"},
    "end": {"number", "group", "usable", "spans", "at", "bytes", "hash"},
    "choose": {"step", "numbers", "again", "stale"},
    "update": {"step", "weights"},
}


def packed(value: Any) -> bytes:
    """Nouns as MessagePack; arrays as their bytes, and what Python's JSON has beyond it as extensions."""
    try:
        return msgspec.msgpack.encode(value, enc_hook=_array_out)
    except (OverflowError, UnicodeEncodeError):
        plain = msgspec.to_builtins(value, builtin_types=(bytes,), enc_hook=_array_out)
        return msgspec.msgpack.encode(_beyond(plain))


def unpacked(content: bytes, kind: type[T]) -> T:
    """
    >>> from tandem.columns import Columns
    >>> unpacked(packed(Columns.of(tokens=(1, 2))), Columns)["tokens"].tolist()
    [1, 2]
    """
    return msgspec.msgpack.decode(content, type=kind, dec_hook=_array_in, ext_hook=_beyond_in)


def _array_out(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.shape, value.tolist() if value.dtype == object else value.tobytes()]
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be kept")


def _array_in(kind: type, value: Any) -> Any:
    if kind is not np.ndarray:
        raise TypeError(f"{kind.__name__} cannot be read")
    dtype, shape, content = value
    if dtype == "|O":
        array = np.empty(shape, object)
        array[:] = content
        array.flags.writeable = False
        return array
    return np.frombuffer(content, dtype).reshape(shape)


def _beyond(value: Any) -> Any:
    """With integers of more than 64 bits and halves of characters as extensions."""
    if isinstance(value, dict):
        return {key: _beyond(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_beyond(one) for one in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return msgspec.msgpack.Ext(_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))
    if isinstance(value, str) and not value.isascii() and any("\ud800" <= one <= "\udfff" for one in value):
        return msgspec.msgpack.Ext(_TEXT, value.encode("utf-8", "surrogatepass"))
    return value


def _beyond_in(code: int, content: memoryview) -> Any:
    if code == _INTEGER:
        return int.from_bytes(content, "big", signed=True)
    return bytes(content).decode("utf-8", "surrogatepass")


@dataclass(frozen=True, slots=True)
class Fact:
    """One line.

    >>> Fact({"fact": "begin", "number": 0}).kind
    'begin'
    """

    values: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.values["fact"])

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


class Journal:
    """Written by one process, from any thread that holds the run's turn; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._facts = os.open(folder / FACTS, flags, 0o644)
        self._groups = os.open(folder / GROUPS, flags, 0o644)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for descriptor in (self._facts, self._groups):
            os.close(descriptor)

    def start(self, weights: str, step: int = 0, under: Mapping[str, Any] | None = None) -> None:
        """step: above 0 where an older journal is gone. under: the settings that a resume may change."""
        self._write(fact="start", version=VERSION, step=step, weights=weights, under=under)

    def resume(self, step: int, under: Mapping[str, Any]) -> None:
        """Another sitting, under other settings; behind the checkpoint of `step` it lives through what is before."""
        self._write(fact="resume", step=step, under=under)

    def begin(self, number: int, group: str, step: int, prompt: int, version: int) -> None:
        """prompt: its place in the run's order of prompts."""
        self._write(fact="begin", number=number, group=group, step=step, prompt=prompt, version=version)

    def end(self, number: int, ended: Ended, usable: bool) -> None:
        content = packed(ended)
        at = os.fstat(self._groups).st_size
        self._all(self._groups, content, GROUPS)
        spans = {one.id: one.spans for one in ended.played}
        where = {"at": at, "bytes": len(content), "hash": xxhash.xxh3_128_hexdigest(content)}
        self._write(fact="end", number=number, group=ended.id, usable=usable, spans=spans, **where)

    def choose(self, step: int, numbers: Sequence[int], again: Sequence[int], stale: Sequence[int]) -> None:
        self._write(fact="choose", step=step, numbers=numbers, again=again, stale=stale)

    def update(self, step: int, weights: str) -> None:
        self._write(fact="update", step=step, weights=weights)

    def size(self) -> int:
        """Bytes of facts: what a checkpoint remembers, to know what came after it."""
        return os.fstat(self._facts).st_size

    def sync(self) -> None:
        """On disk, for a checkpoint."""
        os.fsync(self._groups)
        os.fsync(self._facts)

    def _write(self, **values: Any) -> None:
        self._all(self._facts, json.dumps(values, separators=(",", ":")).encode() + b"\n", FACTS)

    def _all(self, descriptor: int, content: bytes, name: str) -> None:
        start = os.fstat(descriptor).st_size
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError as error:
            os.ftruncate(descriptor, start)
            raise WorldError(
                f"{self.folder / name} could not be written: {error.strerror}. Free some space, then continue with "
                f"--resume {self.folder}."
            ) from error


class Read:
    """A journal as it was written, up to where it is whole. `cut`: why not all of it, or ""."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: list[Fact] = []
        self.cut = ""
        self.ends = [0]  # bytes of facts before each, and of all
        try:
            content = (folder / FACTS).read_bytes()
        except FileNotFoundError:
            raise RunFolderError(
                f"{folder} has no {FACTS}: asynchronous runs alone have one. A run in steps is repeated by its config."
            ) from None
        groups = (folder / GROUPS).stat().st_size if (folder / GROUPS).is_file() else 0
        for line in content.splitlines(keepends=True):
            fact = _fact(line)
            if fact is None:
                self.cut = f"line {len(self.facts) + 1} of {FACTS} is not whole"
                break
            if fact.kind == "end" and fact["at"] + fact["bytes"] > groups:
                self.cut = f"group {fact['number']} of line {len(self.facts) + 1} is not whole in {GROUPS}"
                break
            if fact.kind == "start" and fact["version"] != VERSION:
                raise RunFolderError(
                    f"{folder / FACTS} was written by another version of tandem (its format is {fact['version']}, this "
                    f"one's {VERSION}): go on with that version, or start the run anew."
                )
            self.facts.append(fact)
            self.ends.append(self.ends[-1] + len(line))

    def settings(self) -> tuple[dict[int, Mapping[str, Any]], Mapping[str, Any] | None]:
        """Step -> the settings under which it was learned, and the last ones."""
        found, now = dict[int, Mapping[str, Any]](), None
        for fact in self.facts:
            if fact.kind in ("start", "resume"):
                now = fact.values.get("under")
            elif fact.kind == "update" and now is not None:
                found[fact["step"]] = now
        return found, now

    def mend(self, size: int) -> None:
        """Drop what is not whole, so that the next fact begins a line. RunFolderError where that is among the first
        `size` bytes, which a checkpoint knows."""
        if self.ends[-1] < size:
            raise RunFolderError(
                f"{self.folder / FACTS} is whole up to byte {self.ends[-1]}, and the newest checkpoint was written "
                f"behind byte {size} of it: {self.cut or 'its end was cut off'}. Restore it and {GROUPS}; or move both "
                "away: then the run goes on from the checkpoint, but can't be repeated from its start."
            )
        os.truncate(self.folder / FACTS, self.ends[-1])

    def after(self, size: int) -> Iterator[Fact]:
        """The facts behind the first `size` bytes."""
        return (fact for fact, start in zip(self.facts, self.ends, strict=False) if start >= size)

    def ended(self, fact: Fact) -> Ended:
        """The group of an `end`. RunFolderError where its bytes are not those that were written."""
        with (self.folder / GROUPS).open("rb") as file:
            file.seek(fact["at"])
            content = file.read(fact["bytes"])
        if xxhash.xxh3_128_hexdigest(content) != fact["hash"]:
            raise RunFolderError(
                f"{self.folder / GROUPS} was changed: group {fact['number']} does not hash to what {FACTS} says. "
                "Restore the file."
            )
        return unpacked(content, Ended)


def _fact(line: bytes) -> Fact | None:
    """None where the line is torn, or says no fact."""
    if not line.endswith(b"\n"):
        return None
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return Fact(values) if isinstance(values, dict) and values.keys() >= NEEDS.get(values.get("fact"), {"?"}) else None
