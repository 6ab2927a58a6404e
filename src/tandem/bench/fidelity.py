"""How far a model is from the one that it was made of, on texts: perplexity, KL, and how often both say the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tandem.kernels.divergence import Divergence, Head, head_divergence
from tandem.kernels.linear import logits
from tandem.models.decoder import Decoder
from tandem.models.view import PackView
from tandem.numerics.interval import Z_95, clustered_error

ROWS = 256  # whose logits are in memory at once


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Of a student, over the predicted tokens of all texts; errors are half of 95 % intervals, texts being clusters."""

    perplexity: float
    teacher_perplexity: float
    kl: float  # nats a token, of the teacher from the student
    kl_error: float
    nll_rise: float  # nats a token
    nll_rise_error: float
    same_top: float  # share of tokens that both find likeliest
    tokens: int


def fidelity(student: Decoder, teacher: Decoder, texts: Sequence[Sequence[int]]) -> Fidelity:
    """Each text from its first position on; texts of fewer than two tokens count nothing."""
    kl, rise, nll, counts, same = list[float](), list[float](), list[float](), list[int](), 0
    for text in (one for one in texts if len(one) > 1):
        tokens_T = torch.tensor(text)
        with torch.no_grad():
            heads = []
            for decoder in (student, teacher):
                hidden_TM = decoder.forward(tokens_T, PackView([0, len(text)]))[:-1]
                heads.append(Head(hidden_TM, decoder.head))
            found = head_divergence(heads[0], heads[1], tokens_T[1:], Divergence("forward"))
            for start in range(0, len(text) - 1, ROWS):
                rows = slice(start, start + ROWS)
                tops = [logits(head.hidden_NM[rows].contiguous(), head.weight).argmax(-1) for head in heads]
                same += int((tops[0] == tops[1]).sum())
        kl.append(float(found.divergence_N.double().sum()))
        nll.append(float(-found.teacher_logprobs_N.double().sum()))
        rise.append(float((found.teacher_logprobs_N.double() - found.logprobs_N.double()).sum()))
        counts.append(len(text) - 1)
    total = sum(counts)
    base, risen = sum(nll) / total, sum(rise) / total
    return Fidelity(
        math.exp(base + risen),
        math.exp(base),
        sum(kl) / total,
        Z_95 * (clustered_error(kl, counts) or math.nan),
        risen,
        Z_95 * (clustered_error(rise, counts) or math.nan),
        same / total,
        total,
    )
