"""Tokens not drawn from the distribution whose log-prob is reported, or drawn otherwise in another batch."""

from __future__ import annotations

import ctypes
import math
import platform
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.errors import NonFiniteError
from tandem.kernels import sample as sampler
from tandem.kernels.build import load, toolchain
from tandem.kernels.sample import SamplingBatch
from tandem.numerics import random
from tandem.numerics.compare import same_bits
from tandem.types import Sampling

FILTERS = {
    "plain": Sampling(),
    "temperature": Sampling(temperature=0.6),
    "top-k": Sampling(top_k=5),
    "top-p": Sampling(top_p=0.8),
    "min-p": Sampling(min_p=0.1),
    "all": Sampling(temperature=1.4, top_k=12, top_p=0.9, min_p=0.05),
}
needs_compiler = pytest.mark.skipif(toolchain.compiler() is None, reason="no C++ compiler: only the reference runs")


def one_each(sampling: Sampling, rows: int, seed: int = 0, position: int = 0) -> SamplingBatch:
    """Row s has seed + s, and the same position."""
    return SamplingBatch.stack([sampling] * rows, range(seed, seed + rows), [position] * rows)


def lm_like(rows: int, vocab: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits_SV = 2.5 * torch.randn(rows, vocab, generator=generator)
    logits_SV[:, torch.randint(vocab, (8,), generator=generator)] += 10
    return logits_SV


def take(batch: SamplingBatch, rows: list[int]) -> SamplingBatch:
    return SamplingBatch(*(np.ascontiguousarray(getattr(batch, name)[rows]) for name in SamplingBatch.__slots__))


def logprob_tolerance(vocab: int, logprob_S: torch.Tensor, lse_S: torch.Tensor) -> torch.Tensor:
    """Relative errors of the sum, which the logarithm makes absolute, in units of 2^-24: exp 2 (1.011 ulp), twice, for
    the term and its block; the rounding of its argument d, |d|, on average over the softmax at most log(vocab), since
    log sum + mean |d| is the entropy; additions 16 in a block, 4 of lanes, blocks / 16 <= 12 here, 4 of lanes. Then the
    roundings of the log-sum-exp and of the difference.
    """
    return 2.0**-24 * (4 + math.log(vocab) + 36 + lse_S.abs() + logprob_S.abs())


def matches_reference(logits_SV: torch.Tensor, batch: SamplingBatch) -> None:
    tokens_S, logprobs_S = sampler.sample(logits_SV, batch)
    expected_S, expected_logprobs_S = sampler.sample_reference(logits_SV, batch)
    assert tokens_S.tolist() == expected_S.tolist()
    x_SV = sampler.processed_logits(logits_SV, batch)
    expected_SV = np.stack([sampler._filtered_row(logits_SV, batch, s) for s in range(len(batch))])
    assert same_bits(x_SV, torch.from_numpy(expected_SV))
    gap_S = (logprobs_S.double() - expected_logprobs_S.double()).abs()
    lse_S = torch.logsumexp(x_SV.double(), dim=1)
    assert bool((gap_S <= logprob_tolerance(logits_SV.shape[1], expected_logprobs_S, lse_S)).all()), (gap_S, lse_S)


def expected_probabilities(logits_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """By Transformers' warpers, in its order: temperature, top-k, top-p, min-p."""
    warpers = pytest.importorskip("transformers.generation.logits_process")
    scores = logits_V[None].double() / sampling.temperature
    if sampling.top_k:
        scores = warpers.TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = warpers.TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p:
        scores = warpers.MinPLogitsWarper(sampling.min_p)(None, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_draws_follow_the_reported_distribution(name, vary):
    """A filter applied in another order, not renormalised or cut one token off; noise that is biased."""
    stats = pytest.importorskip("scipy.stats")
    rows, sampling = 20_000, FILTERS[name]
    logits_V = 2 * torch.randn(40, generator=torch.Generator().manual_seed(3))
    batch = one_each(sampling, rows)
    if vary == "position":
        batch = SamplingBatch.stack([sampling] * rows, [5] * rows, range(rows))
    tokens_S, logprobs_S = sampler.sample(logits_V.expand(rows, -1), batch)
    expected_V = expected_probabilities(logits_V, sampling)
    count_V = torch.bincount(tokens_S, minlength=len(logits_V))
    assert bool((count_V[expected_V == 0] == 0).all())
    common = expected_V * rows >= 5
    observed = [*count_V[common].tolist(), count_V[~common].sum().item()]
    wanted = [*(expected_V[common] * rows).tolist(), (expected_V[~common] * rows).sum().item()]
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert stats.chisquare(observed, wanted).pvalue > 1e-3
    torch.testing.assert_close(logprobs_S.double(), expected_V.log()[tokens_S], atol=5e-6, rtol=0)


@pytest.mark.parametrize("pair", ["seeds", "positions", "streams"])
def test_draws_of_neighbours_are_independent(pair):
    """Siblings, consecutive positions or streams that share noise: their tokens would agree too often."""
    stats = pytest.importorskip("scipy.stats")
    rows = 20_000
    logits_SV = torch.randn(12, generator=torch.Generator().manual_seed(1)).expand(rows, -1)
    spaced = range(0, 2 * rows, 2)
    first = SamplingBatch.stack([Sampling()] * rows, spaced, [8] * rows)
    second = first
    if pair == "seeds":
        second = SamplingBatch.stack([Sampling()] * rows, [seed + 1 for seed in spaced], [8] * rows)
    if pair == "positions":
        second = SamplingBatch.stack([Sampling()] * rows, spaced, [9] * rows)
    a = sampler.sample(logits_SV, first)[0]
    stream = random.Stream.NOISE if pair == "streams" else random.Stream.TARGET
    b = sampler.sample(logits_SV, second, stream)[0]
    table = torch.bincount(12 * a + b, minlength=144).view(12, 12).numpy()
    assert stats.chi2_contingency(table).pvalue > 1e-3


ODD = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1.0 + 2**-23, 5.0, -math.inf, 3e38, -3e38, 1e30, 1e6, 1e6 + 0.0625, -90.0, 1e-40]
)
LOGIT = st.one_of(ODD, st.integers(-4, 4).map(float), st.floats(-30, 30, width=32))


@st.composite
def cases(draw):
    vocab = draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 255, 256, 257, 700])))
    kind = draw(st.sampled_from(["drawn", "normal", "flat", "increasing"]))
    if kind == "drawn":
        pool = draw(st.lists(LOGIT, min_size=1, max_size=12))
        picks = np.random.default_rng(draw(st.integers(0, 99))).integers(0, len(pool), vocab)
        logits_V = np.array(pool, dtype=np.float32)[picks]
    else:
        logits_V = np.random.default_rng(draw(st.integers(0, 99))).normal(0, 3, vocab).astype(np.float32)
        logits_V = {"normal": logits_V, "flat": 0 * logits_V, "increasing": np.sort(logits_V)}[kind]
    if logits_V.max() == -np.inf:
        logits_V[draw(st.integers(0, vocab - 1))] = 0.0
    sampling = Sampling(
        temperature=draw(st.sampled_from([1.0, 1.0, 0.0, 0.7, 3.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 5, 17, 300, 10**6])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.0, 1e-3, 0.3, 0.5, 0.75, 0.95, 1 - 1e-9])),
        min_p=draw(st.sampled_from([0.0, 0.0, 1e-9, 0.05, 0.5, 1.0])),
    )
    return logits_V, sampling, draw(st.integers(0, 2**64 - 40)), draw(st.integers(0, 2**32 - 1))


