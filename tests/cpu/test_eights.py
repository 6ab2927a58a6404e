"""Products of integers of 8 bits: exact sums, the same bits on every processor, and an engine that multiplies so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tandem.engine.config import EngineConfig
from tandem.errors import ConfigError, DeliveryError
from tandem.kernels.eights import Eights, product_reference
from tandem.kernels.linear import linear
from tandem.kernels.weight import Weight
from tandem.models.decoder import Decoder
from tandem.numerics.quantise import LARGEST, Quantised, dequantise, quantise
from tandem.sync.receive import Copied, integers_of
from tests.cpu.test_fused import CASES, both_ways, requests
from tests.cpu.test_publish import engine_on


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(x: torch.Tensor, weight: Quantised) -> torch.Tensor:
    """One row at a time, sums of Python's integers."""
    rows = []
    for row in x.float():
        scale = (row.abs().max() / LARGEST[8]).item()
        codes = [round(float(torch.tensor(v) / torch.tensor(scale))) if scale else 0 for v in row.tolist()]
        sums = [sum(a * b for a, b in zip(codes, column, strict=True)) for column in weight.codes_NK.tolist()]
        rows.append(torch.tensor(sums).float() * (torch.tensor(scale) * weight.scales_NG[:, 0]))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(st.integers(1, 20), st.integers(1, 140), st.integers(1, 90), st.integers(0, 99))
def test_is_the_exact_product(any_path, dtype: torch.dtype, rows: int, columns: int, inputs: int, seed: int) -> None:
    """A code, a scale, a sum that is taken off or a bias of another row or column; words beyond the inputs."""
    x, weight = normal(rows, inputs, seed=seed, dtype=dtype), normal(columns, inputs, seed=seed + 1, dtype=dtype)
    x[0] = 0
    if rows > 2:
        x[2, inputs // 2] = torch.nan
    quantised, bias = quantise(weight, 8, inputs), normal(columns, seed=3, dtype=torch.float32)
    residual = normal(rows, columns, seed=4, dtype=dtype)
    wanted = product_reference(x, quantised, bias, residual)
    if any_path != "reference":
        got = Eights(quantised).product(x, bias, residual)
        assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.nan_to_num(), wanted.nan_to_num())
        wide = Eights(quantised).product(x, out_dtype=torch.float32)
        assert torch.equal(wide.nan_to_num(), product_reference(x, quantised, out_dtype=torch.float32).nan_to_num())
    assert bool(wanted[2].isnan().all()) if rows > 2 else bool(wanted.isfinite().all())


def test_the_reference_is_the_rule() -> None:
    """A reference that shares a mistake with the kernel."""
    x, weight = normal(5, 30, seed=1, dtype=torch.float32), quantise(normal(7, 30, seed=2), 8, 30)
    x[3] = 0
    torch.testing.assert_close(product_reference(x, weight), by_hand(x, weight), rtol=0, atol=0)
    exact = x.double() @ dequantise(weight, torch.float32).double().T
    assert float((product_reference(x, weight).double() - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_a_row_has_the_same_bits_alone(kernel_path) -> None:
    """A row whose codes, or sums, hang on its neighbours."""
    made, x = Eights(quantise(normal(200, 96, seed=1), 8, 96)), normal(23, 96, seed=2)
    whole = made.product(x)
    assert all(torch.equal(made.product(x[i : i + 1])[0], whole[i]) for i in range(23))
    strided = torch.cat([x, x], 1)[:, :96]
    assert torch.equal(made.product(strided), whole)


def test_sums_are_exact_where_they_are_largest(kernel_path) -> None:
    """A sum that saturates at 16 bits, or overflows 32 with the 128 that rows carry."""
    for sign in (1.0, -1.0):
        weight = quantise(torch.full((64, 16384), sign), 8, 16384)
        x = torch.ones(2, 16384)
        wanted = float(torch.tensor(16384.0 * 127 * 127) * (torch.tensor(1.0) / 127 * (torch.tensor(1.0) / 127)))
        assert bool((Eights(weight).product(x) == sign * wanted).all())


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_pass_in_one_call(changes, dtype, make_decoder: Callable[..., Decoder], kernel_path) -> None:
    """Rows of another product as codes, threads that read rows before they are rounded, codes of few rows."""
    decoder = make_decoder(dtype, **changes)
    for layer in decoder.layers:
        for slot, weight in layer.weights():
            if slot.columns is not None and (slot.name != "out" or layer.index):  # one is multiplied as it is
                weight.multiply_in_codes(weight.value)
    done = both_ways(decoder).generate(requests(9))
    assert [len(completion.tokens) for completion in done] == [3 + i for i in range(9)]


def test_what_is_served_is_what_was_rounded(make_decoder: Callable[..., Decoder]) -> None:
    """An engine that multiplies by other codes than it says, or rounds what stays whole."""
    learner, decoder = make_decoder("bfloat16"), make_decoder("bfloat16")
    config = EngineConfig(weights="w8a8", page_tokens=4, max_sequences=4, batch_tokens=64)
    receiver = Copied("far", decoder, engine_on(decoder, config), rounding=integers_of(config))
    from tandem.sync.publish import Publisher

    Publisher(learner, [receiver]).publish(0)
    for (name, ours), (_, theirs) in zip(learner.weights(), decoder.weights(), strict=True):
        if name in ("embed", "head") or ours.value.ndim == 1:
            assert theirs.codes is None and torch.equal(theirs.served(), ours.value), name
        else:
            own = dequantise(quantise(ours.value, 8, ours.value.shape[1]), torch.bfloat16)
            assert isinstance(theirs.codes, Eights) and torch.equal(theirs.served(), own), name
            x = normal(3, ours.value.shape[1], seed=5)
            wanted = product_reference(x, quantise(ours.value, 8, ours.value.shape[1]))
            assert torch.equal(linear(x, theirs), wanted), name


def test_codes_of_other_weights_are_not_served(make_decoder: Callable[..., Decoder], monkeypatch) -> None:
    """An engine whose codes are those of the version before, or are changed where they lie."""
    from tandem.sync.publish import Publisher

    learner, decoder = make_decoder("bfloat16"), make_decoder("bfloat16")
    config = EngineConfig(weights="w8a8", page_tokens=4, max_sequences=4, batch_tokens=64)
    publisher = Publisher(learner, [Copied("far", decoder, engine_on(decoder, config), rounding=integers_of(config))])
    publisher.publish(0)
    changed = learner.layers[1].mix.qkv
    changed.value.mul_(1.5)
    changed.repack()
    publisher.publish(1)
    changed.value[3, 5] += 1
    changed.repack()
    with monkeypatch.context() as patched:
        patched.setattr(Eights, "round", lambda self, value: None)
        with pytest.raises(DeliveryError, match=r"other weights than were published, in 1 of .*layers\.1\.qkv"):
            publisher.publish(2)


def test_refused_where_it_cannot_be(make_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another product than was asked for, in silence."""
    decoder = make_decoder("bfloat16")
    for _, weight in decoder.weights():
        weight.library = True
    config = replace(EngineConfig(), weights="w8a8")
    with pytest.raises(ConfigError, match="w8a8, whose products are computed by tandem's own compiled kernels"):
        Copied("far", decoder, rounding=integers_of(config))
    with pytest.raises(AssertionError, match="own kernels alone"):
        bare = Weight(torch.zeros(4, 4), matrix=False)
        bare.multiply_in_codes(torch.zeros(4, 4))
