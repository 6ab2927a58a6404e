"""Rows of files by number: JSON lines, Parquet, plain texts. Only where they lie is held in memory, but of Parquet."""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash

from tandem.corpus.config import FIELDS, PREFERRED, CorpusConfig
from tandem.corpus.reader import refused
from tandem.errors import ConfigError, CorpusError, nearest
from tandem.program.config import MAX_REWARD, half_character
from tandem.program.prompts import OTHER_FORMATS
from tandem.program.reward import clipped

if TYPE_CHECKING:
    import pyarrow

MAX_LINE_BYTES = 256 << 20
BLOCK_BYTES = 1 << 22
LINE_BYTES, ROW_BYTES = 512, 400  # of a line, at least as most files have it; of a row's place, tasks and digest
LOOKED_AT = 1000  # of lines, rows one of which has what corpus.fields names
UNPACKED = 6  # times a Parquet file's size, in memory


class Rows(Protocol):
    """A file's rows."""

    digest: str

    def __len__(self) -> int: ...

    def place(self, number: int) -> str: ...

    def row(self, number: int) -> Mapping[str, Any]:
        """CorpusError where it cannot be read."""
        ...


class Lines:
    """A jsonl file; blank lines are none of its rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = opened(path)
        starts, lengths, numbers = [], [], []
        state, at, number = xxhash.xxh3_128(), 0, 0
        with path.open("rb", buffering=BLOCK_BYTES) as file:
            for line in file:
                number += 1
                if number == 1:
                    for first, kind in OTHER_FORMATS.items():
                        if line.startswith(first):
                            raise CorpusError("no file", f"{path} is {kind}. Unpack or save it as UTF-8 JSON lines.")
                state.update(line)
                if line.strip():
                    starts.append(at)
                    lengths.append(len(line))
                    numbers.append(number)
                at += len(line)
        self._starts, self._lengths = np.array(starts, np.int64), np.array(lengths, np.int64)
        self._numbers = np.array(numbers, np.int64)
        self.digest = state.hexdigest()
        if not numbers:
            raise CorpusError("no rows", f"{path} holds no line. Give a file with a JSON object a line.")

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, number: int) -> str:
        return f"{self.path} line {self._numbers[number]}"

    def row(self, number: int) -> Mapping[str, Any]:
        place, length = self.place(number), int(self._lengths[number])
        if length > MAX_LINE_BYTES:
            raise refused("not JSON", place, f"{length >> 20} MiB long; {MAX_LINE_BYTES >> 20} are read at most.")
        line = os.pread(self._file.fileno(), length, int(self._starts[number]))
        try:
            found = json.loads(line.decode("utf-8-sig" if number == 0 else "utf-8"))
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            raise refused("not JSON", place, f"{error}. Mend or remove the line.") from error
        if not isinstance(found, dict):
            raise refused("not JSON", place, f"{clipped(found)} is no JSON object.")
        if b"\\u" in line and (half := half_character(json.dumps(found, ensure_ascii=False))):
            raise refused("not JSON", place, f"it {half}")  # JSON can spell it, and no tokeniser takes it
        return found


class Table:
    """A Parquet file, with the columns that are read, in memory as Arrow has them."""

    def __init__(self, path: Path, config: CorpusConfig) -> None:
        try:
            import pyarrow.parquet as parquet
            from pyarrow import ArrowException
        except ImportError as error:
            raise ConfigError(f"{path} needs pyarrow ({error}): pip install 'tandem-rl[parquet]'") from error
        opened(path).close()
        self.path = path
        try:
            there = list(parquet.read_schema(path).names)
            check_named(there, config, str(path), "column")
            check_fields(there, config, str(path), "column")
            wanted = [config.field(name) for name in FIELDS if config.field(name) in there]
            self._table: pyarrow.Table = parquet.read_table(path, columns=wanted)
        except (ArrowException, OSError) as error:
            raise CorpusError("not Parquet", f"{path} cannot be read as Parquet: {error}.") from error
        if not self._table.num_rows:
            raise CorpusError("no rows", f"{path} holds no row. Give a file with some, or take it out.")
        self.digest = file_digest(path)

    def __len__(self) -> int:
        return self._table.num_rows

    def place(self, number: int) -> str:
        return f"{self.path} row {number + 1}"

    def row(self, number: int) -> Mapping[str, Any]:
        found = self._table.slice(number, 1).to_pylist()[0]
        return {name: _pruned(value) for name, value in found.items() if value is not None}


class Texts:
    """Plain texts, a document a file."""

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self.paths, self._name = paths, name
        state = xxhash.xxh3_128()
        for path in paths:
            opened(path).close()
            state.update(file_digest(path).encode())
        self.digest = state.hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def place(self, number: int) -> str:
        return str(self.paths[number])

    def row(self, number: int) -> Mapping[str, Any]:
        try:
            return {self._name: self.paths[number].read_text(encoding="utf-8-sig")}
        except UnicodeDecodeError as error:
            raise refused("not UTF-8", self.place(number), f"{error}. Save it as UTF-8.") from error


class Several:
    """Files one after another, as one."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.digest = xxhash.xxh3_128("".join(part.digest for part in parts).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def place(self, number: int) -> str:
        part, at = self._at(number)
        return part.place(at)

    def row(self, number: int) -> Mapping[str, Any]:
        part, at = self._at(number)
        return part.row(at)

    def _at(self, number: int) -> tuple[Rows, int]:
        which = int(np.searchsorted(self._ends, number, side="right"))
        return self.parts[which], number - (int(self._ends[which - 1]) if which else 0)


