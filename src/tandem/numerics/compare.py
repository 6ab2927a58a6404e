"""How far apart two tensors are, in the terms that tests and `tandem doctor` report."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two tensors with one shape and dtype. NaN equals NaN here, and anything against NaN is infinitely far.

    >>> difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])).max_abs
    0.5
    """

    count: int  # elements
    differing_bits: int  # elements whose bits differ (+0 and -0 do; NaN payloads do)
    max_abs: float
    max_rel: float  # |a - b| / max(|a|, |b|)
    max_ulp: int  # representable numbers between a and b; -1 for integer tensors and where only one of them is NaN
    worst: tuple[int, ...]  # index of max_abs; () where there is no element

    @property
    def same_bits(self) -> bool:
        return self.differing_bits == 0

    def __str__(self) -> str:
        if self.same_bits:
            return f"{self.count} elements, same bits"
        return (
            f"{self.differing_bits} of {self.count} elements differ: max abs {self.max_abs:.3g}, "
            f"max rel {self.max_rel:.3g}, max ulp {self.max_ulp}, worst at {self.worst}"
        )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True where shape, dtype and every bit agree."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bits(a), _bits(b))


def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """Representable numbers between a and b, elementwise (int64); +0 and -0 are 0 apart. NaN is not allowed."""
    assert a.dtype == b.dtype and a.dtype in _INTEGER, (a.dtype, b.dtype)
    assert not bool(a.isnan().any()) and not bool(b.isnan().any()), "NaN has no distance"
    return (_rank(a) - _rank(b)).abs()


def difference(a: Tensor, b: Tensor) -> Difference:
    """Compare two tensors of one shape and dtype."""
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    a, b = a.detach().cpu(), b.detach().cpu()
    differing = int((_bits(a) != _bits(b)).sum())
    if a.numel() == 0 or differing == 0:
        return Difference(a.numel(), differing, 0.0, 0.0, 0, ())
    x, y = a.to(torch.float64), b.to(torch.float64)
    equal = (x == y) | (x.isnan() & y.isnan())
    absolute = torch.where(equal, 0.0, (x - y).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
    largest = torch.maximum(x.abs(), y.abs())
    relative = torch.where(equal, 0.0, absolute / largest).nan_to_num(nan=float("inf"), posinf=float("inf"))
    ulp = -1
    if a.dtype in _INTEGER and not bool((x.isnan() ^ y.isnan()).any()):
        numbers = ~x.isnan()
        ulp = int(ulp_distance(a[numbers], b[numbers]).max()) if bool(numbers.any()) else 0
    index = torch.unravel_index(absolute.argmax(), absolute.shape)
    return Difference(
        a.numel(), differing, float(absolute.max()), float(relative.max()), ulp, tuple(int(i) for i in index)
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_INTEGER[tensor.dtype]) if tensor.dtype in _INTEGER else tensor


def _rank(tensor: Tensor) -> Tensor:
    """Place of each number in the order of its format, as int64: neighbours differ by one."""
    bits = _bits(tensor).to(torch.int64)
    width = tensor.element_size() * 8
    return torch.where(bits < 0, -(bits + (1 << (width - 1))) if width < 64 else -(bits & ((1 << 63) - 1)), bits)
