"""A weight's adapter and a weight's shard: values, gradients, the same bits in engine and learner.

Tolerance: in fp32 each product errs by at most K 2^-24 of the sum of its magnitudes, K at most 128 here; the decoder's
logits pass some forty of them, whose errors are taken to add up.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from tandem.errors import ModelError
from tandem.kernels.linear import linear
from tandem.kernels.swiglu import swiglu_down, swiglu_reference
from tandem.kernels.weight import Adapter, Weight
from tandem.models.decoder import Decoder
from tandem.models.fused import fits
from tandem.models.parts import Slot, Stored, all_slots

MATRICES = ["qkv", "out", "gate_up", "down"]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(rows: int, depth: int, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> Adapter:
    sides = (normal(rank, depth, seed=seed) / depth**0.5, normal(rows, rank, seed=seed + 1) / rank**0.5)
    made = Adapter(*(Weight(side.to(dtype), matrix=True) for side in sides), scale=0.5)
    made.down.grad, made.up.grad = torch.zeros(rank, depth), torch.zeros(rows, rank)
    return made


def adapted(decoder: Decoder, names: list[str], rank: int = 3) -> Decoder:
    for layer in decoder.layers:
        for slot, weight in layer.weights():
            if slot.name in names:
                weight.adapter = adapter(*weight.value.shape, rank, 7 * layer.index, weight.value.dtype)
    return decoder


@pytest.mark.parametrize("rank", [1, 4, 65])
@pytest.mark.parametrize("feed", [False, True])
def test_products_and_gradients(any_path, rank: int, feed: bool) -> None:
    """An adapter that is scaled twice or not, or whose gradient, or that of its input, lacks a term."""
    rows, depth, count = 20, 34, 9
    x = normal(count, 2 * depth if feed else depth, seed=0).requires_grad_()
    weight, residual = Weight(normal(rows, depth, seed=1), matrix=True), normal(count, rows, seed=2).requires_grad_()
    weight.adapter = one = adapter(rows, depth, rank, 3)
    dy = normal(count, rows, seed=5)
    y = swiglu_down(x, weight, residual) if feed else linear(x, weight, None, residual)
    y.backward(dy)

    plain = [t.detach().double().requires_grad_() for t in (x, one.down.value, one.up.value, residual)]
    act = swiglu_reference(plain[0]) if feed else plain[0]
    wanted = act @ (weight.value.double() + 0.5 * plain[2] @ plain[1]).T + plain[3]
    wanted.backward(dy.double())
    found = [y, x.grad, one.down.grad, one.up.grad, residual.grad]
    for got, right in zip(found, [wanted.detach(), *(t.grad for t in plain)], strict=True):
        assert got is not None and right is not None
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)
    assert weight.grad is None  # frozen


@pytest.mark.parametrize("names", [*([name] for name in MATRICES), MATRICES], ids="+".join)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engine_and_learner_have_the_same_bits(make_decoder, parity, dtype: str, names: list[str]) -> None:
    """An engine's pass in one call that leaves the adapter out, or a row whose adapter depends on its company."""
    decoder = make_decoder(dtype=dtype)
    asked = parity.groups([[5, 6, 7], [9] * 17, [3, 1, 4, 1, 5, 9, 2, 6]], 2, 1.0, 14)
    without = parity.engine(decoder).generate(asked)
    adapted(decoder, names)
    engine = parity.engine(decoder)
    assert not fits(decoder, engine.runner.pools_L)
    done = parity.check_company(decoder, asked, engine)
    assert [one.logprobs for one in done] != [one.logprobs for one in without]
    parity.check_learner(decoder, parity.samples(asked, done), 1.0)


def test_as_folded_into_the_matrix(make_decoder, parity) -> None:
    """An adapter on one part of the model alone, or on the wrong layer."""
    one, two = make_decoder(dtype="float32"), make_decoder(dtype="float32")
    adapted(one, MATRICES)
    for left, right in zip(one.layers, two.layers, strict=True):
        for (_, weight), (_, folded) in zip(left.weights(), right.weights(), strict=True):
            if weight.adapter is not None:
                folded.value += weight.adapter.scale * weight.adapter.up.value @ weight.adapter.down.value
                folded.repack()
    context = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    torch.testing.assert_close(parity.alone(one, context), parity.alone(two, context), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_products_of_shards_make_the_whole(make_decoder, ranks: int) -> None:
    """A rank that has another's rows, the heads of one projection in place of its share of each, or a wrong half."""
    decoder = make_decoder(dtype="float32")
    for slot, weight in decoder.slots():
        if slot.columns is None:
            continue
        stored = [weight.value[start : start + one.rows] for one, start in with_starts(slot)]
        part, x = slot.shard(ranks), normal(5, slot.columns, seed=1)
        wanted = [linear(x, Weight(tensor, matrix=True)) for tensor in stored]
        outs = []
        for rank in range(ranks):
            own = Weight(torch.cat([slot.cut(tensor, rank, ranks) for tensor in stored]), matrix=True)
            assert own.value.shape == part.shape
            columns = x.chunk(ranks, 1)[rank] if slot.split == "columns" else x
            outs.append(linear(columns.contiguous(), own).split([one.rows for one in part.stored], 1))
        if slot.split == "columns":
            got = [torch.stack([one[0] for one in outs]).sum(0)]
        else:
            got = [torch.cat(parts, 1) if slot.split else parts[0] for parts in zip(*outs, strict=True)]
        for left, right in zip(got, wanted, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def with_starts(slot: Slot) -> Iterator[tuple[Stored, int]]:
    starts = itertools.accumulate((one.rows for one in slot.stored), initial=0)
    return zip(slot.stored, starts, strict=False)


def test_a_shard_that_does_not_divide_is_named(make_decoder) -> None:
    """Heads lost to a division that leaves a rest."""
    slots = [slot for slot in all_slots(make_decoder().spec) if slot.split]
    assert {slot.name for slot in slots} >= set(MATRICES)
    for slot in slots:
        with pytest.raises(ModelError, match=rf"{slot.stored[0].name} has \d+ {slot.split} to divide over 7 ranks"):
            slot.shard(7)
