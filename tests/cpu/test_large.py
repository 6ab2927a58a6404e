"""Memory cut from chunks."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tandem.kernels import large as module
from tandem.kernels.large import LEAST_BYTES, large, release_memory
from tandem.plan.memory import resident_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn])
def test_tensors_do_not_overlap(dtype: torch.dtype) -> None:
    """Two weights in one place, or one that a step writes beyond."""
    count = LEAST_BYTES // dtype.itemsize
    made = [large(3, count + i, dtype=dtype) for i in range(200)]
    for number, tensor in enumerate(made):
        assert tensor.data_ptr() % 64 == 0 and tensor.dtype == dtype and tensor.shape == (3, count + number)
        tensor.view(torch.uint8).fill_(number)
    assert all(bool((tensor.view(torch.uint8) == number).all()) for number, tensor in enumerate(made))
    assert large(5, dtype=dtype).shape == (5,) and large(64 << 20, dtype=torch.uint8).shape == (64 << 20,)


@given(st.lists(st.integers(1, 3 * LEAST_BYTES), min_size=1, max_size=12))
def test_zeros_are_zero(sizes: list[int]) -> None:
    """Weights that are not loaded yet multiply by what another tensor left in the memory."""
    dirty = [large(size, dtype=torch.uint8).fill_(7) for size in sizes]
    zeros = [large(size, dtype=torch.uint8, zero=True) for size in sizes]
    assert not any(bool(tensor.any()) for tensor in zeros) and all(bool((tensor == 7).all()) for tensor in dirty)
    del dirty
    assert not any(bool(large(size, dtype=torch.uint8, zero=True).any()) for size in sizes)


@given(st.lists(st.tuples(st.integers(1, 3 * LEAST_BYTES), st.booleans()), min_size=1, max_size=12))
def test_what_is_given_back_is_zero_and_nothing_else(drawn: list[tuple[int, bool]]) -> None:
    """A neighbour that loses its beginning, or a tensor whose ends keep what they held."""
    made = [large(size, dtype=torch.uint8).fill_(7) for size, _ in drawn]
    release_memory(tensor for tensor, (_, given_) in zip(made, drawn, strict=True) if given_)
    for tensor, (_, given_) in zip(made, drawn, strict=True):
        assert bool((tensor == (0 if given_ else 7)).all())


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux alone")
def test_given_back_is_free() -> None:
    """Gradients and pages that stay with the process while the other side works."""
    made = [large(24 << 20, dtype=torch.uint8).fill_(1) for _ in range(4)]
    before = resident_bytes()
    release_memory(made)
    assert before - resident_bytes() > 90 << 20
    assert all(bool((tensor == 0).all()) for tensor in made)


def test_a_chunk_lives_as_long_as_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor whose chunk was given back: a crash, or another's numbers."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 8 * LEAST_BYTES)
    kept = []
    for number in range(40):
        tensor = large(LEAST_BYTES, dtype=torch.uint8).fill_(number)
        if number % 7 == 0:
            kept.append(tensor)
    gc.collect()
    assert [tensor.unique().tolist() for tensor in kept] == [[number] for number in range(0, 40, 7)]
