"""GPTQ against the recursion that it is derived from, by hand, and where its inputs are nothing or nonsense."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tandem.errors import NonFiniteError
from tandem.numerics.blocks import FORMATS, WHOLE_ROW, Format, block_scales, dequantise, quantise
from tandem.numerics.elements import Fixed
from tandem.numerics.gptq import DAMP, LAZY, by_input, factor, gptq

INT4 = Format("int4_row", Fixed("int4", 4, 0), WHOLE_ROW, "fp32")


def inputs(rows: int, width: int, seed: int = 0) -> Tensor:
    """Correlated, and of unequal sizes."""
    drawn = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, width, generator=drawn) @ torch.randn(width, width, generator=drawn)
    return mixed * torch.rand(width, generator=drawn).add(0.05) / width**0.5


def obq(weight_NK: Tensor, hessian_KK: Tensor, form: Format, order: list[int]) -> Tensor:
    """Optimal brain quantisation (Frantar and Alistarh, 2208.11580) in a fixed order, fp64: round an input, take its
    error off all that are left by the inverse of their own H, and strike the input out of that inverse."""
    w, blocks = weight_NK.double().clone(), quantise(weight_NK, form)
    grid = form.element.values().double()
    scales_GN, _ = by_input(blocks, form, len(w))
    inverse = torch.linalg.inv(hessian_KK.double())
    left = list(order)
    for j in order:
        group = 0 if form.block <= 0 else j // form.block
        scale_N = scales_GN[group].double()
        known = grid[(grid.abs() <= form.element.largest) & grid.isfinite()]
        nearest = (w[:, j, None] / scale_N[:, None].where(scale_N[:, None] > 0, torch.inf) - known).abs().argmin(1)
        value = known[nearest] * scale_N
        left.remove(j)
        error = (w[:, j] - value) / inverse[j, j]
        w[:, j] = value
        for k in left:
            w[:, k] -= error * inverse[j, k]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return w.float()


@pytest.mark.parametrize("name", ["int4_g32", "mxfp4", "nvfp4", "nvfp4_four_six", "fp8_tensor", "fp8_128x128"])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "by size"])
def test_equals_the_recursion(name: str, act_order: bool) -> None:
    """Errors are carried to other inputs than the recursion carries them, behind a block of LAZY inputs too."""
    width, form = LAZY + 20, FORMATS[name]
    x = inputs(400, width)
    hessian = x.T @ x
    weight = torch.randn(6, width, generator=torch.Generator().manual_seed(3))
    damped = hessian + DAMP * hessian.diagonal().mean() * torch.eye(width)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else torch.arange(width)
    wanted = obq(weight, damped, form, order.tolist())
    blocks = gptq(weight, factor(hessian, act_order=act_order), form)
    torch.testing.assert_close(dequantise(blocks, form), wanted, rtol=1e-6, atol=1e-7)
    assert torch.equal(blocks.scales, quantise(weight, form).scales)


def test_by_hand() -> None:
    """The error of the first input is not made up for by the second one, which is its neighbour alone."""
    # Scale 1. 2.4 becomes 2; of the 0.4 that are lost, H01 / H11 = 1.5 times as much goes to the second: 3.2 + 0.6.
    weight = torch.tensor([[2.4, 3.2, 7.0]])
    hessian = torch.tensor([[4.0, 1.5, 0.0], [1.5, 1.0, 0.0], [0.0, 0.0, 1.0]])
    found = factor(hessian, act_order=False, damp=1e-7)
    assert dequantise(gptq(weight, found, INT4), INT4).tolist() == [[2.0, 4.0, 7.0]]
    assert dequantise(quantise(weight, INT4), INT4).tolist() == [[2.0, 3.0, 7.0]]


def test_zero_points() -> None:
    """A zero point is counted twice, or codes leave the range of an asymmetric format."""
    x, form = inputs(200, 64), FORMATS["int4_g32_asym"]
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(4)) + 0.7
    blocks = gptq(weight, factor(x.T @ x), form)
    assert int(blocks.codes.max()) <= 15
    error, nearest = (x @ (dequantise(one, form) - weight).T for one in (blocks, quantise(weight, form)))
    assert float(error.norm()) < 0.8 * float(nearest.norm())
    plain = gptq(weight, factor(torch.eye(64)), form)  # no neighbours
    assert torch.equal(plain.codes, quantise(weight, form).codes)


def test_what_is_never_given_is_rounded_to_nearest() -> None:
    """An input that is always 0 is set to 0, or divides by 0; with none but such, nothing is rounded."""
    x, form = inputs(300, 96), FORMATS["int4_g32"]
    x[:, [5, 40]] = 0.0
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(5))
    nearest = dequantise(quantise(weight, form), form)
    made = dequantise(gptq(weight, factor(x.T @ x), form), form)
    assert torch.equal(made[:, [5, 40]], nearest[:, [5, 40]]) and not torch.equal(made, nearest)
    assert torch.equal(dequantise(gptq(weight, factor(torch.zeros(96, 96)), form), form), nearest)
    zero = gptq(torch.zeros(4, 96), factor(x.T @ x), form)
    assert not bool(zero.codes.any()) and not bool(block_scales(zero, form).any())


def test_moments_that_are_none() -> None:
    """A matrix that is no matrix of second moments ends in an infinite weight; a little short of one is damped."""
    with pytest.raises(NonFiniteError, match="not finite"):
        factor(torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]))
    with pytest.raises(NonFiniteError, match="not positive definite, with 10 times"):
        factor(torch.tensor([[1.0, 20.0], [20.0, 1.0]]))
    assert factor(torch.tensor([[1.0, 1.05], [1.05, 1.0]])).damp == pytest.approx(0.1)
    one = torch.ones(300, 1) * torch.randn(300, 1, generator=torch.Generator().manual_seed(6))
    alike = one.expand(300, 48)  # of rank 1
    weight = torch.randn(3, 48, generator=torch.Generator().manual_seed(7))
    blocks = gptq(weight, factor(alike.T @ alike), INT4)
    error, nearest = ((dequantise(b, INT4) - weight).sum(1).abs() for b in (blocks, quantise(weight, INT4)))
    assert float(error.max()) < 0.3 * float(nearest.max())
