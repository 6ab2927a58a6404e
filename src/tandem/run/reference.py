"""The reference policy's log-probs of a batch; of answers that are given again and again, computed once and kept.

`reference.bin` of a run's folder has a record an answer: its key (a hash of its tokens, its mask, and which weights
scored it), how many log-probs follow, those in fp32, and a hash of the record. A record that a crash cut short, and
what lies behind one whose hash is wrong, is dropped and computed again.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from tandem.columns import Columns
from tandem.errors import ConfigError, unwritten
from tandem.run.parts import Parts, Scorer, reference_of
from tandem.sync.publish import weight_version

if TYPE_CHECKING:
    from tandem.algo.objective import Objective
    from tandem.algo.pack import PromptTotal
    from tandem.models.decoder import Decoder
    from tandem.run.config import RunConfig
    from tandem.trace import Trace
    from tandem.types import Sample

FILE = "reference.bin"
_HEAD = struct.Struct("<16sI")  # key, log-probs
_CHECK = 8  # bytes of a record's hash


class KeptLogprobs:
    """Log-probs by key, in a file that one process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, tuple[int, int]] = {}  # key -> where its log-probs lie, how many
        self._end = 0  # of what is whole
        if path.exists():
            self._read()

    def _read(self) -> None:
        with self.path.open("rb") as file:
            while len(head := file.read(_HEAD.size)) == _HEAD.size:
                key, count = _HEAD.unpack(head)
                body = file.read(4 * count + _CHECK)
                if len(body) < 4 * count + _CHECK or body[4 * count :] != _check(head + body[: 4 * count]):
                    break
                self._places[key] = (self._end + _HEAD.size, count)
                self._end += len(head) + len(body)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        """Records."""
        return len(self._places)

    def get(self, keys: Sequence[bytes]) -> list[np.ndarray]:
        """Of each key, fp64."""
        found = []
        with self.path.open("rb") as file:
            for key in keys:
                place, count = self._places[key]
                file.seek(place)
                found.append(np.frombuffer(file.read(4 * count), "<f4").astype(np.float64))
        return found

    def put(self, keys: Sequence[bytes], values: Sequence[np.ndarray]) -> None:
        """New records. WorldError where the disk does not take them: the file then has what it had."""
        places, end, records = {}, self._end, []
        for key, logprobs in zip(keys, values, strict=True):
            narrow = logprobs.astype("<f4")
            assert np.array_equal(narrow.astype(np.float64), logprobs, equal_nan=True), "log-probs are fp32 at most"
            record = _HEAD.pack(key, len(narrow)) + narrow.tobytes()
            places[key] = (end + _HEAD.size, len(narrow))
            records.append(record + _check(record))
            end += len(records[-1])
        try:
            with self.path.open("r+b" if self.path.exists() else "w+b") as file:
                file.truncate(self._end)
                file.seek(self._end)
                file.write(b"".join(records))
        except OSError as error:
            raise unwritten(self.path, error, "Free some space, then continue with --resume.") from error
        self._places |= places
        self._end = end


class KeptReference:
    """A scorer (run/parts.py) that asks another one only for what it has not kept."""

    def __init__(self, kept: KeptLogprobs, weights: str, make: Callable[[], Scorer], trace: Trace) -> None:
        self.kept = kept
        self.weights = weights  # names them, and what else the bits hang on
        self._make = make
        self._trace = trace
        self._scorer: Scorer | None = None  # made when first needed

    def __call__(
        self, samples: Sequence[Sample], prompts: Sequence[PromptTotal], budget_tokens: int, temperature: float
    ) -> tuple[Sample, ...]:
        """The samples with their `reference_logprobs`."""
        keys = [self._key(sample, temperature) for sample in samples]
        lacking = {key: sample for key, sample in zip(keys, samples, strict=True) if key not in self.kept}
        self._trace.count("referred_answers", len(lacking))
        if lacking:
            if self._scorer is None:
                self._scorer = self._make()
            scored = self._scorer(tuple(lacking.values()), prompts, budget_tokens, temperature)
            self.kept.put(
                list(lacking), [one.columns["reference_logprobs"][one.columns["loss_mask"]] for one in scored]
            )
        return tuple(
            dataclasses.replace(sample, columns=_having(sample, logprobs))
            for sample, logprobs in zip(samples, self.kept.get(keys), strict=True)
        )

    def _key(self, sample: Sample, temperature: float) -> bytes:
        columns = sample.columns
        state = xxhash.xxh3_128(f"{self.weights} {temperature!r} {len(columns)}\n".encode())
        state.update(columns["tokens"].tobytes())
        state.update(columns["loss_mask"].tobytes())
        return state.digest()


def scorer_of(
    parts: Parts, config: RunConfig, objective: Objective, load: Callable[[str], Decoder], folder: Path, trace: Trace
) -> Scorer | None:
    """What fills in `reference_logprobs`; None where nobody asks for them. Of samples of an engine, which do not come
    again, nothing is kept."""
    if "reference_logprobs" not in objective.columns:
        return None
    if objective.samples:
        return reference_of(parts, config, load)
    model, weights = config.model, str(parts.plan["weights"])

    def loaded(source: str) -> Decoder:
        decoder = load(source)
        if (found := weight_version(decoder, 0).digest) != weights:
            raise ConfigError(
                f"model.source {source} was changed while the run went on: its weights hash to {found[:12]}, and were "
                f"{weights[:12]} when it began. Put them back, and continue with --resume."
            )
        return decoder

    identity = f"{weights} {model.dtype} {model.device} {model.kernels} {model.weights} {model.kv} {model.logits}"
    return KeptReference(KeptLogprobs(folder / FILE), identity, lambda: reference_of(parts, config, loaded), trace)


def _having(sample: Sample, logprobs: np.ndarray) -> Columns:
    mask = sample.columns["loss_mask"]
    filled = np.zeros(len(mask))
    filled[mask] = logprobs
    return sample.columns.having(reference_logprobs=filled)


def _check(record: bytes) -> bytes:
    return xxhash.xxh3_64(record).digest()
