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

from tandem.kernels.adamw import Hyper, adamw, grad_norm
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
