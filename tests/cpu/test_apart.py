"""Two formats told apart, and the verb `tandem numerics`."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tandem.cli.main import main
from tandem.errors import ConfigError
from tandem.numerics.apart import compare, edges
from tandem.numerics.blocks import FORMATS, quantise, rounded
from tandem.numerics.elements import E2M1


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["numerics", *words]) == 0
    return capsys.readouterr().out


def test_edges_have_ties_and_both_sides_of_powers() -> None:
    """Inputs that a wrong rule passes: none of them on an edge."""
    found = dict(edges(E2M1, 32))
    edge = found["edges at 2^0"]
    tops = edge.abs().amax(1)
    assert {1.0, 1.5, 6.0} <= set(tops.tolist()) and math.nextafter(1, 2) not in tops.tolist()
    assert torch.nextafter(torch.tensor(6.0), torch.tensor(math.inf)) in tops
    assert torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)) in tops
    block = edge[tops == 1.0][0]
    assert {0.0625, 0.1875, 0.3125, 0.4375, 0.625, 0.875} <= set(block.tolist())  # ties at a scale of 1 / 4


def test_the_first_difference() -> None:
    """A place, a code or a scale that is another block's; NaN that counts as a difference of equal formats."""
    x = torch.zeros(3, 96)
    x[0, 0], x[1, 33], x[1, 40] = math.nan, 1.75, 0.3
    found = compare(FORMATS["mxfp4"], FORMATS["mxfp4_even"], [("same", torch.ones(2, 32)), ("x", x)])
    assert found.numbers == 64 + 3 * 96 and found.differ == 1 and found.first is not None
    first = found.first
    assert first.name == "x" and first.place == (1, 32) and first.inputs[1] == 1.75
    assert first.scales == (0.25, 0.5) and first.values[0][1] == 1.5 and first.values[1][1] == 2.0
    codes = tuple(tuple(quantise(x, FORMATS[name]).codes[1, 32:64].tolist()) for name in ("mxfp4", "mxfp4_even"))
    assert first.codes == codes
    assert compare(FORMATS["mxfp4"], FORMATS["mxfp4"], [("x", x)]).first is None
    tile = torch.randn(150, 200)
    assert compare(FORMATS["fp8_128x128"], FORMATS["fp8_128x128"], [("x", tile)]).differ == 0
    with pytest.raises(ConfigError, match="differ everywhere"):
        compare(FORMATS["mxfp4"], FORMATS["nvfp4"], [])


def test_edges_are_edges_of_a_scale_of_the_tensor_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks of all powers in one tensor, of which a scale of the tensor leaves all but the largest at 0."""
    for name in ("nvfp4", "nvfp4_inference", "nvfp4_four_six", "fp8_tensor"):
        form = FORMATS[name]
        for power in (0, -1, 8, -9, 60, -60):
            x = dict(edges(form.element, 16))[f"edges at 2^{power}"]
            assert bool((quantise(x, form).codes[:, 0] != 0).all()), (name, power)
    assert "the first of normal, in bf16" in told(capsys, "compare", "nvfp4", "nvfp4_inference")


def test_the_block_that_is_shown_has_other_codes() -> None:
    """A block whose values differ in the last bit shown, where another has other codes: nothing is learned from it."""
    ties = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    alike = torch.full((1, 16), 1.1)
    forms = FORMATS["nvfp4"], FORMATS["nvfp4_inference"]
    found = compare(*forms, [("alike", alike), ("x", ties)])
    assert found.first is not None and 0 < found.recoded < found.differ
    codes = found.first.codes
    assert codes[0] != codes[1] and found.first.name == "x"
    values = compare(*forms, [("alike", alike)])
    assert (values.differ, values.recoded) == (16, 0) and values.first is not None and values.first.name == "alike"


def test_scales_of_fp16_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    """Formats with scales of fp16 refused for the sake of inputs that were made to tell formats apart."""
    text = told(capsys, "compare", "e2m1/16:fp16", "e2m1/16:bf16")
    assert "by other codes" in text and "edges at 2^60" not in text


def test_every_pair_of_rules_is_told_apart() -> None:
    """Two rules of one format that no input of `edges` separates."""
    for name in ("mxfp4", "mxfp8_e4m3", "mxfp6_e2m3", "mxint8"):
        rules = [name, *(f"{name}_{rule}" for rule in ("rceil", "ceil", "even"))]
        for one, other in zip(rules, rules[1:] + rules[:1], strict=True):
            first = FORMATS[one]
            assert compare(first, FORMATS[other], edges(first.element, 32)).first is not None, (one, other)


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    """A table that lacks a format, a comparison that says another count than its JSON."""
    table = told(capsys, "formats")
    assert all(f"\n{name} " in table for name in FORMATS)
    rows = {row["format"]: row for row in json.loads(told(capsys, "formats", "--json"))}
    assert rows["nvfp4"]["bits"] == 4.5 and rows["fp8_128x128"]["block"] == "128 x 128"
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    noise = (x - rounded(x, FORMATS["mxfp4"])).square().sum() / x.square().sum()
    assert rows["mxfp4"]["sqnr_db"] == pytest.approx(-10 * math.log10(float(noise)), abs=0.01)
    found = json.loads(told(capsys, "compare", "mxfp4", "mxfp4_even", "--json"))
    text = told(capsys, "compare", "mxfp4", "mxfp4_even")
    assert f"{found['differ']:,} of {found['numbers']:,} numbers" in text and "the first of edges at 2^0, row" in text
    assert "0 of " in told(capsys, "compare", "e4m3/32:e8m0", "mxfp8_e4m3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "mxfp4"], "takes two formats and maybe a model; 1 names were given"),
        (["compare", "a", "b"], "'a' is no format"),
        (["compare", "mxfp4", "nvfp4"], "mxfp4 has a scale for each 32, nvfp4 for each 16: they differ everywhere"),
        (["compare", "fp8_row", "fp8_tensor"], "for each row, fp8_tensor for each tensor"),
        (["compare", "mxfp4", "mxfp4_even", "nowhere"], "no model at nowhere"),
        (["formats", "x"], "takes no names"),
    ],
)
def test_what_the_verb_refuses(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nonsense that is taken, or ends with a trace."""
    assert main(["numerics", *words]) == 2
    assert message in capsys.readouterr().err
