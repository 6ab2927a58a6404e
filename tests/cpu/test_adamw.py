"""AdamW against torch.optim.AdamW, the copy in the compute dtype, and the norm of all gradients.

Tolerance: one update has fewer than 16 roundings of E = 2^-24, each relative to the update or, in the last sum, to the
weight; the moments' errors are relative (no cancellation in the second; in the first, relative to the sum of the
magnitudes of past gradients). After n updates of size at most lr / (1 - beta1): n E |w| + 16 n E lr / (1 - beta1).
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.kernels.adamw import Few, Hyper, adamw, adamw_few, adamw_few_reference, few_of, grad_norm
from tandem.numerics.compare import same_bits

E = 2.0**-24


@settings(max_examples=20)
@given(
    size=st.one_of(st.integers(1, 40), st.just(1000)),
    betas=st.sampled_from([(0.9, 0.999), (0.8, 0.95), (0.0, 0.99)]),
    decay=st.sampled_from([0.0, 0.1]),
    clip=st.sampled_from([1.0, 0.125]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_torch(any_path, dtype, size, betas, decay, clip, seed):
    """A bias correction left out or off by a step, eps inside the root, decay of the gradient, clipping too late."""
    generator = torch.Generator().manual_seed(seed)
    master = torch.randn(size, generator=generator)
    first, second, value = torch.zeros(size), torch.zeros(size), torch.empty(size, dtype=dtype)
    parameter = torch.nn.Parameter(master.double())
    lr, eps, steps = 1e-2, 1e-6, 5
    peer = torch.optim.AdamW([parameter], lr=lr, betas=betas, eps=eps, weight_decay=decay)
    for step in range(1, steps + 1):
        grad = torch.randn(size, generator=generator)
        parameter.grad = grad.double() * clip
        peer.step()
        kept = grad.clone()
        adamw(master, first, second, grad, value, Hyper(lr, *betas, eps, decay, step, clip))
        assert same_bits(grad, kept)
        assert same_bits(value, master.to(dtype))
    state = peer.state[parameter]
    # beta and 1 - beta are fp32 constants: 1 - 0.999 has a relative error of 2^-25 / 0.001.
    constant = E / (1 - betas[1])
    torch.testing.assert_close(second.double(), state["exp_avg_sq"], atol=0, rtol=constant + 16 * steps * E)
    wanted = parameter.detach()
    bound = steps * (2 * E * (wanted.abs() + 0.1) + (16 * E + constant) * lr / (1 - betas[0]))
    assert bool(((master.double() - wanted).abs() <= bound).all()), ((master.double() - wanted).abs() / bound).max()


@pytest.mark.parametrize("sizes", [[1], [3, 70_000], [65_536, 65_537, 5]])
def test_norm_of_all_gradients(any_path, sizes):
    """A tensor, a chunk or its last elements left out of the norm that clips."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(size, generator=generator) for size in sizes]
    grads[-1][-1] = 50.0
    wanted = torch.cat(grads).double().norm().item()
    assert grad_norm(grads) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_norm_tells_what_is_not_finite(any_path, value):
    """A gradient that is not finite passes the check before the optimiser."""
    grads = [torch.zeros(9), torch.ones(70_000)]
    grads[1][-1] = value
    assert not math.isfinite(grad_norm(grads))


def test_norm_beyond_fp32(any_path):
    """Squares overflow in fp32 where every gradient is finite."""
    assert grad_norm([torch.full((4,), 1e30)]) == pytest.approx(2e30, rel=1e-6)


def updated(
    eights: bool, masters: bool, reference: bool, steps: int = 12, size: int = 2500
) -> tuple[Few, torch.Tensor]:
    """After updates by gradients of far sizes."""
    draw = torch.Generator().manual_seed(4)
    value = torch.randn(size, generator=draw).bfloat16()
    state = few_of(value, eights=eights, masters=masters)
    for step in range(1, steps + 1):
        grad = torch.randn(size, generator=draw) * torch.logspace(-7, 1, size)
        hyper = Hyper(1e-3, 0.9, 0.99, 1e-8, 0.1, step, 0.5)
        (adamw_few_reference if reference else adamw_few)(state, grad, value, hyper, 2**40 + 9)
    return state, value


@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("eights", [True, False])
def test_a_state_of_fewer_bits_is_the_rule(any_path, eights: bool, masters: bool) -> None:
    """A scale of another block, a word of another number or update, a lost sign, a rounding that is not drawn."""
    (ours, value), (wanted, other) = updated(eights, masters, False), updated(eights, masters, True)
    assert (ours.master is value) is not masters
    apart = (value != other).float().mean()  # a sum that another order of operations moves over an edge
    assert float(apart) < 2e-3 and torch.allclose(value.float(), other.float(), rtol=2**-6, atol=1e-4)
    for got, right in zip(ours[1:3], wanted[1:3], strict=True):
        if eights:
            assert float((got != right).float().mean()) < 2e-3 and int((got.int() - right.int()).abs().max()) <= 1
        else:
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-7)
    exact, _ = updated(False, True, True)
    if eights:
        assert ours.first_scales is not None and ours.second_scales is not None
        held = ours.first.view(torch.float8_e4m3fn).float() * ours.first_scales.repeat_interleave(1024)[:2500]
        roots = ours.second.view(torch.float8_e4m3fn).float() * ours.second_scales.repeat_interleave(1024)[:2500]
        for own, right in ((held, exact.first), (roots, exact.second.sqrt())):
            assert float((own - right).norm() / right.norm()) < 0.2


def test_a_drawn_rounding_is_right_on_the_mean() -> None:
    """A moment, or a weight, that stands still because each step is less than half of a code."""
    for eights, masters in ((True, True), (False, False)):
        value = torch.full((4096,), 1.0).bfloat16()
        state = few_of(value, eights=eights, masters=masters)
        for step in range(1, 101):  # with gradients of one size an update is the rate: a fortieth of a bf16 code
            adamw_few(state, torch.ones(4096), value, Hyper(1e-4, 0.9, 0.99, 0.0, 0.0, step), 3)
        mean = float((state.master.float() if masters else value.float()).mean())
        assert abs((1 - mean) - 100 * 1e-4) < 5e-4, (eights, masters, mean)


def test_a_small_second_moment_is_not_lost(any_path) -> None:
    """A root that is rounded to zero beside a large one of its block: the next update is hundreds of rates."""
    draw = torch.Generator().manual_seed(0)
    value = torch.zeros(4096).bfloat16()
    state, lr, most = few_of(value, eights=True, masters=True), 1e-3, 0.0
    for step in range(1, 41):
        grad = torch.randn(4096, generator=draw) * 1e-6
        grad[::1024] = 1.0
        grad[::2] *= step < 20  # of tokens that come no more
        before = state.master.clone()
        adamw_few(state, grad, value, Hyper(lr, 0.9, 0.99, 1e-8, 0.0, step), 7)
        most = max(most, float((state.master - before).abs().max()) / lr)
    assert most < 4, most
    untouched = few_of(value, eights=True, masters=True)
    adamw_few(untouched, torch.zeros(4096), value, Hyper(lr, 0.9, 0.99, 1e-8, 0.0, 1), 7)
    assert not untouched.second.any()
