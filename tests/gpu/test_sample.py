"""Triton's sampler: its noise is numerics/random.py's, its tokens are the C++ sampler's on the same logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tandem.errors import NonFiniteError
from tandem.kernels import choice
from tandem.kernels import sample as sampler
from tandem.kernels.sample import SamplingBatch, kept_sets, processed_logits, sample, sample_reference
from tandem.numerics import random
from tandem.types import Sampling

SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(temperature=0.0),
    Sampling(top_k=5),
    Sampling(temperature=1.3, top_p=0.8),
    Sampling(temperature=0.9, min_p=0.1),
    Sampling(top_k=50, top_p=0.9, min_p=0.02),
    Sampling(top_p=0.0),
    Sampling(top_k=100_000),
]


def drawn(vocab: int, seed: int) -> tuple[torch.Tensor, SamplingBatch]:
    """Four rows of each kind; whole-number logits in every third row, so that many tie."""
    rows = 4 * len(SAMPLINGS)
    logits_SV = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    logits_SV[::3] = logits_SV[::3].round()
    seeds = [2**63 + 977 * row for row in range(rows)]
    return logits_SV, SamplingBatch.stack(SAMPLINGS * 4, seeds, [3 * row for row in range(rows)])


def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public operations choose C++ again, or the reference where there is no compiler."""
    monkeypatch.setattr(choice, "_asked", lambda: "")


def test_words_are_philox(device):
    """A token's noise comes from another counter, key or word than on the CPU."""
    from tandem.kernels.gpu.sample import words

    cases = [(0, 0), (2**64 - 1, 2**32 - 1), (123456789012345678, 77), (2**63, 2**31)]
    seeds = torch.from_numpy(np.array([seed for seed, _ in cases], dtype=np.uint64).view(np.int64)).to(device)
    positions = torch.tensor([position for _, position in cases], device=device)
    for stream in random.Stream:
        got = words(seeds, positions, stream, 64).cpu().numpy()
        for row, (seed, position) in enumerate(cases):
            assert (got[row] == random.words(seed, position, np.arange(64), stream)).all()


@pytest.mark.parametrize(("vocab", "seed"), [(3, 0), (700, 1), (1024, 2), (2500, 3)])
def test_tokens_are_those_of_the_cpu(device, monkeypatch, vocab, seed):
    """Temperature, a filter, a tie, the tail of the vocabulary or the noise differs from the C++ and the reference."""
    logits_SV, batch = drawn(vocab, seed)
    tokens, logprobs = (result.cpu() for result in sample(logits_SV.to(device), batch))
    kept = processed_logits(logits_SV.to(device), batch).cpu()
    sets, unfiltered = kept_sets(logits_SV.to(device), tokens.to(device), batch)
    on_cpu(monkeypatch)
    for expected in (sample(logits_SV, batch), sample_reference(logits_SV, batch)):
        assert torch.equal(tokens, expected[0])
        # Sums of at most `vocab` terms in other orders, and the result's own rounding.
        assert (logprobs - expected[1]).abs().max() < (vocab / 64 + 16) * 2**-24 * 16
    assert torch.equal(kept, processed_logits(logits_SV, batch))
    cpu_sets, cpu_unfiltered = kept_sets(logits_SV, tokens, batch)
    assert sets == cpu_sets  # None, and NaN below, for a row without filters
    both = (np.array(values, dtype=float) for values in (unfiltered, cpu_unfiltered))
    assert np.allclose(*both, atol=1e-4, equal_nan=True)


def test_a_draw_depends_on_its_row_alone(device):
    """A row draws another token, or reports other bits, among other rows; or scoring has other bits than drawing."""
    logits_SV, batch = drawn(1500, 4)
    logits_SV = logits_SV.to(device)
    tokens, logprobs = sample(logits_SV, batch)
    for rows in ([0], [35, 2], [7, 8, 9]):
        alone = sample(logits_SV[rows], batch.rows(np.array(rows)))
        assert torch.equal(alone[0], tokens[rows]) and torch.equal(alone[1], logprobs[rows])
    plain = [row for row in range(len(batch)) if SAMPLINGS[row % len(SAMPLINGS)].temperature and row % 9 < 2]
    temperature = torch.from_numpy(batch.temperature_S)[plain]
    assert torch.equal(sampler.token_logprobs(logits_SV[plain], tokens[plain], temperature), logprobs[plain])
    kept = processed_logits(logits_SV, batch)
    assert torch.equal(sampler.token_logprobs(kept, tokens), logprobs)


def test_statistics(device):
    """The log-sum-exp or the entropy loses the tail, the temperature, or tokens that were dropped."""
    logits_SV = drawn(1100, 5)[0].to(device)
    logits_SV[1, 5:] = -torch.inf
    temperature = torch.rand(len(logits_SV), device=device) + 0.5
    exact = logits_SV.double() / temperature.double()[:, None]
    # 1100 terms in 1024 sums, their tree of ten levels, a quotient, an exponential; weighted by gaps up to 40.
    bound = 40 * 32 * 2**-24
    assert (sampler.log_sum_exp(logits_SV, temperature).double() - exact.logsumexp(1)).abs().max() < bound
    entropy = torch.special.entr(exact.softmax(1)).sum(1)
    assert (sampler.entropy(logits_SV, temperature).double() - entropy).abs().max() < bound


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("sampling", SAMPLINGS[:5])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_named(device, sampling, value):
    """A broken model samples silently on the device."""
    logits_SV = torch.zeros(3, 40, device=device)
    batch = SamplingBatch.stack([sampling] * 3, [1, 2, 3], [0, 0, 0])
    logits_SV[1, 7] = value
    for broken in (logits_SV, torch.where(torch.arange(3, device=device)[:, None] == 1, -torch.inf, 0.0).expand(3, 40)):
        with pytest.raises(NonFiniteError, match="row 1 of 3"):
            sample(broken, batch)
        with pytest.raises(NonFiniteError, match="row 1 of 3"):
            processed_logits(broken, batch)