@needs_compiler
@given(cases())
@settings(max_examples=150, deadline=None)
def test_compiled_equals_reference(case):
    """Another token, kept set or log-prob than the slow, obvious sampler: ties, -infinity, huge values, short rows."""
    logits_V, sampling, seed, position = case
    with np.errstate(over="ignore"):
        finite = sampling.temperature == 0 or np.isfinite((logits_V / np.float32(sampling.temperature)).max())
    logits_SV, batch = torch.from_numpy(logits_V).expand(4, -1), one_each(sampling, 4, seed, position)
    if finite:
        matches_reference(logits_SV, batch)
    else:
        for draw in (sampler.sample, sampler.sample_reference):
            with pytest.raises(NonFiniteError, match="row 0 .* overflow"):
                draw(logits_SV, batch)


@needs_compiler
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("shape", ["lm", "flat", "far from zero", "increasing", "two modes"])
def test_pruning_is_exact_at_a_real_vocabulary(name, shape):
    """Noise bounded too low, so that a token that should win is left out."""
    rows, vocab = 6, 32_003
    logits_SV = lm_like(rows, vocab, seed=5)
    if shape == "flat":
        logits_SV.zero_()
    if shape == "far from zero":  # where fp32 numbers lie 1 apart: the noise must not be rounded away
        logits_SV.fill_(1e7)
    if shape == "increasing":
        logits_SV = logits_SV.sort(dim=1).values
    if shape == "two modes":  # the mass is in 32,000 tokens, 12 nats below one of them
        logits_SV = torch.full((rows, vocab), -12.0)
        logits_SV[:, 100] = 0.0
    matches_reference(logits_SV, one_each(FILTERS[name], rows, seed=11))


