"""How far gradients in a format are from exact ones: of each matrix, of the next token's loss on given texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem.models.decoder import Decoder
from tandem.study.ablation import matrices
from tandem.study.sensitivity import Batch, Note, opened
from tandem.train.config import LearnerConfig
from tandem.train.step import learn_rounded

LOGIT_ROWS = 256  # whose logits are held at once


def gradient_errors(model: str, form: str, texts: Path, note: Note) -> dict[str, Any]:
    """A cell a matrix: SQNR of its gradient in dB, and the cosine to the exact one; and both of all matrices together.

    form: a learner.gradients. The forward pass is exact, in fp32, and so is the loss: what differs is what the two
    products of the backward pass multiply, errors of layers above among it. Texts are one batch of the learner's.
    ConfigError for an unknown format and for a file without texts.
    """
    LearnerConfig(gradients=form).check("float32", "cpu")
    checkpoint, decoder, found = opened(model, texts)
    exact = _gradients(decoder, found, note, "exact gradients")
    learn_rounded(decoder, form)
    ours = _gradients(decoder, found, note, f"gradients in {form}")
    cells: list[dict[str, Any]] = []
    totals = torch.zeros(4, dtype=torch.float64)
    for at, gradient in exact.items():
        sums = _sums(gradient, ours[at])
        totals += sums
        cells.append({"layer": at[0], "tensor": at[1]} | _figures(sums))
    return {
        "model": model, "format": form, "texts": sum(len(batch.bounds) - 1 for batch in found),
        "tokens": sum(len(batch.tokens_T) for batch in found), "layers": checkpoint.spec.layers, "cells": cells,
        **_figures(totals),
    }  # fmt: skip


def _gradients(decoder: Decoder, found: Sequence[Batch], note: Note, what: str) -> dict[tuple[int, str], Tensor]:
    """Of each matrix of a layer, fp32."""
    weights = {id(weight): weight for layer in decoder.layers for _, weight, _ in matrices(layer)}
    for weight in weights.values():
        weight.grad = torch.zeros(weight.value.shape)
    for number, batch in enumerate(found, 1):
        note(f"{what}, batch {number} of {len(found)}")
        with torch.enable_grad():
            hidden_TM = decoder.forward(batch.tokens_T, batch.view)
        hidden_TM.backward(_of_hidden(decoder, batch, hidden_TM.detach()))
    made: dict[tuple[int, str], Tensor] = {}
    for layer in decoder.layers:
        for column, weight, view in matrices(layer):
            assert weight.grad is not None
            start = (view.data_ptr() - weight.value.data_ptr()) // (view.stride(0) * view.element_size())
            made[layer.index, column] = weight.grad[start : start + len(view)]
    return made


def _of_hidden(decoder: Decoder, batch: Batch, hidden_TM: Tensor) -> Tensor:
    """The gradient of -log p of all next tokens at the final hidden states: nothing follows a text's last."""
    following_T = torch.cat([batch.tokens_T[1:], batch.tokens_T[:1]])
    found_TM = torch.zeros_like(hidden_TM)
    for start in range(0, len(hidden_TM), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        shares_NV = decoder.logits(hidden_TM[rows]).softmax(-1)
        shares_NV[torch.arange(len(shares_NV)), following_T[rows]] -= 1.0
        found_TM[rows] = shares_NV @ decoder.head.value
    found_TM[[end - 1 for end in batch.bounds[1:]]] = 0.0
    return found_TM


def _sums(exact: Tensor, ours: Tensor) -> Tensor:
    """Of squares, of both's product, of the other's squares and of the difference's, in fp64."""
    one, other = exact.double(), ours.double()
    parts = (one.square(), one * other, other.square(), (one - other).square())
    return torch.stack([part.sum() for part in parts])


def _figures(sums: Tensor) -> dict[str, float | None]:
    signal, both, other, noise = sums.tolist()
    return {
        "sqnr_db": 10 * math.log10(signal / noise) if signal and noise else None,
        "cosine": both / math.sqrt(signal * other) if signal and other else None,
    }
