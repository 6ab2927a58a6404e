"""Products that are rounded in engine and learner alike: one policy, its gradients, and that what is served is it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.config import EngineConfig
from tandem.errors import ConfigError, DeliveryError, NonFiniteError
from tandem.kernels.blocks import rounded, rounded_rows, rounded_rows_reference
from tandem.kernels.eights import product_reference
from tandem.kernels.eights_gradient import (
    accumulate,
    accumulate_reference,
    input_gradient,
    input_gradient_reference,
    turned,
)
from tandem.kernels.fours import product_reference as fours_reference
from tandem.kernels.linear import linear
from tandem.kernels.rounding import rounding_of
from tandem.kernels.swiglu import swiglu_down
from tandem.kernels.weight import Weight
from tandem.models.config import ModelConfig
from tandem.models.decoder import Decoder
from tandem.models.view import PackView
from tandem.numerics import blocks as reference
from tandem.numerics.blocks import FORMATS, format_of
from tandem.numerics.compare import same_bits
from tandem.numerics.quantise import from_int8, to_int8
from tandem.sync.departures import check_engine
from tandem.sync.publish import Publisher
from tandem.sync.receive import Copied, Shared, serving_decoder
from tests.cpu.test_publish import engine_on

OWN = ("e3m4b5/32:e8m0:even", "e4m3/16:fp32", "e1m2/32:e8m0", "e3m0/32:e8m0", "e8m5b130/8:e8m0", "e2m1/7x24:e4m3")
OWN = (*OWN, "e4m3/16x8:bf16", "int8/5x16:e8m0", "e2m1/tensor:e8m0", "int8/row:fp32", "int8_row_asym")
KINDS = ("w8a8", "w4a8", "mxfp4", "int4_g32_asym", "nvfp4+nvfp4", "fp8_128x128+fp8_1x128", "same+mxfp8_e4m3", "int8")


def drawn(rows: int, inputs: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers of far sizes; rows of zeros of both signs, ties, powers of two, denormals, the largest."""
    draw = torch.Generator().manual_seed(seed)
    far = torch.exp2(torch.randint(-60, 60, (rows, 1), generator=draw).float())
    x = torch.randn(rows, inputs, generator=draw) * far
    odd = torch.randint(-8, 9, (rows, inputs), generator=draw)
    kinds = torch.randint(0, 8, (rows,), generator=draw).tolist()
    for row, kind in enumerate(kinds):
        if kind < 5:
            one = odd[row].float()
            given = (0.0 * one, one * 0.25, one.sign() * torch.exp2(one.abs() * 15.0), one * 1e-40, one * 4e37)[kind]
            x[row] = given
    return x.to(dtype)


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """To the bit; one NaN is as good as another."""
    return torch.equal(got.isnan(), wanted.isnan()) and same_bits(got.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("name", [*FORMATS, *OWN])
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 140), st.integers(1, 300), st.integers(0, 99), st.booleans())
def test_the_kernel_is_the_rule(name: str, rows: int, inputs: int, seed: int, wide: bool) -> None:
    """A scale of another block, a tie that goes up, a zero that loses its sign, an edge of a tile that is not read."""
    form, dtype = format_of(name), torch.float32 if wide else torch.bfloat16
    x = drawn(rows, inputs, seed, dtype)
    assert same(rounded(x, form), reference.rounded(x, form))
    x[seed % rows, seed % inputs] = torch.nan if seed % 2 else torch.inf
    if form.scale == "e8m0":
        assert same(rounded(x, form), reference.rounded(x, form))
    else:
        with pytest.raises(NonFiniteError):
            rounded(x, form)
    if form.rows == 1:
        assert same(rounded_rows(x, form.by_row()), rounded_rows_reference(x, form.by_row()))


