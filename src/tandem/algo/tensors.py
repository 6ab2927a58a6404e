"""Microbatch to tensors: the crossing from plain values to torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.types import Denominators, Microbatch


@dataclass(frozen=True, slots=True)
class MicrobatchTensors:
    """A microbatch on a device. Loss fields are fp64: N numbers cost nothing beside N x V logits.

    `paths_S` stay plain: a view of keys and values lays them out as its kernel wants them.
    """

    tokens_T: Tensor  # int64
    positions_T: Tensor  # int64
    segments_S: Tensor  # int64, S+1 boundaries
    paths_S: tuple[tuple[int, ...], ...]
    rows_N: Tensor  # int64
    targets_N: Tensor  # int64
    sample_N: Tensor  # int64, non-decreasing: the predictions of a sample are contiguous
    advantages_N: Tensor
    logprobs_N: Tensor  # behaviour, nats
    weights_N: Tensor
    reference_logprobs_N: Tensor | None
    sample_tokens: Tensor  # int64, one a sample: its predictions
    prompt_tokens: Tensor  # int64, one a sample: predictions of its prompt in the whole batch
    denominators: Denominators
    proximal_logprobs_N: Tensor | None = None  # the learner's before the step's first update, where they were scored
    source_logprobs_N: Tensor | None = None  # the learner's under the weights that sampled, where these are older
    unfiltered_logprobs_N: Tensor | None = None  # behaviour before top-k, top-p and min-p, where one of them was on


def to_tensors(microbatch: Microbatch, device: torch.device | str = "cpu") -> MicrobatchTensors:
    """Integers as int64, loss fields as fp64 (exact for log-probs that were fp32 or narrower)."""

    def integers(values: tuple[int, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def floats(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    def optional(values: tuple[float, ...] | None) -> Tensor | None:
        return None if values is None else floats(values)

    expected = tuple(index for index, count in enumerate(microbatch.sample_tokens) for _ in range(count))
    assert microbatch.sample_N == expected, "the predictions of a sample must be whole and contiguous"
    return MicrobatchTensors(
        tokens_T=integers(microbatch.tokens_T),
        positions_T=integers(microbatch.positions_T),
        segments_S=integers(microbatch.segments_S),
        paths_S=microbatch.paths_S,
        rows_N=integers(microbatch.rows_N),
        targets_N=integers(microbatch.targets_N),
        sample_N=integers(microbatch.sample_N),
        advantages_N=floats(microbatch.advantages_N),
        logprobs_N=floats(microbatch.logprobs_N),
        weights_N=floats(microbatch.weights_N),
        reference_logprobs_N=optional(microbatch.reference_logprobs_N),
        sample_tokens=integers(microbatch.sample_tokens),
        prompt_tokens=integers(microbatch.prompt_tokens),
        denominators=microbatch.denominators,
        proximal_logprobs_N=optional(microbatch.proximal_logprobs_N),
        source_logprobs_N=optional(microbatch.source_logprobs_N),
        unfiltered_logprobs_N=optional(microbatch.unfiltered_logprobs_N),
    )
