"""Rounding of weights and of keys and values: the code that is nearest, and the same one everywhere.

Signal to noise of normal numbers: int8 in groups of 128 43.74 dB, int4 18.55 and, in groups of 32, 20.24.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import NonFiniteError
from tandem.kernels import quantise as kernels
from tandem.kernels.page_pool import KvPool, rotate_store_
from tandem.numerics import quantise as numerics
from tandem.numerics.compare import same_bits
from tandem.numerics.quantise import LARGEST, from_e4m3, from_int8, to_e4m3, to_int8

ml_dtypes = pytest.importorskip("ml_dtypes")
F32 = np.float32


@pytest.fixture(params=["numerics", "kernels"])
def rounding(request, any_path):
    """The functions in torch, and the ones that choose C++."""
    return {"numerics": numerics, "kernels": kernels}[request.param]


def by_hand(weight: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """One weight at a time, in fp32."""
    rows, inputs = weight.shape
    largest = LARGEST[bits]
    codes = np.zeros(weight.shape, np.int8)
    scales = np.zeros((rows, math.ceil(inputs / group)), F32)
    for i in range(rows):
        for g in range(scales.shape[1]):
            own = range(g * group, min(inputs, (g + 1) * group))
            scale = F32(max(abs(weight[i, j]) for j in own)) / F32(largest)
            scales[i, g] = scale
            for j in own:
                code = np.rint(weight[i, j] / scale) if scale > 0 else 0  # rint: ties to even
                codes[i, j] = max(-largest, min(largest, code))
    return codes, scales


def adversarial(inputs: int, group: int) -> np.ndarray:
    """Groups of ties (scale a power of two), of zeros, of one weight, of tiny and of large weights; and normal ones."""
    rng = np.random.default_rng(inputs + group)
    weight = rng.standard_normal((13, inputs)).astype(F32)
    for row, largest in ((0, 127), (1, 7)):
        weight[row] = rng.integers(-largest, largest, inputs) + 0.5
        weight[row, ::group] = largest
    weight[2] = 0
    weight[3] = 0
    weight[3, ::group] = -3
    weight[4] *= F32(2.0**-140)  # subnormal
    weight[5] = rng.integers(-300, 300, inputs) * F32(2.0**-149)  # scales of one to three units of the least number
    weight[6] *= F32(2.0**120)
    weight[7] = np.copysign(weight[7, 0], weight[7])  # all of one size
    weight[8] = np.copysign(0.0, weight[8])
    weight[9, : group // 2] = 0
    return weight


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("inputs", "group"), [(64, 64), (150, 64), (5, 2), (33, 128), (96, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_integers_are_those_of_a_loop(rounding, bits, inputs, group, dtype):
    """Ties away from even, a scale from a neighbour's group or a padded tail, a product with the reciprocal."""
    weight_NK = torch.from_numpy(adversarial(inputs, group)).clamp(-60000, 60000).to(dtype)
    codes, scales = by_hand(weight_NK.float().numpy(), bits, group)
    got = rounding.quantise(weight_NK, bits, group)
    assert (got.bits, got.group) == (bits, group)
    assert same_bits(got.codes_NK, torch.from_numpy(codes))
    assert same_bits(got.scales_NG, torch.from_numpy(scales))
    for out in (torch.float32, torch.bfloat16, torch.float16):
        each = torch.from_numpy(scales).repeat_interleave(group, 1)[:, :inputs]
        assert same_bits(rounding.dequantise(got, out), (torch.from_numpy(codes).float() * each).to(out))


def test_strided_weights(rounding):
    """A view of a larger matrix is read as if its rows lay side by side."""
    weight_NK = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    whole = rounding.quantise(weight_NK[:, 8:].contiguous(), 8, 16)
    assert same_bits(rounding.quantise(weight_NK[:, 8:], 8, 16).codes_NK, whole.codes_NK)
    assert same_bits(
        rounding.quantise(weight_NK[:, 8:].T, 8, 4).codes_NK,
        rounding.quantise(weight_NK[:, 8:].T.contiguous(), 8, 4).codes_NK,
    )


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(rounding, wrong):
    """A NaN becomes a weight of 0 or 127, and the engine samples on."""
    for place in (0, 70, 99):
        weight_NK = torch.ones(3, 100)
        weight_NK[1, place] = wrong
        with pytest.raises(NonFiniteError, match="1 of 300 weights"):
            rounding.quantise(weight_NK, 8, 64)


@pytest.mark.parametrize(("bits", "group", "decibel"), [(8, 128, 43.74), (4, 128, 18.55), (4, 32, 20.24)])
def test_signal_to_noise(bits, group, decibel):
    """A scale that is too wide by a code (128 or 8), or an error that is not that of rounding."""
    weight_NK = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    rounded = kernels.dequantise(kernels.quantise(weight_NK, bits, group), torch.float32)
    noise = (weight_NK - rounded).double().square().sum()
    assert 10 * math.log10(weight_NK.double().square().sum() / noise) == pytest.approx(decibel, abs=0.15)


