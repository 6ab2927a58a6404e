"""A weight's adapter and a weight's shard: values, gradients, the same bits in engine and learner.

Tolerance: in fp32 each product errs by at most K 2^-24 of the sum of its magnitudes, K at most 128 here; the decoder's
logits pass some forty of them, whose errors are taken to add up.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tandem.engine.engine import Engine
from tandem.errors import ConfigError, ModelError
from tandem.kernels.adapter import adapt_reference_, adapted_input_gradient, add_gradients
from tandem.kernels.linear import linear
from tandem.kernels.swiglu import swiglu_down, swiglu_reference
from tandem.kernels.weight import Adapter, Piece, Strips, Weight
from tandem.models.adapter import AdapterSet
from tandem.models.config import PROJECTIONS, AdapterConfig
from tandem.models.decoder import Decoder
from tandem.models.fused import FusedForward
from tandem.models.parts import Slot, Stored, all_slots
from tandem.numerics.quantise import quantise
from tandem.sync.receive import drop_adapter, serve_adapter
from tandem.types import Request

MATRICES = ["qkv", "out", "gate_up", "down"]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(parts: list[tuple[int, int]], depth: int, seed: int, *, dora: bool) -> Adapter:
    """Of pieces of so many rows and ranks, with gradients; the first row behind each piece has none."""
    pieces, first, start = [], 0, 0
    for number, (rows, rank) in enumerate(parts):
        up = Weight(normal(rows, rank, seed=seed + number) / rank**0.5, matrix=True)
        magnitude = Weight(2 + normal(rows, seed=seed + 7), matrix=False) if dora else None
        for weight in (up, *([magnitude] if magnitude else [])):
            weight.grad = torch.zeros(weight.value.shape)
        pieces.append(Piece(first, start, 0.5 + number, up, magnitude))
        first, start = first + rows + 1, start + rank + rank % 2
    down = Strips(torch.zeros(start, depth))
    for piece in pieces:
        down.value[piece.ranks] = normal(piece.ranks.stop - piece.ranks.start, depth, seed=seed + 9) / depth**0.5
    down.repack()
    down.grad = torch.zeros(start, depth)
    return Adapter(down, tuple(pieces), Weight(torch.ones(first), matrix=False) if dora else None)


def worn(decoder: Decoder, seed: int = 1, name: str = "", **form: object) -> AdapterSet:
    """An adapter whose B is not zero."""
    config = AdapterConfig(rank=3, alpha=6.0, rank_pattern=(("layers.1.self_attn.q_proj", 6),))
    made = AdapterSet(decoder, replace(config, **form), name).draw(seed)
    for number, one in enumerate(made.additions):
        one.piece.up.value.copy_(normal(*one.piece.up.value.shape, seed=100 * seed + number))
        if one.piece.magnitude is not None:
            one.piece.magnitude.value *= 1 + 0.1 * normal(len(one.piece.magnitude.value), seed=number)
    made.repack()
    return made


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("parts", [[(21, 1)], [(9, 4), (3, 1), (7, 3)], [(20, 65)]], ids=str)
@pytest.mark.parametrize("feed", [False, True])
def test_products_and_gradients(any_path, parts: list[tuple[int, int]], feed: bool, dora: bool) -> None:
    """A piece that is scaled twice or not, or by another's factor, or whose gradient, or its input's, lacks a term."""
    rows, depth, count = sum(rows + 1 for rows, _ in parts), 34, 9
    x = normal(count, 2 * depth if feed else depth, seed=0).requires_grad_()
    weight, residual = Weight(normal(rows, depth, seed=1), matrix=True), normal(count, rows, seed=2).requires_grad_()
    weight.adapter = one = adapter(parts, depth, 3, dora=dora)
    plain = [t.detach().double().requires_grad_() for t in (x, one.down.value, residual)]
    ups = [piece.up.value.double().requires_grad_() for piece in one.pieces]
    magnitudes = [p.magnitude.value.double().requires_grad_() for p in one.pieces if p.magnitude is not None]

    whole = weight.value.double()
    for piece, up in zip(one.pieces, ups, strict=True):
        pad = (0, 0, piece.first, rows - piece.rows.stop)
        whole = whole + torch.nn.functional.pad(piece.scale * up @ plain[1][piece.ranks], pad)
    if dora:  # W' = m (W + s B A) / |W + s B A|, the norm a constant (Liu et al., 2402.09353, equations 5 and 11)
        norm = whole.detach().norm(dim=1)
        factor = torch.ones(rows, dtype=torch.float64)
        for piece, magnitude in zip(one.pieces, magnitudes, strict=True):
            factor = factor.index_put((torch.arange(rows)[piece.rows],), magnitude / norm[piece.rows])
        assert one.factor is not None
        one.factor.value.copy_(factor.detach())
        whole = factor[:, None] * whole
    act = swiglu_reference(plain[0]) if feed else plain[0]
    wanted = act @ whole.T + plain[2]

    dy = normal(count, rows, seed=5)
    y = swiglu_down(x, weight, residual) if feed else linear(x, weight, None, residual)
    y.backward(dy)
    wanted.backward(dy.double())
    found = [y, x.grad, one.down.grad, residual.grad, *(piece.up.grad for piece in one.pieces)]
    right = [wanted.detach(), *(t.grad for t in plain), *(up.grad for up in ups)]
    found += [piece.magnitude.grad for piece in one.pieces if piece.magnitude is not None]
    right += [magnitude.grad for magnitude in magnitudes]
    for got, expected in zip(found, right, strict=True):
        assert got is not None and expected is not None
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-5)
    assert weight.grad is None  # frozen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_over_many_rows(any_path, dtype: torch.dtype) -> None:
    """Rows beyond one run of the sum (adapter.cpp's OUTER_ROWS) are lost, counted twice, or of another panel."""
    rows, depth, count = 150, 130, 301
    x, dy = normal(count, depth, seed=0).to(dtype), normal(count, rows, seed=1).to(dtype)
    weight = Weight(normal(rows, depth, seed=2).to(dtype), matrix=True)
    ups = [Weight(normal(size, rank, seed=3 + size).to(dtype), matrix=True) for size, rank in ((80, 16), (70, 5))]
    made = Adapter(Strips(normal(22, depth, seed=3).to(dtype)), (Piece(0, 0, 0.5, ups[0]), Piece(80, 16, 2.0, ups[1])))
    parts = made.down, *ups
    for part in parts:
        part.grad = torch.ones(part.value.shape)
    lowered = adapt_reference_(torch.zeros(count, rows, dtype=dtype), x, made)
    dx, dlow = adapted_input_gradient(dy, weight, made)
    add_gradients(made, dy, dlow, x, lowered)

    wanted_low = torch.zeros(count, 22, dtype=torch.float64)
    for piece in made.pieces:
        wanted_low[:, piece.ranks] = piece.scale * (dy[:, piece.rows].double() @ piece.up.value.double())
    wanted = [dy.double() @ weight.value.double() + wanted_low @ made.down.value.double(), wanted_low]
    wanted += [1 + dlow.double().T @ x.double()]
    wanted += [1 + dy[:, piece.rows].double().T @ lowered[:, piece.ranks].double() for piece in made.pieces]
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-19  # what is lowered is rounded, its product too
    for number, (got, right) in enumerate(zip([dx, dlow, *(part.grad for part in parts)], wanted, strict=True)):
        bound = (3 * unit if number < 2 else 2.0**-19) * right.abs().max()
        assert (got.double() - right).abs().max() <= bound, number


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_through_codes(bits: int) -> None:
    """The input's gradient of a matrix that is kept as codes: of other values, or of none."""
    x, dy = normal(9, 64, seed=0).bfloat16(), normal(9, 70, seed=1).bfloat16()
    one, two = (Weight(normal(70, 64, seed=2).bfloat16(), matrix=True) for _ in range(2))
    quantised = quantise(one.value, bits, 32)
    assert one.hold(quantised)
    two.value.copy_(one.served())
    two.repack()
    grads = []
    for weight in (one, two):
        own = x.clone().requires_grad_()
        linear(own, weight).backward(dy)
        grads.append(own.grad)
    assert grads[0] is not None and torch.equal(*grads)


@pytest.mark.parametrize("form", [{}, {"dora": True}, {"rslora": True, "targets": ("k_proj", "up_proj")}], ids=str)
@pytest.mark.parametrize("changes", [{}, {"ff_width": 128, "attention_bias": True}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engine_and_learner_have_the_same_bits(make_decoder, parity, dtype: str, changes, form) -> None:
    """An engine's pass in one call that leaves the adapter out, or a row whose adapter depends on its company."""
    decoder = make_decoder(dtype=dtype, **changes)
    asked = parity.groups([[5, 6, 7], [9] * 17, [3, 1, 4, 1, 5, 9, 2, 6]], 2, 1.0, 14)
    without = parity.engine(decoder).generate(asked)
    decoder.wear(worn(decoder, **form))
    engine = parity.engine(decoder)
    assert isinstance(engine.runner.forward, FusedForward)
    done = parity.check_company(decoder, asked, engine)
    assert [one.logprobs for one in done] != [one.logprobs for one in without]
    parity.check_learner(decoder, parity.samples(asked, done), 1.0)


def of_each(parity, names: list[str]) -> list[Request]:
    """Requests in turn of these adapters, siblings and equal prompts among them."""
    asked = parity.groups([[5, 6, 7] * 5, [9] * 17, [5, 6, 7] * 5], 4, 1.0, 14)
    return [replace(one, id=f"{one.id}/{n}", adapter=names[n % len(names)]) for n, one in enumerate(asked)]


def serving(decoder: Decoder, parity, fused: bool = True, **forms: dict[str, object]) -> Engine:
    engine = parity.engine(decoder, 200)
    if not fused:
        engine.runner.forward = decoder.forward
    for number, (name, form) in enumerate(forms.items()):
        serve_adapter("the engine", engine, worn(decoder, 5 + number, name, **form), 0)
    return engine


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_in_one_batch_are_each_as_alone(make_decoder, parity, dtype: str, fused: bool) -> None:
    """A row that gets another's adapter or factor, or base rows that change beside adapters; pages shared between
    adapters, whose prompts are the same here."""
    decoder, forms = make_decoder(dtype=dtype, ff_width=128), {"one": {}, "two": {"dora": True}, "three": {"rank": 40}}
    asked = of_each(parity, ["", *forms])
    engine = serving(decoder, parity, fused, **forms)
    done = engine.generate(asked)
    assert engine.stats.cached_tokens  # siblings of one adapter share
    for request, completion in zip(asked, done, strict=True):
        alone = serving(decoder, parity, **forms)
        if request.adapter:  # worn by the learner, and asked for by no name
            learner = make_decoder(dtype=dtype, ff_width=128)
            learner.wear(worn(learner, 5 + [*forms].index(request.adapter), **forms[request.adapter]))
            parity.check_learner(learner, parity.samples([request], [completion]), 1.0)
        parity.same(completion, alone.generate([request])[0], "among adapters")


def test_pages_are_of_an_adapter_and_its_version(make_decoder, parity) -> None:
    """A prefix of another adapter, or of an earlier one of the same name, is taken from the cache."""
    decoder = make_decoder()
    engine = serving(decoder, parity, one={}, two={})
    (asked,) = parity.groups([[5, 6, 7] * 6], 1, 1.0, 5)
    cached = {}
    for turn, name in enumerate(["", "one", "two", "one", "", "two"]):
        (done,) = engine.generate([replace(asked, id=f"{turn}", adapter=name)])
        cached.setdefault(name, []).append(done.cached_tokens)
    assert all(first == 0 and second > 0 for first, second in cached.values()), cached
    serve_adapter("the engine", engine, worn(decoder, 77, "one"), 1)
    again = [engine.generate([replace(asked, id=f"{name}", adapter=name)])[0].cached_tokens for name in ("one", "two")]
    assert again[0] == 0 and again[1] > 0, again
    engine.check_integrity()


def test_another_version_while_requests_run(make_decoder, parity) -> None:
    """A running request's pages, part old and part new, are named for others; or those of other adapters are lost."""
    decoder = make_decoder()
    engine = serving(decoder, parity, one={}, two={})
    asked = of_each(parity, ["one", "two"])
    for request in asked:
        engine.submit(request)
    done = {}
    for step in range(200):
        if step == 3:
            serve_adapter("the engine", engine, worn(decoder, 88, "one"), 1)
        done |= {one.request_id: one for one in engine.step()}
        engine.check_integrity()
        if not engine.has_work:
            break
    alone = serving(decoder, parity, one={}, two={})
    for request in asked:
        if request.adapter == "two":
            parity.same(done[request.id], alone.generate([request])[0], "beside a change")
    fresh = serving(decoder, parity, one={}, two={})
    serve_adapter("the engine", fresh, worn(decoder, 88, "one"), 1)
    for request in asked:
        later = replace(request, id=f"{request.id}/later")
        parity.same(engine.generate([later])[0], fresh.generate([later])[0], "after a change")


def test_an_unknown_adapter_is_refused_by_name(make_decoder, parity) -> None:
    """A request that is answered by the weights alone, without a word."""
    engine = serving(make_decoder(), parity, one={}, two={})
    (asked,) = parity.groups([[5, 6, 7]], 1, 1.0, 5)
    with pytest.raises(ConfigError, match="asks for adapter 'three', and this engine serves one, two. Allowed: one, t"):
        engine.submit(replace(asked, adapter="three"))


def test_an_adapter_that_is_dropped(make_decoder, parity) -> None:
    """Rows that run with an adapter that is gone, or one that cannot be let go, or is found under its name after."""
    engine = serving(make_decoder(), parity, one={}, two={})
    asked = of_each(parity, ["one", "two"])
    for request in asked:
        engine.submit(request)
    engine.step()
    with pytest.raises(ConfigError, match="6 requests for adapter 'one' are on their way. Wait for them"):
        drop_adapter(engine, "one")
    while engine.has_work:
        engine.step()
    drop_adapter(engine, "one")
    with pytest.raises(ConfigError, match="no adapter 'one' is served. There are: two."):
        drop_adapter(engine, "one")
    with pytest.raises(ConfigError, match="asks for adapter 'one', and this engine serves two"):
        engine.submit(asked[0])
    (done,) = engine.generate([replace(asked[1], id="again")])
    parity.same(
        done, serving(make_decoder(), parity, one={}, two={}).generate([asked[1]])[0], "beside one that is gone"
    )


@pytest.mark.parametrize("form", [{}, {"dora": True}], ids=str)
def test_as_folded_into_the_matrix(make_decoder, parity, form) -> None:
    """An adapter on one part of the model alone, on the wrong layer, or on another's rows of a matrix."""
    one, two = make_decoder(dtype="float32"), make_decoder(dtype="float32")
    made = worn(one, **form)
    one.wear(made)
    tensors = dict(two.export())
    assert len(made.additions) == len(PROJECTIONS) * len(one.layers)
    for addition in made.additions:
        whole, piece = tensors[f"{addition.module}.weight"], addition.piece
        rank = 6 if addition.module == "model.layers.1.self_attn.q_proj" else 3
        assert piece.up.value.shape == (len(whole), rank) and piece.scale == 6.0 / rank
        whole += piece.scale * piece.up.value @ addition.adapter.down.value[piece.ranks]
        if piece.magnitude is not None:
            whole *= (piece.magnitude.value / whole.norm(dim=1))[:, None]
    two.repack()
    context = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    torch.testing.assert_close(parity.alone(one, context), parity.alone(two, context), rtol=1e-4, atol=1e-4)


def test_a_new_adapter_adds_nothing(make_decoder, parity) -> None:
    """A run's first weights are others than the model's, or its adapter's halves are both zero and never learn."""
    decoder = make_decoder(dtype="float32")
    context = [3, 1, 4, 1, 5, 9]
    before = parity.alone(decoder, context)
    for dora in (False, True):
        made = AdapterSet(decoder, AdapterConfig(rank=4, dora=dora)).draw(3)
        decoder.wear(made)
        assert torch.equal(parity.alone(decoder, context), before)
        down = made.matrices["layers.0.qkv"].down.value
        assert 0.5 < float(down.abs().max()) * down.shape[1] ** 0.5 <= 1 and len(set(down.flatten().tolist())) > 100
    with pytest.raises(ConfigError, match="adapter.targets names lm_head"):
        AdapterSet(decoder, AdapterConfig(rank=4, targets=("q_proj", "lm_head"))).draw(0)


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
