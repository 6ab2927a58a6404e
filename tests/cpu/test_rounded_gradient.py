"""Gradients whose products multiply rounded operands: against the rules of the formats, by hand, and on the mean."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.errors import ConfigError
from tandem.kernels.blocks import drawn_rows, drawn_rows_reference
from tandem.kernels.gradient import add_gradient, input_gradient
from tandem.kernels.rounded_gradient import operands_of
from tandem.kernels.rounding import rounding_of
from tandem.kernels.weight import Weight
from tandem.models.decoder import Decoder
from tandem.models.view import PackView
from tandem.numerics import blocks as reference
from tandem.numerics.blocks import FORMATS, format_of
from tandem.numerics.compare import same_bits
from tandem.train.config import LearnerConfig
from tandem.train.step import learn_rounded

DRAWN = ("mxfp8_e4m3", "mxfp8_e5m2_rceil", "mxfp6_e2m3_even", "mxfp4_ceil", "mxint8", "nvfp4", "nvfp4_inference")
DRAWN += ("nvfp4_four_six", "fp8_tensor", "fp8_1x128", "int4_g32", "e3m4b5/32:e8m0:even", "int3_g8")


@pytest.mark.parametrize("name", DRAWN)
@settings(max_examples=6, deadline=None)
@given(st.integers(1, 9), st.integers(1, 150), st.integers(0, 99), st.booleans())
def test_a_drawn_rounding_is_the_rule(name: str, rows: int, inputs: int, seed: int, wide: bool) -> None:
    """A word of another row or column, a bit of it that is not compared, a largest number that grows, a lost sign."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=draw) * torch.exp2(
        torch.randint(-40, 40, (rows, 1), generator=draw).float()
    )
    x[0, ::3], x[-1, 0] = 0.0, -0.0
    x = x.to(torch.float32 if wide else torch.bfloat16)
    if rows > 2:
        x[2, seed % inputs] = torch.nan
    form = format_of(name).by_row()
    got, wanted = drawn_rows(x, form, seed << 33 | 5), drawn_rows_reference(x, form, seed << 33 | 5)
    assert torch.equal(got.isnan(), wanted.isnan()) and same_bits(got.nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_a_drawn_rounding_is_right_on_the_mean() -> None:
    """What is below half of a step lost each time; one that is up too often."""
    x = torch.full((20_000, 16), 0.2)
    x[:, 0] = 6.0  # the scale is 1: 0.2 is 0 or 0.5
    for name in ("nvfp4", "mxfp4"):
        back = drawn_rows(x, format_of(name).by_row(), 3)
        assert set(back[:, 1:].unique().tolist()) == {0.0, 0.5} and bool((back[:, 0] == 6).all())
        assert float(back[:, 1:].mean()) == pytest.approx(0.2, abs=0.002)
    assert not torch.equal(drawn_rows(x, format_of("mxfp4").by_row(), 4), back)


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return tuple(torch.randn(*shape, generator=draw) for shape in ((37, 70), (37, 64), (70, 64)))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2+mxfp8_e4m3", "fp8_1x128", "same+mxfp4", "nvfp4"])
def test_blocks_lie_along_what_is_summed(name: str, any_path) -> None:
    """dx by blocks along a matrix's inputs, dW by blocks along outputs, dy and W in each other's format."""
    dy, x, matrix = operands()
    first, _, second = name.partition("+")
    forms = [None if one == "same" else FORMATS[one] for one in (first, second or first)]
    mine, met = (
        (lambda y: y)
        if form is None
        else (lambda y, form=form: torch.stack([reference.rounded(row, form) for row in y]))
        for form in forms
    )
    weight = Weight(matrix.clone(), matrix=True)
    weight.operands, weight.grad = operands_of(name), torch.ones(70, 64)
    torch.testing.assert_close(input_gradient(dy, weight), mine(dy) @ met(matrix.T).T, rtol=1e-5, atol=1e-4)
    add_gradient(weight, dy, x)
    torch.testing.assert_close(weight.grad, 1 + mine(dy.T) @ met(x.T).T, rtol=1e-5, atol=1e-4)
    assert float((weight.grad - 1 - dy.T @ x).norm()) > 1e-3 * float((dy.T @ x).norm())
    weight.grad = None
    add_gradient(weight, dy, x)  # frozen


def test_rows_are_those_of_the_product_before(kernel_path) -> None:
    """A gradient of rows that were not multiplied, where the forward pass rounds too."""
    dy, x, matrix = operands()
    weight = Weight(matrix.clone(), matrix=True)
    weight.multiply_rounded(rounding_of("mxfp4+mxfp4"))
    weight.operands, weight.grad = operands_of("mxfp8_e4m3"), torch.zeros(70, 64)
    plain = Weight(rounding_of("mxfp4").matrix(matrix), matrix=True)
    plain.operands, plain.grad = weight.operands, torch.zeros(70, 64)
    add_gradient(weight, dy, x)
    add_gradient(plain, dy, rounding_of("same+mxfp4").multiplied(x))
    assert torch.equal(weight.grad, plain.grad)
    assert torch.equal(input_gradient(dy, weight), input_gradient(dy, plain))


def test_the_hadamard_step_spreads_what_is_large(kernel_path) -> None:
    """A transform of one operand alone, whose product is another; one that leaves out the last rows."""
    dy, x, _ = operands()
    turned = operands_of("nvfp4+hadamard")
    turned_dy, turned_x = turned._replace(dy=None, met=None).of_weight(dy, x)
    assert turned_dy.shape == (48, 70)
    torch.testing.assert_close(turned_dy.T @ turned_x, dy.T @ x, rtol=0.02, atol=0.2)  # each is rounded to bf16
    dy[3] *= 300  # a token of far larger gradients than its block's others, which four bits then have as zeros
    exact, found = dy.T @ x, {}
    for name in ("nvfp4", "nvfp4+hadamard"):
        weight = Weight(torch.zeros(70, 64), matrix=True)
        weight.operands, weight.grad = operands_of(name), torch.zeros(70, 64)
        add_gradient(weight, dy, x)
        found[name] = float((weight.grad - exact).norm() / exact.norm())
    assert 0 < found["nvfp4"] < 0.3 and 0 < found["nvfp4+hadamard"] < 0.3
    # and dx, which NVFP4's training does not turn, is as without
    assert all(
        torch.equal(*pair)
        for pair in zip(turned.of_input(dy, x.T @ x), operands_of("nvfp4").of_input(dy, x.T @ x), strict=False)
    )


def test_stochastic_gradients_are_right_on_the_mean(kernel_path) -> None:
    """Gradients of four bits that are biased: rounding to the nearest loses what is below a quarter of a step."""
    value = torch.eye(64)
    dy = torch.full((4096, 64), 0.1)
    dy[:, ::16] = 6.0
    small = torch.arange(64) % 16 != 0
    for name, wanted in (("mxfp4+stochastic", 0.1), ("mxfp4", 0.0)):
        weight = Weight(value.clone(), matrix=True)
        weight.operands = operands_of(name)
        dx = input_gradient(dy, weight)
        assert float(dx[:, small].mean()) == pytest.approx(wanted, abs=0.004)
        assert torch.equal(dx, input_gradient(dy, weight))  # a function of what it is made of: a resume repeats it


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "nvfp4+stochastic+hadamard"])
def test_a_learner_rounds_every_matrix(name: str, kernel_path, make_decoder: Callable[..., Decoder]) -> None:
    """A product of the backward pass that stays as it was."""
    exact, ours = make_decoder("float32"), make_decoder("float32")
    learn_rounded(ours, name)
    for decoder in (exact, ours):
        for _, weight in decoder.weights():
            weight.grad = torch.zeros(weight.value.shape)
        decoder.forward(torch.arange(50), PackView([0, 50])).square().sum().backward()
    for (where, one), (_, other) in zip(ours.weights(), exact.weights(), strict=True):
        if where not in ("head", "norm"):
            assert one.grad is not None and other.grad is not None
            error = float((one.grad - other.grad).norm() / other.grad.norm())
            assert 1e-4 < error < (0.2 if name == "mxfp8_e4m3" else 0.7), (where, error)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mxfp5", "is no format"),
        ("same", ""),
        ("same+same", "is no format"),
        ("stochastic+nvfp4", "is no format"),
        ("nvfp4+nvfp4+nvfp4", "is no format"),
        ("mxfp9_e4m3", "'mxfp9_e4m3' is no format"),
        ("fp8_128x128", "rounds tiles of 128 rows"),
        ("int4_g32_asym+stochastic", "int4_g32_asym has no stochastic rounding"),
        ("same+mxfp4+stochastic", "same has no stochastic rounding"),
    ],
)
def test_what_rounds_no_gradient_is_refused(name: str, said: str) -> None:
    """A setting that is taken and rounds nothing."""
    if not said:
        LearnerConfig(gradients=name).check("bfloat16", "cpu")
        return
    with pytest.raises(ConfigError, match=said):
        LearnerConfig(gradients=name).check("bfloat16", "cpu")


def test_where_gradients_are_not_rounded(make_decoder: Callable[..., Decoder]) -> None:
    """A GPU's or a library's gradients called rounded."""
    with pytest.raises(ConfigError, match="gradients are rounded on the CPU"):
        LearnerConfig(gradients="nvfp4").check("bfloat16", "cuda")
    decoder = Decoder(make_decoder("float32").spec, "float32", kernels="library")
    with pytest.raises(ConfigError, match="whose products round nothing"):
        learn_rounded(decoder, "nvfp4")
