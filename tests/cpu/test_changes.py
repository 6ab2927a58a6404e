"""What changed in a tensor, coded and written into another copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.kernels.changes import (
    BLOCK,
    Changes,
    apply_changes,
    changed_words,
    code_changes,
    code_changes_reference,
    is_sound,
    words_of,
)


def pair(words: int, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of words and an earlier one, of which about this share differs."""
    draw = np.random.default_rng(seed)
    now = draw.integers(-(2**15), 2**15, words, dtype=np.int16)
    base = np.where(draw.random(words) < share, now ^ draw.integers(1, 2**15, words, dtype=np.int16), now)
    return torch.from_numpy(now), torch.from_numpy(base)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 2 * BLOCK + 200), st.sampled_from([0.0, 1e-4, 0.01, 0.05, 0.07, 0.5, 0.95, 1.0]), st.integers(0, 99)
)
def test_any_two_tensors(words, share, seed):
    """A change that is lost or written elsewhere: at a block's end, in the last one, in any of the three streams."""
    now, base = pair(words, share, seed)
    changes = code_changes(now, base, torch.empty_like(now))
    reference = code_changes_reference(now, base)
    assert torch.equal(changes.counts, reference.counts) and torch.equal(changes.streams, reference.streams)
    differs = now != base
    assert changes.changed == int(differs.sum()) and is_sound(changes, words)
    assert changes.streams.nbytes <= min(4 * changes.changed, now.nbytes)
    read = [*changed_words(changes, words)]
    places = np.concatenate([each[0] for each in read]) if read else np.empty(0, np.int64)
    if not any(len(each[0]) == BLOCK or len(each[0]) == words % BLOCK for each in read):  # a whole block has all values
        assert np.array_equal(places, differs.numpy().nonzero()[0])
    slow = base.clone()
    for at, values in read:
        slow.numpy()[at] = values
    apply_changes(base, changes)
    assert torch.equal(base, now) and torch.equal(slow, now)


def test_without_kernels(monkeypatch):
    """A machine without a compiler that can publish nothing, or otherwise."""
    now, base = pair(BLOCK + 9, 0.03, 1)
    compiled = code_changes(now, base, torch.empty_like(now))
    monkeypatch.setattr("tandem.kernels.changes.function", lambda *_: None)
    changes = code_changes(now, base, torch.empty_like(now))
    assert torch.equal(changes.streams, compiled.streams)
    apply_changes(base, changes)
    assert torch.equal(base, now)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_that_compare_alike(dtype):
    """A sign of zero or the payload of a NaN that is not sent, since the values compare equal or never do."""
    now = torch.tensor([0.0, -0.0, float("nan"), 1.0], dtype=dtype)
    base = torch.tensor([-0.0, -0.0, float("nan"), 1.0], dtype=dtype)
    changes = code_changes(words_of(now), words_of(base), torch.empty(8, dtype=torch.int16))
    assert changes.changed == 1
    apply_changes(words_of(base), changes)
    assert torch.equal(words_of(base), words_of(now))


@pytest.mark.parametrize(
    "counts, words",
    [([3], 8), ([5, 1], 12), ([-1], 0), ([BLOCK + 1], BLOCK), ([4], 6)],
    ids=["longer", "of two blocks", "negative", "more than a block has", "shorter"],
)
def test_changes_that_can_be_of_no_such_tensor(counts, words):
    """A damaged count by which values are written beyond the tensor."""
    changes = Changes(torch.tensor(counts, dtype=torch.int32), torch.zeros(words, dtype=torch.int16))
    assert not is_sound(changes, BLOCK)
    with pytest.raises(AssertionError):
        apply_changes(torch.zeros(BLOCK, dtype=torch.int16), changes)


def test_counts_that_cancel_out():
    """A negative count made up for by another block's, by which values are read from before the stream."""
    changes = Changes(torch.tensor([-1, 1], dtype=torch.int32), torch.zeros(0, dtype=torch.int16))
    assert not is_sound(changes, 2 * BLOCK)
