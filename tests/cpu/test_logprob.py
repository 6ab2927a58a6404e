"""Log-probs, entropies and their gradients against log_softmax in fp64, without ever a logit of every row and token.

Tolerances (E = 2^-24): a logit errs by (M + 2) E sum |h||w| =: e; so do, at most, the log-sum-exp and the log-prob
(2e), which add the roundings of logits, temperature and sums: (V / 16 + 40) E is above the sampler's own bound
for V here, plus E |value|. A gradient p - 1 has the error of its probability, 2e + the same; e^(x - m) is rounded to
the compute dtype (U = E or 2^-8) where it is kept, and scaled again before the two products, which sum V and N terms.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tandem.kernels import logprob, sample
from tandem.kernels.linear import logits
from tandem.kernels.logprob import COLUMNS, ROWS, logprob_reference, token_logprobs
from tandem.kernels.weight import Weight
from tandem.numerics.compare import same_bits

E = 2.0**-24
STORE = {torch.float32: E, torch.bfloat16: 2.0**-8}
DTYPES = [torch.float32, torch.bfloat16]
TEMPERATURES = [1.0, 0.7, 2.0]


def problem(rows: int, vocab: int, width: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Weight, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = Weight((torch.randn(vocab, width, generator=generator) / width**0.5 * 2).to(dtype), matrix=True)
    weight.grad = torch.zeros(vocab, width)
    return hidden, weight, torch.randint(vocab, (rows,), generator=generator)


def within(got: Tensor, wanted: Tensor, bound: Tensor) -> None:
    excess = (got.double() - wanted).abs() - 1.05 * bound - 1e-30
    assert bool((excess <= 0).all()), (excess.max().item(), bound.max().item())


def compare(rows: int, vocab: int, width: int, dtype: torch.dtype, temperature: float, seed: int) -> None:
    hidden, weight, targets = problem(rows, vocab, width, dtype, seed)
    grad = torch.randn(rows, generator=torch.Generator().manual_seed(seed + 1))
    logprobs, entropies = token_logprobs(hidden, weight, targets, temperature)
    assert logprobs.dtype == entropies.dtype == torch.float32 and not entropies.requires_grad
    logprobs.backward(grad)

    h64, w64 = hidden.detach().double().requires_grad_(), weight.value.double().requires_grad_()
    log_p = (h64 @ w64.T / temperature).log_softmax(-1)
    wanted = log_p.gather(1, targets[:, None])[:, 0]
    dhidden, dweight = torch.autograd.grad(wanted, (h64, w64), grad.double(), retain_graph=True)
    with torch.no_grad():
        unit, p = STORE[dtype], log_p.exp()
        e = (width + 4) * E * float((h64.abs() @ w64.abs().T).max()) / temperature
        own = (vocab / 16 + 40) * E
        within(logprobs.detach(), wanted, 2 * e + own + 4 * E * wanted.abs())
        entropy = -(p * log_p).sum(-1)
        within(entropies, entropy, (2 * e + own) * (2 + (p * log_p.abs()).sum(-1)) * 2)
        hot = torch.zeros_like(p).scatter_(1, targets[:, None], 1.0)
        scale = grad.double()[:, None].abs() / temperature
        dlogits = scale * (p + hot)
        error = scale * ((2 * e + own + 8 * E * (1 + log_p.abs())) * p + 4 * E * hot) + 2 * unit * dlogits
        within(hidden.grad, dhidden, (error + vocab * E * dlogits) @ w64.abs() + unit * dhidden.abs())
        within(weight.grad, dweight, (error + (rows + 4) * E * dlogits).T @ h64.abs())


@settings(max_examples=20)
@given(
    rows=st.integers(1, 20),
    vocab=st.one_of(st.integers(2, 70), st.sampled_from([127, 128, 500])),
    width=st.integers(1, 40),
    temperature=st.sampled_from(TEMPERATURES),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(any_path, dtype, rows, vocab, width, temperature, seed):
    """A temperature forgotten in the gradient or applied twice, a target misplaced, entropy of other logits."""
    compare(rows, vocab, width, dtype, temperature, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_of_rows_and_columns(any_path, dtype):
    """At the seam of two chunks a row, a block of the vocabulary or a target is lost or counted twice."""
    compare(ROWS + 3, COLUMNS + 70, 8, dtype, 0.8, 0)


def test_a_temperature_that_is_a_whole_number(any_path):
    """A temperature of 1 or 2 that is no float is read as another number: log-probs are not finite."""
    hidden, weight, targets = problem(7, 90, 12, torch.float32, 4)
    for whole in (1, 2):
        got = token_logprobs(hidden, weight, targets, whole)
        wanted = token_logprobs(hidden, weight, targets, float(whole))
        assert all(same_bits(one.detach(), other.detach()) for one, other in zip(got, wanted, strict=True))


def test_rows_beside_do_not_enter(kernel_path):
    """Log-probs depend on how many rows are scored together."""
    hidden, weight, targets = problem(40, 300, 24, torch.bfloat16, 2)
    with torch.no_grad():
        whole = token_logprobs(hidden, weight, targets, 0.9)
        for some in (slice(11, 12), slice(3, 30)):
            part = token_logprobs(hidden[some], weight, targets[some], 0.9)
            assert all(same_bits(got, wanted[some]) for got, wanted in zip(part, whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_computed_again(kernel_path, monkeypatch, dtype):
    """Where the forward pass keeps too little room, a slab's rows get another slab's targets, sets or gradient."""
    rows, vocab = 75, 600
    sets = tuple(np.arange(row % 3, vocab, 3, dtype=np.uint32).tobytes() if row % 4 else b"" for row in range(rows))
    results = []
    for room in (logprob.KEPT_BYTES, 0):
        monkeypatch.setattr(logprob, "KEPT_BYTES", room)
        monkeypatch.setattr(logprob, "SLAB", 32)
        hidden, weight, _ = problem(rows, vocab, 48, dtype, 7)
        targets = torch.arange(rows) % 3 + 3 * (torch.arange(rows) % 7)
        logprobs, _ = token_logprobs(hidden, weight, targets, 0.8, sets)
        logprobs.backward(torch.arange(rows) / rows - 0.4)
        results.append((logprobs.detach(), hidden.grad, weight.grad))
    for got, wanted in zip(results[1][:2], results[0][:2], strict=True):
        assert same_bits(got, wanted)
    gap = (results[1][2] - results[0][2]).abs()
    assert bool((gap <= (rows + 4) * E * 2 * rows * float(hidden.detach().abs().max())).all())


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_samplers_bits(kernel_path, dtype, temperature):
    """The learner's log-prob of a token differs from the one the sampler reported, with or without gradients."""
    hidden, weight, targets = problem(30, 400, 24, dtype, 3)
    with torch.no_grad():
        sampled = sample.token_logprobs(logits(hidden, weight), targets, torch.full((30,), temperature))
        assert same_bits(token_logprobs(hidden, weight, targets, temperature)[0], sampled)
    assert same_bits(token_logprobs(hidden, weight, targets, temperature)[0].detach(), sampled)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made within it has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_never_all_logits(any_path, monkeypatch):
    """Rows x vocabulary of logits held at once: memory grows with the product of batch and vocabulary, without end."""
    rows, vocab, width = 512, 8192, 4
    monkeypatch.setattr(logprob, "KEPT_BYTES", 1 << 20)
    monkeypatch.setattr(logprob, "SLAB", 64)
    hidden, weight, targets = problem(rows, vocab, width, torch.float32, 4)
    with Largest() as largest:
        token_logprobs(hidden, weight, targets, 1.0)[0].sum().backward()
    assert 64 * vocab <= largest.numel <= rows * vocab // 2


def test_reference_in_fp64():
    """The reference beside the kernel computes another distribution."""
    hidden, weight, targets = problem(6, 9, 5, torch.float32, 5)
    h64, w64 = hidden.detach().double(), weight.value.double()
    logprobs, entropies = logprob_reference(h64, w64, targets, 0.5)
    distribution = torch.distributions.Categorical(logits=2 * h64 @ w64.T)
    torch.testing.assert_close(logprobs, distribution.log_prob(targets), atol=1e-12, rtol=0)
    torch.testing.assert_close(entropies, distribution.entropy(), atol=1e-12, rtol=0)
