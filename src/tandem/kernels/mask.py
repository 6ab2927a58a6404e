"""Masks of rows of logits: kept sets (types.kept_ids) that are known before anything is drawn, as a bit a token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.types import is_mask, kept_ids


class MaskTable(NamedTuple):
    """The distinct masks of S rows, in words of 32 tokens from the lowest bit on."""

    words_UW: NDArray[np.uint32]
    numbers_S: NDArray[np.int32]  # which of them a row has; -1: none


def mask_table(masks: Iterable[bytes], vocab: int) -> MaskTable | None:
    """Rows that share a mask share its words. None where no row has one.

    >>> mask_table((b"", bytes([6, 0, 0, 0, 1]), bytes([6, 0, 0, 0, 1])), 3)
    MaskTable(words_UW=array([[6]], dtype=uint32), numbers_S=array([-1,  0,  0], dtype=int32))
    """
    numbers: dict[bytes, int] = {}
    numbers_S = [numbers.setdefault(mask, len(numbers)) if mask else -1 for mask in masks]
    if not numbers:
        return None
    words_UW = np.zeros((len(numbers), -(-vocab // 32)), np.uint32)
    for words_W, mask in zip(words_UW, numbers, strict=True):
        if is_mask(mask):
            words_W[:] = np.frombuffer(mask[:-1], np.uint32)
        else:
            ids = np.asarray(kept_ids(mask))
            np.bitwise_or.at(words_W, ids // 32, np.uint32(1) << ids % np.uint32(32))
        assert words_W.any() and (vocab % 32 == 0 or not words_W[-1] >> vocab % 32), (len(mask), vocab)
    return MaskTable(words_UW, np.array(numbers_S, np.int32))


def masked(logits_SV: Tensor, masks: Iterable[bytes]) -> Tensor:
    """The logits, -infinity where a row's mask lacks a token; NaN and +infinity stay. Themselves where no row has one.

    >>> masked(torch.zeros(2, 3), (b"", np.array([1], np.uint32).tobytes())).tolist()
    [[0.0, 0.0, 0.0], [-inf, 0.0, -inf]]
    """
    table = mask_table(masks, logits_SV.shape[1])
    if table is None:
        return logits_SV
    bits = np.unpackbits(table.words_UW.view(np.uint8), axis=1, bitorder="little", count=logits_SV.shape[1])
    bits = np.concatenate([bits, np.ones_like(bits[:1])])  # the last, -1: all
    allowed_SV = torch.from_numpy(bits[table.numbers_S].astype(np.bool_)).to(logits_SV.device)
    return torch.where(allowed_SV | ~(logits_SV < torch.inf), logits_SV, -torch.inf)
