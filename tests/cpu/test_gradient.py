"""Gradients of a product against fp64, where groups, chunks of the depth and shares of threads end.

Tolerances: a sum of K products in fp32, in any order, errs by at most K 2^-24 sum |x||w| (Higham, Accuracy and
Stability, 3.1); the input's gradient is rounded once to the compute dtype, by at most 2^-8 of itself.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandem.kernels.gradient import accumulate, accumulate_reference, input_gradient, input_gradient_reference
from tandem.kernels.weight import Weight
from tandem.numerics.compare import same_bits

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
DTYPES = [torch.float32, torch.bfloat16]
GROUP, CHUNK = 96, 1024  # of gradient.h


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: Tensor, wanted: Tensor, bound: Tensor) -> None:
    excess = (got.double() - wanted).abs() - 1.01 * bound - 1e-37
    assert bool((excess <= 0).all()), (excess.max().item(), bound.max().item())


def compare(rows: int, columns: int, depth: int, dtype: torch.dtype) -> None:
    """Rows may be strided, as the parts of a fused projection are."""
    dy = drawn(rows, columns + 3, dtype=dtype, seed=rows)[:, 2 : columns + 2]
    x = drawn(rows, depth + 5, dtype=dtype, seed=columns)[:, 1 : depth + 1]
    weight = Weight(drawn(columns, depth, dtype=dtype, seed=depth), matrix=True)
    before = drawn(columns, depth, dtype=torch.float32, seed=3)
    grad, other = before.clone(), before.clone()
    accumulate(grad, dy, x)
    sums = dy.double().abs().T @ x.double().abs() + before.double().abs()
    wanted, bound = before.double() + dy.double().T @ x.double(), (rows + 4) * 2.0**-24 * sums
    close(grad, wanted, bound)
    accumulate_reference(other, dy, x)
    close(other, wanted, bound)
    wanted, sums = dy.double() @ weight.value.double(), dy.double().abs() @ weight.value.double().abs()
    bound = (columns + 4) * 2.0**-24 * sums + UNIT[dtype] * wanted.abs()
    close(input_gradient(dy, weight), wanted, bound)
    close(input_gradient_reference(dy, weight.value), wanted, bound)


@settings(max_examples=40)
@given(
    rows=st.one_of(st.integers(1, 70), st.integers(CHUNK - 2, CHUNK + 70)),
    columns=st.one_of(st.integers(1, 70), st.integers(GROUP - 2, GROUP + 40)),
    depth=st.one_of(st.integers(1, 70), st.integers(126, 130)),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(any_path, dtype, rows, columns, depth):
    """A strip, group or chunk that is not whole is dropped, counted twice or filled with what lay there."""
    compare(rows, columns, depth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_enter(dtype):
    """A share of the threads begins in a group that it did not bring along, or sums in another order."""
    x, dy = drawn(1100, 200, dtype=dtype, seed=0), drawn(1100, 250, dtype=dtype, seed=1)
    weight, threads, found = Weight(drawn(250, 200, dtype=dtype, seed=2), matrix=True), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            grad = torch.zeros(250, 200)
            accumulate(grad, dy, x)
            found.append((grad, input_gradient(dy, weight)))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(got, wanted) for pair in found for got, wanted in zip(pair, found[0], strict=True))
