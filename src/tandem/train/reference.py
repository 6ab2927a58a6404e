"""A decoder's log-probs of given samples: the forward pass of the learner, and passes that only score."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from tandem.algo.pack import SCORED, PromptTotal, pack
from tandem.kernels.address import check_range
from tandem.kernels.logprob import token_logprobs
from tandem.models.decoder import Decoder
from tandem.models.view import PackView
from tandem.types import Microbatch, Sample


def forward(
    decoder: Decoder, microbatch: Microbatch, temperature: float, checkpointing: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [N] of a microbatch's targets, among the tokens that the sampler had kept."""
    place = decoder.device
    for what, ids in (("tokens", microbatch.tokens_T), ("targets", microbatch.targets_N)):  # a device would read beyond
        check_range(torch.tensor(ids), decoder.spec.vocab_size, f"{what} of {', '.join(microbatch.sample_ids)}:")
    view = PackView(microbatch.positions_T, microbatch.segments_S, microbatch.paths_S, place)
    tokens_T = torch.tensor(microbatch.tokens_T, dtype=torch.int64, device=place)
    rows_N = torch.tensor(microbatch.rows_N, dtype=torch.int64, device=place)
    targets_N = torch.tensor(microbatch.targets_N, dtype=torch.int64, device=place)
    hidden_NM = decoder.forward(tokens_T, view, rows_N, checkpointing=checkpointing)
    return token_logprobs(hidden_NM, decoder.head, targets_N, temperature, kept=microbatch.kept_N)


def score(decoder: Decoder, microbatch: Microbatch, temperature: float) -> torch.Tensor:
    """Log-probs [N] of a microbatch's targets, without gradients."""
    with torch.no_grad():
        return forward(decoder, microbatch, temperature)[0]


def with_logprobs(
    name: str,
    decoder: Decoder,
    samples: Sequence[Sample],
    prompts: Sequence[PromptTotal],
    budget_tokens: int,
    temperature: float,
) -> tuple[Sample, ...]:
    """The samples with their field `name` [T] filled in for the trained tokens (0.0 elsewhere), by `decoder`.

    `name` is "reference_logprobs", "proximal_logprobs" or "source_logprobs".
    """
    assert name in SCORED, f"{name} is not one of {SCORED}"
    found: dict[str, list[float]] = {}
    for microbatch in pack(samples, prompts, budget_tokens):
        logprobs = score(decoder, microbatch, temperature).tolist()
        for index, logprob in zip(microbatch.sample_N, logprobs, strict=True):
            found.setdefault(microbatch.sample_ids[index], []).append(logprob)
    scored = []
    for sample in samples:
        values = iter(found[sample.id])
        # Predictions are in order of position; the first token of a context is never predicted.
        row = tuple(next(values) if trained and t > 0 else 0.0 for t, trained in enumerate(sample.loss_mask))
        scored.append(dataclasses.replace(sample, **{name: row}))  # type: ignore[arg-type]
    return tuple(scored)
