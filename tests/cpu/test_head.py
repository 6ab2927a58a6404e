"""The fused head and sampler against logits and `sample`, which test_sample.py holds to an obvious reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.errors import NonFiniteError
from tandem.kernels.head import draw
from tandem.kernels.linear import logits
from tandem.kernels.sample import SamplingBatch, sample, sample_reference
from tandem.kernels.weight import Weight
from tandem.types import Sampling


def case(rows: int, vocab: int, depth: int, dtype: torch.dtype, scale: float, seed: int) -> tuple[torch.Tensor, Weight]:
    generator = torch.Generator().manual_seed(seed)
    hidden_SM = torch.randn(rows, depth, generator=generator).to(dtype)
    return hidden_SM, Weight((torch.randn(vocab, depth, generator=generator) * scale).to(dtype), matrix=True)


def batch_of(temperatures: list[float], seed: int, **filters: float) -> SamplingBatch:
    rows = len(temperatures)
    samplings = [Sampling(temperature=t, **filters) for t in temperatures]  # type: ignore[arg-type]
    return SamplingBatch.stack(samplings, [seed + 31 * i for i in range(rows)], [7 + i for i in range(rows)])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.3, 1.0, 1.7]), min_size=1, max_size=20),
    st.integers(1, 1400),
    st.sampled_from([8, 66]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0.01, 1.0, 6.0]),
    st.integers(0, 2**20),
    st.integers(1, 2),
)
def test_draws_what_the_sampler_draws(temperatures, vocab, depth, dtype, scale, seed, threads) -> None:
    """A block skipped, two blocks' bests confused, or padding drawn from: other tokens, other bits."""
    hidden_SM, weight = case(len(temperatures), vocab, depth, dtype, scale, seed)
    batch = batch_of(temperatures, seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tokens_S, logprobs_S = draw(hidden_SM, weight, batch)
    finally:
        torch.set_num_threads(before)
    expected = sample(logits(hidden_SM, weight), batch)
    assert torch.equal(tokens_S, expected[0]) and torch.equal(logprobs_S, expected[1])


def test_ties_go_to_the_lowest_id() -> None:
    """Greedy rows whose best logit stands in several blocks, of several threads: the lowest id is drawn."""
    weight = Weight(torch.zeros(2000, 4), matrix=True)
    weight.value[[300, 900, 1990]] = 1.0
    weight.repack()
    tokens_S, logprobs_S = draw(torch.ones(3, 4), weight, batch_of([0.0, 0.0, 0.0], 1))
    assert tokens_S.tolist() == [300] * 3 and logprobs_S.tolist() == [0.0] * 3


def test_filters_and_reference() -> None:
    """A batch with top-k goes wrong where the fused pass takes it; values against the full-sort reference in NumPy."""
    hidden_SM, weight = case(5, 777, 16, torch.float32, 1.0, 3)
    for filters in ({"top_k": 5}, {}):
        batch = batch_of([1.0, 0.5, 0.0, 1.0, 2.0], 9, **filters)
        tokens_S, logprobs_S = draw(hidden_SM, weight, batch)
        expected = sample_reference(logits(hidden_SM, weight), batch)
        assert torch.equal(tokens_S, expected[0])
        torch.testing.assert_close(logprobs_S, expected[1], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_names_the_row_that_is_not_finite(bad: float, temperature: float) -> None:
    """Weights gone bad in one row's hidden state: a token would be drawn from nonsense."""
    hidden_SM, weight = case(4, 600, 8, torch.float32, 1.0, 5)
    hidden_SM[2, 0] = bad
    with pytest.raises(NonFiniteError, match="row 2 of 4"):
        draw(hidden_SM, weight, batch_of([temperature] * 4, 1))
