"""Matrix products against fp64, and the same bits for a row whatever rows ride along.

Tolerances: a sum of K products in fp32, in any order, errs by at most K 2^-24 sum |x||w| (Higham, Accuracy and
Stability, 3.1; products of bf16 are exact). A few more roundings: bias, residual, fp32 store. Rounding to bf16
adds 2^-8 of the result, once for the product and once for the sum where there is a residual.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandem.kernels.linear import linear, logits
from tandem.kernels.weight import Weight
from tandem.numerics.compare import same_bits

STORE = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
DTYPES = [torch.float32, torch.bfloat16]
SIZES = st.one_of(st.integers(1, 20), st.sampled_from([31, 63, 64, 65, 96, 127, 128, 130, 200]))


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def within(got: Tensor, wanted: Tensor, bound: Tensor) -> None:
    excess = (got.double() - wanted).abs() - bound * 1.01 - 1e-37
    worst = int(excess.argmax())
    assert bool((excess <= 0).all()), (got.flatten()[worst].item(), wanted.flatten()[worst].item(), excess.max().item())


def trained(value: Tensor, *, matrix: bool) -> Weight:
    weight = Weight(value, matrix=matrix)
    weight.grad = torch.zeros(value.shape)
    return weight


@settings(max_examples=60)
@given(rows=SIZES, columns=SIZES, depth=SIZES, seed=st.integers(0, 99), options=st.tuples(*[st.booleans()] * 2))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_and_gradients(any_path, dtype, rows, columns, depth, seed, options):
    """A tail of rows, columns or depth dropped or counted twice; a bias, residual or gradient left out or doubled."""
    x = normal(rows, depth, dtype=dtype, seed=seed).requires_grad_()
    weight = trained(normal(columns, depth, dtype=dtype, seed=seed + 1), matrix=True)
    bias = trained(normal(columns, dtype=dtype, seed=seed + 2), matrix=False) if options[0] else None
    residual = normal(rows, columns, dtype=dtype, seed=seed + 3).requires_grad_() if options[1] else None
    dy = normal(rows, columns, dtype=dtype, seed=seed + 4)
    y = linear(x, weight, bias, residual)
    y.backward(dy)

    unit, x64, w64, dy64 = STORE[dtype], x.detach().double(), weight.value.double(), dy.double()
    sums = x64.abs() @ w64.abs().T
    wanted = x64 @ w64.T
    if bias is not None:
        wanted, sums = wanted + bias.value.double(), sums + bias.value.double().abs()
    bound = (depth + 4) * 2.0**-24 * sums + unit * wanted.abs()
    if residual is not None:
        wanted = wanted + residual.detach().double()
        bound = bound + unit * wanted.abs() + 2.0**-24 * wanted.abs()
    assert y.dtype == dtype
    within(y, wanted, bound * (1 + unit))

    dx = dy64 @ w64
    within(x.grad, dx, (columns + 4) * 2.0**-24 * (dy64.abs() @ w64.abs()) + unit * dx.abs())
    within(weight.grad, dy64.T @ x64, (rows + 4) * 2.0**-24 * (dy64.abs().T @ x64.abs()))
    if bias is not None:
        within(bias.grad, dy64.sum(0), (rows + 4) * 2.0**-24 * dy64.abs().sum(0))
    if residual is not None:
        assert same_bits(residual.grad, dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_add_up(any_path, dtype):
    """A second microbatch's gradient replaces the first one's."""
    weight = trained(normal(70, 33, dtype=dtype, seed=0), matrix=True)
    x, dy = normal(9, 33, dtype=dtype, seed=1).requires_grad_(), normal(9, 70, dtype=dtype, seed=2)
    linear(x, weight).backward(dy)
    once = weight.grad.clone()
    linear(x, weight).backward(dy)
    assert same_bits(weight.grad, 2 * once)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_is_not_rounded(any_path, dtype):
    """Logits pass through bf16 on their way to fp32."""
    x, weight = normal(7, 50, dtype=dtype, seed=0), Weight(normal(131, 50, dtype=dtype, seed=1), matrix=True)
    wanted = x.double() @ weight.value.double().T
    out = logits(x, weight)
    assert out.dtype == torch.float32
    within(out, wanted, 54 * 2.0**-24 * (x.double().abs() @ weight.value.double().abs().T))


@settings(max_examples=60)
@given(rows=st.integers(2, 40), columns=SIZES, depth=SIZES, start=st.integers(0, 39), count=st.integers(1, 12))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_alone_equals_row_among_many(kernel_path, dtype, rows, columns, depth, start, count):
    """The number of rows, their place in a tile or their stride changes a row's bits."""
    x = normal(rows, depth + 3, dtype=dtype, seed=rows)[:, 1 : depth + 1]
    weight = Weight(normal(columns, depth, dtype=dtype, seed=7), matrix=True)
    residual = normal(rows, columns, dtype=dtype, seed=8)
    chosen = slice(min(start, rows - 1), min(start, rows - 1) + count)
    whole = linear(x, weight, None, residual)
    assert same_bits(whole[chosen], linear(x[chosen].contiguous(), weight, None, residual[chosen].contiguous()))
    assert same_bits(logits(x, weight)[chosen], logits(x[chosen].clone(), weight))


def test_repack_follows_the_value(any_path):
    """The products go on reading the weights of before an update."""
    weight = Weight(normal(65, 20, dtype=torch.float32, seed=0), matrix=True)
    x = normal(3, 20, dtype=torch.float32, seed=1)
    before = linear(x, weight)
    weight.value.mul_(2)
    weight.repack()
    assert same_bits(linear(x, weight), 2 * before)
