"""Rollouts under top-k, top-p and min-p: the sets that tokens were drawn from, replayed in the learner bit for bit."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandem.algo.pack import count_prompts, pack
from tandem.columns import Columns
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.kernels import logprob
from tandem.kernels import sample as sampler
from tandem.kernels.logprob import KeptSets, logprob_reference, token_logprobs
from tandem.kernels.sample import SamplingBatch, kept_sets, processed_logits
from tandem.kernels.weight import Weight
from tandem.models.decoder import Decoder
from tandem.models.view import PackView
from tandem.rollout.trajectory import flatten
from tandem.types import Completion, Request, Sample, Sampling, StopReason, Trajectory, Turn, kept_ids
from tests.samples import column, owners_of, trained

VOCAB = 97
DTYPES = ["float32", "bfloat16"]
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([1.0, 0.6, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 7, 96, 500]),
    top_p=st.sampled_from([1.0, 1e-6, 0.4, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 1e-4, 0.1, 1.0]),
)


def ids(*tokens: int) -> bytes:
    return array("I", tokens).tobytes()


@pytest.fixture(params=DTYPES)
def decoder(request: pytest.FixtureRequest, make_decoder: Callable[..., Decoder], kernel_path: str) -> Decoder:
    return make_decoder(request.param)


def generate(decoder: Decoder, chosen: Sequence[Sampling], num_pages: int = 64) -> tuple[list[Completion], Engine]:
    """A completion for each sampling, in one engine together; prompts of two groups."""
    config = EngineConfig(page_tokens=4, batch_tokens=24, max_sequences=6, lookahead_tokens=0)
    runner = DecoderRunner(decoder, num_pages, 4)
    engine = Engine(runner, config, num_pages, 256, decode=lambda tokens: "".join(f"<{t}>" for t in tokens))
    requests = [
        Request(f"p{i % 2}/{i}", f"p{i % 2}", tuple((7 * i % 2 + 5 * j * j) % VOCAB for j in range(9)), sampling, i)
        for i, sampling in enumerate(chosen)
    ]
    return engine.generate(requests), engine


def trajectories(completions: Sequence[Completion]) -> list[Trajectory]:
    flat = []
    for i, completion in enumerate(completions):
        prompt = tuple((7 * i % 2 + 5 * j * j) % VOCAB for j in range(9))
        flat.append(flatten(f"p{i % 2}/{i}", f"p{i % 2}", prompt, (Turn(completion),), 1.0))
    return flat


def scores(decoder: Decoder, played: Sequence[Trajectory], temperature: float, replay: bool) -> dict[str, list[str]]:
    """The learner's log-probs of each trajectory's tokens on packs of it, as hexadecimal."""
    samples = [Sample(t.id, t.prompt_id, t.columns.without("kept", "unfiltered_logprobs")) for t in played]
    by_id = {t.id: t for t in played}
    scored: dict[str, list[str]] = {}
    for microbatch in pack(samples, count_prompts(samples), 60):
        members = [by_id[name] for name in microbatch.sample_ids]
        kept = [column(t, "kept")[p] if "kept" in t.columns else b"" for t in members for p in trained(t)]
        view = PackView(microbatch.segments_S, microbatch.first_S, microbatch.parent_S)
        tokens_T, rows_N = (torch.from_numpy(x.astype(np.int64)) for x in (microbatch.tokens_T, microbatch.rows_N))
        with torch.no_grad():
            hidden_NM = decoder.forward(tokens_T, view, rows_N)
            targets_N = torch.tensor(microbatch.predictions["tokens"].tolist())
            logprobs_N, _ = token_logprobs(hidden_NM, decoder.head, targets_N, temperature, kept if replay else None)
        for name, value in zip(owners_of(microbatch), logprobs_N.tolist(), strict=True):
            scored.setdefault(name, []).append(value.hex())
    return scored


def recorded(played: Sequence[Trajectory], unfiltered: bool = False) -> dict[str, list[str]]:
    found = {}
    for t in played:
        logprobs = column(t, "unfiltered_logprobs" if unfiltered and "kept" in t.columns else "logprobs")
        found[t.id] = [logprobs[p].hex() for p in trained(t)]
    return found


@settings(max_examples=15)
@given(chosen=st.lists(samplings, min_size=1, max_size=5), temperature=st.sampled_from([1.0, 0.6, 1.7]))
def test_the_learner_replays_the_engines_sets(decoder, chosen, temperature):
    """The policy trained is not the filtered one that sampled: an id lost, a row slipped, another order of the sum."""
    chosen = [replace(sampling, temperature=temperature, max_new_tokens=6) for sampling in chosen]
    completions, _ = generate(decoder, chosen)
    played = trajectories(completions)
    assert scores(decoder, played, temperature, replay=True) == recorded(played)
    assert scores(decoder, played, temperature, replay=False) == recorded(played, unfiltered=True)
    for sampling, t in zip(chosen, played, strict=True):
        filters = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        assert ("kept" in t.columns) == ("unfiltered_logprobs" in t.columns) == filters
        assert not filters or all(column(t, "kept")[p] for p in trained(t))


def test_without_its_set_a_token_has_another_logprob(decoder):
    """The test above would pass though no filter did anything."""
    played = trajectories(generate(decoder, [Sampling(top_k=3, max_new_tokens=8)] * 3)[0])
    assert scores(decoder, played, 1.0, replay=True) == recorded(played)
    assert scores(decoder, played, 1.0, replay=False) != recorded(played)
    assert all((t.columns["logprobs"] >= t.columns["unfiltered_logprobs"]).all() for t in played)


def test_sets_outlive_preemption_stop_strings_and_aborts(decoder):
    """A sequence run again loses the sets of its first life; an ended one has more sets than tokens."""
    chosen = [Sampling(top_p=0.7, top_k=20 + i, max_new_tokens=20) for i in range(5)]
    alone = [generate(decoder, [Sampling()] * i + [sampling])[0][i] for i, sampling in enumerate(chosen)]
    together, engine = generate(decoder, chosen, num_pages=16)
    assert engine.stats.preemptions
    for wanted, got in zip(alone, together, strict=True):
        assert got.columns == wanted.columns and "kept" in got.columns and "unfiltered_logprobs" in got.columns
    string = f"<{alone[0].tokens[4]}>"
    (stopped,) = generate(decoder, [replace(chosen[0], stop_strings=(string,))])[0]
    assert stopped.stop_reason is StopReason.STOP_STRING and len(stopped.tokens) <= 5
    engine.submit(Request("late", "late", (1, 2, 3), chosen[0], 0))
    engine.step()
    engine.step()
    aborted = engine.abort("late")
    assert aborted is not None and len(aborted.tokens) == 2
    for completion in (*together, stopped, aborted):
        assert "unfiltered_logprobs" in completion.columns
        assert all(t in kept_ids(kept) for t, kept in zip(completion.tokens, completion.columns["kept"], strict=True))


@settings(max_examples=40)
@given(chosen=st.lists(samplings, min_size=1, max_size=6), flat=st.booleans(), seed=st.integers(0, 99))
def test_kept_sets_are_those_of_the_reference(any_path, chosen, flat, seed):
    """A set with a token that could not be drawn, or without one that could; ties cut elsewhere than in the sampler."""
    logits_SV = 2 * torch.randn(len(chosen), 300, generator=torch.Generator().manual_seed(seed))
    logits_SV = logits_SV.round() if flat else logits_SV
    batch = SamplingBatch.stack(chosen, range(len(chosen)), [seed] * len(chosen))
    tokens_S, _ = sampler.sample(logits_SV, batch)
    kept, unfiltered = kept_sets(logits_SV, tokens_S, batch)
    wanted = logits_SV.double() / torch.tensor([[s.temperature] for s in chosen])
    for s in range(len(chosen)):
        if not batch.filters_S[s]:
            assert kept[s] is unfiltered[s] is None
            continue
        expected = np.flatnonzero(np.isfinite(sampler._filtered_row(logits_SV, batch, s))).tolist()
        assert list(kept_ids(kept[s])) == expected
        assert torch.isfinite(processed_logits(logits_SV, batch)[s]).nonzero()[:, 0].tolist() == expected
        assert int(tokens_S[s]) in expected
        assert unfiltered[s] == pytest.approx(float(wanted[s].log_softmax(-1)[tokens_S[s]]), abs=1e-5)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(top_k=1), [1]),  # ties go to the lowest id
        (Sampling(top_k=2), [1, 3]),
        (Sampling(top_p=1e-9), [1]),
        (Sampling(top_p=0.5), [1, 3]),
        (Sampling(min_p=1.0), [1, 3, 4]),
        (Sampling(top_k=4, top_p=0.99), [1, 2, 3, 4]),
        (Sampling(top_k=5), [0, 1, 2, 3, 4]),
    ],
)
def test_sets_by_hand(any_path, sampling, expected):
    """A boundary off by one: the last of tied tokens, a set of one, a set of all."""
    logits_SV = torch.tensor([[-4.0, 2.0, 0.0, 2.0, 2.0]])
    batch = SamplingBatch.stack([sampling], [0], [0])
    tokens_S, _ = sampler.sample(logits_SV, batch)
    assert list(kept_ids(kept_sets(logits_SV, tokens_S, batch)[0][0])) == expected


def test_greedy_rows_have_no_set(any_path):
    """A greedy request in a filtered batch is given a set, which no temperature could replay."""
    logits_SV = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    batch = SamplingBatch.stack([Sampling(temperature=0.0, top_k=3), Sampling(top_k=3)], [0, 1], [0, 0])
    kept, unfiltered = kept_sets(logits_SV, sampler.sample(logits_SV, batch)[0], batch)
    assert kept[0] is unfiltered[0] is None and len(kept_ids(kept[1])) == 3


def drawn(rows: int, vocab: int, seed: int) -> tuple[Tensor, tuple[bytes, ...]]:
    """Targets and sets around them, of every size; every third row without one."""
    rng = np.random.default_rng(seed)
    targets_N, kept = rng.integers(0, vocab, rows), []
    for row, target in enumerate(targets_N):
        others = rng.choice(vocab, size=int(rng.integers(0, vocab + 1)), replace=False)
        chosen = np.unique([*others, target]).astype(np.uint32)
        kept.append(b"" if row % 3 == 2 else chosen.tobytes())
    return torch.from_numpy(targets_N), tuple(kept)


@settings(max_examples=15)
@given(
    rows=st.integers(1, 20),
    vocab=st.sampled_from([2, 9, 64, 70, 500]),
    width=st.integers(1, 24),
    temperature=st.sampled_from([1.0, 0.5, 2.0]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients(any_path, rows, vocab, width, temperature, seed):
    """A gradient outside the set, a temperature or a normaliser of the whole vocabulary in it, entropy of other logits.

    fp32: tolerance V E = 2^-24 (V + M + 40) of sums of up to V terms of at most 1, times |weight| <= 3 sqrt M.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    value = torch.randn(vocab, width, generator=generator) / width**0.5
    targets_N, kept = drawn(rows, vocab, seed)
    grad_N = torch.randn(rows, generator=generator)
    h64, w64 = hidden.double().requires_grad_(), value.double().requires_grad_()
    wanted, wanted_entropy = logprob_reference(h64, w64, targets_N, temperature, kept)
    dhidden, dweight = torch.autograd.grad(wanted, (h64, w64), grad_N.double())

    weight = Weight(value, matrix=True)
    weight.grad = torch.zeros_like(value)
    hidden.requires_grad_()
    logprobs_N, entropy_N = token_logprobs(hidden, weight, targets_N, temperature, kept)
    logprobs_N.backward(grad_N)
    bound = 2.0**-24 * (vocab + width + 40) / temperature * 20
    assert hidden.grad is not None
    for got, expected in (
        (logprobs_N, wanted),
        (entropy_N, wanted_entropy),
        (hidden.grad, dhidden),
        (weight.grad, dweight),
    ):
        torch.testing.assert_close(got.detach().double(), expected.detach(), atol=bound, rtol=bound)
    alone = [row for row, k in enumerate(kept) if len(k) == 4]
    assert not hidden.grad[alone].any() and not logprobs_N[alone].any(), "one token kept: probability 1, no gradient"


