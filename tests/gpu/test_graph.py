"""Steps padded to buckets and replayed: the bits of exact steps, nothing written beside the rows, nothing stale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tandem.engine import graph
from tandem.engine.batch import Sequence
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.errors import DeliveryError, NonFiniteError
from tandem.kernels.page_sum import page_sums_reference
from tandem.models.decoder import Decoder
from tandem.models.spec import LayerAttention
from tandem.types import Completion, Reach, Request, Sampling, StopReason, likely_tokens
from tests.drafting import Told, at_most

GROUPS = {"attention": (LayerAttention(Reach(window=9)), LayerAttention()), "qk_norm": True, "attention_bias": True}


def engine_of(decoder: Decoder, **settings: Any) -> Engine:
    config = EngineConfig(
        **{"page_tokens": 4, "batch_tokens": 128, "max_sequences": 16, "lookahead_tokens": 4, **settings}
    )
    return Engine(DecoderRunner(decoder, 64, config.page_tokens, config), config, 64, decoder.spec.max_position)


def drawn(completions: list[Completion]) -> list[tuple[tuple[int, ...], list[str]]]:
    return [(completion.tokens, [x.hex() for x in completion.logprobs]) for completion in completions]


def steps_of(engine: Engine) -> graph.DeviceSteps:
    return engine.runner.device_steps  # type: ignore[attr-defined]


def requests(count: int, new: int = 3) -> list[Request]:
    """Prompts of 3, 4, ... tokens; every third is greedy."""
    return [
        Request(f"r{i}", "p", tuple(range(i + 1, 2 * i + 4)), Sampling(float(i % 3), max_new_tokens=new), seed=i)
        for i in range(count)
    ]


def emptied(engine: Engine) -> list[torch.Tensor]:
    """Its pages, all of nines."""
    pools = [pages for pool in engine.runner.pools for pages in pool.tensors()]  # type: ignore[attr-defined]
    return [pages.fill_(9.0) for pages in pools]


@pytest.mark.parametrize("changes", [{}, GROUPS])
def test_padding_changes_no_bit(make_decoder, monkeypatch, changes):
    """A row of padding takes part or writes a page; a field is padded at the wrong end; a replay reads stale rows."""
    decoder = make_decoder("bfloat16" if not changes else "float32", **changes)
    padded, plain = engine_of(decoder), engine_of(decoder)
    pools, expected = emptied(padded), emptied(plain)
    results = [drawn(padded.generate(requests(count))) for count in (3, 5)]
    assert steps_of(padded).captured == [(4, 128), (8, 128)]
    monkeypatch.setattr(graph.DeviceSteps, "_replayed", lambda own, *step: own._step(own._sent(*step)))
    assert [drawn(plain.generate(requests(count))) for count in (3, 5)] == results
    assert all(map(torch.equal, pools, expected))


def test_a_graph_outlives_an_update(make_decoder):
    """After an update the captured step runs with old weights, is captured again, or reads memory that was freed."""
    decoder, other = make_decoder(seed=0), make_decoder(seed=1)
    engine = engine_of(decoder, share_prefixes=False)
    before = drawn(engine.generate(requests(2)))
    captured = steps_of(engine).captured
    decoder.load((name, tensor.clone()) for name, tensor in other.export())
    after = drawn(engine.generate(requests(2)))
    assert after != before and after == drawn(engine_of(other).generate(requests(2)))
    assert steps_of(engine).captured == captured
    decoder.layers[0].mix.qkv.value = decoder.layers[0].mix.qkv.value.clone()
    with pytest.raises(AssertionError, match="moved"):
        engine.generate(requests(2))


def test_rows_that_filter_share_a_step(make_decoder):
    """A step with top-k loses its kept sets, draws in the order of other rows, or is taken for one without filters."""
    plain, filtering = requests(2)
    filtering = replace(filtering, sampling=replace(filtering.sampling, temperature=1.0, top_k=4))
    together = engine_of(make_decoder()).generate([plain, filtering])
    alone = [engine_of(make_decoder()).generate([request])[0] for request in (plain, filtering)]
    assert drawn(together) == drawn(alone)
    assert [done.columns.get("kept") is None for done in together] == [True, False]
    assert [len(kept) // 4 for kept in together[1].columns["kept"]] == [4, 4, 4]


def test_a_captured_step_is_captured_once(make_decoder):
    """Every step is captured anew, or a capture runs what it should record only."""
    counts: list[int] = []

    def capture(run: graph.Run) -> graph.Run:
        counts.append(0)
        place = len(counts) - 1
        run()  # as a warm-up does

        def replay() -> None:
            counts[place] += 1
            run()

        return replay

    engine = engine_of(make_decoder())
    engine.runner.device_steps = graph.DeviceSteps(engine.runner, capture)  # type: ignore[attr-defined, arg-type]
    plain = engine_of(make_decoder())
    assert drawn(engine.generate(requests(2, new=4))) == drawn(plain.generate(requests(2, new=4)))
    assert counts == [3]  # the first token is drawn by the prefill


class OneAtATime:
    """A runner that is waited for before the next batch is planned."""

    def __init__(self, runner: DecoderRunner) -> None:
        self.layout, self.run = runner.layout, runner.run


@pytest.mark.parametrize("settings", [{}, {"noise": 0.1}, {"batch_tokens": 16}])
def test_steps_started_ahead_draw_the_same(make_decoder, settings):
    """A step runs a token that another one drew, or a capture's trial run; what has stopped shows in others."""
    ahead, plain = engine_of(make_decoder(), **settings), engine_of(make_decoder(), **settings)
    ahead.runner.device_steps = graph.DeviceSteps(ahead.runner, lambda run: (run(), run)[1])  # type: ignore[attr-defined]
    plain.runner = OneAtATime(plain.runner)  # type: ignore[arg-type]
    asked = [
        replace(
            request, sampling=replace(request.sampling, max_new_tokens=2 + i % 4, stop_token_ids=tuple(range(0, 67, 5)))
        )
        for i, request in enumerate(requests(9))
    ]
    assert drawn(ahead.generate(asked)) == drawn(plain.generate(asked))
    assert ahead.stats.run_tokens > plain.stats.run_tokens


