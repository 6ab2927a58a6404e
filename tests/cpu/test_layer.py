"""Norm, rotation, page writes and SwiGLU against fp64 and autograd.

Tolerances: E = 2^-24 a rounding in fp32, U one to the compute dtype (2^-24 or, for bf16, 2^-8). A mean of M squares
has a relative error of at most (M + 2) E, its root half of it; products add an E each. Gradients are bounded by the
same counts times the sum of the magnitudes of their terms. exp errs by 1.02 x 2^-23 (vector.h).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandem.kernels.norm import rms_norm
from tandem.kernels.rotary import rotate_, store_
from tandem.kernels.swiglu import swiglu, swiglu_down
from tandem.kernels.weight import Weight
from tandem.numerics.compare import same_bits

E = 2.0**-24
STORE = {torch.float32: E, torch.bfloat16: 2.0**-8}
DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 128, 200, 576]))
ROWS = st.one_of(st.integers(1, 12), st.sampled_from([63, 64, 65, 130]))


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def within(got: Tensor, wanted: Tensor, bound: Tensor) -> None:
    excess = (got.double() - wanted).abs() - 1.05 * bound - 1e-37
    assert bool((excess <= 0).all()), (excess.max().item(), bound.max().item())


@settings(max_examples=40)
@given(rows=ROWS, width=WIDTHS, eps=st.sampled_from([1e-6, 1e-5, 0.1]), seed=st.integers(0, 99))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(any_path, dtype, rows, width, eps, seed):
    """eps outside the root, a mean over the padding, a gradient without its mean term or a block of rows left out."""
    x = normal(rows, width, dtype=dtype, seed=seed).requires_grad_()
    weight = Weight(normal(width, dtype=dtype, seed=seed + 1), matrix=False)
    weight.grad = torch.ones(width)
    dy = normal(rows, width, dtype=dtype, seed=seed + 2)
    y = rms_norm(x, weight, eps)
    y.backward(dy)

    unit, x64, dy64 = STORE[dtype], x.detach().double().requires_grad_(), dy.double()
    w64 = weight.value.double().requires_grad_()
    wanted = torch.nn.functional.rms_norm(x64, (width,), w64, eps)
    dx, dw = torch.autograd.grad(wanted, (x64, w64), dy64)
    relative = (width / 2 + 8) * E
    within(y.detach(), wanted.detach(), (relative + unit) * wanted.detach().abs())
    with torch.no_grad():
        r = (x64.square().mean(-1, keepdim=True) + eps).rsqrt()
        xhat, direct = x64 * r, (dy64 * w64).abs()
        spread = direct + xhat.abs() * (direct * xhat.abs()).mean(-1, keepdim=True)
        within(x.grad, dx, (3 * relative + 2 * width * E) * r * spread + unit * dx.abs())
        within(weight.grad - 1, dw, (relative + (rows + 4) * E) * ((dy64 * xhat).abs().sum(0) + 1 + dw.abs()))
    with torch.no_grad():
        assert same_bits(rms_norm(x, weight, eps), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_rows_do_not_depend_on_others(kernel_path, dtype):
    """A row's norm changes with the number of rows or their stride."""
    x = normal(70, 100, dtype=dtype, seed=0)
    weight = Weight(normal(97, dtype=dtype, seed=1), matrix=False)
    whole = rms_norm(x[:, 2:99], weight, 1e-5)
    for row in (0, 1, 33, 69):
        assert same_bits(whole[row : row + 1], rms_norm(x[row : row + 1, 2:99].contiguous(), weight, 1e-5))


