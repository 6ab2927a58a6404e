"""Products by torch's library: other bits than ours, and no more than rounding apart.

Tolerances: with U the unit of the compute dtype (2^-24 or 2^-8) and E = 2^-24, a product of depth K errs by at most
(K + 2) E sum |x||w| + U |y| on either side; a weight gradient is also rounded to the compute dtype before it is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tandem.errors import ConfigError
from tandem.kernels import library
from tandem.kernels.linear import linear
from tandem.kernels.logprob import token_logprobs
from tandem.kernels.weight import Weight
from tandem.models.config import ModelConfig
from tandem.models.decoder import Decoder
from tandem.models.view import PackView

E = 2.0**-24
UNIT = {torch.float32: E, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The library's way every time, whatever is faster; the operations that had the choice."""
    seen: set[str] = set()

    def theirs(operation: str, matrix: Tensor, rows: int, ways: tuple[Callable, ...], trial: Tensor) -> Callable:
        seen.add(operation)
        return ways[-1]

    monkeypatch.setattr(library, "fastest", theirs)
    yield seen


def within(got: Tensor, wanted: Tensor, bound: Tensor) -> None:
    excess = (got.double() - wanted.double()).abs() - bound - 1e-30
    assert bool((excess <= 0).all()), (excess.max().item(), bound.max().item())


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_agree(taken, dtype, rows, with_bias, with_residual):
    """The library's way forgets a bias or a residual, transposes, or overwrites a gradient it should add to."""
    width, columns, unit = 40, 70, UNIT[dtype]
    generator = torch.Generator().manual_seed(rows)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    value, x = drawn(columns, width), drawn(rows, width).requires_grad_()
    bias = Weight(drawn(columns), matrix=False) if with_bias else None
    residual = drawn(rows, columns) if with_residual else None
    weight = Weight(value, matrix=True)
    weight.library, weight.grad = True, torch.ones(columns, width)
    dy = drawn(rows, columns)
    kept = residual.clone() if residual is not None else None
    y = linear(x, weight, bias, residual)
    y.backward(dy)
    assert taken == {"forward", "input gradient", "weight gradient"} and x.grad is not None
    assert kept is None or torch.equal(kept, residual), "the residual is read, not written"

    x64, w64, dy64 = x.detach().double(), value.double(), dy.double()
    wanted = x64 @ w64.T + (bias.value.double() if bias is not None else 0.0)
    reach = (width + 3) * E * (x64.abs() @ w64.abs().T + 4) + 1.01 * unit * wanted.abs()
    if residual is not None:
        wanted = wanted + residual.double()
        reach = reach + 1.01 * unit * wanted.abs() + unit * reach
    within(y.detach(), wanted, reach)
    within(x.grad, dy64 @ w64, (columns + 3) * E * (dy64.abs() @ w64.abs()) + 1.01 * unit * (dy64 @ w64).abs())
    dw = dy64.T @ x64
    bound = (rows + 3) * E * (dy64.abs().T @ x64.abs() + 1) + 1.01 * unit * dw.abs() + E * (1 + dw).abs()
    within(weight.grad, 1 + dw, bound)


def learn(decoder: Decoder) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of a pack of two samples and all gradients of their sum."""
    for _, weight in decoder.weights():
        weight.grad = torch.zeros(weight.value.shape)
    tokens = [(7 * i * i + 3) % 97 for i in range(30)]
    view = PackView([0, 18, 30])
    hidden_NM = decoder.forward(torch.tensor(tokens), view)
    logprobs_N, _ = token_logprobs(hidden_NM, decoder.head, torch.tensor(tokens[1:] + [0]), 1.0)
    logprobs_N.sum().backward()
    grads = {name: weight.grad for name, weight in decoder.weights() if weight.grad is not None}
    return logprobs_N.detach(), grads


@pytest.mark.parametrize(("dtype", "unit"), [("float32", 2.0**-24), ("bfloat16", 2.0**-8)])
def test_a_decoder_learns_the_same_up_to_rounding(taken, make_decoder, dtype, unit):
    """A product of some layer is left to the library with the wrong matrix, or its gradient is lost.

    Some 40 independent roundings of relative size `unit` lie between embedding and gradient, each amplified by the gain
    of two layers, below 4 for these weights: sqrt(40) x 4 = 25 units of a tensor's norm.
    """
    exact = make_decoder(dtype)
    fast = Decoder(exact.spec, dtype, kernels="library").load(exact.export())
    assert all(weight.library for _, weight in fast.weights())
    assert not any(weight.library for _, weight in exact.weights())
    wanted, wanted_grads = learn(exact)
    assert not taken, "the exact decoder never asks the library"
    got, grads = learn(fast)
    assert taken == {"forward", "input gradient", "weight gradient"}
    assert float((got - wanted).norm()) <= 25 * unit * float(wanted.norm())
    assert grads.keys() == wanted_grads.keys()
    for name, grad in grads.items():
        assert float((grad - wanted_grads[name]).norm()) <= 25 * unit * float(wanted_grads[name].norm()), name


def test_the_faster_way_is_taken_and_remembered(monkeypatch):
    """The slower of the two, or a timing at every call."""
    monkeypatch.setattr(library, "_chosen", {})
    clock = [0.0]
    monkeypatch.setattr(library.time, "perf_counter", lambda: clock[0])
    calls: list[str] = []

    def way(name: str, seconds: float) -> Callable[[Tensor], str]:
        def run(_: Tensor) -> str:
            calls.append(name)
            clock[0] += seconds
            return name

        return run

    matrix, trial = torch.zeros(3, 4), torch.zeros(1)
    ways = (way("slow", 2.0), way("fast", 1.0))
    assert library.fastest("forward", matrix, 5, ways, trial)(trial) == "fast"
    assert calls == ["slow", "fast"] * library.TRIALS + ["fast"]
    swapped = (way("fast", 1.0), way("slow", 2.0))
    assert library.fastest("forward", matrix, 7, swapped, trial)(trial) == "slow", "5 and 7 rows share a choice"
    assert library.fastest("forward", matrix, 8, swapped, trial)(trial) == "fast", "8 rows have their own"


def test_a_trial_leaves_the_gradient_alone(monkeypatch):
    """Timing the two ways adds the product to the gradient once a trial."""
    monkeypatch.setattr(library, "_chosen", {})
    weight = Weight(torch.ones(3, 2), matrix=True)
    weight.library, weight.grad = True, torch.zeros(3, 2)
    linear(torch.ones(4, 2, requires_grad=True), weight).sum().backward()
    assert weight.grad.tolist() == [[4.0, 4.0]] * 3


def test_kernels_are_checked():
    """A misspelt name runs the exact kernels under the wrong label."""
    with pytest.raises(ConfigError, match=r"model\.kernels is 'fast'. Allowed: exact, library"):
        ModelConfig("m", kernels="fast")  # type: ignore[arg-type]