def test_reference_by_gradient_check():
    """The slow twin's own gradient is wrong, and the kernel with it; NaN from 0 x -infinity in the entropy."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    targets_N, kept = drawn(5, 8, 4)
    assert torch.autograd.gradcheck(lambda h, w: logprob_reference(h, w, targets_N, 0.7, kept), (hidden, weight))


def test_chunks_of_rows_and_columns(any_path, monkeypatch):
    """At the seam of two chunks a row is given another row's set, or a block of the vocabulary its first one's."""
    monkeypatch.setattr(logprob, "ROWS", 7)
    monkeypatch.setattr(logprob, "COLUMNS", 128)
    generator = torch.Generator().manual_seed(3)
    hidden, value = torch.randn(20, 8, generator=generator), torch.randn(300, 8, generator=generator)
    targets_N, kept = drawn(20, 300, 5)
    h64 = hidden.double().requires_grad_()
    wanted, _ = logprob_reference(h64, value.double(), targets_N, 1.0, kept)
    hidden.requires_grad_()
    got, _ = token_logprobs(hidden, Weight(value, matrix=True), targets_N, 1.0, kept)
    torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=0)
    (dhidden,) = torch.autograd.grad(wanted.sum(), h64)
    (own,) = torch.autograd.grad(got.sum(), hidden)
    torch.testing.assert_close(own.double(), dhidden, atol=1e-3, rtol=0)


def test_unfiltered_rows_keep_their_bits(any_path):
    """A neighbour's set changes a row that has none."""
    generator = torch.Generator().manual_seed(2)
    hidden, targets_N = torch.randn(4, 8, generator=generator), torch.tensor([3, 1, 4, 1])
    weight = Weight(torch.randn(300, 8, generator=generator), matrix=True)
    plain = token_logprobs(hidden, weight, targets_N, 0.8)
    mixed = token_logprobs(hidden, weight, targets_N, 0.8, (b"", ids(1, 7), b"", b""))
    for a, b in zip(plain, mixed, strict=True):
        assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]]) and a[1] != b[1]


