"""A teacher's log-probs on disk: what comes back, of which text, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tandem.columns import Columns
from tandem.corpus.teacher import HEADER, IDS, LOGPROBS, Origin, Stored, StoredWriter, is_stored, words_hash
from tandem.errors import CheckpointError, ConfigError
from tandem.types import Sample

ORIGIN = Origin("t", "d", "w", "bfloat16", 97, 64, 1.0, 3)


def sample(number: int, tokens: list[int], trained: int) -> Sample:
    mask = [False] * (len(tokens) - trained) + [True] * trained
    return Sample(f"p/{number}", "p", Columns.of(tokens=tokens, loss_mask=mask))


SAMPLES = [sample(0, [5, 9, 2, 7], 2), sample(1, [5, 9, 2, 7], 3), sample(2, [1, 2, 3, 4, 5, 6], 4)]


def said(one: Sample) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count = int(one.columns["loss_mask"].sum())
    generator = torch.Generator().manual_seed(int(one.id.split("/")[1]))
    ids = torch.randint(97, (count, 3), generator=generator)
    logprobs = torch.randn(count, 4, generator=generator).log_softmax(-1)
    return ids, logprobs[:, :3], logprobs[:, 3]


def write(folder: Path, samples: list[Sample] = SAMPLES) -> None:
    with StoredWriter(folder, ORIGIN) as writer:
        for one in samples:
            writer.add(one, *said(one))


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    """A text gets another's log-probs, one that trains other tokens is taken for it, or places are off by one."""
    folder = tmp_path / "stored"
    write(folder, [*SAMPLES, SAMPLES[1]])
    stored = Stored(folder)
    assert is_stored(folder) and len(stored) == 3 and stored.rows == 9 and stored.origin == ORIGIN
    for one, filled in zip(SAMPLES[::-1], stored.filled(SAMPLES[::-1]), strict=True):
        ids, logprobs, rest = said(one)
        mask = one.columns["loss_mask"]
        assert filled.columns["teacher_ids"][mask].tolist() == ids.tolist()
        wanted = torch.cat([logprobs, rest[:, None]], 1).to(torch.bfloat16).float().numpy()
        assert np.array_equal(filled.columns["teacher_logprobs"][mask], wanted)
        assert not filled.columns["teacher_ids"][~mask].any() and filled.columns["tokens"] is not None
    with pytest.raises(ConfigError, match=r"the text of p/9 is not among the 3 .* `tandem convert teacher`"):
        stored.filled([sample(9, [5, 9, 2, 8], 2)])


def test_what_is_damaged_is_refused(tmp_path: Path) -> None:
    """A file that was changed or cut short is learned from, or ends in a traceback."""
    for name, change in (
        (LOGPROBS, lambda path: path.write_bytes(path.read_bytes()[:-2])),
        (IDS, lambda path: path.write_bytes(b"\1" + path.read_bytes()[1:])),
        ("texts.jsonl", lambda path: path.write_text("")),
        (HEADER, lambda path: path.write_text("{")),
        (HEADER, lambda path: path.write_text(json.dumps({"format": 1}))),
        (IDS, lambda path: path.unlink()),
    ):
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        write(folder)
        change(folder / name)
        with pytest.raises(CheckpointError, match="Write it again with `tandem convert teacher`"):
            Stored(folder)


def test_nothing_half_written_is_there(tmp_path: Path) -> None:
    """What was stopped on the way looks whole, stays in the way, or a folder that is there is written over."""
    folder = tmp_path / "stored"
    with pytest.raises(KeyboardInterrupt), StoredWriter(folder, ORIGIN) as writer:
        writer.add(SAMPLES[0], *said(SAMPLES[0]))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [] and not is_stored(folder)
    write(folder)
    with pytest.raises(ConfigError, match="is there already"):
        write(folder)
    empty = tmp_path / "none"
    write(empty, [])
    assert len(Stored(empty)) == 0


def test_words_by_their_ids() -> None:
    """Two vocabularies with other ids, or other tokens, count as one."""
    own = {"a": 0, "b": 1}
    assert words_hash(own) == words_hash({"b": 1, "a": 0})
    assert len({words_hash(one) for one in (own, {"a": 1, "b": 0}, {"a": 0}, {"a": 0, "c": 1})}) == 4
