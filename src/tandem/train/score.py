"""A decoder's log-probs of given samples: the forward pass of the learner, and passes that only score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from tandem.algo.objective import Outputs, Watch
from tandem.algo.pack import PromptTotal, pack
from tandem.algo.tensors import MicrobatchTensors, to_tensors
from tandem.kernels.address import check_range
from tandem.kernels.logprob import token_logprobs
from tandem.models.decoder import Decoder
from tandem.models.view import PackView
from tandem.types import Microbatch, Sample


def hidden_states(
    decoder: Decoder,
    microbatch: Microbatch,
    tensors: MicrobatchTensors,
    checkpointing: bool = False,
    watch: Watch | None = None,
) -> torch.Tensor:
    """[N, M], normed: what the head reads to predict a microbatch's targets."""
    for what, ids in (("tokens", microbatch.tokens_T), ("targets", microbatch.predictions["tokens"])):
        # a device would read beyond
        check_range(torch.tensor(ids), decoder.spec.vocab_size, f"{what} of {', '.join(microbatch.sample_ids)}:")
    view = PackView(microbatch.segments_S, microbatch.first_S, microbatch.parent_S, decoder.device)
    return decoder.forward(tensors.tokens_T, view, tensors.rows_N, checkpointing=checkpointing, watch=watch)


def forward(
    decoder: Decoder,
    microbatch: Microbatch,
    tensors: MicrobatchTensors,
    temperature: float,
    checkpointing: bool = False,
    watch: Watch | None = None,
) -> Outputs:
    """Of a microbatch's targets. `watch` sees each layer's hidden states."""
    hidden_NM = hidden_states(decoder, microbatch, tensors, checkpointing, watch)

    def score() -> tuple[torch.Tensor, torch.Tensor]:
        kept = None if tensors.kept_N is None else tensors.kept_N.tolist()
        return token_logprobs(hidden_NM, decoder.head, tensors.targets_N, temperature, kept=kept)

    return Outputs(hidden_NM, decoder.head, score)


def score(decoder: Decoder, microbatch: Microbatch, temperature: float) -> torch.Tensor:
    """Log-probs [N] of a microbatch's targets, without gradients."""
    with torch.no_grad():
        return forward(decoder, microbatch, to_tensors(microbatch, decoder.device), temperature).logprobs_N


def with_logprobs(
    name: str,
    decoder: Decoder,
    samples: Sequence[Sample],
    prompts: Sequence[PromptTotal],
    budget_tokens: int,
    temperature: float,
) -> tuple[Sample, ...]:
    """The samples with their column `name` filled in for the trained tokens (0.0 elsewhere), by `decoder`."""
    return with_column(name, lambda m: score(decoder, m, temperature), samples, prompts, budget_tokens)


def with_column(
    name: str,
    score: Callable[[Microbatch], torch.Tensor],
    samples: Sequence[Sample],
    prompts: Sequence[PromptTotal],
    budget_tokens: int,
) -> tuple[Sample, ...]:
    """The samples with their column `name` filled in for the trained tokens (0.0 elsewhere), by what gives it [N]."""
    filled = [np.zeros(len(sample.columns)) for sample in samples]
    for microbatch in pack(samples, prompts, budget_tokens):
        scores = score(microbatch).double().cpu().numpy()
        parts = np.split(scores, np.cumsum(microbatch.sample_tokens)[:-1])
        for index, part in zip(microbatch.members, parts, strict=True):
            filled[index][samples[index].columns["loss_mask"]] = part
    return tuple(
        dataclasses.replace(sample, columns=sample.columns.having(**{name: values}))
        for sample, values in zip(samples, filled, strict=True)
    )


def versions_of(samples: Sequence[Sample]) -> set[int]:
    """The versions (update counts) that sampled the trained tokens."""
    sampled = [sample.columns["versions"][sample.columns["loss_mask"]] for sample in samples]
    return set(np.unique(np.concatenate(sampled)).tolist()) if sampled else set()


def with_sources(
    decoders: Mapping[int, Decoder],
    samples: Sequence[Sample],
    prompts: Sequence[PromptTotal],
    budget_tokens: int,
    temperature: float,
) -> tuple[Sample, ...]:
    """The samples with "source_logprobs": of each trained token under the version that sampled it, by its decoder.

    nan (unknown) where `decoders` has none for that version.
    """
    name = "source_logprobs"
    filled = [np.where(sample.columns["loss_mask"], np.nan, 0.0) for sample in samples]
    for version, decoder in decoders.items():
        drew = [sample.columns["loss_mask"] & (sample.columns["versions"] == version) for sample in samples]
        members = [index for index, tokens in enumerate(drew) if tokens.any()]
        chosen = [samples[index] for index in members]
        for index, sample in zip(
            members, with_logprobs(name, decoder, chosen, prompts, budget_tokens, temperature), strict=True
        ):
            filled[index][drew[index]] = sample.columns[name][drew[index]]
    return tuple(
        dataclasses.replace(sample, columns=sample.columns.having(**{name: values}))
        for sample, values in zip(samples, filled, strict=True)
    )