def test_drafts_draw_the_same(make_decoder):
    """Draws that outgrow what a step leaves for the next, or a token drawn at another row's position."""
    asked = requests(4, new=7)[1:]
    asked[1] = replace(asked[1], sampling=replace(asked[1].sampling, top_k=4))
    plain = [engine_of(make_decoder()).generate([request])[0] for request in asked]
    known = {completion.request_id: [*completion.tokens, *range(4)] for completion in plain}

    def drafter(sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        ahead = [
            known[s.request.id][s.num_drawn : s.num_drawn + count] for s, count in zip(sequences, most, strict=True)
        ]
        return [[*tokens[:2], *[(token + 1) % 67 for token in tokens[2:]]] for tokens in ahead]

    engine = engine_of(make_decoder(), max_sequences=2, draft=at_most(4))
    engine.scheduler.drafting.drafter = Told(drafter)
    assert drawn(engine.generate(asked)) == drawn(plain)
    assert engine.stats.drafted_tokens > engine.stats.accepted_tokens > 6


def test_branches_draw_the_same(make_decoder):
    """A branch's page is not copied on the device, its draws are another's, or they outgrow what a step leaves."""
    asked = requests(3, new=7)[1:]
    plain = [engine_of(make_decoder()).generate([request])[0] for request in asked]
    known = {completion.request_id: [*completion.tokens, *range(9)] for completion in plain}

    def branches(sequences: list[Sequence], most: list[int], width: list[int]) -> list[list[list[int]]]:
        rest = [known[s.request.id][s.num_drawn :][:count] for s, count in zip(sequences, most, strict=True)]
        return [[[(token + 1) % 67 for token in tokens], tokens[:2], tokens[:1]] for tokens in rest]

    engine = engine_of(make_decoder(), max_sequences=2, draft=at_most(3, 3))
    engine.scheduler.drafting.drafter = Told(lambda sequences, most: [], branches)
    assert drawn(engine.generate(asked)) == drawn(plain)
    assert engine.stats.accepted_tokens >= 2 * 3


def test_drafts_are_judged(make_decoder):
    """On a device a draft is judged by what another was drawn from, or what is recorded is not the model's log-prob."""
    asked = [replace(requests(2, new=4)[1], id=f"s{i}", seed=i, tokens=(5, 6, 7)) for i in range(4)]
    q_V = torch.full((67,), 0.5 / 66)
    q_V[3] = 0.5
    decoder = make_decoder()
    told = Told(
        lambda sequences, most: [[3] * count for count in most],
        probabilities=lambda sequences: [q_V.repeat(3, 1).to(decoder.device) for _ in sequences],
    )
    engine = engine_of(decoder, draft=at_most(3, verify="reject"))
    engine.scheduler.drafting.drafter = told
    done = engine.generate(asked)
    again = replace(asked[0], tokens=(5, 6, 7, *done[0].tokens), scored=True, sampling=Sampling(max_new_tokens=1))
    (scored,) = engine_of(decoder).generate([again])
    assert [x.hex() for x in scored.prompt["logprobs"][3:].tolist()] == [x.hex() for x in done[0].logprobs]
    assert engine.stats.drafted_tokens > engine.stats.accepted_tokens


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_broken_row_fails_alone(make_decoder):
    """NaN logits are drawn from in silence, padding is blamed for them, or they end their neighbours' step."""
    decoder = make_decoder(tied_embeddings=False)
    decoder.embed.value[50] = torch.nan
    engine = engine_of(decoder)
    for request in requests(3, new=9):
        engine.submit(request)
    whole = drawn(engine_of(make_decoder(tied_embeddings=False)).generate(requests(3, new=9)))
    engine.step()
    engine.abort("nobody")  # waits for what was drawn
    sequence = engine.scheduler.running[1]
    sequence.tokens[-1] = 50
    done = {}
    while engine.has_work:
        done |= {completion.request_id: completion for completion in engine.step()}
    assert done["r1"].stop_reason is StopReason.FAILED and "row 1 of 3 holds 67 NaN" in done["r1"].failure
    assert drawn([done["r0"], done["r2"]]) == [whole[0], whole[2]]


def test_weights_that_are_not_finite_end_the_step(make_decoder):
    """Requests fail one by one for what is the weights' fault, or stay in the engine."""
    decoder = make_decoder()
    decoder.norm.value[5] = torch.nan
    for filters in ({}, {"top_k": 4}):
        engine = engine_of(decoder)
        asked = [replace(r, sampling=Sampling(max_new_tokens=3, **filters)) for r in requests(2)]
        with pytest.raises(NonFiniteError, match=r"logits row 0 of . holds 67 NaN"):
            engine.generate(asked)
        assert not engine.has_work
        engine.check_integrity()


@pytest.mark.parametrize("config", [{}, {"kv_dtype": "float8_e4m3"}, {"kv_dtype": "int8"}])
def test_a_shared_page_that_changed_stops_the_step(make_decoder, device, config):
    """Samples are drawn from damaged keys or scales, or from a page that is whole an error is raised."""
    first, second = (Request(f"{i}", "p", tuple(range(1, 30)), Sampling(max_new_tokens=3), seed=i) for i in range(2))
    engine = engine_of(make_decoder(head_size=16), **config)  # a page's scales are smaller than its codes
    engine.generate([first])
    pools = [pages for pool in engine.runner.pools for pages in pool.tensors()]  # type: ignore[attr-defined]
    named = torch.tensor([3, 0, 5], device=device)
    sums = steps_of(engine)._sums
    assert sums.sums(named).tolist() == page_sums_reference(pools, named.tolist())
    engine.generate([second])
    assert engine.stats.cached_tokens
    pools[-1].view(torch.uint8)[:, -1] ^= 1
    with pytest.raises(DeliveryError, match="changed after they were computed"):
        engine.generate([Request("2", "p", first.tokens, Sampling(max_new_tokens=3), seed=2)])


def test_arrays_arrive(device):
    """An array arrives in another's place, is cut, or goes elsewhere than one of its size went, where a graph reads."""
    staging = graph.Staging(torch.device(device))
    places = []
    for turn in range(3):
        arrays = [np.arange(5) + turn, np.full((2, 3), turn, np.int32), np.array([], np.int64), np.float32([turn, 0.5])]
        sent = staging.send(arrays)
        for got, array in zip(sent, arrays, strict=True):
            assert torch.equal(got.cpu(), torch.from_numpy(array)) and got.data_ptr() % 16 == 0
        places.append([got.data_ptr() for got in sent])
    assert places[0] == places[1] == places[2]
    assert torch.equal(staging.send([np.arange(900)])[0].cpu(), torch.arange(900))
    assert [got.tolist() for got in graph.fetch(*staging.send([np.arange(3)]))()] == [[0, 1, 2]]


@pytest.mark.parametrize("most", [1, 3, 8, 20, 64, 256, 300])
def test_buckets(most):
    """A step of `most` sequences has no bucket, or half of a bucket and more is padding."""
    found = graph.buckets(most)
    assert found[-1] == most and found == sorted(set(found))
    assert all(after <= 2 * before for before, after in zip(found, found[1:], strict=False))


def test_what_is_told_beside_draws_changes_none(make_decoder):
    """The likeliest tokens, or a prompt's log-probs, are of another row on a device, or change what is drawn."""
    decoder = make_decoder("float32")
    asked = requests(4)
    plain = engine_of(decoder, batch_tokens=16).generate(asked)
    told = engine_of(decoder, batch_tokens=16).generate(
        [replace(one, likely=2 if place % 2 else 0, scored=place < 3) for place, one in enumerate(asked)]
    )
    assert drawn(told) == drawn(plain)
    for place, (request, one) in enumerate(zip(asked, told, strict=True)):
        assert ("likely" in one.columns) == bool(place % 2) and (one.prompt is not None) == (place < 3)
        if one.prompt is not None:
            again = replace(request, tokens=request.tokens[:-1], likely=2, sampling=Sampling(max_new_tokens=1), id="a")
            best = engine_of(decoder).generate([again])[0].columns["likely"][0]
            known = dict(likely_tokens(best))
            assert place % 2 == 0 or one.prompt["likely"][-1] == best
            assert known.get(request.tokens[-1], one.prompt["logprobs"][-1]) == one.prompt["logprobs"][-1]
            assert np.isnan(one.prompt["logprobs"]).tolist() == [True, *[False] * (len(request.tokens) - 1)]