def in_pages(rows_TD: torch.Tensor, kind: torch.dtype) -> tuple[KvPool, torch.Tensor]:
    """Rows as keys and as values of one head, by the kernel that writes them; and what then is read of them."""
    (count, size), slots = rows_TD.shape, torch.arange(len(rows_TD))
    pool = KvPool(-(-count // 16), 16, 1, size, rows_TD.dtype, kind)
    fused = rows_TD[:, None].repeat(1, 3, 1)
    rotate_store_((fused[:, :1], fused[:, 1:2], fused[:, 2:]), slots, None, slots, pool)
    keys, values = pool.rows(slots)
    assert same_bits(keys, values)
    return pool, keys[:, 0]


def stored(x: torch.Tensor) -> torch.Tensor:
    """Codes that pages hold of numbers in e4m3: each is read as itself."""
    return to_e4m3(in_pages(x.reshape(-1, 16), torch.float8_e4m3fn)[1]).view(x.shape)


def check_vectors(rows_TD: torch.Tensor) -> None:
    """Codes and scales in int8 are those of a loop; broken vectors have scale NaN and codes 0."""
    broken_T = ~rows_TD.isfinite().all(1)
    whole = rows_TD.masked_fill(broken_T[:, None], 0).float().numpy()
    codes_TD, scales_T = (torch.from_numpy(x) for x in by_hand(whole, 8, whole.shape[1]))
    scales_T = scales_T[:, 0].masked_fill(broken_T, math.nan)
    codes, scales = to_int8(rows_TD)
    assert torch.equal(codes, codes_TD) and same_bits(scales, scales_T)
    pool, read = in_pages(rows_TD, torch.int8)
    wanted = (codes_TD.float() * scales_T[:, None]).to(rows_TD.dtype)
    for values in (read, from_int8(codes, scales, rows_TD.dtype)):
        assert torch.equal(values.nan_to_num(9), wanted.nan_to_num(9)) and torch.equal(values.isnan(), wanted.isnan())
    assert pool.scales is not None
    for which in (0, 1):
        assert same_bits(pool.scales[:, which].flatten()[: len(scales)], scales_T)


@given(
    rows=st.lists(st.lists(st.floats(width=32), min_size=16, max_size=16), min_size=1, max_size=20),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_vectors_to_int8(any_path, rows, kind):
    """A scale of a neighbour, a tie to odd, a vector of zeros divided by 0, or an infinity that becomes a number."""
    check_vectors(torch.tensor(rows).to(kind))


@pytest.mark.parametrize("size", [16, 24, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adversarial_vectors_to_int8(any_path, dtype, size):
    """As above, over heads with a tail: ties, zeros, tiny and large numbers, a NaN or an infinity anywhere."""
    rows = torch.from_numpy(adversarial(size, size)).clamp(-60000, 60000).to(dtype).repeat(3, 1)
    for row, value in ((20, math.nan), (21, -math.inf), (33, math.inf)):
        rows[row, row % size] = value
    check_vectors(rows)


def nearest_e4m3(x: torch.Tensor) -> np.ndarray:
    """Codes by ml_dtypes, of values within its range."""
    with np.errstate(invalid="ignore"):
        return x.float().numpy().clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_16_bit_number_to_e4m3(any_path, dtype):
    """A tie to odd, a subnormal flushed, 464 or an infinity that is not 448, a NaN that becomes a number."""
    kind = torch.float16 if dtype == torch.float16 else torch.bfloat16
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(kind).to(dtype)
    wanted = torch.from_numpy(nearest_e4m3(x))
    nan = x.isnan()
    for convert in (to_e4m3, stored):
        codes = convert(x).view(torch.uint8)
        assert bool((codes[~nan] == wanted[~nan]).all())
        assert bool(((codes[nan] & 0x7F) == 0x7F).all())


def test_fp32_to_e4m3_beside_every_tie(any_path):
    """A rounding in two steps: fp32 to bf16, then to e4m3, takes numbers next to a tie for the tie."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (values[1:] + values[:-1]) / 2
    above, below = (torch.nextafter(ties, torch.tensor(end)) for end in (math.inf, 0.0))
    x = torch.cat([ties, above, below, values, torch.tensor([448.0, 464.0, 465.0, 1e30, 1e-40])])
    x = torch.cat([x, -x])
    x = torch.nn.functional.pad(x, (0, -len(x) % 16))
    wanted = torch.from_numpy(nearest_e4m3(x))
    for convert in (to_e4m3, stored):
        assert same_bits(convert(x).view(torch.uint8), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code_from_e4m3(dtype):
    """A code that is read as another number than ml_dtypes'."""
    codes = torch.arange(256).to(torch.uint8)
    wanted = torch.from_numpy(codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(F32))
    got = from_e4m3(codes.view(torch.float8_e4m3fn), dtype)
    assert got.dtype == dtype and torch.equal(got.float().nan_to_num(999), wanted.nan_to_num(999))
    assert torch.equal(got.isnan(), wanted.isnan()) and int(got.isnan().sum()) == 2
    assert torch.equal(to_e4m3(got).view(torch.uint8)[~got.isnan()], codes[~got.isnan()])
