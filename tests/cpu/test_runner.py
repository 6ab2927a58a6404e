"""The engine on a real decoder: a request generates what it does alone, and the learner scores it with its bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.algo.pack import count_prompts, pack
from tandem.engine.config import EngineConfig, ProgramsConfig
from tandem.engine.engine import Engine
from tandem.engine.layout import KvGroup, KvLayout, pages_for
from tandem.engine.runner import DecoderRunner
from tandem.errors import NonFiniteError
from tandem.models.decoder import Decoder
from tandem.models.spec import LayerAttention, ModelSpec
from tandem.numerics import random
from tandem.train.step import score
from tandem.types import Completion, Reach, Request, Sample, Sampling, StopReason, WeightVersion
from tests.samples import sample_of

DTYPES = ["float32", "bfloat16"]
STOP = 5


def engine_of(decoder: Decoder, num_pages: int = 64, **settings: Any) -> Engine:
    config = EngineConfig(
        **{"page_tokens": 4, "batch_tokens": 64, "max_sequences": 16, "lookahead_tokens": 4, **settings}
    )
    return Engine(DecoderRunner(decoder, num_pages, config.page_tokens), config, num_pages, decoder.spec.max_position)


@pytest.fixture(params=DTYPES)
def decoder(request: pytest.FixtureRequest, make_decoder: Callable[..., Decoder], kernel_path: str) -> Decoder:
    return make_decoder(request.param)


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    """Prompts that often begin alike, of one page or several; every filter of the sampler."""
    stem = tuple((7 * i * i + 3) % 97 for i in range(20))
    made = []
    for number in range(draw(st.integers(1, 8))):
        shared = draw(st.integers(0, 20))
        own = draw(st.lists(st.integers(0, 96), min_size=int(shared == 0), max_size=9))
        sampling = Sampling(
            temperature=draw(st.sampled_from([1.0, 0.0, 0.6])),
            top_k=draw(st.sampled_from([0, 0, 3])),
            top_p=draw(st.sampled_from([1.0, 1.0, 0.9])),
            max_new_tokens=draw(st.integers(1, 24)),
            stop_token_ids=draw(st.sampled_from([(), (STOP,)])),
        )
        made.append(Request(f"r{number}", f"r{number}", (*stem[:shared], *own), sampling, seed=number * 1000))
    return made


def same(got: Completion, wanted: Completion, count: int | None = None) -> None:
    """Token for token and, for the log-probs, bit for bit."""
    assert got.tokens == wanted.tokens[:count]
    assert [p.hex() for p in got.logprobs] == [p.hex() for p in wanted.logprobs[:count]]


@settings(max_examples=25)
@given(
    asked=requests(),
    limits=st.fixed_dictionaries(
        {
            "page_tokens": st.sampled_from([2, 4, 16]),
            "batch_tokens": st.integers(4, 40),
            "max_sequences": st.integers(1, 4),
            "share_prefixes": st.booleans(),
        }
    ),
    spare=st.integers(0, 12),
    arrivals=st.lists(st.integers(0, 6), min_size=8, max_size=8),
    aborts=st.dictionaries(st.integers(0, 7), st.integers(0, 30), max_size=2),
)
def test_any_company_gives_what_is_generated_alone(decoder, asked, limits, spare, arrivals, aborts):
    """Batching, chunking, prefix hits, preemption or a neighbour's abort changes a request's tokens or log-probs."""
    alone = {request.id: engine_of(decoder).generate([request])[0] for request in asked}
    longest = max(len(request.tokens) + request.sampling.max_new_tokens for request in asked)
    engine = engine_of(decoder, pages_for(longest, limits["page_tokens"]) + spare, **limits)
    done: dict[str, Completion] = {}
    step = 0
    while engine.has_work or step <= 6:
        for number, request in enumerate(asked):
            if arrivals[number] == step:
                engine.submit(request)
        for number, when in aborts.items():
            if when == step and number < len(asked) and (withdrawn := engine.abort(f"r{number}")):
                assert withdrawn.stop_reason == StopReason.ABORTED
                done[withdrawn.request_id] = withdrawn
        done |= {completion.request_id: completion for completion in engine.step()}
        engine.check_integrity()
        step += 1
        assert step < 2000
    assert done.keys() == alone.keys()
    for name, completion in done.items():
        aborted = completion.stop_reason == StopReason.ABORTED
        same(completion, alone[name], len(completion.tokens) if aborted else None)


def rollouts(decoder: Decoder, temperature: float, version: int = 0) -> list[Sample]:
    """Three prompts, four siblings each, as the engine samples them in company."""
    asked = []
    for prompt in range(3):
        tokens = tuple((11 * prompt + 5 * i * i) % 97 for i in range(6 + 9 * prompt))
        for sibling in range(4):
            sampling = Sampling(temperature=temperature, max_new_tokens=5 + 8 * sibling)
            asked.append(Request(f"p{prompt}/{sibling}", f"p{prompt}", tokens, sampling, seed=100 * prompt + sibling))
    engine = engine_of(decoder, 40, batch_tokens=24, max_sequences=6)
    if version:
        engine.receive(WeightVersion(version, "other"))
    samples = []
    for request, completion in zip(asked, engine.generate(asked), strict=True):
        samples.append(sample_of(request, completion, (1.0,) * len(completion.tokens)))
    assert engine.stats.preemptions or engine.stats.cached_tokens
    return samples


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("budget", [60, 2000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_learner_scores_with_the_engines_bits(decoder, temperature, budget, share_prefix):
    """The policy that is trained is not the one that sampled: log-probs of engine and learner differ in some bit."""
    samples = rollouts(decoder, temperature)
    for microbatch in pack(samples, count_prompts(samples), budget, share_prefix):
        scored = score(decoder, microbatch, temperature).tolist()
        assert [p.hex() for p in scored] == [p.hex() for p in microbatch.predictions["logprobs"].tolist()]


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": (LayerAttention(Reach(window=9)),)},
        {"qk_norm": True},
        {"attention_bias": True},
        {"head_size": 24},
    ],
)
def test_every_kind_of_layer_keeps_the_bits(kernel_path, make_decoder, changes):
    """A window, q/k norms or biases are computed apart from the other path, or in another order."""
    decoder = make_decoder("bfloat16", **changes)
    samples = rollouts(decoder, 1.0)
    for microbatch in pack(samples, count_prompts(samples), 300):
        scored = score(decoder, microbatch, 1.0).tolist()
        assert [p.hex() for p in scored] == [p.hex() for p in microbatch.predictions["logprobs"].tolist()]


WINDOW, CHUNK = LayerAttention(Reach(window=9)), LayerAttention(Reach(chunk=16))
HYBRIDS = {
    "window": (WINDOW,),
    "window and all": (WINDOW, WINDOW, LayerAttention()),
    "chunks and all": (CHUNK, CHUNK, CHUNK, LayerAttention(rotary=False)),
    "window and chunk": (WINDOW, CHUNK),
}


def without_freeing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group holds the pages of its whole context."""
    of = KvLayout.of

    def holding(spec: ModelSpec, *_: object) -> KvLayout:
        layout = of(spec.reaches)
        return KvLayout((KvGroup(Reach()),) * len(layout.groups), layout.place_L, layout.depth)

    monkeypatch.setattr(KvLayout, "for_engine", holding)


