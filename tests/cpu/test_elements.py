"""Number formats: every code and every cast, by ml_dtypes, by a table of values, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tandem.errors import ConfigError, NonFiniteError
from tandem.numerics.elements import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    ELEMENTS,
    INT8,
    Element,
    decode,
    encode,
    encode_reference,
    floating,
    words_of,
)

ml_dtypes = pytest.importorskip("ml_dtypes")
THEIRS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
OWN = ["e3m4b5", "e1m6", "e4m3b11", "e5m10ieee", "e8m7ieee", "e4m0nan", "e3m3b0ieee"]
ALL_BF16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def ties(element: Element) -> torch.Tensor:
    """Each value, each middle of two, and the fp32 numbers on both sides of each."""
    values = element.values()[: element.last + 1].double()
    exact = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([element.largest * 1.25])]).float()
    near = [torch.nextafter(exact, torch.tensor(way)) for way in (torch.inf, -torch.inf)]
    found = torch.cat([exact, *near])
    return torch.cat([found, -found])


@pytest.mark.parametrize("name", [*THEIRS])
def test_every_code_is_ml_dtypes_number(name: str) -> None:
    """A code that is read as another number."""
    element = ELEMENTS[name]
    theirs = np.arange(1 << element.bits, dtype=np.uint8).view(THEIRS[name]).astype(np.float32)
    np.testing.assert_array_equal(decode(torch.arange(1 << element.bits), element).numpy(), theirs)
    assert element.largest == float(ml_dtypes.finfo(THEIRS[name]).max)
    assert element.smallest == float(ml_dtypes.finfo(THEIRS[name]).smallest_subnormal)


@pytest.mark.parametrize("name", [*THEIRS])
def test_every_bf16_becomes_ml_dtypes_code(name: str) -> None:
    """A cast that rounds twice, breaks ties otherwise, or flushes denormals, of all 65,536 inputs and of all ties."""
    element = ELEMENTS[name]
    for x in (ALL_BF16.float(), ties(element)):
        x = x[x.isfinite()]
        inside = x.clamp(-element.largest, element.largest)  # ml_dtypes has NaN or infinity beyond
        theirs = inside.numpy().astype(THEIRS[name]).view(np.uint8)
        np.testing.assert_array_equal(encode(x, element).numpy(), theirs)


def test_beyond_the_largest() -> None:
    """Overflow that saturates where it is to be told, or is told where it is to saturate."""
    x = torch.tensor([464.0, 464.5, -1e30, torch.inf, torch.nan])
    assert decode(encode(x, E4M3), E4M3)[:4].tolist() == [448, 448, -448, 448]
    assert decode(encode(x, E4M3, saturate=False), E4M3).isnan().tolist() == [False, True, True, True, True]
    y = torch.tensor([61439.0, 61440.0, -torch.inf, torch.nan])
    assert decode(encode(y, E5M2), E5M2)[:3].tolist() == [57344, 57344, -57344]
    told = decode(encode(y, E5M2, saturate=False), E5M2)
    assert told[:3].tolist() == [57344, torch.inf, -torch.inf] and bool(told[3].isnan())
    assert decode(encode(torch.tensor([torch.inf]), E2M1, saturate=False), E2M1).item() == 6
    with pytest.raises(NonFiniteError, match="1 of 2 numbers are NaN, and e2m1 has none"):
        encode(torch.tensor([1.0, torch.nan]), E2M1)


@pytest.mark.parametrize("name", [*ELEMENTS, *OWN])
def test_two_writings_agree(name: str) -> None:
    """An integer rule that is not the nearest value, of formats that no library has, too."""
    element = floating(name)
    for x in (ALL_BF16.float(), ties(element)):
        x = x[x.isfinite()]
        torch.testing.assert_close(encode(x, element), encode_reference(x, element), rtol=0, atol=0)


def test_halves_are_torch_halves() -> None:
    """A format of one's own that is fp16 or bf16 by another name."""
    x = torch.cat([ALL_BF16.float(), torch.randn(4096), torch.randn(4096) * 1e-6])
    x = x[x.isfinite()]
    for name, dtype in (("e5m10ieee", torch.float16), ("e8m7ieee", torch.bfloat16)):
        if name == "e8m7ieee":
            with pytest.raises(ConfigError, match="16 with the sign|has numbers that fp32 has not"):
                floating("e8m9ieee")
        got = encode(x, floating(name), saturate=False)
        assert torch.equal(got.to(torch.int16), x.to(dtype).view(torch.int16)), name


def test_toward_zero() -> None:
    """A number that grows."""
    x = torch.tensor([0.49, 0.99, 1.49, 5.99, 1e9, -2.99, -0.3])
    assert decode(encode(x, E2M1, "zero"), E2M1).tolist() == [0, 0.5, 1, 4, 6, -2, -0.0]
    for element in (E2M3, E3M2, E4M3, INT8):
        y = ALL_BF16.float()
        y = y[y.isfinite()]
        got = decode(encode(y, element, "zero"), element).abs()
        assert bool((got <= y.abs()).all())
        assert bool((decode(encode(y, element), element).abs() - got >= 0).all())


def test_stochastic_rounding_is_right_in_the_mean() -> None:
    """A probability that is not the lost part's share; a number that is exact and moves; a denormal that is lost."""
    drawn = torch.Generator().manual_seed(0)
    for element, x in ((E2M1, 1.1), (E2M1, 0.05), (E4M3, 2.0**-9 * 0.3), (INT8, 0.3), (E5M2, -3.2)):
        many = torch.full((200_000,), x)
        got = decode(encode(many, element, "stochastic", words=words_of(many, drawn)), element).double()
        ends = got.unique()
        assert len(ends) == 2 and ends[0] <= x <= ends[1]
        error = float((ends[1] - ends[0]) / 2 / len(many) ** 0.5)
        assert abs(float(got.mean()) - float(many[0])) <= 4.5 * error, (element.name, x)
        exact = element.values()[: element.last + 1]
        assert torch.equal(decode(encode(exact, element, "stochastic", words=words_of(exact, drawn)), element), exact)


@pytest.mark.parametrize("power", [-140, -20, -3, 0, 5, 120])
def test_a_power_of_two_is_no_rounding(power: int) -> None:
    """A scale that is multiplied in, and rounds or underflows."""
    x = torch.randn(512) * 2.0 ** max(-100, min(100, power))
    wide = (x.double() * 2.0**-power).float()  # exact where fp32 has it
    fits = wide.double() == x.double() * 2.0**-power
    assert int(fits.sum()) > 500
    torch.testing.assert_close(encode(x, E4M3, power=power)[fits], encode(wide, E4M3)[fits], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["e9m1", "e3", "e0m3", "e8m8", "e1m0ieee", "e5m2b200", "int7"])
def test_odd_formats_are_refused(name: str) -> None:
    """A format that fp32 cannot hold, or that is no format, is taken."""
    with pytest.raises(ConfigError):
        floating(name)