@needs_compiler
def test_pruning_is_exact_where_the_likely_token_loses():
    """Noise of unlikely tokens left out because the likely one was expected to win."""
    logits_V = torch.full((40,), -5.0)
    logits_V[20] = 0.0
    batch = one_each(Sampling(), 4000)
    tokens_S = sampler.sample(logits_V.expand(4000, -1), batch)[0]
    assert tokens_S.tolist() == sampler.sample_reference(logits_V.expand(4000, -1), batch)[0].tolist()


@pytest.mark.parametrize("top_k", [0, 20])
def test_top_p_cuts_at_the_exact_mass(top_k):
    """A mass computed in fp32 or by a wrong polynomial: 1e-9 more or less of top-p must move the cut by one token."""
    logits_V = np.random.default_rng(7).normal(0, 2, 30).astype(np.float32)
    mass = np.sort(np.exp(logits_V.astype(np.float64)))[::-1][: top_k or None]
    reached = np.cumsum(mass) / mass.sum()
    for count in range(1, 15):
        for top_p, expected in ((reached[count - 1] - 1e-9, count), (reached[count - 1] + 1e-9, count + 1)):
            assert len(kept(logits_V.tolist(), Sampling(top_k=top_k, top_p=float(top_p)))) == expected


@needs_compiler
def test_noise_equals_reference():
    """Philox lanes in another order, or fp32 logarithms, in the C++."""
    words, noise = np.empty(4096, np.uint32), np.empty(4096, np.float32)
    seed, position = 0xFEDCBA9876543210, 0xFFFFFFFF
    sampler._compiled().tandem_noise(seed, position, 3, 4096, words.ctypes.data, noise.ctypes.data)
    expected = random.words(seed, position, np.arange(4096), 3)
    assert (words == expected).all()
    # Both evaluate in fp64 and round: they can differ only where libm's last bit crosses a rounding boundary of fp32.
    assert (noise != random.gumbel(expected)).sum() <= 1


@needs_compiler
def test_largest_noise_is_below_the_bound_of_the_pruning():
    """GUMBEL_MAX in sample.h below the noise of the largest word."""
    header = (load.SOURCES / "sample.h").read_text()
    bound = float(header.split("GUMBEL_MAX = ")[1].split(";")[0])
    assert random.GUMBEL_MAX <= bound <= random.GUMBEL_MAX + 1e-3


@needs_compiler
@pytest.mark.parametrize("name", FILTERS)
def test_row_alone_equals_row_among_many(name):
    """A reduction, a scratch buffer or a random number that depends on the batch, the threads, or the rows' stride."""
    logits_SV = lm_like(9, 3000, seed=2)
    samplings = [FILTERS[name], Sampling(top_p=0.5), Sampling(temperature=0.0)] * 3
    batch = SamplingBatch.stack(samplings, range(9), [5, 5, 5, 6, 6, 6, 7, 7, 7])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                (*sampler.sample(logits_SV, batch), sampler.log_sum_exp(logits_SV), sampler.entropy(logits_SV))
            )
    finally:
        torch.set_num_threads(threads)
    wide_SV = torch.full((9, 3001), float("nan"))
    wide_SV[:, 1:] = logits_SV
    view_SV = wide_SV[:, 1:]
    results.append((*sampler.sample(view_SV, batch), sampler.log_sum_exp(view_SV), sampler.entropy(view_SV)))
    alone = [
        (
            *sampler.sample(logits_SV[s : s + 1], take(batch, [s])),
            sampler.log_sum_exp(logits_SV[s : s + 1]),
            sampler.entropy(logits_SV[s : s + 1]),
        )
        for s in range(9)
    ]
    results.append(tuple(torch.cat(parts) for parts in zip(*alone, strict=True)))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_are_the_samplers_bits(temperature):
    """A learner whose log-prob of the same logits differs from the behaviour log-prob."""
    logits_SV = lm_like(16, 2000, seed=4)
    tokens_S, logprobs_S = sampler.sample(logits_SV, one_each(Sampling(temperature=temperature), 16))
    temperature_S = None if temperature == 1 else torch.full((16,), temperature)
    assert same_bits(sampler.token_logprobs(logits_SV, tokens_S, temperature_S), logprobs_S)