@pytest.mark.parametrize("layers", HYBRIDS)
def test_pages_that_no_query_sees_are_missed_by_nobody(kernel_path, make_decoder, monkeypatch, layers):
    """A page let go while some query still sees it, a NULL page read, a hit on a block that lacks a group's page, or
    a chunk, a preemption or a prefix hit that a layer with a window computes otherwise. Free pages hold NaN."""
    decoder = make_decoder("bfloat16", layers=4, attention=HYBRIDS[layers])
    stem = [(7 * i * i + 3) % 97 for i in range(120)]
    asked = []
    for number, length in enumerate((15, 16, 17, 35, 35, 90, 16, 36, 90)):
        sampling = Sampling(max_new_tokens=(60, 3, 33)[number % 3])
        asked.append(Request(f"r{number}", f"r{number}", tuple(stem[:length]), sampling, seed=number))
    with monkeypatch.context() as patch:
        without_freeing(patch)
        alone = [engine_of(decoder, 128, share_prefixes=False).generate([request])[0] for request in asked]
    layout = KvLayout.for_engine(decoder.spec, EngineConfig(), "bfloat16")
    num_pages = layout.most_pages(123, 1, 4)
    found = preempted = 0
    for share, batch_tokens in ((True, 20), (False, 20), (True, 100)):
        engine = engine_of(
            decoder, num_pages, share_prefixes=share, batch_tokens=batch_tokens, max_sequences=4, lookahead_tokens=0
        )
        runner, pool = engine.runner, engine.scheduler.pool
        assert isinstance(runner, DecoderRunner)
        for request in asked:
            engine.submit(request)
        done = {}
        while engine.has_work:
            free = sorted(set(range(num_pages)) - set(pool.cached) - {p for p, refs in enumerate(pool.refs) if refs})
            for tensor in (tensor for kv in runner.pools for tensor in kv.tensors()):
                tensor[free] = float("nan")
            done |= {completion.request_id: completion for completion in engine.step()}
            engine.check_integrity()
        for wanted in alone:
            same(done[wanted.request_id], wanted)
        found += engine.stats.cached_tokens
        preempted += engine.stats.preemptions
    assert found and (preempted or "all" not in layers)  # what keeps but a window does not outgrow what it began with


def test_page_memory_of_the_runner(make_decoder):
    """Capacity is worked out from another size than the pages really take."""
    decoder = make_decoder("bfloat16")
    runner = DecoderRunner(decoder, 10, 4)
    taken = sum(pool.nbytes for pool in runner.pools)
    assert taken == 10 * 4 * runner.layout.groups[0].token_bytes


