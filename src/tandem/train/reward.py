"""A reward model's head in a checkpoint, and what the model says of given answers.

`reward_head.safetensors` beside the model's own files has the head as Transformers' models for sequence classification
name it, `score.weight` [1, M], which this model and that head make one of (docs/preferences.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tandem.algo.pack import count_prompts, pack
from tandem.algo.preference import RewardHead, judged
from tandem.algo.tensors import to_tensors
from tandem.errors import ModelError
from tandem.models.decoder import Decoder
from tandem.train.score import hidden_states
from tandem.types import Sample

FILE, NAME = "reward_head.safetensors", "score.weight"


def save(directory: Path, head: RewardHead) -> None:
    """Into a checkpoint that is being written."""
    save_file({NAME: head.weight.value[None].cpu().contiguous()}, directory / FILE)


def read(directory: Path) -> torch.Tensor:
    """The head of a checkpoint, [M]. ModelError where it has none."""
    path = directory / FILE
    try:
        found = load_file(path)[NAME]
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}), so {directory} is no reward model. One is trained with "
            "objective=preference and preference.loss=reward_model."
        ) from error
    if found.ndim != 2 or len(found) != 1:
        raise ModelError(f"{path} has a head of shape {tuple(found.shape)}; a reward model has one of shape (1, M).")
    return found[0]


def load(directory: Path, trunk: Decoder) -> RewardHead:
    """The head of a checkpoint, over its model. ModelError where it has none, or another model's."""
    return RewardHead(trunk, read(directory))


def rewards(head: RewardHead, samples: Sequence[Sample], budget_tokens: int) -> list[float]:
    """Of each sample: its answer's, by the state at its last trained token."""
    found = [0.0] * len(samples)
    given = [judged(sample) for sample in samples]
    with torch.no_grad():
        for microbatch in pack(given, count_prompts(given), budget_tokens):
            batch = to_tensors(microbatch, head.trunk.device)
            values = head(hidden_states(head.trunk, microbatch, batch)).tolist()
            for place, value in zip(microbatch.members.tolist(), values, strict=True):
                found[place] = value
    return found