def check_named(there: Sequence[str], config: CorpusConfig, place: str, what: str) -> None:
    """CorpusError where corpus.fields gives a name that nothing has."""
    for name, own in config.fields:
        if own not in there:
            raise refused("missing fields", place, f"no {what} {own!r} (corpus.fields: {name}).{nearest(own, there)}")


def check_first(rows: Rows, config: CorpusConfig, place: str) -> None:
    """As check_named, by the first rows of lines, of which each may lack what it need not have."""
    there = dict[str, None]()
    for number in range(min(len(rows), LOOKED_AT) if config.fields else 0):
        with contextlib.suppress(CorpusError):  # which is told where its own turn comes
            there |= dict.fromkeys(rows.row(number))
    check_named([*there], config, place, f"field of its first {LOOKED_AT:,} rows is")


def check_fields(there: Sequence[str], config: CorpusConfig, place: str, what: str) -> None:
    """CorpusError where a row has nothing to learn from."""
    known = [config.field(name) for name in ("messages", "conversations", "text", *PREFERRED[1:4])]
    if not any(name in there for name in known):
        advice = "Name it: --set corpus.fields=messages=NAME"
        if {"question", "answer"} <= {*there}:
            advice = (
                "Each is a chat of one turn with --set corpus.fields=prompt=question,completion=answer; or it is a "
                "task: --set task.environment=jsonl --set task.path=FILE, without corpus.*"
            )
        raise refused(
            "missing fields",
            place,
            f"no {what} {', '.join(known[:-1])} or {known[-1]}; it has {', '.join(there) or 'none'}. {advice}",
        )


def finite(row: Mapping[str, Any], name: str, place: str) -> float:
    """A number of at most 1e9; CorpusError for anything else."""
    value = row.get(name)
    if not isinstance(value, int | float) or not abs(value) <= MAX_REWARD:
        raise refused(f"no {name}", place, f"its {name} is {clipped(value)}; a number of at most 1e9 is needed.")
    return float(value)


def held_bytes(config: CorpusConfig) -> int:
    """Of memory that the sources take while a run lasts, as far as their files' sizes say: of lines where they lie, of
    Parquet all that is read of it."""
    found = 0
    for source in config.sources:
        path = Path(source).expanduser()
        for one in [path] if path.exists() else map(Path, glob.glob(str(path))):
            size = one.stat().st_size if one.is_file() else 0
            found += size * UNPACKED if one.suffix.lower() == ".parquet" else size // LINE_BYTES * ROW_BYTES
    return found


def opened(path: Path) -> Any:
    """A regular file, open; CorpusError for anything else."""
    try:
        if path.exists() and not path.is_file():
            raise CorpusError("no file", f"{path} is no regular file. Give a file, or a run folder.")
        return path.open("rb")
    except OSError as error:
        raise CorpusError("no file", f"{path} cannot be read: {error.strerror}. Check corpus.sources.") from error


def file_digest(path: Path) -> str:
    """XXH3 of a file's bytes, 32 digits."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()


def _pruned(value: Any) -> Any:
    """Without the keys that Arrow's structs have for other rows' sake."""
    if isinstance(value, dict):
        return {name: _pruned(one) for name, one in value.items() if one is not None}
    return [_pruned(one) for one in value] if isinstance(value, list) else value
