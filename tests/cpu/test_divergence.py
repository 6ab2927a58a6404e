"""Divergences of two models' distributions and their gradients, against brute force in fp64 and by hand.

The kernel's probabilities err by the logits' rounding, some E = 2^-24 times their size; the gradient at the logits is
rounded to the compute dtype (U) where it is kept and where it is scaled, then summed over V or N.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandem.kernels import divergence as kernel
from tandem.kernels.divergence import (
    KINDS,
    Divergence,
    Head,
    chosen_logits,
    divergence_reference,
    head_divergence,
    top_logprobs,
)
from tandem.kernels.logprob import token_logprobs
from tandem.kernels.weight import Weight
from tandem.numerics.compare import same_bits

DTYPES = [torch.float32, torch.bfloat16]
UNIT = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7}  # of a gradient, beside its largest terms


def head(rows: int, vocab: int, width: int, dtype: torch.dtype, seed: int) -> Head:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = Weight((torch.randn(vocab, width, generator=generator) / width**0.5 * 2).to(dtype), matrix=True)
    weight.grad = torch.zeros(vocab, width)
    return Head(hidden, weight)


def brute(kind: str, a: float, logp: Tensor, logq: Tensor) -> Tensor:
    """[N], from the definitions, in terms of KL(x, y) alone."""
    p, q = logp.exp(), logq.exp()

    def kl(x: Tensor, logy: Tensor) -> Tensor:
        return (x * (x.log() - logy)).sum(-1)

    if kind == "forward":
        return kl(q, logp)
    if kind == "reverse":
        return kl(p, logq)
    if kind == "jensen_shannon":
        mixed = (a * q + (1 - a) * p).log()
        return a * kl(q, mixed) + (1 - a) * kl(p, mixed)
    if kind == "skewed_forward":
        return kl(q, (a * q + (1 - a) * p).log())
    return kl(p, (a * p + (1 - a) * q).log())


def compare(rows: int, vocab: int, widths: tuple[int, int], dtype: torch.dtype, how: Divergence, seed: int) -> None:
    student, teacher = head(rows, vocab, widths[0], dtype, seed), head(rows, vocab, widths[1], dtype, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    targets, grad = torch.randint(vocab, (rows,), generator=generator), torch.randn(rows, generator=generator)
    hidden = student.hidden_NM.clone().requires_grad_()
    found = head_divergence(Head(hidden, student.weight), teacher, targets, how)
    found.loss_N.backward(grad)

    h64, w64 = hidden.detach().double().requires_grad_(), student.weight.value.double().requires_grad_()
    logp = (h64 @ w64.T / how.temperature).log_softmax(-1)
    logq = (teacher.hidden_NM.double() @ teacher.weight.value.double().T / how.temperature).log_softmax(-1)
    wanted = brute(how.kind, how.mix, logp, logq)
    torch.testing.assert_close(found.divergence_N.double(), wanted.detach(), rtol=2e-5, atol=2e-5)
    wanted = wanted - how.text * logp.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.loss_N.detach().double(), wanted.detach(), rtol=2e-5, atol=2e-5)
    for got, log in ((found.logprobs_N, logp), (found.teacher_logprobs_N, logq)):
        torch.testing.assert_close(got.double(), log.gather(1, targets[:, None])[:, 0].detach(), rtol=2e-5, atol=2e-5)
    entropy = -(logp.exp() * logp).sum(-1).detach()
    torch.testing.assert_close(found.entropy_N.double(), entropy, rtol=2e-5, atol=2e-5)
    assert not any(one.requires_grad for one in found[1:]) and float(teacher.weight.grad.abs().max()) == 0.0
    dlogits = torch.autograd.grad(wanted, logp, grad.double(), retain_graph=True)[0].abs()
    dhidden, dweight = torch.autograd.grad(wanted, (h64, w64), grad.double())
    scale = (dlogits + logp.exp().detach() * dlogits.sum(-1, keepdim=True)) / how.temperature
    sizes = (one.hidden_NM.double().abs() @ one.weight.value.double().abs().T for one in (student, teacher))
    largest = max(float(size.max()) for size in sizes)
    unit = UNIT[dtype] + 8 * (max(widths) + 4) * 2.0**-24 * largest / how.temperature  # of rounded logits
    close(hidden.grad, dhidden, unit * (scale @ w64.detach().abs() + dhidden.abs()))
    close(student.weight.grad, dweight, unit * (scale.T @ h64.detach().abs()))


def close(got: Tensor | None, wanted: Tensor, bound: Tensor) -> None:
    assert got is not None
    excess = (got.double() - wanted).abs() - bound - 1e-6
    assert bool((excess <= 0).all()), (float(excess.max()), float(bound.max()))


@settings(max_examples=12)
@given(
    shape=st.tuples(st.integers(1, 20), st.one_of(st.integers(2, 70), st.sampled_from([255, 256, 600]))),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    how=st.tuples(st.sampled_from([0.1, 0.5, 0.9]), st.sampled_from([1.0, 0.7, 2.0]), st.sampled_from([0.0, 0.5, 3.0])),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(any_path, dtype, kind, shape, widths, how, seed):
    """Student and teacher change places, a temperature is forgotten in a gradient, a mixture's share is the other's, or
    the texts' own term is another token's."""
    compare(*shape, widths, dtype, Divergence(kind, *how), seed)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_rows(any_path, kind):
    """At the seam of two chunks a row is lost, or has another's target or gradient."""
    compare(kernel.ROWS + 3, 300, (8, 12), torch.float32, Divergence(kind, 0.3, 0.8), 5)


