"""Which kernel computes: Triton or this processor's. Of these an operation runs C++, or where `build.load.kernel` has
none for its dtype the PyTorch reference beside it."""

from __future__ import annotations

import functools
from typing import Literal

import torch

from tandem import env
from tandem.kernels.build.load import SUFFIX, library

Backend = Literal["cpp", "triton", "reference"]
_COMPILED = frozenset(getattr(torch, name.removeprefix("torch.")) for name in SUFFIX)


@functools.cache
def _asked() -> str:
    return env.kernels()


def backend(tensor: torch.Tensor) -> Backend:
    """What computes on `tensor`: Triton on a GPU, or where TANDEM_KERNELS asks; else C++; else PyTorch's reference.

    On the CPU TANDEM_KERNELS=reference rules the C++ out.
    """
    if tensor.is_cuda or _asked() == "triton":
        return "triton"
    return "cpp" if tensor.dtype in _COMPILED and library("linear") is not None else "reference"