def test_a_row_is_rounded_alone(any_path) -> None:
    """A scale of a whole tensor: a row's log-prob hangs on who rides along."""
    x = drawn(40, 96, 3, torch.bfloat16)
    x[7, 3] = torch.nan
    for name in ("nvfp4", "nvfp4_inference", "nvfp4_four_six", "fp8_tensor", "fp8_1x128", "mxfp4"):
        form = format_of(name).by_row()
        whole = rounded_rows(x, form)
        assert all(same(rounded_rows(x[i : i + 1], form)[0], whole[i]) for i in range(40)), name
        assert bool(whole[7].isnan().all()), name
        finite = x[torch.arange(40) != 7][:1]
        assert same(rounded_rows(finite, form), reference.rounded(finite, FORMATS[name])), name
    with pytest.raises(ConfigError, match="tiles of 128 rows"):
        format_of("fp8_128x128").by_row()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_policy(name: str, dtype: str, kernel_path, make_decoder: Callable[..., Decoder], parity) -> None:
    """A product of the learner that is rounded otherwise than the engine's, or not."""
    decoder = make_decoder(dtype, attention_bias=True, width=36, ff_width=50)
    plain = [weight.value.clone() for _, weight in decoder.weights()]
    before = parity.alone(decoder, range(40))
    for layer in decoder.layers:
        for slot, weight in layer.weights():
            if slot.columns is not None:
                weight.multiply_rounded(rounding_of(name, 16))
    assert not torch.equal(parity.alone(decoder, range(40)), before)
    texts = [[(7 * i + 11 * j * j) % 97 for j in range(3 + 40 * i)] for i in range(3)]
    parity.check_chain(decoder, texts, 4, 1)
    asked = parity.groups(texts, 3, 0.9, 12)
    done = parity.check_company(decoder, asked, parity.engine(decoder, batch_tokens=40))
    parity.check_learner(decoder, parity.samples(asked, done), 0.9, 150)
    assert all(torch.equal(a, b.value) for a, (_, b) in zip(plain, decoder.weights(), strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_the_rounded_product(name: str, any_path) -> None:
    """A gradient by what was not multiplied; one that is lost in the rounding."""
    if any_path == "reference" and rounding_of(name).products:
        pytest.skip("integers have no reference that trains")
    draw, rounding = torch.Generator().manual_seed(1), rounding_of(name, 16)
    x, matrix, dy = (torch.randn(*shape, generator=draw) for shape in ((9, 64), (70, 64), (9, 70)))
    weight = Weight(matrix.clone(), matrix=True)
    weight.multiply_rounded(rounding)
    weight.grad = torch.zeros(70, 64)
    x.requires_grad_()
    y = linear(x, weight)
    y.backward(dy)
    rows, values = rounding.multiplied(x.detach()), rounding.matrix(matrix)
    wanted = rows @ values.T
    if rounding.products:
        wanted = {8: product_reference, 4: fours_reference}[rounding.bits](x.detach(), rounding.codes(matrix))
    torch.testing.assert_close(y.detach(), wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad, dy @ values, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(weight.grad, dy.T @ rows, rtol=1e-5, atol=1e-4)
    # and behind an activation that is computed again
    gate_up, residual = torch.randn(9, 128, generator=draw), torch.zeros(9, 70)
    weight.grad.zero_()
    gate_up.requires_grad_(), residual.requires_grad_()
    swiglu_down(gate_up, weight, residual).backward(dy)
    gate, up = gate_up.detach().chunk(2, -1)
    acted = rounding.multiplied(torch.nn.functional.silu(gate) * up)
    torch.testing.assert_close(weight.grad, dy.T @ acted, rtol=2e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(st.integers(1, 70), st.integers(1, 300), st.integers(1, 140), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_gradients_in_8_bits_are_the_rule(any_path, dtype: torch.dtype, count: int, rows: int, inputs: int, seed: int):
    """A scale, a byte of noise or a sum of another row or column; words beyond the rows; what is there already."""
    if any_path == "reference":
        pytest.skip("integers are multiplied by the C++ alone")
    draw = torch.Generator().manual_seed(seed)
    dy, x, value = (
        torch.randn(*shape, generator=draw).to(dtype) for shape in ((count, rows), (count, inputs), (rows, inputs))
    )
    dy[0], x[:, 0] = 0, 0
    whole = torch.cat([dy, dy], 1)[:, :rows]  # rows that do not lie together
    assert same(input_gradient(whole, turned(value)), input_gradient_reference(dy, value))
    ours, wanted = torch.ones(rows, inputs), torch.ones(rows, inputs)
    accumulate(ours, whole, x)
    accumulate_reference(wanted, dy, x)
    assert same(ours, wanted)


def test_gradients_in_8_bits_are_right_on_the_mean(kernel_path) -> None:
    """A rounding to the nearest: what is below half a code is lost in every step."""
    value, x = torch.eye(64), torch.ones(4096, 8)
    dy = torch.full((4096, 64), 0.3 / 127)
    dy[:, 0] = 1.0
    assert float(input_gradient(dy, turned(value))[:, 1:].mean()) == pytest.approx(0.3 / 127, rel=0.01)
    grad = torch.zeros(64, 8)
    dy[0] = 1.0
    accumulate(grad, dy, x)
    assert float(grad[1:].mean()) == pytest.approx(1 + 4095 * 0.3 / 127, rel=0.01)


def test_a_layer_learns_in_8_bits(kernel_path, make_decoder: Callable[..., Decoder]) -> None:
    """A product of the backward pass that stays as it was, or whose matrix is that of an update before."""
    exact, ours = make_decoder("float32"), make_decoder("float32")
    for decoder in (exact, ours):
        for name, weight in decoder.weights():
            weight.grad = torch.zeros(weight.value.shape)
            if weight.value.ndim == 2 and name not in ("embed", "head"):
                if decoder is ours:
                    weight.learn_in_8_bits()
                weight.value.mul_(2)
                weight.repack()
        decoder.forward(torch.arange(50), PackView([0, 50])).square().sum().backward()
    for (name, one), (_, other) in zip(ours.weights(), exact.weights(), strict=True):
        if name != "head":
            assert one.grad is not None and other.grad is not None
            error = float((one.grad - other.grad).norm() / other.grad.norm())
            assert error < 0.1 and (error > 1e-4 or name == "norm"), (name, error)


def test_rows_of_8_bits_are_those_of_the_product() -> None:
    """A gradient by other rows than the product has."""
    x = drawn(30, 50, 5, torch.float32)
    assert same(rounding_of("w8a8").multiplied(x), from_int8(*to_int8(x), x.dtype))


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "mxfp4+mxfp8_e4m3"])
def test_what_is_served_follows_the_value(name: str, make_decoder: Callable[..., Decoder]) -> None:
    """An update after which products read the matrix before it; a bit of a packed form that is another."""
    made = make_decoder("bfloat16")
    decoder = Decoder(made.spec, "bfloat16", rounding=rounding_of(name)).load(made.export())
    copied = Decoder(made.spec, "bfloat16", rounding=rounding_of(name))
    publisher = Publisher(
        decoder, [Shared("here", decoder), Copied("there", copied, engine_on(copied, EngineConfig()))]
    )
    publisher.publish(0)
    weight, theirs = decoder.layers[0].feed.down, copied.layers[0].feed.down
    assert torch.equal(theirs.served(), weight.served()) and not torch.equal(weight.served(), weight.value)
    weight.value.neg_()
    with pytest.raises(DeliveryError, match="down"):
        publisher.publish(1)
    weight.repack()
    publisher.publish(2)
    assert torch.equal(theirs.served(), weight.served())
    bits = weight.codes.packed if weight.codes is not None else weight.packed.view(torch.int16)
    bits[3] ^= 1
    with pytest.raises(DeliveryError, match="down"):
        publisher.publish(3)


def test_an_engine_alone_is_rounded(make_decoder: Callable[..., Decoder]) -> None:
    """A departure to a format that rounds the learner too, or rounds nothing."""
    learner, model = make_decoder("bfloat16"), ModelConfig("x")
    config = EngineConfig(weights="nvfp4+nvfp4", page_tokens=4, max_sequences=4, batch_tokens=64)
    serving = serving_decoder(learner.spec, model, config)
    Publisher(learner, [Copied("far", serving, engine_on(serving, config))]).publish(0)
    for (name, ours), (_, theirs) in zip(learner.weights(), serving.weights(), strict=True):
        matrix = ours.value.ndim == 2 and name not in ("embed", "head")
        wanted = reference.rounded(ours.value, FORMATS["nvfp4"]) if matrix else ours.value
        assert torch.equal(theirs.served(), wanted) and not ours.rounding, name
        assert bool(theirs.rounding) is matrix


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"weights": "mxfp5"},
            "'mxfp5' rounds nothing that is known.*Give such a format, same, int8, int4, w8a8 or w4a8",
        ),
        ({"weights": "nvfp4_56"}, "'nvfp4_56' rounds nothing that is known.*Did you mean nvfp4"),
        ({"weights": "mxfp4+fp8_128x128"}, "rounds tiles of 128 rows"),
    ],
)
def test_a_format_that_is_none_is_refused(changes: dict[str, str], said: str, make_decoder) -> None:
    """A name that rounds nothing, in silence."""
    spec, model = make_decoder("float32").spec, ModelConfig("x")
    for asked in ((model, EngineConfig(**changes)), (replace(model, **changes), EngineConfig())):
        with pytest.raises(ConfigError, match=said) as found:
            check_engine(spec, *asked)
        assert str(found.value).count("nvfp4_four_six") <= 1


def test_a_dtype_without_products_is_named(make_decoder: Callable[..., Decoder]) -> None:
    """The device or a compiler is blamed, which are all right."""
    with pytest.raises(ConfigError, match=r"w8a8 is computed in bfloat16 or float32 .*, and the dtype is float16"):
        Decoder(make_decoder("float32").spec, "float16", rounding=rounding_of("w8a8"))


def test_both_at_once_are_refused(make_decoder: Callable[..., Decoder]) -> None:
    """A policy that is rounded twice, of which only one is said."""
    spec = make_decoder("float32").spec
    with pytest.raises(ConfigError, match="the policy that is trained is rounded already"):
        check_engine(spec, ModelConfig("x", weights="w8a8"), EngineConfig(weights="w8a8"))
    with pytest.raises(ConfigError, match="torch's own products round nothing"):
        Decoder(spec, "float32", kernels="library", rounding=rounding_of("mxfp4"))
    with pytest.raises(ConfigError, match="w8a8 is computed by tandem's own compiled kernels"):
        Weight(torch.zeros(4, 4), matrix=False).multiply_rounded(rounding_of("w8a8"))
