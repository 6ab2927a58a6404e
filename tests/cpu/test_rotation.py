"""Scales and rotations of a matrix's inputs: by loops, by hand, and as orthogonal as they say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tandem.errors import ConfigError
from tandem.numerics.blocks import FORMATS, Format, rounded
from tandem.numerics.elements import Fixed
from tandem.numerics.rotation import cayley_step, hadamard_matrix, random_hadamard, random_orthogonal
from tandem.numerics.scaling import ENDS, LEAST, STEPS, awq_scales, clipped, cost, smooth_scales


def outliers(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Inputs of which a few are large, and a matrix."""
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=drawn)
    x[:, :3] *= 30.0
    return x, torch.randn(5, width, generator=drawn) * 0.05


def error_of(x: Tensor, weight: Tensor, made: Tensor) -> float:
    return float((x.double() @ (made - weight).double().T).square().sum())


@pytest.mark.parametrize("name", ["int4_g32", "nvfp4", "int4_g32_asym"])
def test_awq_takes_what_errs_least_on_the_inputs(name: str) -> None:
    """Another exponent than the one of the least squared error of the outputs, found here by running all of them."""
    form, (x, weight) = FORMATS[name], outliers(200, 64)
    mean = x.abs().mean(0)
    errors = []
    for step in range(STEPS):
        s = torch.tensor([max(float(one), LEAST) ** (step / STEPS) for one in mean])
        s = s / math.sqrt(float(s.max()) * float(s.min()))
        errors.append(error_of(x / s, weight * s, rounded(weight * s, form)))
    s, exponent = awq_scales(weight, x.T @ x, mean, form)
    assert exponent == errors.index(min(errors)) / STEPS > 0
    assert min(errors) < 0.7 * errors[0]  # without scales
    error = rounded(weight * s, form) / s - weight
    assert cost(error, x.T @ x) == pytest.approx(min(errors), rel=1e-4)


@pytest.mark.parametrize("name", ["int4_g32", "nvfp4", "int4_g32_asym"])
def test_ends_of_each_block_by_itself(name: str) -> None:
    """A block's end is brought in although its own outputs get worse, or a row takes another row's."""
    form, (x, weight) = FORMATS[name], outliers(100, 70)  # ragged
    weight[2, 5] = 0.9  # of which most is worth cutting off
    made, size = clipped(weight, x.T @ x, form), form.block
    for row in range(len(weight)):
        for start in range(0, 70, size):
            block, own = slice(start, start + size), weight[row : row + 1, start : start + size]
            low, high = min(float(own.min()), 0.0), max(float(own.max()), 0.0)
            if not form.zero_point:
                low, high = -max(-low, high), max(-low, high)
            held = form.scale == "e4m3" and high == float(weight.abs().max())
            tries = [own] if held else [own.clamp(low * share, high * share) for share in ENDS]
            whole = weight.clone()
            errors = []
            for one in tries:
                whole[row : row + 1, block] = one  # nvfp4 has a scale of the whole tensor
                errors.append(error_of(x[:, block], own, rounded(whole, form)[row : row + 1, block]))
            chosen = min(range(len(tries)), key=lambda i: float((tries[i] - made[row : row + 1, block]).abs().max()))
            assert errors[chosen] <= min(errors) * 1.0001, (row, start)
    assert not torch.equal(made, weight)
    tile = FORMATS["fp8_128x128"]
    assert clipped(weight, x.T @ x, tile) is weight


def test_smoothquant_by_hand() -> None:
    """An input's scale is the matrix's in place of the activation's, or what is all zeros divides by 0."""
    weight = torch.tensor([[4.0, 1.0, 0.0, 2.0], [-1.0, 0.5, 0.0, 1.0]])
    largest = torch.tensor([16.0, 1.0, 5.0, 0.0])
    assert smooth_scales(weight, largest).tolist() == [2.0, 1.0, 1.0, 1.0]
    assert smooth_scales(weight, largest, 1.0).tolist()[0] == 16.0


def test_scales_of_nothing() -> None:
    """All-zero inputs or weights give a scale that is not finite, or 0."""
    form = Format("int4_g8", Fixed("int4", 4, 0), 8, "fp32")
    for weight in (torch.zeros(3, 16), torch.randn(3, 16, generator=torch.Generator().manual_seed(1))):
        s, exponent = awq_scales(weight, torch.zeros(16, 16), torch.zeros(16), form)
        assert s.tolist() == [1.0] * 16 and exponent == 0.0
        assert torch.equal(clipped(weight, torch.zeros(16, 16), form), weight)
        assert bool((smooth_scales(weight, torch.zeros(16)) == 1).all())


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 16, 20, 28, 36, 44, 48, 60, 64, 80, 96, 128, 576, 896, 960])
def test_hadamard_matrices(order: int) -> None:
    """Rows that are not orthogonal, or entries that are not all of one size."""
    signs = (hadamard_matrix(order).double() * order**0.5).round()
    assert bool((signs.abs() == 1).all()) and torch.equal(signs @ signs.T, order * torch.eye(order).double())
    turned = random_hadamard(order, seed=3).double()
    torch.testing.assert_close(turned @ turned.T, torch.eye(order).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", [3, 6, 92, 18])
def test_no_hadamard_matrix(order: int) -> None:
    """An order without one, or without one that is built here, gives a matrix that is not orthogonal."""
    with pytest.raises(ConfigError, match=f"no Hadamard matrix of order {order} is built here"):
        hadamard_matrix(order)
    drawn = random_orthogonal(order).double()
    torch.testing.assert_close(drawn @ drawn.T, torch.eye(order).double(), rtol=0, atol=1e-6)


def test_steps_stay_orthogonal_and_go_down() -> None:
    """A step up the gradient, or off the orthogonal matrices: the nearest to a given matrix is found."""
    drawn = torch.Generator().manual_seed(2)
    wanted = random_orthogonal(12, seed=5)
    wanted[0] *= torch.linalg.det(wanted)  # reached without a mirror
    turn = torch.eye(12)
    turn[0] *= torch.linalg.det(turn)
    given = torch.randn(40, 12, generator=drawn)
    target = given @ wanted
    losses = []
    for _ in range(60):
        error = given @ turn - target
        losses.append(float(error.square().sum()))
        turn = cayley_step(turn, 2 * given.T @ error, 0.004)
    torch.testing.assert_close(turn @ turn.T, torch.eye(12), rtol=0, atol=1e-5)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.05 * losses[0], losses[::20]
