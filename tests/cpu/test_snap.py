"""The nearest number by sums in fp32 against the one made of bits, and a search's rounding against the codes'."""

from __future__ import annotations

import pytest
import torch

from tandem.kernels.quantise import nearest, values
from tandem.numerics import elements
from tandem.numerics.blocks import FORMATS, WHOLE, Format, dequantise, quantise, rounded
from tandem.numerics.elements import ELEMENTS, Element, Fixed, Floating, decode, floating
from tandem.numerics.scaling import tried
from tandem.numerics.snap import codes_of, encode, snap

KINDS: tuple[Element, ...] = (
    *ELEMENTS.values(),
    Fixed("int3", 3, 0),
    Fixed("int4", 4, 0),
    Fixed("int12", 12, 3),
    *(floating(name) for name in ("e3m4b5", "e5m10ieee", "e1m2")),
)


def edges(element: Element) -> torch.Tensor:
    """All bf16 numbers but NaN, all numbers of the format, ties with their neighbours, zeros, and normal numbers."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    every = bits.view(torch.bfloat16).float()
    values = element.values()[element.values().isfinite()].double().sort().values
    ties = ((values[1:] + values[:-1]) / 2).float()
    beside = [torch.nextafter(ties, torch.tensor(sign * torch.inf)) for sign in (1.0, -1.0)]
    drawn = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    scaled = [drawn * element.largest / 2, drawn * element.smallest]
    return torch.cat([every[~every.isnan()], values.float(), ties, *beside, *scaled])


@pytest.mark.parametrize("element", KINDS, ids=lambda element: element.name)
def test_the_same_codes_as_from_bits(element: Element) -> None:
    """A tie goes to the odd code, a denormal is lost, a zero loses its sign, or what is too large wraps."""
    x = edges(element)
    wanted = elements.encode(x, element)
    assert torch.equal(codes_of(snap(x, element), element), wanted)
    assert torch.equal(snap(x, element).double(), decode(wanted, element).double())


def test_the_same_codes_of_blocks_at_any_power() -> None:
    """A block far from 1 is divided by a number that fp32 does not have, or a block of zeros takes the others along."""
    for powers in ((-126, 120), (-100, 100), (-127, 0)):
        power = torch.tensor(powers)[:, None]
        x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)) * torch.exp2(power.float())
        x[x.abs() < 2.0**-126] = 0.0
        for element in (ELEMENTS["e2m1"], ELEMENTS["e4m3"], ELEMENTS["int8"]):
            wanted = elements.encode(x, element, power=power.long())
            assert torch.equal(encode(x, element, power=power), wanted), (powers, element.name)
    powers_of_two = floating("e4m0")  # ties go to the even code, which is not the even number: by bits
    x = edges(powers_of_two)
    assert torch.equal(encode(x, powers_of_two), elements.encode(x, powers_of_two))
    tiny = Floating("tiny", 5, 2, 120)  # numbers near the end of fp32: by bits
    x = torch.tensor([2.0**-118, -(2.0**-121), 2.0**-123])
    assert torch.equal(encode(x, tiny), elements.encode(x, tiny))


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_a_search_rounds_as_the_format_does(form: Format) -> None:
    """A search for scales measures another rounding than the one that is written; a ragged last block is one too."""
    x = torch.randn(130, 150, generator=torch.Generator().manual_seed(2)) * 0.02
    x[3], x[5, :16] = 0.0, 0.0
    x[7] *= -1.0
    assert torch.equal(tried(x, form), rounded(x, form))
    own = Format("int3_g50", Fixed("int3", 3, 0), 50, "fp32", zero_point=True)
    assert torch.equal(tried(x, own), rounded(x, own))
    assert form.block != WHOLE or quantise(x, form).scales.numel() == 1


@pytest.mark.parametrize(
    "name", ["int4_g32", "int4_g128", "int8_g128", "int8_row", "int4_g32_asym", "int8_tensor", "nvfp4"]
)
def test_the_compiled_rounding_has_the_same_codes(name: str, any_path: str) -> None:
    """Codes keep a sign beyond their bits, or a row's and a tensor's scale are mixed up."""
    form = FORMATS[name] if name in FORMATS else Format(name, Fixed("int8", 8, 0), -1 if "row" in name else 0, "fp32")
    x = torch.randn(9, 150, generator=torch.Generator().manual_seed(3)) * 0.02
    x[3] = 0.0
    for weight in (x, x.bfloat16()):
        made, wanted = nearest(weight, form), quantise(weight, form)
        assert torch.equal(made.codes, wanted.codes) and torch.equal(made.scales, wanted.scales)
        assert torch.equal(values(made, form), dequantise(wanted, form))
