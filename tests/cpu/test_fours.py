"""Products of codes of 4 bits by rows of 8: exact sums, the same bits on every processor, and files' codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.config import EngineConfig
from tandem.errors import NonFiniteError
from tandem.kernels.codes import Codes
from tandem.kernels.fours import Fours, fits, product_reference
from tandem.kernels.sizes import GROUP
from tandem.models.decoder import Decoder
from tandem.numerics.quantise import LARGEST, Quantised, dequantise, quantise
from tandem.sync.publish import Publisher
from tandem.sync.receive import Copied, integers_of
from tests.cpu.test_eights import normal
from tests.cpu.test_fused import CASES, both_ways, requests
from tests.cpu.test_publish import engine_on

KINDS = ("own", "halves", "minima")


def codes_of(kind: str, rows: int, inputs: int, group: int, seed: int) -> Quantised:
    """Own codes; a file's, all sixteen of them, with scales of both signs; and with minima."""
    draw = torch.Generator().manual_seed(seed)
    if kind == "own":
        return quantise(normal(rows, inputs, seed=seed), 4, group)
    codes = torch.randint(0, 16, (rows, inputs), generator=draw, dtype=torch.int8)
    scales, minima = torch.randn(2, rows, -(-inputs // group), generator=draw).half()
    return Quantised(codes, scales, 4, group, minima) if kind == "minima" else Quantised(codes - 8, scales, 4, group)


def by_hand(x: torch.Tensor, weight: Quantised) -> torch.Tensor:
    """One row and column at a time, sums of Python's integers, fp32 numbers one by one."""
    found = torch.zeros(len(x), len(weight.codes_NK))
    for t, row in enumerate(x.float()):
        scale = row.abs().max() / LARGEST[8]
        codes = [round(float(value / scale)) if scale else 0 for value in row]
        for n, column in enumerate(weight.codes_NK.tolist()):
            total = torch.tensor(0.0)
            for g in range(weight.scales_NG.shape[1]):
                own = range(g * weight.group, min(len(codes), (g + 1) * weight.group))
                total = (
                    total + torch.tensor(float(sum(codes[k] * column[k] for k in own))) * weight.scales_NG[n, g].float()
                )
                if weight.minima_NG is not None:
                    total = total + torch.tensor(float(sum(codes[k] for k in own))) * weight.minima_NG[n, g].float()
            found[t, n] = total * scale
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(st.integers(1, 20), st.integers(1, 140), st.integers(1, 90), st.sampled_from([8, 32, 64]), st.integers(0, 99))
def test_is_the_reference(
    any_path, kind: str, dtype: torch.dtype, rows: int, columns: int, inputs: int, group: int, seed: int
):
    """A nibble, a scale or a row's sum of another column or group; words and groups beyond the inputs."""
    x, quantised = normal(rows, inputs, seed=seed, dtype=dtype), codes_of(kind, columns, inputs, group, seed)
    x[0] = 0
    if rows > 2:
        x[2, inputs // 2] = torch.nan if seed % 2 else torch.inf
    bias, residual = normal(columns, seed=3, dtype=torch.float32), normal(rows, columns, seed=4, dtype=dtype)
    wanted = product_reference(x, quantised, bias, residual)
    if any_path != "reference":
        made = Fours(quantised)
        got = made.product(x, bias, residual)
        assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.nan_to_num(), wanted.nan_to_num())
        wide = made.product(x, out_dtype=torch.float32)
        assert torch.equal(wide.nan_to_num(), product_reference(x, quantised, out_dtype=torch.float32).nan_to_num())
        assert torch.equal(made.values(dtype), dequantise(quantised, dtype))
    assert bool(wanted[2].isnan().all()) if rows > 2 else bool(wanted.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_rule(kind: str) -> None:
    """A reference that shares a mistake with the kernel."""
    x, weight = normal(4, 70, seed=1, dtype=torch.float32), codes_of(kind, 5, 70, 32, 2)
    x[3] = 0
    torch.testing.assert_close(product_reference(x, weight), by_hand(x, weight), rtol=0, atol=0)
    exact = x.double() @ dequantise(weight, torch.float32).double().T
    assert float((product_reference(x, weight).double() - exact).abs().max()) < 0.05 * float(exact.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_alone(kernel_path, kind: str) -> None:
    """A row whose bits hang on how many ride along: few rows take other ways through a panel than many."""
    made, x = Fours(codes_of(kind, 200, 96, 32, 1)), normal(23, 96, seed=2)
    whole = made.product(x)
    for count in range(1, 8):
        assert all(torch.equal(made.product(x[i : i + count]), whole[i : i + count]) for i in range(23)), count
    assert torch.equal(made.product(torch.cat([x, x], 1)[:, :96]), whole)


def test_sums_are_exact_where_they_are_largest(kernel_path) -> None:
    """A sum that saturates at 16 bits, or loses what rows and nibbles carry beside their codes."""
    for sign in (1.0, -1.0):
        weight = quantise(torch.full((64, 16384), sign), 4, 16384)
        wanted = torch.tensor(sign * 16384 * 7 * 127) * (torch.tensor(1.0) / 7) * (torch.tensor(1.0) / 127)
        assert bool((Fours(weight).product(torch.ones(2, 16384)) == wanted).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=12)
@given(st.integers(1, 140), st.integers(1, 90), st.integers(0, 99))
def test_a_matrix_is_rounded_where_it_lies(kernel_path, dtype: torch.dtype, rows: int, inputs: int, seed: int) -> None:
    """A code or a scale of the matrix before, a denormal scale that a vector rounds away, a NaN that is served."""
    weight, made = normal(rows, inputs, seed=seed, dtype=dtype), Fours(normal(rows, inputs, seed=seed + 1, dtype=dtype))
    weight[seed % rows] *= (1.0, 0.0, 1e-38)[seed % 3]
    made.round(weight)
    quantised = quantise(weight, 4, GROUP)
    assert torch.equal(made.packed, Fours(quantised).packed) and made.is_of(weight)
    assert torch.equal(made.values(dtype), dequantise(quantised, dtype))
    weight[-1, -1] += 1
    assert not made.is_of(weight)
    weight[-1, -1] = torch.nan
    with pytest.raises(NonFiniteError, match="1 of .* weights are not finite"):
        made.round(weight)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_pass_in_one_call(changes, dtype, make_decoder: Callable[..., Decoder], kernel_path) -> None:
    """Rows of another product as codes, sums of another row's group, threads that read rows before they are rounded."""
    decoder = make_decoder(dtype, **changes)
    for layer in decoder.layers:
        for slot, weight in layer.weights():
            if slot.columns is not None and (slot.name != "out" or layer.index):  # one is multiplied as it is
                weight.multiply_in_codes(weight.value, 8 if slot.name == "down" and layer.index else 4)
    done = both_ways(decoder).generate(requests(9))
    assert [len(completion.tokens) for completion in done] == [3 + i for i in range(9)]


def test_a_file_s_codes_are_served(make_decoder: Callable[..., Decoder]) -> None:
    """Codes of a file that are rounded once more, or served of weights that are others by now."""
    learner, decoder = make_decoder("bfloat16"), make_decoder("bfloat16")
    own = {}
    for name, weight in learner.weights():
        if weight.value.ndim == 2 and name not in ("embed", "head"):
            own[name] = codes_of("minima", *weight.value.shape, 16, len(own))
            weight.value.copy_(dequantise(own[name], torch.bfloat16))
    other = next(iter(own))
    own[other] = replace(own[other], bits=8)
    learner.repack()
    config = EngineConfig(weights="w4a8", page_tokens=4, max_sequences=4, batch_tokens=64)
    receiver = Copied("far", decoder, engine_on(decoder, config), rounding=integers_of(config), codes=own.get)
    publisher = Publisher(learner, [receiver])
    publisher.publish(0)
    served = dict(decoder.weights())
    for name, quantised in own.items():
        codes = served[name].codes
        assert isinstance(codes, Fours) and codes.packed.equal(
            Fours(quantised if name != other else quantise(dict(learner.weights())[name].value, 4, GROUP)).packed
        ), name
    for name, weight in learner.weights():
        if name in own:
            weight.value.neg_()
    learner.repack()
    publisher.publish(1)
    for name, weight in learner.weights():
        if name in own:
            assert torch.equal(served[name].served(), dequantise(quantise(weight.value, 4, GROUP), torch.bfloat16)), (
                name
            )


def test_what_has_no_packed_form() -> None:
    """Minima in fp32, groups of no whole words, or 8 bits, packed as something else."""
    own = quantise(normal(4, 64, seed=1), 4, 32)
    assert fits(own) and not fits(quantise(normal(4, 64, seed=1), 8, 32))
    assert not fits(quantise(normal(4, 64, seed=1), 4, 12)) and not fits(replace(own, minima_NG=own.scales_NG))
    assert Codes(own).packed.equal(Fours(own).packed)
