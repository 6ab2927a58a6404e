"""Memory cut from chunks."""

from __future__ import annotations

import gc

import pytest
import torch

from tandem.kernels import large as module
from tandem.kernels.large import LEAST_BYTES, large


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