def test_draws_without_a_compiler(any_path, make_decoder, parity):
    """The reference path fails in the engine, or a path draws another token than the noise and the logits say."""
    request = Request("r", "r", (1, 2, 3), Sampling(max_new_tokens=12), seed=3)
    decoder = make_decoder()
    context = list(request.tokens)
    for _ in range(12):
        logits_V = decoder.logits(parity.alone(decoder, context)[-1:])[0].double().numpy()
        noise_V = random.gumbel(random.words(request.seed, len(context), np.arange(len(logits_V))))
        context.append(int((logits_V + noise_V).argmax()))
    assert engine_of(decoder).generate([request])[0].tokens == tuple(context[3:])


@pytest.mark.parametrize("attention", [(), (LayerAttention(Reach(window=5)), LayerAttention())], ids=["full", "window"])
@pytest.mark.parametrize("length", [1, 2, 6, 9, 16])
def test_siblings_copy_the_end_of_their_prompt(length, attention, make_decoder, kernel_path) -> None:
    """A sibling on a copy made too late, of another page, or of what its owner went on to write."""
    decoder = make_decoder("bfloat16", **({"attention": attention} if attention else {}))
    prompt = tuple((5 * i + 3) % 97 for i in range(length))
    asked = [Request(f"g/{i}", "g", prompt, Sampling(max_new_tokens=3 + 4 * i % 9), seed=i) for i in range(6)]
    engine = engine_of(decoder, max_sequences=4)
    got = engine.generate(asked)
    for completion, request in zip(got, asked, strict=True):
        same(completion, engine_of(decoder).generate([request])[0])
    assert engine.stats.cached_tokens >= 3 * (length - 1)


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}])
def test_a_row_that_is_not_finite_fails_alone(any_path, make_decoder, filters) -> None:
    """One request's NaN ends a whole step, or changes a bit or a kept set of those beside it."""
    decoder = make_decoder("bfloat16", tied_embeddings=False)
    sampling = Sampling(max_new_tokens=5, **filters)
    asked = [Request(f"r{i}", "r", (1, 2, 3 + i), Sampling(max_new_tokens=5), i) for i in range(3)]
    asked += [Request("filters", "r", (1, 2, 50), sampling, 3), Request("bad", "r", (1, 2, 60, 7), sampling, 4)]
    alone = [engine_of(decoder).generate([request])[0] for request in asked[:4]]
    decoder.embed.value[60] = float("nan")
    engine = engine_of(decoder)
    *others, bad = engine.generate(asked)
    assert (bad.stop_reason, bad.tokens) == (StopReason.FAILED, ())
    assert re.search(r"logits row . of . holds 97 NaN .*no token can be drawn", bad.failure)
    for got, wanted in zip(others, alone, strict=True):
        assert got.stop_reason is StopReason.LENGTH and len(got.columns) == 5
        assert any_path == "reference" or got.columns == wanted.columns  # it is not batch-invariant
    engine.check_integrity()


def test_weights_that_are_not_finite_end_a_step_by_name(any_path, make_decoder) -> None:
    """NaN is drawn from, or leaves the engine with requests and pages that nobody can take back."""
    decoder = make_decoder("bfloat16")
    engine, fresh = engine_of(decoder), engine_of(make_decoder("bfloat16"))
    asked = [Request(f"r{i}", "r", (1, 2, 3 + i), Sampling(max_new_tokens=3), i) for i in range(2)]
    finite = decoder.norm.value.clone()
    decoder.norm.value[5] = float("nan")
    with pytest.raises(NonFiniteError, match=r"logits row 0 of . holds 97 NaN .* not finite.*check the model's files"):
        engine.generate(asked)
    assert not engine.has_work
    engine.check_integrity()
    decoder.norm.value.copy_(finite)
    for got, wanted in zip(engine.generate(asked), fresh.generate(asked), strict=True):
        same(got, wanted)


def test_programs_that_are_paused_and_parked_draw_what_they_do_alone(decoder: Decoder, tmp_path: Path) -> None:
    """Keys and values that come back from a file onto other pages with another layer's bytes, or not all of them."""
    programs = ProgramsConfig("enforce", "thunder", tick_s=1e-6, park=str(tmp_path))
    engine = engine_of(decoder, num_pages=14, programs=programs)
    engine.scheduler.programs.reload_s = lambda tokens: 9.0
    plain = engine_of(decoder, num_pages=64)
    contexts = {name: [(5 * i * i + name) % 97 for i in range(18)] for name in range(4)}
    for turn in range(4):
        sampling, asked = Sampling(max_new_tokens=5), []
        for name, context in contexts.items():
            asked.append(Request(f"{name}/{turn}", f"p{name}", tuple(context), sampling, seed=name))
        for request, found in zip(asked, engine.generate(asked), strict=True):
            (wanted,) = plain.generate([request])
            assert (found.tokens, found.logprobs) == (wanted.tokens, wanted.logprobs)
            contexts[int(request.program_id[1:])] += [*found.tokens, 3, 1]
        engine.check_integrity()
    parking = engine.scheduler.programs.parking
    assert parking.counts["unparked"] >= 4 and parking.counts["damaged"] == 0