@settings(max_examples=40)
@given(
    rows=st.integers(1, 30),
    heads=st.integers(1, 5),
    half=st.sampled_from([1, 3, 8, 16, 32, 64]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation(any_path, dtype, rows, heads, half, seed):
    """Neighbours rotated in place of halves, the wrong way, by another row's position, or past the heads given."""
    fused = normal(rows, heads + 2, 2 * half, dtype=dtype, seed=seed)
    before = fused.clone()
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 50, (rows,), generator=generator)
    angles = torch.rand(50, half, generator=generator) * 100
    cos, sin = angles.cos(), angles.sin()
    rotate_(fused[:, 1 : heads + 1], positions, cos, sin)

    turn = torch.complex(cos.double(), sin.double())[positions][:, None]
    low, high = before[:, 1 : heads + 1].double().chunk(2, -1)
    turned = torch.complex(low, high) * turn
    wanted = torch.cat((turned.real, turned.imag), -1)
    size = (low.square() + high.square()).sqrt().repeat(1, 1, 2)
    within(fused[:, 1 : heads + 1], wanted, 4 * E * size + STORE[dtype] * wanted.abs())
    assert same_bits(fused[:, 0], before[:, 0]) and same_bits(fused[:, -1], before[:, -1])

    rotate_(fused[:, 1 : heads + 1], positions, cos, sin, sign=-1.0)
    back = before[:, 1 : heads + 1].double()
    within(fused[:, 1 : heads + 1], back, 20 * E * size + 3 * STORE[dtype] * size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_backwards_is_its_gradient(any_path, dtype):
    """The learner turns gradients the same way as rows: it must undo the rotation, not repeat it."""
    x = normal(6, 2, 16, dtype=torch.float64, seed=0).requires_grad_()
    positions, angles = torch.arange(6), torch.rand(6, 8, generator=torch.Generator().manual_seed(1)) * 6
    low, high = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    c, s = cos.double()[:, None], sin.double()[:, None]
    dy = normal(6, 2, 16, dtype=dtype, seed=2)
    (wanted,) = torch.autograd.grad(torch.cat((low * c - high * s, high * c + low * s), -1), x, dy.double())
    grad = dy.clone()
    rotate_(grad, positions, cos, sin, sign=-1.0)
    within(grad, wanted, (4 * E + STORE[dtype]) * (1 + dy.double().abs().max()) * torch.ones_like(wanted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_store(any_path, dtype):
    """Keys written to another slot, from a row's wrong end, or over their neighbours."""
    rows = normal(5, 6, 8, dtype=dtype, seed=0)
    pool = torch.zeros(20, 2, 8, dtype=dtype)
    slots = torch.tensor([7, 0, 19, 3, 12])
    store_(rows[:, 3:5], slots, pool)
    wanted = torch.zeros(20, 2, 8, dtype=dtype)
    for row, slot in enumerate(slots.tolist()):
        wanted[slot] = rows[row, 3:5]
    assert same_bits(pool, wanted)


@settings(max_examples=40)
@given(rows=st.integers(1, 20), ff=WIDTHS, width=st.integers(1, 70), seed=st.integers(0, 99))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_and_its_half_of_the_layer(any_path, dtype, rows, ff, width, seed):
    """Gate and up swapped, silu's own slope left out of its gradient, the residual or its gradient dropped."""
    gate_up = (3 * normal(rows, 2 * ff, dtype=torch.float32, seed=seed)).to(dtype).requires_grad_()
    weight = Weight(normal(width, ff, dtype=dtype, seed=seed + 1), matrix=True)
    weight.grad = torch.zeros(width, ff)
    residual = normal(rows, width, dtype=dtype, seed=seed + 2).requires_grad_()
    dy = normal(rows, width, dtype=dtype, seed=seed + 3)
    unit = STORE[dtype]

    wide = gate_up.detach().double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    act = torch.nn.functional.silu(gate) * up
    with torch.no_grad():
        within(swiglu(gate_up), act, (16 * E + unit) * act.abs())
    out = swiglu_down(gate_up, weight, residual)
    out.backward(dy)

    w64, dy64 = weight.value.double(), dy.double()
    total = act @ w64.T + residual.detach().double()
    with torch.no_grad():
        sums = act.abs() @ w64.abs().T
        product_error = ((ff + 20) * E + unit) * sums + unit * (act @ w64.T).abs()
        within(out, total, product_error + (unit + E) * total.abs())
    dact = dy64 @ w64
    (wanted,) = torch.autograd.grad(act, wide, dact)
    with torch.no_grad():
        dact_error = (width + 2) * E * (dy64.abs() @ w64.abs()) + unit * dact.abs()
        # d(silu) = sigmoid (1 + gate (1 - sigmoid)): bounded by 1.1, its terms by 1 + |gate| sigmoid (1 - sigmoid).
        sigmoid = gate.sigmoid()
        slope = up.abs() * (sigmoid + (gate * sigmoid).abs() * (1 - sigmoid))
        bound = torch.cat((slope, torch.nn.functional.silu(gate).abs()), -1)
        error = (16 * E * dact.abs() + dact_error).repeat(1, 2) * bound + unit * wanted.abs()
        # 1 - sigmoid loses E where sigmoid is near 1.
        error[:, :ff] += 4 * E * (dact * up * gate).abs()
        within(gate_up.grad, wanted, error)
        weight_sums = dy64.abs().T @ act.abs()
        within(weight.grad, dy64.T @ act, ((rows + 20) * E + unit) * weight_sums)
    assert same_bits(residual.grad, dy)
