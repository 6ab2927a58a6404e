"""Block formats: scales and codes by hand, by an independent writing in NumPy, and at every edge of their rules.

Decibels of the table are those of 2 M numbers: within 0.1 on normal ones, 0.15 on Student's with four degrees, whose
few largest decide.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import ConfigError, NonFiniteError
from tandem.kernels.blocks import rounded as kernel_rounded
from tandem.numerics.blocks import (
    FORMATS,
    RULES,
    SIGNS,
    Format,
    Rule,
    block_scales,
    dequantise,
    exponent_of,
    format_of,
    from_e8m0,
    hadamard,
    quantise,
    rounded,
    sqnr_db,
)
from tandem.numerics.compare import same_bits
from tandem.numerics.elements import E2M1, E4M3, E5M2, INT8, Element, decode
from tandem.numerics.names import check_weights_name

ml_dtypes = pytest.importorskip("ml_dtypes")
F32 = np.float32
DECIBELS = {  # of normal numbers, and of Student's
    "mxfp4": (18.76, 17.64),
    "mxfp4_rceil": (18.71, 17.15),
    "mxfp4_ceil": (16.81, 14.79),
    "mxfp4_even": (18.99, 17.79),
    "nvfp4": (20.41, 20.75),
    "nvfp4_four_six": (21.19, 21.22),
    "mxfp6_e2m3": (30.94, 29.99),
    "mxfp6_e3m2_rceil": (25.55, 25.54),
    "mxfp8_e4m3": (30.62, 29.87),
    "mxfp8_e4m3_rceil": (31.53, 31.50),
    "mxfp8_e4m3_even": (31.19, 30.78),
    "mxfp8_e5m2_rceil": (25.55, 25.54),
    "mxint8": (41.67, 39.31),
    "fp8_1x128": (31.8, 32.41),
    "fp8_tensor": (31.55, 31.52),
    "int4_g32": (20.24, 17.65),
    "int4_g128": (18.55, 14.37),
    "int8_g128": (43.74, 39.42),
}


def power_of(amax: float, element: Element, rule: Rule) -> int:
    """The rule in exact arithmetic, rceil's quotient in fp32."""
    if rule == "rceil":
        amax = float(F32(amax) / F32(element.largest))
    fraction, exponent = math.frexp(amax)  # amax = fraction 2^exponent, fraction in [0.5, 1)
    exponent -= 1
    if rule == "even":
        steps = fraction * 2 ** (element.mantissa + 1)
        exponent += math.floor(steps + 0.5) >= 2 ** (element.mantissa + 1)
    elif rule in ("ceil", "rceil"):
        exponent += fraction > 0.5
    return max(-127, min(127, exponent - (0 if rule == "rceil" else element.most)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("element", [E2M1, E4M3, E5M2, INT8], ids=lambda one: one.name)
def test_scale_at_each_power_of_two(element: Element, rule: Rule) -> None:
    """A logarithm that is off by one, one unit around a power of two or a multiple of the largest number."""
    exact = [2.0**n for n in range(-126, 128)] + [element.largest * 2.0**n for n in range(-120, 110)]
    exact += [2.0**n * (2 - 2.0 ** -(element.mantissa + 1)) for n in range(-120, 120)]
    near = [float(np.nextafter(F32(x), F32(way))) for x in exact for way in (0, np.inf) if x < 2.0**127]
    sizes = torch.tensor([x for x in exact + near if x < 3.4e38])
    wanted = [power_of(x, element, rule) for x in sizes.tolist()]
    assert exponent_of(sizes, element, rule).tolist() == wanted


def test_every_e8m0() -> None:
    """A byte that is another power of two, 2^-127 flushed, 255 a number."""
    codes = np.arange(256, dtype=np.uint8)
    theirs = codes.view(ml_dtypes.float8_e8m0fnu).astype(F32)
    np.testing.assert_array_equal(from_e8m0(torch.from_numpy(codes)).numpy(), theirs)
    assert float(from_e8m0(torch.tensor([0], dtype=torch.uint8))) == 2.0**-127


def test_scales_are_not_made_by_a_cast() -> None:
    """A scale by a cast to e8m0: torch's rounds 3 up to 4, drops a sign and has 2^-127 for 0; ml_dtypes' has NaN."""
    x = torch.tensor([3.0, -1.0, 0.0])
    assert x.to(torch.float8_e8m0fnu).view(torch.uint8).tolist() == [129, 127, 0]
    assert x.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8).tolist() == [129, 255, 255]
    blocks = quantise(torch.tensor([[12.0] + [0.0] * 31, [-4.0] + [0.0] * 31, [0.0] * 32]), FORMATS["mxfp4"])
    assert blocks.scales.flatten().tolist() == [128, 127, 0]  # of 12 = 3 x 4, by the floor


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3_rceil", "mxfp8_e5m2", "mxint8_even"])
def test_blocks_of_odd_contents(name: str) -> None:
    """A NaN that leaves its block, a block of zeros that divides by zero, denormals that vanish, a short last block."""
    form = FORMATS[name]
    x = torch.randn(2, 100)
    x[0, 3], x[0, 40], x[1, 64:96] = torch.nan, -torch.inf, 0
    x[1, 0:32] = torch.randn(32) * 2.0**-128
    found = quantise(x, form)
    back = dequantise(found, form)
    assert found.scales.shape == (2, 4) and back.shape == x.shape
    assert bool(back[0, :64].isnan().all()) and bool(back[0, 64:].isfinite().all())
    assert found.scales[0, :2].tolist() == [255, 255] and found.scales[1, 2] == 0
    assert bool((back[1, 64:96] == 0).all()) and bool((back[1, :32] != 0).any())
    alone = quantise(x[1:, 96:], form)
    assert torch.equal(alone.codes, found.codes[1:, 96:]) and torch.equal(alone.scales, found.scales[1:, 3:])


def test_mxfp4_by_hand() -> None:
    """A tie that is not broken to the even code, the largest that is not saturated by the floor rule."""
    x = torch.tensor([[7.0, -5.0, 0.25, 0.75, 1.25, -1.75, 2.5, 3.5, 0.2499, -0.0]])
    found = quantise(x, FORMATS["mxfp4"])  # amax 7: 2^(2 - 2)
    assert found.scales.tolist() == [[127]]
    assert decode(found.codes, E2M1).tolist() == [[6, -4, 0, 1, 1, -2, 2, 4, 0, -0.0]]
    assert dequantise(quantise(x, FORMATS["mxfp4_rceil"]), FORMATS["mxfp4_rceil"]).tolist()[0][:3] == [8, -4, 0]


def nvfp4_by_hand(x: np.ndarray, most: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Transformer Engine's chain a block at a time: codes, scales and values for largest 6, and the scale of the
    tensor; in NumPy's fp32 and ml_dtypes' casts."""
    top = np.abs(x).max()
    enc = F32(min(F32(most * 6) / top, np.finfo(F32).max)) if top else F32(1)
    whole = F32(1) / enc
    scales = (np.abs(x).max(-1) * (enc * (F32(1) / F32(6)))).clip(None, 448).astype(ml_dtypes.float8_e4m3fn)
    with np.errstate(divide="ignore", over="ignore"):
        factor = np.minimum(F32(1) / (scales.astype(F32) * whole), np.finfo(F32).max)
        codes = (x * factor[:, None]).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn)
    values = codes.astype(F32) * (scales.astype(F32) * whole)[:, None]
    return codes.view(np.uint8), scales.view(np.uint8), values, whole


@pytest.mark.parametrize("bf16", [False, True])
def test_nvfp4_is_the_training_chain(bf16: bool) -> None:
    """An order of operations that moves a tie: bf16 inputs hit hundreds of them, fp32 ones none."""
    drawn = torch.Generator().manual_seed(3)
    for spread in (1.0, 2.0**-90, 2.0**60):
        x = (
            torch.randn(4000, 16, generator=drawn)
            * torch.exp2(torch.randint(-22, 3, (4000, 1), generator=drawn))
            * spread
        )
        x[::7] = (x[::7] / spread * 4).round() / 4 * spread
        x = x.to(torch.bfloat16).float() if bf16 else x
        found = quantise(x, FORMATS["nvfp4"])
        codes, scales, values, whole = nvfp4_by_hand(x.numpy(), 448.0)
        assert found.whole is not None and float(found.whole) == whole
        np.testing.assert_array_equal(found.scales[:, 0].numpy(), scales)
        np.testing.assert_array_equal(found.codes.numpy(), codes)
        np.testing.assert_array_equal(dequantise(found, FORMATS["nvfp4"]).numpy(), values)


def test_nvfp4_zeros_and_small_blocks() -> None:
    """A block scale of zero that makes NaN; a tensor of zeros."""
    x = torch.zeros(2, 32)
    assert dequantise(quantise(x, FORMATS["nvfp4"]), FORMATS["nvfp4"]).abs().sum() == 0
    x[0, 0], x[1, 20] = 1.0, 1e-6  # below 2^-10 / 448 of the largest: its block's scale is 0
    found = quantise(x, FORMATS["nvfp4"])
    assert found.scales[1, 1] == 0 and bool(dequantise(found, FORMATS["nvfp4"]).isfinite().all())
    kept = rounded(x, FORMATS["nvfp4_inference"])  # whose least scale is e4m3's smallest normal number
    assert float(kept[0, 0]) == 1.0 and bool(kept.isfinite().all())
    with pytest.raises(NonFiniteError, match="1 of 64 numbers are not finite"):
        quantise(
            x.index_fill(1, torch.tensor([5]), torch.nan)[:1].repeat(2, 1).index_fill(0, torch.tensor([1]), 0),
            FORMATS["nvfp4"],
        )


def test_nvfp4_inference_differs_in_ties() -> None:
    """Two chains that are taken for one: the reciprocals are taken in another order."""
    x = torch.randn(60_000, 16, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    train, serve = (quantise(x, FORMATS[name]) for name in ("nvfp4", "nvfp4_inference"))
    differ = (train.codes != serve.codes).any(-1) | (train.scales != serve.scales).any(-1)
    assert 0 < int(differ.sum()) < len(x) // 20


def test_four_over_six_is_never_worse() -> None:
    """The larger error kept, or a scale beyond 256 that 1.5 times is no e4m3."""
    x = torch.randn(3000, 16, generator=torch.Generator().manual_seed(6))
    codes, scales, values, whole = nvfp4_by_hand(x.numpy(), 256.0)
    form = FORMATS["nvfp4_four_six"]
    found = quantise(x, form)
    error = (dequantise(found, form) - x).square().sum(-1).numpy()
    plain = np.square(values - x.numpy()).sum(-1)
    assert bool((error <= plain * (1 + 1e-6)).all())
    chose = found.scales[:, 0].numpy() != scales
    assert 0.25 < chose.mean() < 0.55
    ours = decode(found.scales[:, 0], E4M3).numpy()
    theirs = scales.view(ml_dtypes.float8_e4m3fn).astype(F32)
    assert bool((np.abs(ours[chose] / theirs[chose] - 1.5) < 0.2).all()) and ours.max() <= 384


def test_tiles_and_rows() -> None:
    """A tile that takes its neighbour's largest, a ragged edge that is lost."""
    form, x = FORMATS["fp8_128x128"], torch.randn(200, 300) * torch.logspace(-3, 3, 300)
    found = quantise(x, form)
    wanted = torch.stack([torch.stack([b.abs().max() for b in a.split(128, 1)]) for a in x.split(128, 0)]) / 448.0
    assert torch.equal(found.scales, wanted) and dequantise(found, form).shape == x.shape
    assert float((dequantise(found, form) - x).abs().max() / x.abs().max()) < 0.04
    assert torch.equal(quantise(x, FORMATS["fp8_row"]).scales[:, 0], x.abs().amax(1) / 448.0)
    assert quantise(x, FORMATS["fp8_tensor"]).scales.shape == (1,)


def test_zero_points() -> None:
    """Zero that is no code, or ends of a block that are outside its range."""
    x = torch.rand(8, 128) + 3.0
    form = FORMATS["int4_g128_asym"]
    found = quantise(x, form)
    assert found.zeros is not None and bool((found.zeros == 0).all())
    back = dequantise(found, form)
    assert float((back - x).abs().max()) <= float(found.scales.max()) / 2 * 1.0001
    y = torch.linspace(-1, 2, 128)[None]
    assert float(rounded(torch.cat([y[:, :-1], torch.zeros(1, 1)], 1), form)[0, -1]) == 0.0


def test_decibels_are_known_ones() -> None:
    """A format that is a good deal better or worse than it is."""
    drawn = torch.Generator().manual_seed(1)
    normal = torch.randn(2048, 1024, generator=drawn)
    chi = torch.randn(4, 2048, 1024, generator=drawn).square().sum(0) / 4
    student = torch.randn(2048, 1024, generator=drawn) / chi.sqrt()
    for name, (wanted, heavy) in DECIBELS.items():
        form = FORMATS[name]
        assert abs(sqnr_db(normal, rounded(normal, form)) - wanted) < 0.1, name
        assert abs(sqnr_db(student, rounded(student, form)) - heavy) < 0.15, name


@given(st.sampled_from([*FORMATS]), st.integers(1, 70), st.integers(0, 2**31))
def test_what_is_representable_stays(name: str, columns: int, seed: int) -> None:
    """A second rounding that changes what the first gave, of formats whose scales are powers of two."""
    form = FORMATS[name]
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    once = rounded(x, form)
    assert once.shape == x.shape and bool(once.isfinite().all())
    if form.scale == "e8m0" and form.rule != "ceil":
        assert torch.equal(rounded(once, form), once) or form.rule in ("rceil", "even")


def test_stochastic_blocks_are_right_in_the_mean() -> None:
    """Noise of one block used for another, or a bias."""
    x = torch.full((4096, 32), 0.3)
    x[:, 0] = 6.0
    back = rounded(x, FORMATS["mxfp4"], "stochastic", draw=torch.Generator().manual_seed(0))
    assert bool((back[:, 0] == 6).all()) and abs(float(back[:, 1:].mean()) - 0.3) < 0.003


def test_hadamard_keeps_products() -> None:
    """A transform that is not orthogonal, or that is not rounded to bf16."""
    x, w = torch.randn(5, 64), torch.randn(7, 64)
    assert hadamard(x).dtype == torch.bfloat16
    wanted, got = x @ w.T, hadamard(x).float() @ hadamard(w).float().T
    assert float((got - wanted).abs().max()) < 0.02 * float(wanted.abs().max() + 8)
    unit = torch.zeros(1, 16)
    unit[0, 3] = 1.0
    assert set(hadamard(unit).flatten().tolist()) == {0.25, -0.25} and hadamard(unit)[0, 0] == SIGNS[3] / 4
    with pytest.raises(ConfigError, match="16 inputs does not divide a width of 40"):
        hadamard(torch.zeros(1, 40))


def test_a_format_of_ones_own() -> None:
    """A name that is taken for another format, or nonsense that is taken."""
    assert rounded(torch.randn(2, 64), format_of("e2m1/32:e8m0")).shape == (2, 64)
    own, x = format_of("e2m1/32:e8m0:even"), torch.randn(64, 64)
    assert torch.equal(rounded(x, own), rounded(x, FORMATS["mxfp4_even"]))
    assert isinstance(own, Format) and block_scales(quantise(x, own), own).shape == (64, 2)
    like = {"int8/32:e8m0:even": "mxint8_even", "e2m1/16:e4m3": "nvfp4", "e4m3/128x128:fp32": "fp8_128x128"}
    for one, known in (*like.items(), ("e4m3/tensor:fp32", "fp8_tensor"), ("e4m3/row:fp32", "fp8_row")):
        check_weights_name("model.weights", f"{one}+{one}")
        assert replace(format_of(one), name=known) == FORMATS[known]
    assert quantise(x, format_of("e3m2/16x32:bf16")).scales.shape == (4, 2)
    for name in (
        *("mxfp5", "e2m1/0:e8m0", "e2m1/0x8:e8m0", "e4m3/32:e4m3", "e2m1/32:fp32:even", "e2m1/32:e8m0:up", "/32:e8m0"),
        *("e2m1/rows:e8m0", "int4/32:e8m0"),
    ):
        with pytest.raises(ConfigError):
            format_of(name)
    with pytest.raises(ConfigError, match="'mxfp5' is no format. Did you mean mxfp4.* One of your own is"):
        format_of("mxfp5")


@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0), (0, 0), (2, 0, 5)], ids=str)
def test_a_tensor_of_nothing(shape: tuple[int, ...]) -> None:
    """A traceback in place of nothing; scales that are not those of more rows or inputs."""
    for name, form in FORMATS.items():
        for own in (form, form.by_row()) if form.rows == 1 else (form,):
            found = quantise(torch.empty(shape), own)
            assert dequantise(found, own, torch.bfloat16).shape == found.codes.shape == shape, name
            assert found.scales.ndim == quantise(torch.ones(*(1 for _ in shape)), own).scales.ndim, name
            assert found.scales.numel() == 0 and (found.zeros is None or found.zeros.shape == found.scales.shape), name


@pytest.mark.parametrize("name", ["int4_g32_asym", "int8_row_asym"])
def test_ends_further_apart_than_fp32_has(name: str) -> None:
    """An infinite step, of which a whole block is NaN; one that the kernel takes otherwise."""
    x = torch.cat([torch.tensor([[3e38, -3e38, 1e38, 0.0]]), torch.zeros(1, 4)])
    back = rounded(x, format_of(name))
    assert bool(back.isfinite().all()) and float((back - x).abs().max()) <= 6e38 / 15 / 2 * 1.0001
    far = x * torch.linspace(0.9, 1.13, 57)[:, None, None]
    assert same_bits(kernel_rounded(far.view(-1, 4), format_of(name)), rounded(far.view(-1, 4), format_of(name)))
