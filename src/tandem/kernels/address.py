"""What a compiled kernel takes for granted of a tensor, looked at before it gets the address: C++ cannot.

Asserts, with the numbers: a caller in this package is wrong where one fails. A tensor takes 0.5 us, the range of
ids 2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def address(tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> int | None:
    """Of a tensor of this dtype and shape, contiguous and beside the CPU; null for None."""
    if tensor is None:
        return None
    right = tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.is_cpu
    assert right, f"{_told(tensor)} where a kernel takes {dtype} {list(shape)}, contiguous, cpu"
    return tensor.data_ptr()


def rows_address(tensor: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """`address` of rows, each contiguous, that lie stride(0) apart."""
    within_row = (1,) if len(shape) == 2 else (shape[2], 1)
    right = tensor.dtype == dtype and tensor.shape == shape and tensor.stride()[1:] == within_row and tensor.is_cpu
    assert right, f"{_told(tensor)} where a kernel takes rows of {dtype} {list(shape)}, each contiguous, cpu"
    return tensor.data_ptr()


def _told(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}, strides {list(tensor.stride())}, {tensor.device}"


def check_range(ids: Tensor, size: int, what: str) -> None:
    """That every one of `ids` is in [0, size), where they are beside the CPU; on a device it would be waited for."""
    if ids.is_cpu and ids.numel():
        low, high = torch.aminmax(ids)
        assert 0 <= int(low) and int(high) < size, f"{what} {int(low)} to {int(high)}, outside 0 to {size - 1}"