def test_a_target_outside_its_set_is_refused():
    """A log-prob of -infinity trains on, and the loss is NaN a step later."""
    with pytest.raises(AssertionError, match=r"row 1: target 5 is not among the 2 tokens"):
        KeptSets.build((b"", ids(4, 6), ids(5)), torch.tensor([5, 5, 5]))
    with pytest.raises(AssertionError, match="1 kept sets for 2 targets"):
        KeptSets.build((b"",), torch.tensor([5, 5]))


def test_turns_flatten_by_hand():
    """Sets slip against their tokens; a turn without filters in a filtered trajectory breaks the columns."""
    seen = Columns.of(tokens=(5, 2), logprobs=(-0.1, -0.2), versions=(0, 0))
    seen = seen.having(kept=(ids(5, 6), ids(2)), unfiltered_logprobs=(-0.3, -0.4))
    filtered = Completion("a", seen, StopReason.STOP_TOKEN, 1.0, 2.0, 4.0)
    seen = Columns.of(tokens=(7, 2), logprobs=(-0.5, -0.6), versions=(0, 0))
    plain = Completion("b", seen, StopReason.STOP_TOKEN, 6.0, 6.0, 6.5)
    flat = flatten("p/0/0", "p", (1,), (Turn(filtered, (8, 9)), Turn(plain)), 1.0)
    assert column(flat, "kept") == [b"", ids(5, 6), ids(2), b"", b"", b"", b""]
    assert column(flat, "unfiltered_logprobs") == [0.0, -0.3, -0.4, 0.0, 0.0, -0.5, -0.6]
    assert (flat.seconds, flat.counts) == (3.5, {"observations": 1})
    bare = flatten("p/0/0", "p", (1,), (Turn(plain, (3,)),), 1.0)
    assert "kept" not in bare.columns and "unfiltered_logprobs" not in bare.columns and bare.counts["observations"] == 1