@pytest.mark.parametrize("name", FILTERS)
def test_processed_logits_score_what_was_sampled(name):
    """A replay of the kept set that gives other log-probs or other tokens than the draw did."""
    logits_SV, batch = lm_like(16, 2000, seed=6), one_each(FILTERS[name], 16)
    tokens_S, logprobs_S = sampler.sample(logits_SV, batch)
    x_SV = sampler.processed_logits(logits_SV, batch)
    assert same_bits(sampler.token_logprobs(x_SV, tokens_S), logprobs_S)
    again_S, again_logprobs_S = sampler.sample(x_SV, one_each(Sampling(), 16))
    assert same_bits(again_S, tokens_S) and same_bits(again_logprobs_S, logprobs_S)


def test_greedy_takes_the_lowest_id_of_ties():
    """A tie broken by order of lanes, or a log-prob other than that of a one-hot distribution."""
    logits_SV = torch.zeros(3, 1000)
    logits_SV[0, [40, 700, 999]] = 5.0
    logits_SV[1, [31, 16]] = 2.0
    logits_SV[2] = -math.inf
    logits_SV[2, 999] = -1e30
    tokens_S, logprobs_S = sampler.sample(logits_SV, one_each(Sampling(temperature=0.0, top_k=3, top_p=0.1), 3))
    assert tokens_S.tolist() == [40, 16, 999] and logprobs_S.tolist() == [0.0, 0.0, 0.0]


def kept(logits: list[float], sampling: Sampling) -> list[int]:
    x_SV = sampler.processed_logits(torch.tensor([logits]), one_each(sampling, 1))
    return torch.nonzero(x_SV[0] > -math.inf)[:, 0].tolist()


@pytest.mark.parametrize("compiled", [True, False])
def test_kept_sets_by_hand(compiled, monkeypatch):
    """A boundary off by one: exactly k with ties to the lowest ids, mass that just reaches top-p, min-p at equality."""
    if not compiled:
        monkeypatch.setattr(sampler, "_compiled", lambda: None)
    elif toolchain.compiler() is None:
        pytest.skip("no C++ compiler")
    assert kept([1.0, 2.0, 2.0, 2.0, 0.0], Sampling(top_k=2)) == [1, 2]
    assert kept([-0.0, 0.0, 0.0, -1.0], Sampling(top_k=2)) == [0, 1]
    assert kept([0.0] * 10, Sampling(top_p=0.3)) == [0, 1, 2]  # three tenths reach 0.3, in fp64 as well
    assert kept([0.0] * 4, Sampling(top_p=0.5)) == [0, 1]
    assert kept([0.0] * 4, Sampling(top_p=0.5000001)) == [0, 1, 2]
    assert kept([math.log(8), math.log(4), math.log(2), math.log(2)], Sampling(top_p=0.7)) == [0, 1]
    assert kept([math.log(8), math.log(4), math.log(2), math.log(2)], Sampling(top_p=0.8, min_p=0.3)) == [0, 1]
    # top-p of the mass that top-k left: 8 of 12 reach 0.66, but 8 of 16 do not.
    assert kept([math.log(8), math.log(4), math.log(2), math.log(2)], Sampling(top_k=2, top_p=0.66)) == [0]
    assert kept([3.0, 3.0, 2.0], Sampling(min_p=1.0)) == [0, 1]
    assert kept([5.0, 1.0, 5.0], Sampling(top_p=0.0)) == [0]
    assert kept([-math.inf, 0.0, -math.inf], Sampling(top_k=3)) == [1]


