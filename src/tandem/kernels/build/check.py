"""The comparison that a compiled library must pass when it is first loaded: `load` runs it and keeps the mark.

What to compare is registered in CHECKS from above (`kernels/selfcheck.py`), so that building knows no operation; but
the micro-kernel's own check, which comes before all others, is here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.errors import KernelError
from tandem.kernels.build.toolchain import compiler, processor_name

E = 2.0**-24


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """What came out and what should have.

    >>> Comparison("sums", torch.ones(2), torch.tensor([1.0, 1.5]), 0.25).excess
    0.25
    """

    what: str
    got: Tensor
    wanted: Tensor
    bound: Tensor | float = 0.0  # of |got - wanted|, element by element

    @property
    def difference(self) -> float:
        return float((self.got.double() - self.wanted.double()).abs().max())

    @property
    def excess(self) -> float:
        """How far the worst element lies outside its bound; NaN where something is not finite."""
        return float(((self.got.double() - self.wanted.double()).abs() - self.bound).max())


CHECKS: dict[str, Callable[[], Iterable[Comparison]]] = {"unit": tuple}  # library -> check; `check_unit` came before


def check(name: str, unit: str) -> None:
    """KernelError where the library `name` fails."""
    assert name in CHECKS, f"{name}.cpp is not checked yet: import tandem.kernels.selfcheck, which knows how"
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        _judge(name, unit, CHECKS[name]())


def check_unit(loaded: ctypes.CDLL, unit: str) -> None:
    """`check` of unit.cpp, which all other libraries share the micro-kernel of."""
    _judge("unit", unit, _products(loaded))


def _judge(name: str, unit: str, comparisons: Iterable[Comparison]) -> None:
    for each in comparisons:
        if not each.excess <= 0:
            raise KernelError(
                f"the kernel {name}.cpp, compiled by {compiler() or 'an earlier compiler'}, fails its self-check "
                f"on {processor_name()} ({unit}): {each.what} is off by {each.difference:.3g}. Report this line; "
                "meanwhile TANDEM_KERNELS=reference runs the slow PyTorch kernels."
            )


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _products(loaded: ctypes.CDLL) -> Iterator[Comparison]:
    """Depths with and without a rest of 32 inputs; rows that fill tiles, and do not; sums that go on."""
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loaded.multiply_bf16.argtypes = [pointer, size, size, pointer, size, pointer, size]

    def multiply(x_TK: Tensor, panel: Tensor, out: Tensor, add: int) -> None:
        pointers = (x_TK.data_ptr(), x_TK.stride(0), len(x_TK), panel.data_ptr(), x_TK.shape[1], out.data_ptr(), add)
        loaded.multiply_bf16(*pointers)

    for depth in (64, 582):
        x_TK, weight_NK = (normal(n, depth, dtype=torch.bfloat16, seed=n) for n in (45, 64))
        panel = weight_NK.view(64, depth // 2, 2).transpose(0, 1).contiguous()
        wanted, sums = x_TK.double() @ weight_NK.double().T, x_TK.double().abs() @ weight_NK.double().abs().T
        out, alone = torch.empty(45, 64), torch.empty(1, 64)
        multiply(x_TK, panel, out, 0)
        yield Comparison(f"a product of depth {depth}", out, wanted, (depth + 4) * E * sums)
        for row in (0, 17, 44):
            multiply(x_TK[row : row + 1], panel, alone, 0)
            yield Comparison("a row alone", alone[0], out[row])
        multiply(x_TK, panel, out, 1)
        yield Comparison("a sum that goes on", out, 2 * wanted, (3 * depth + 8) * E * sums)
