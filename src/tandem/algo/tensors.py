"""Microbatch to tensors: the crossing from arrays to torch, made once a microbatch and a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tandem.columns import COLUMNS, Array, Columns
from tandem.types import Denominators, Microbatch


@dataclass(frozen=True, slots=True)
class MicrobatchTensors:
    """A microbatch on a device. Log-probs and advantages are fp64: N numbers cost nothing beside N x V logits."""

    tokens_T: Tensor  # int64
    rows_N: Tensor  # int64
    targets_N: Tensor  # int64
    sample_N: Tensor  # int64, non-decreasing: the predictions of a sample are contiguous
    columns_N: Mapping[str, Tensor]  # those of tandem.columns that are numbers, each in its own dtype
    columns_T: Mapping[str, Tensor]  # those of every row that runs (Column.rows)
    sample_ids: tuple[str, ...]
    kept_N: Array | None  # bytes: the set that each target was drawn from; None where nothing was filtered
    sample_tokens: Tensor  # int64, one a sample: its predictions
    prompt_tokens: Tensor  # int64, one a sample: predictions of its prompt in the whole batch
    denominators: Denominators

    def __getitem__(self, name: str) -> Tensor:
        """A column [N]."""
        return self.columns_N[name]

    def get(self, name: str) -> Tensor | None:
        """A column [N], or None where the samples lack it."""
        assert name in COLUMNS, f"{name} is no column; columns: {', '.join(COLUMNS)}"
        return self.columns_N.get(name)


def to_tensors(microbatch: Microbatch, device: torch.device | str = "cpu") -> MicrobatchTensors:
    """Places and ids as int64, columns as they are."""

    def integers(values: Array) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(device)

    columns = microbatch.predictions

    def numbers(columns: Columns) -> dict[str, Tensor]:
        own = {name: array for name, array in columns.arrays.items() if array.dtype != object and name != "tokens"}
        return {name: torch.tensor(array, device=device) for name, array in own.items()}

    return MicrobatchTensors(
        tokens_T=integers(microbatch.tokens_T),
        rows_N=integers(microbatch.rows_N),
        targets_N=integers(columns["tokens"]),
        sample_N=integers(np.repeat(np.arange(len(microbatch.sample_ids)), microbatch.sample_tokens)),
        columns_N=numbers(columns),
        columns_T=numbers(microbatch.row_columns),
        sample_ids=microbatch.sample_ids,
        kept_N=columns.get("kept"),
        sample_tokens=integers(microbatch.sample_tokens),
        prompt_tokens=integers(microbatch.prompt_tokens),
        denominators=microbatch.denominators,
    )
