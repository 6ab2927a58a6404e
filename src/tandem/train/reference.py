"""Log-probs under a frozen reference policy, for a KL term."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tandem.algo.pack import PromptTotal, pack
from tandem.models.decoder import Decoder
from tandem.train.step import score
from tandem.types import Sample


def with_reference(
    decoder: Decoder, samples: Sequence[Sample], prompts: Sequence[PromptTotal], budget_tokens: int, temperature: float
) -> tuple[Sample, ...]:
    """The samples with `reference_logprobs` [T] of the trained tokens (0.0 elsewhere), by `decoder`'s forward pass."""
    found: dict[str, list[float]] = {}
    for microbatch in pack(samples, prompts, budget_tokens):
        logprobs = score(decoder, microbatch, temperature).tolist()
        for index, logprob in zip(microbatch.sample_N, logprobs, strict=True):
            found.setdefault(microbatch.sample_ids[index], []).append(logprob)
    scored = []
    for sample in samples:
        values = iter(found[sample.id])
        # Predictions are in order of position; the first token of a context is never predicted.
        row = [next(values) if trained and t > 0 else 0.0 for t, trained in enumerate(sample.loss_mask)]
        scored.append(dataclasses.replace(sample, reference_logprobs=tuple(row)))
    return tuple(scored)
