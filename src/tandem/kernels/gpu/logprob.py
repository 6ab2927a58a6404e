"""Log-probs and entropies of given tokens from hidden states, ROWS rows of logits at a time.

The product and the log-sum-exp are the sampler's own kernels, so a learner's log-prob has the engine's bits. Backward:
the logits again, COLUMNS of the vocabulary at a time.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tandem.kernels.gpu.linear import accumulate, product, wide_product
from tandem.kernels.gpu.sample import statistics
from tandem.kernels.weight import Weight

ROWS = 512  # x 151,936 fp32 logits = 311 MB
COLUMNS = 8192


class Restriction(Protocol):
    """The tokens that each row's distribution is over."""

    def restrict(self, logits_SV: Tensor, row: int, first: int) -> Tensor:
        """-infinity, in place, outside; `logits_SV` begins at row `row` and at token `first`."""
        ...


def _forward(
    hidden_NM: Tensor, weight: Weight, targets_N: Tensor, temperature: float, kept: Restriction | None
) -> tuple[Tensor, Tensor, Tensor]:
    parts = []
    for start in range(0, hidden_NM.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        logits_SV = product(hidden_NM[rows], weight.value, out_dtype=torch.float32)
        if kept is not None:
            logits_SV = kept.restrict(logits_SV, start, 0)
        temperature_S = torch.full((logits_SV.shape[0],), temperature, device=logits_SV.device)
        lse_S, entropy_S = statistics(logits_SV, temperature_S)
        target_S = logits_SV.gather(1, targets_N[rows, None])[:, 0] / temperature_S
        parts.append((target_S - lse_S, entropy_S, lse_S))
    logprobs, entropies, lse = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return logprobs, entropies, lse


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NM, weight, targets_N, temperature, kept):  # type: ignore[no-untyped-def]
        logprobs_N, entropy_N, lse_N = _forward(hidden_NM, weight, targets_N, temperature, kept)
        ctx.save_for_backward(hidden_NM, targets_N, lse_N)
        ctx.weight, ctx.temperature, ctx.kept = weight, temperature, kept
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx, grad_N, _entropy):  # type: ignore[no-untyped-def]
        hidden_NM, targets_N, lse_N = ctx.saved_tensors
        weight, temperature = ctx.weight, ctx.temperature
        dhidden_NM = torch.zeros(hidden_NM.shape, device=hidden_NM.device)
        for first in range(0, weight.value.shape[0], COLUMNS):
            block_VM = weight.value[first : first + COLUMNS]
            logits_NV = wide_product(hidden_NM, block_VM.T)
            if ctx.kept is not None:
                logits_NV = ctx.kept.restrict(logits_NV, 0, first)
            tokens_V = torch.arange(first, first + block_VM.shape[0], device=hidden_NM.device)
            hot_NV = (tokens_V == targets_N[:, None]).float()
            share_NV = (logits_NV / temperature - lse_N[:, None]).exp()
            dlogits_NV = (grad_N[:, None].float() / temperature * (hot_NV - share_NV)).to(hidden_NM.dtype)
            dhidden_NM += wide_product(dlogits_NV, block_VM)
            if weight.grad is not None:
                accumulate(weight.grad[first : first + COLUMNS], dlogits_NV, hidden_NM)
        return dhidden_NM.to(hidden_NM.dtype), None, None, None, None


def token_logprobs(
    hidden_NM: Tensor, weight: Weight, targets_N: Tensor, temperature: float, kept: Restriction | None = None
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden W^T / temperature)[target] and the entropy, each [N] fp32, nats.

    The log-probs are differentiable (the weight's gradient goes to `weight.grad`); the entropies are measured only.
    """
    if torch.is_grad_enabled() and hidden_NM.requires_grad:
        return _LogProb.apply(hidden_NM.contiguous(), weight, targets_N, temperature, kept)
    return _forward(hidden_NM.contiguous(), weight, targets_N, temperature, kept)[:2]
