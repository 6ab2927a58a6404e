"""Drafts accepted by their probability (`engine.draft.verify=reject`), in place of by what is drawn.

A draft x that was drawn from q stands with probability min(1, p(x) / q(x)), p what `sample` draws from: after mask,
temperature, top-k, top-p and min-p. In the place of one that does not, a token is drawn from max(0, p - q). So a token
is distributed as p, whatever q is (Leviathan et al., 2211.17192; Chen et al., 2302.01318), on three conditions:

- q is what the draft was really drawn from, filters and all: `proposed` gives both.
- Proposal, acceptance and residual have noise of their own: streams of the request's counter-keyed noise.
- Whether a draft is offered does not hang on the draft itself, though it may on q and on those before it.

A draft of a drafter that gives no q was sure: q(x) = 1. It stands with p(x), else p without x is drawn from.

The log-prob of a token is that of p, with the bits of `sample`, whichever way it came. The text is a function of the
seed and of the drafts, where drafts that match (`verify=match`) leave it a function of the seed alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.kernels.sample import SamplingBatch, log_sum_exp, processed_logits, sample, token_logprobs
from tandem.numerics import random
from tandem.numerics.random import Stream

if TYPE_CHECKING:
    from tandem.engine.batch import Batch

NONE = -1  # in place of a row's draft


class Trials(NamedTuple):
    """Of S rows that draw, the drafts that they judge."""

    drafts_S: NDArray[np.int64]  # the draft of the position that the row draws; NONE: it has none
    places_S: NDArray[np.int64]  # where in `q_QV` is what it was drawn from; NONE: it was sure
    q_QV: Tensor  # fp32

    @staticmethod
    def of(batch: Batch) -> Trials | None:
        """None where drafts are matched, and no row judges."""
        if all(work.proposals is None for work in batch.works):
            return None
        drafts, places, q = list[int](), list[int](), [torch.empty(0, 0)]
        known = 0
        for work in batch.all_works:
            if not work.draws:
                continue
            drafts += [*work.tokens[len(work.tokens) - work.draws + 1 :], NONE]
            if work.proposals is None or isinstance(work.proposals, tuple):
                places += [NONE] * work.draws
            else:
                places += [*range(known, known + work.draws - 1), NONE]
                known += work.draws - 1
                q.append(work.proposals[: work.draws - 1])
        q_QV = torch.cat(q[1:]) if known else q[0]
        return Trials(np.array(drafts, dtype=np.int64), np.array(places, dtype=np.int64), q_QV)

    def rows(self, rows_N: NDArray[np.int64]) -> Trials:
        """The rows of these numbers, in their order."""
        return Trials(self.drafts_S[rows_N], self.places_S[rows_N], self.q_QV)


def judged(logits_SV: Tensor, batch: SamplingBatch, trials: Trials) -> tuple[Tensor, Tensor]:
    """`sample`, but a row with a draft gives the draft where it stands, else what takes its place. Raises as it.

    What takes the place of a draft is never the draft itself.
    """
    tokens_S, logprobs_S = sample(logits_SV, batch)
    rows_N = np.flatnonzero(trials.drafts_S != NONE)
    if not len(rows_N):
        return tokens_S, logprobs_S
    device, trying = logits_SV.device, batch.rows(rows_N)
    own_N = torch.from_numpy(rows_N).to(device)
    drafts_N = torch.from_numpy(trials.drafts_S[rows_N]).to(device)
    x_NV = processed_logits(logits_SV[own_N], trying)
    judged_N = drafts_N.clone()
    fails_N = torch.from_numpy(np.flatnonzero(~_stands(x_NV, drafts_N, trying, trials.rows(rows_N)))).to(device)
    if len(fails_N):
        rest_RV = _rest(x_NV[fails_N], trials.rows(rows_N[fails_N.cpu().numpy()]))
        some = (rest_RV > -torch.inf).any(1)  # else p is q but for rounding: the draft stands
        fails_N, rest_RV = fails_N[some], rest_RV[some]
    if len(fails_N):
        drawing = trying.rows(fails_N.cpu().numpy())
        judged_N[fails_N] = sample(rest_RV, _plain(drawing), Stream.RESIDUAL)[0]
    tokens_S[own_N], logprobs_S[own_N] = judged_N, token_logprobs(x_NV, judged_N)
    return tokens_S, logprobs_S


def proposed(logits_SV: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Drafts [S] (int64) and what they were drawn from [S, V] (fp32 probabilities), of a drafter's logits (fp32).

    batch: how the requests draw, at the positions of the drafts.
    """
    x_SV = processed_logits(logits_SV, batch)
    return sample(logits_SV, batch, Stream.PROPOSAL)[0], torch.softmax(x_SV, 1)


def _stands(x_NV: Tensor, drafts_N: Tensor, batch: SamplingBatch, trials: Trials) -> NDArray[np.bool_]:
    """Whether u q(x) < p(x), u uniform."""
    q_N, drawn_N = np.ones(len(batch)), trials.places_S != NONE
    if drawn_N.any():
        q_DV = trials.q_QV[torch.from_numpy(trials.places_S[drawn_N])]
        q_N[drawn_N] = q_DV.gather(1, torch.from_numpy(trials.drafts_S[drawn_N])[:, None].to(q_DV.device))[:, 0].cpu()
    p_N = token_logprobs(x_NV, drafts_N).double().exp().cpu().numpy()
    u_N = random.uniform(random.word_rows(batch.seeds_S, batch.positions_S, 1, Stream.ACCEPT)[:, 0])
    return u_N * q_N < p_N


def _rest(x_RV: Tensor, trials: Trials) -> Tensor:
    """log max(0, p - q) but for a constant a row, -infinity where it is 0; fp32."""
    rest_RV = x_RV.scatter(1, torch.from_numpy(trials.drafts_S)[:, None].to(x_RV.device), -torch.inf)
    drawn_D = np.flatnonzero(trials.places_S != NONE)
    if len(drawn_D):
        own_D = torch.from_numpy(drawn_D).to(x_RV.device)
        x_DV = x_RV[own_D]
        p_DV = (x_DV - log_sum_exp(x_DV)[:, None]).double().exp()
        q_DV = trials.q_QV[torch.from_numpy(trials.places_S[drawn_D])].to(x_RV.device).double()
        rest_RV[own_D] = (p_DV - q_DV).clamp_min(0).log().float()
    return rest_RV


def _plain(batch: SamplingBatch) -> SamplingBatch:
    """Rows that draw from all of their logits, with the same noise."""
    rows = len(batch)
    return SamplingBatch(
        np.ones(rows, np.float32),
        np.zeros(rows, np.int32),
        np.ones(rows),
        np.zeros(rows),
        batch.seeds_S,
        batch.positions_S,
        np.full(rows, b"", np.object_),
        np.zeros(rows, np.int32),
    )