@pytest.mark.parametrize("vocab", [1, 15, 256, 1000, 49_152])
def test_log_sum_exp_and_entropy_values(vocab):
    """A block skipped, a tail counted twice, padding that adds mass."""
    logits_SV = lm_like(3, vocab, seed=vocab)
    logits_SV[0, : vocab // 2] = -math.inf
    temperature_S = torch.tensor([1.0, 0.5, 2.0])
    x_SV = logits_SV.double() / temperature_S[:, None].double()
    lse_S = x_SV.logsumexp(1)
    # As for log-probs; dividing in fp32 moves each x, and so the log-sum-exp, by 2^-24 |x| at most.
    slack_S = logprob_tolerance(vocab, torch.zeros(3), lse_S) + 2.0**-24 * x_SV.clamp(min=-1e4).abs().amax(1)
    assert bool(((sampler.log_sum_exp(logits_SV, temperature_S) - lse_S).abs() <= slack_S).all())
    entropy_S = torch.distributions.Categorical(logits=x_SV).entropy()
    torch.testing.assert_close(sampler.entropy(logits_SV, temperature_S).double(), entropy_S, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", ["plain", "top-k", "top-p", "greedy"])
@pytest.mark.parametrize(
    ("value", "where", "cause"),
    [
        (math.nan, 0, "1 NaN"),
        (math.nan, 299, "1 NaN"),
        (math.inf, 130, "1 .infinity"),
        (-math.inf, slice(None), "only -infinity"),
    ],
)
def test_rows_that_are_not_finite_are_named(name, value, where, cause, compiled, monkeypatch):
    """A broken model that goes on sampling token 0, or an error that does not say which row."""
    if not compiled:
        monkeypatch.setattr(sampler, "_compiled", lambda: None)
    logits_SV = torch.zeros(5, 300)
    logits_SV[3, where] = value
    sampling = {**FILTERS, "greedy": Sampling(temperature=0.0)}[name]
    with pytest.raises(NonFiniteError, match=f"row 3 of 5 holds {cause}"):
        sampler.sample(logits_SV, one_each(sampling, 5))


def test_without_a_compiler_the_reference_runs(monkeypatch):
    """No compiler: a crash, or other tokens."""
    logits_SV, batch = lm_like(4, 500, seed=8), one_each(Sampling(top_p=0.9), 4)
    tokens_S, logprobs_S = sampler.sample(logits_SV, batch)
    monkeypatch.setattr(sampler, "_compiled", lambda: None)
    slow_S, slow_logprobs_S = sampler.sample(logits_SV, batch)
    assert slow_S.tolist() == tokens_S.tolist()
    torch.testing.assert_close(slow_logprobs_S, logprobs_S, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        sampler.token_logprobs(sampler.processed_logits(logits_SV, batch), slow_S), slow_logprobs_S, atol=0, rtol=0
    )
    assert sampler.entropy(logits_SV).shape == (4,)


@pytest.fixture(scope="module", params=["-DTANDEM_PORTABLE", "-mno-avx512f"])
def other_path(request, tmp_path_factory):
    """sample.cpp by plain loops, and by AVX2."""
    cxx = toolchain.compiler()
    if cxx is None:
        pytest.skip("no C++ compiler")
    if request.param == "-mno-avx512f" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not an x86 processor")
    target = tmp_path_factory.mktemp("other") / "sample.so"
    flags = [*load.FLAGS, "-w", "-O2", request.param]
    subprocess.run([cxx, *flags, "-o", str(target), str(load.SOURCES / "sample.cpp")], check=True, timeout=300)
    return sampler.declare(ctypes.CDLL(str(target)))


def evaluate(compiled: ctypes.CDLL, which: int, x: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    compiled.tandem_vector(which, x.ctypes.data, out.ctypes.data, x.size)
    return out


@needs_compiler
@pytest.mark.parametrize(("which", "exact"), [(0, np.exp), (1, np.log)])
def test_vector_functions_are_accurate_and_the_same_everywhere(which, exact, other_path):
    """A coefficient mistyped; a machine without AVX-512 with other bits."""
    every = np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32).view(np.float32)
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0, 88.73, -87.01, 1e-45, 1.0], dtype=np.float32)
    x = np.concatenate([every, special, np.zeros(-(every.size + special.size) % 16, np.float32)])
    got = evaluate(sampler._compiled(), which, x)
    assert got.tobytes() == evaluate(other_path, which, x).tobytes()
    with np.errstate(all="ignore"):
        value = exact(x.astype(np.float64))
    domain = (x >= -87) & (x <= 88.722) if which == 0 else (x > 0) & np.isfinite(x)
    ulp = np.spacing(np.abs(value[domain]).astype(np.float32)).astype(np.float64)
    assert (np.abs(got[domain] - value[domain]) <= 1.011 * np.maximum(ulp, 2.0**-149)).all()
    assert np.isnan(got[np.isnan(x)]).all()
    if which == 0:
        assert (got[x < -87] == 0).all() and np.isposinf(got[x > 88.73]).all()
    else:
        assert np.isnan(got[x < 0]).all() and np.isneginf(got[x == 0]).all() and np.isposinf(got[np.isposinf(x)]).all()


@needs_compiler
@pytest.mark.parametrize("name", [*FILTERS, "greedy"])
def test_every_path_has_the_same_bits(name, other_path, monkeypatch):
    """A run that does not replay on a machine without AVX-512."""
    sampling = {**FILTERS, "greedy": Sampling(temperature=0.0)}[name]
    logits_SV, batch = lm_like(8, 5001, seed=9), one_each(sampling, 8)
    expected = (*sampler.sample(logits_SV, batch), sampler.log_sum_exp(logits_SV), sampler.entropy(logits_SV))
    monkeypatch.setattr(sampler, "_compiled", lambda: other_path)
    got = (*sampler.sample(logits_SV, batch), sampler.log_sum_exp(logits_SV), sampler.entropy(logits_SV))
    assert all(same_bits(a, b) for a, b in zip(expected, got, strict=True))
