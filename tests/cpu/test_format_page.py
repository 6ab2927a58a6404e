"""A format's page: its ties, its errors and its pictures, of every format."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tandem.cli import main
from tandem.numerics.blocks import FORMATS, format_of
from tandem.numerics.elements import E2M1, decode, encode_reference
from tandem.report import format_page
from tandem.report.format_page import (
    RULES,
    decibels_by_top,
    error_figure,
    errors_by_size,
    facts,
    grid_figure,
    rule_of,
    saturating,
    scale_figure,
    ties,
    values,
)


def number(text: str) -> float:
    """As a page has it: 0.25, or 1.5 x 2^-16."""
    size, _, power = text.partition(" x 2^")
    return float(size) * 2.0 ** int(power or 0)


def test_ties_of_four_bits_by_hand() -> None:
    """A tie told to go to the odd code."""
    goes = {middle: to for _, _, middle, to in ties(E2M1)}
    assert goes == {"0.25": "0", "0.75": "1", "1.25": "1", "1.75": "2", "2.5": "2", "3.5": "4", "5": "4"}
    assert dict(values(E2M1)) == dict(zip("01234567", ("0", "0.5", "1", "1.5", "2", "3", "4", "6"), strict=True))


@pytest.mark.parametrize("name", [*FORMATS, "e3m2/20:bf16", "int8/row:e8m0", "e3m4/8x32:fp16", "int8/tensor:e8m0"])
def test_every_format_has_a_page(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A format without a rule, or one whose curves cannot be drawn."""
    monkeypatch.setattr(format_page, "DRAWN", 4)
    form = format_of(name)
    assert rule_of(form) in RULES
    for low, high, middle, to in ties(form.element):
        if low != "…":
            code = encode_reference(torch.tensor([number(middle)]), form.element)
            assert float(decode(code, form.element)) == pytest.approx(number(to), rel=1e-5) and to in (low, high)
            assert number(low) < number(middle) < number(high)
    share, error = errors_by_size(form)
    assert len(share) == len(error) and np.isfinite(error).all() and error.max() <= 1 + 1e-6
    near = error[(share > 0.5) & (share < 1)]
    assert 0 < near.max() < 0.34
    assert name in FORMATS or facts(form)[-1][1].endswith("%") == (name in ("e3m2/20:bf16", "int8/row:e8m0"))
    figures = [draw(form) for draw in (grid_figure, error_figure)]
    assert all(figure.axes for figure in figures)
    tops = torch.tensor([0.25 if form.scale == "e4m3" else 1.5])
    assert decibels_by_top(form, tops, form.scale == "e4m3")[0] > 14


def test_a_scale_for_each_number_and_scales_that_end() -> None:
    """A page that ends with a trace, or is refused, for a block of one number or a scale beyond fp16."""
    share, error = errors_by_size(format_of("e2m1/1:fp32"))
    assert len(share) == len(error) and error.max() < 1e-6  # each is its block's largest
    assert decibels_by_top(format_of("e2m1/16:fp16"), torch.tensor([1.5, 2.0**30]), False) == [
        pytest.approx(20, abs=2),
        0.0,
    ]


def test_codes_with_a_zero_point_begin_at_zero() -> None:
    """Codes of int4 with a zero point shown as signed: eight of the sixteen, and negative numbers of the same sizes."""
    form = FORMATS["int4_g32_asym"]
    assert [code for code, _ in values(form.shown)] == list("0123456789abcdef")
    told = dict(facts(form))
    assert told["element"] == "uint4, 4 bits, 15 numbers above zero" and "zero point" in told["bits a number"]
    assert dict(facts(FORMATS["fp8_row"]))["bits a number"] == "8, that of a row not among them"


def test_blocks_that_saturate_are_counted() -> None:
    """MXFP4's floor rule called harmless: 6 is 1.5 x 2^2, so blocks whose largest has more mantissa lose it."""
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    mantissa = 2 * torch.frexp(x.view(-1, 32).abs().amax(1))[0]
    for name, most in (("mxfp4", 1.5), ("mxfp8_e4m3", 1.75)):
        share = float((mantissa > most).float().mean())
        assert saturating(x, FORMATS[name]) == share > 0.1
    for name in ("mxfp4_rceil", "int4_g32", "int4_g128_asym"):
        assert saturating(x, FORMATS[name]) == 0.0
    assert 0 < saturating(x, FORMATS["nvfp4"]) < 1  # a scale that is rounded down


def test_lost_blocks_are_lost() -> None:
    """A scale that underflows drawn as if it held: NVFP4's of the training chain below 2^-10 / 448 of the tensor's."""
    form = FORMATS["nvfp4"]
    assert decibels_by_top(form, torch.tensor([2.0**-19.5, 2.0**-4]), True) == [0.0, pytest.approx(20.2, abs=0.5)]
    octave = np.array(decibels_by_top(FORMATS["mxfp4"], torch.tensor([1.99, 1.5]), False))
    assert octave[0] < octave[1] - 2  # what saturates


@pytest.mark.parametrize("name", ["e3m4/32:e8m0:even"])
def test_a_page_opens_offline(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A page that needs the network or another file, or a name of one's own that is no file's."""
    assert main.main(["numerics", "page", name, "--out", str(tmp_path / "pages")]) == 0
    (path,) = (tmp_path / "pages").iterdir()
    assert str(path) in capsys.readouterr().out
    page = path.read_text(encoding="utf-8")
    assert page.count("<img ") == 3 and format_of(name).element.name in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert scale_figure(format_of(name)).axes
