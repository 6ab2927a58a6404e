"""Log-probs and entropies of given tokens from hidden states, never holding all rows x vocabulary of logits.

Forward: ROWS rows at a time against the whole vocabulary, with the reduction that the sampler uses, so that the
learner's log-prob of a sampled token has the engine's bits. Backward: the logits again, COLUMNS of the
vocabulary at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.kernels.build import kernel
from tandem.kernels.linear import accumulate, linear_reference, logits, pack_transposed, product
from tandem.kernels.sample import entropy, log_sum_exp
from tandem.kernels.weight import PANEL, Weight, padded

ROWS = 128  # x 49,152 fp32 logits = 25 MB
COLUMNS = 4096  # of the vocabulary; a multiple of PANEL


def logprob_reference(
    hidden_NM: Tensor, weight_VM: Tensor, targets_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """All logits at once; differentiable in both inputs. Returns log-probs and entropies [N]."""
    wide = hidden_NM.dtype if hidden_NM.dtype == torch.float64 else torch.float32
    logprobs_NV = (hidden_NM.to(wide) @ weight_VM.to(wide).T / temperature).log_softmax(-1)
    return logprobs_NV.gather(1, targets_N[:, None])[:, 0], -(logprobs_NV.exp() * logprobs_NV).sum(-1)


def _forward(hidden_NM: Tensor, weight: Weight, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    parts = []
    for start in range(0, hidden_NM.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        logits_SV = logits(hidden_NM[rows], weight)
        temperature_S = torch.full((logits_SV.shape[0],), temperature)
        lse_S = log_sum_exp(logits_SV, temperature_S)
        target_S = logits_SV.gather(1, targets_N[rows, None])[:, 0] / temperature_S
        parts.append((target_S - lse_S, entropy(logits_SV, temperature_S), lse_S))
    logprobs, entropies, lse = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return logprobs, entropies, lse


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NM, weight, targets_N, temperature):  # type: ignore[no-untyped-def]
        logprobs_N, entropy_N, lse_N = _forward(hidden_NM, weight, targets_N, temperature)
        ctx.save_for_backward(hidden_NM, targets_N, lse_N)
        ctx.weight, ctx.temperature = weight, temperature
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx, grad_N, _entropy):  # type: ignore[no-untyped-def]
        hidden_NM, targets_N, lse_N = ctx.saved_tensors
        weight, dhidden_NM = ctx.weight, torch.zeros(hidden_NM.shape)
        grad_N = grad_N.float().contiguous()
        for first in range(0, weight.value.shape[0], COLUMNS):
            block_VM = weight.value[first : first + COLUMNS]
            dlogits_NV = _dlogits(hidden_NM, weight, first, (targets_N, lse_N, grad_N), ctx.temperature)
            if weight.packed is None:
                dhidden_NM += dlogits_NV.float() @ block_VM.float()
            else:
                width = hidden_NM.shape[1]
                dhidden_NM += product(dlogits_NV, pack_transposed(block_VM), width, out_dtype=torch.float32)
            if weight.grad is not None:
                accumulate(weight.grad[first : first + COLUMNS], dlogits_NV, hidden_NM)
        return dhidden_NM.to(hidden_NM.dtype), None, None, None


def _dlogits(
    hidden_NM: Tensor, weight: Weight, first: int, saved: tuple[Tensor, Tensor, Tensor], temperature: float
) -> Tensor:
    """Gradient at logits [first, first + COLUMNS), in hidden's dtype."""
    targets_N, lse_N, grad_N = saved
    block_VM = weight.value[first : first + COLUMNS]
    columns = block_VM.shape[0]
    run = kernel("logprob", "logprob_backward", hidden_NM.dtype, "pppppiiif")
    if run is None or weight.packed is None:
        logits_NV = linear_reference(hidden_NM, block_VM, out_dtype=torch.float32) / temperature
        hot_NV = torch.arange(first, first + columns) == targets_N[:, None]
        grad_NV = grad_N[:, None] / temperature * (hot_NV.float() - (logits_NV - lse_N[:, None]).exp())
        return grad_NV.to(hidden_NM.dtype)
    start = first // PANEL * PANEL * padded(weight.value.shape[1], hidden_NM.dtype)
    logits_NV = product(hidden_NM, weight.packed[start:], columns, out_dtype=torch.float32)
    out_NV = torch.empty(logits_NV.shape, dtype=hidden_NM.dtype)
    pointers = (t.data_ptr() for t in (logits_NV, lse_N, grad_N, targets_N, out_NV))
    run(*pointers, logits_NV.shape[0], columns, first, temperature)
    return out_NV


def token_logprobs(hidden_NM: Tensor, weight: Weight, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax(hidden W^T / temperature)[target] and the entropy, each [N] fp32, nats.

    The log-probs are differentiable (the weight's gradient goes to `weight.grad`); the entropies are measured only.
    """
    hidden_NM = hidden_NM.contiguous()
    if torch.is_grad_enabled() and hidden_NM.requires_grad:
        return _LogProb.apply(hidden_NM, weight, targets_N, temperature)
    return _forward(hidden_NM, weight, targets_N, temperature)[:2]