HALVES = math.log(0.5), math.log(0.5)
QUARTERS = math.log(0.75), math.log(0.25)
# p = (1/2, 1/2), q = (3/4, 1/4), a = 1/2, so m = (5/8, 3/8); the gradients at the two logits add to 0.
BY_HAND = {
    "forward": (0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.5 - 0.75),
    "reverse": (0.5 * math.log(2 / 3) + 0.5 * math.log(2), 0.25 * (math.log(2 / 3) - math.log(2))),
    "jensen_shannon": (
        0.5 * (0.75 * math.log(1.2) + 0.25 * math.log(2 / 3)) + 0.5 * (0.5 * math.log(0.8) + 0.5 * math.log(4 / 3)),
        0.125 * (math.log(0.8) - math.log(4 / 3)),
    ),
    "skewed_forward": (0.75 * math.log(1.2) + 0.25 * math.log(2 / 3), 0.25 * (-0.5 * 1.2 + 0.5 * 2 / 3)),
    "skewed_reverse": (
        0.5 * math.log(0.8) + 0.5 * math.log(4 / 3),
        0.25 * (math.log(0.8) - math.log(4 / 3) - 0.5 * (0.8 - 4 / 3)),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand(any_path, kind):
    """A formula is not the published one: two tokens, worked on paper."""
    weight, other = (Weight(torch.tensor([[log] for log in logs]), matrix=True) for logs in (HALVES, QUARTERS))
    weight.grad = torch.zeros(2, 1)
    hidden = torch.ones(1, 1, requires_grad=True)
    found = head_divergence(
        Head(hidden, weight), Head(torch.ones(1, 1), other), torch.zeros(1).long(), Divergence(kind)
    )
    found.loss_N.backward()
    value, slope = BY_HAND[kind]
    assert float(found.divergence_N.detach()) == pytest.approx(value, abs=1e-6)
    assert weight.grad[:, 0].tolist() == pytest.approx([slope, -slope], abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_hangs_on_the_chunks(kernel_path, monkeypatch, dtype):
    """A row's divergence has other bits in another chunk; or where the gradient is computed again, another gradient."""
    results = []
    for rows, kept in ((kernel.ROWS, 1 << 30), (7, 1 << 30), (kernel.ROWS, 0)):
        monkeypatch.setattr(kernel, "ROWS", rows)
        monkeypatch.setattr("tandem.kernels.logprob.KEPT_BYTES", kept)
        monkeypatch.setattr(kernel, "SLAB", 32)
        monkeypatch.setattr("tandem.kernels.logprob.SLAB", 32)
        student, teacher = head(75, 600, 48, dtype, 7), head(75, 600, 20, dtype, 8)
        hidden = student.hidden_NM.clone().requires_grad_()
        how = Divergence("jensen_shannon", 0.4, 1.3)
        found = head_divergence(Head(hidden, student.weight), teacher, torch.arange(75), how)
        found.loss_N.backward(torch.arange(75) / 75 - 0.4)
        results.append(([one.detach() for one in found], hidden.grad, student.weight.grad))
    for values, dhidden, dweight in results[1:]:
        assert all(same_bits(got, wanted) for got, wanted in zip(values, results[0][0], strict=True))
        assert same_bits(dhidden, results[0][1])
        torch.testing.assert_close(dweight, results[0][2], rtol=1e-4, atol=1e-5)


def test_never_all_logits(any_path, monkeypatch):
    """Rows x vocabulary of both models' logits are held at once."""
    made: list[int] = []
    taken = torch.empty

    def spied(*shape, **how):
        tensor = taken(*shape, **how)
        made.append(tensor.numel())
        return tensor

    rows, vocab = 512, 4096
    monkeypatch.setattr(kernel, "ROWS", 16)
    monkeypatch.setattr("tandem.kernels.logprob.KEPT_BYTES", 1 << 20)
    monkeypatch.setattr(kernel, "SLAB", 64)
    monkeypatch.setattr("tandem.kernels.logprob.SLAB", 64)
    monkeypatch.setattr(kernel, "large", lambda *shape, dtype: spied(*shape, dtype=dtype))
    from tests.cpu.test_logprob import Largest

    student, teacher = head(rows, vocab, 4, torch.float32, 4), head(rows, vocab, 4, torch.float32, 5)
    hidden = student.hidden_NM.clone().requires_grad_()
    with Largest() as largest:
        found = head_divergence(Head(hidden, student.weight), teacher, torch.zeros(rows).long(), Divergence())
        found.loss_N.sum().backward()
    assert 16 * vocab <= max(largest.numel, *made, 0) <= 64 * vocab


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_head(any_path, kind):
    """Rows of a head that only one of the two has are compared with nothing, or get a gradient."""
    student, teacher = head(5, 300, 16, torch.float32, 1), head(5, 270, 16, torch.float32, 2)
    hidden = student.hidden_NM.clone().requires_grad_()
    found = head_divergence(Head(hidden, student.weight), teacher, torch.arange(5), Divergence(kind, 0.3))
    found.loss_N.sum().backward()
    x, y = hidden.detach() @ student.weight.value[:270].T, teacher.hidden_NM @ teacher.weight.value.T
    wanted = divergence_reference(x.double(), y.double(), Divergence(kind, 0.3))
    torch.testing.assert_close(found.divergence_N.detach().double(), wanted, rtol=2e-5, atol=2e-5)
    grad = student.weight.grad
    assert grad is not None and float(grad[:270].abs().max()) > 0 and float(grad[270:].abs().max()) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_distributions_far_apart(any_path, kind):
    """A probability that is 0 in fp32 makes a divergence or a gradient NaN."""
    student, teacher = head(4, 300, 8, torch.float32, 1), head(4, 300, 8, torch.float32, 2)
    hidden = (student.hidden_NM * 300).requires_grad_()
    far = Head(teacher.hidden_NM * 300, teacher.weight)
    found = head_divergence(Head(hidden, student.weight), far, torch.arange(4), Divergence(kind, 0.3))
    found.loss_N.sum().backward()
    logits = hidden.detach().double() @ student.weight.value.double().T
    wanted = divergence_reference(logits, far.hidden_NM.double() @ far.weight.value.double().T, Divergence(kind, 0.3))
    torch.testing.assert_close(found.divergence_N.detach().double(), wanted, rtol=1e-4, atol=1e-4)
    assert bool(hidden.grad.isfinite().all()) and bool(student.weight.grad.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_chosen_tokens(any_path, monkeypatch, dtype):
    """A chosen token's logit, or its gradient, is another's; a token that is chosen twice counts once."""
    monkeypatch.setattr(kernel, "ROWS", 4)
    student = head(9, 50, 12, dtype, 3)
    ids = torch.randint(50, (9, 6), generator=torch.Generator().manual_seed(1))
    ids[:, 1] = ids[:, 0]
    hidden = student.hidden_NM.clone().requires_grad_()
    got = chosen_logits(hidden, student.weight, ids)
    grad = torch.randn(9, 6, generator=torch.Generator().manual_seed(2))
    got.backward(grad)
    h64, w64 = hidden.detach().double().requires_grad_(), student.weight.value.double().requires_grad_()
    wanted = (h64 @ w64.T).gather(1, ids)
    wanted.backward(grad.double())
    torch.testing.assert_close(got.detach().double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    unit = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(hidden.grad.double(), h64.grad, rtol=unit, atol=unit)
    torch.testing.assert_close(student.weight.grad.double(), w64.grad, rtol=1e-5, atol=1e-5)


def test_top_tokens(any_path, monkeypatch):
    """The most likely tokens are others, or their log-probs are those of a softmax over the chosen alone."""
    monkeypatch.setattr(kernel, "ROWS", 4)
    one = head(9, 60, 12, torch.float32, 3)
    ids, logprobs = top_logprobs(one, 5, 0.7, 50)
    assert ids.shape == (9, 5) and int(ids.max()) < 50
    cut = Weight(one.weight.value[:50], matrix=True)
    for k in range(5):
        own, _ = token_logprobs(one.hidden_NM, cut, ids[:, k].contiguous(), 0.7)
        torch.testing.assert_close(logprobs[:, k], own, rtol=1e-5, atol=1e-5)
    whole = (one.hidden_NM @ cut.value.T).sort(-1, descending=True).indices
    assert torch.equal(whole[:, :5], ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_top_tokens_of_many_blocks(any_path, dtype):
    """A block whose tokens are among the likeliest is passed over, equals come in no order, or a row has another's."""
    generator = torch.Generator().manual_seed(1)
    rows, vocab, width = kernel.ROWS + 5, 1500, 7
    hidden = torch.randint(-3, 4, (rows, width), generator=generator).to(dtype)  # small whole numbers: exact, with ties
    weight = Weight(torch.randint(-3, 4, (vocab, width), generator=generator).to(dtype), matrix=True)
    logits = hidden.double() @ weight.value.double().T
    for count, among in ((1, vocab), (40, 1300), (300, vocab), (vocab, vocab)):
        ids, logprobs = top_logprobs(Head(hidden, weight), count, 0.5, among)
        x = logits[:, :among] / 0.5
        wanted = x.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        assert torch.equal(ids, wanted)
        torch.testing.assert_close(logprobs.double(), x.log_softmax(-1).gather(1, wanted), rtol=1e-5, atol=1e-5)
    ids, logprobs = top_logprobs(Head(hidden[:0], weight), 3, 1.0, vocab)
    assert ids.shape == logprobs.shape == (0, 3)
