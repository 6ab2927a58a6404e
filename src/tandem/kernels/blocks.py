"""Rounding to the formats of numerics/blocks.py, to the same bits, in one pass over memory (blocks.cpp)."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from tandem.errors import NonFiniteError
from tandem.kernels.build.load import kernel
from tandem.numerics import blocks as reference
from tandem.numerics.blocks import RULES, WHOLE, Format
from tandem.numerics.elements import Fixed
from tandem.numerics.random import Stream, word_rows

SCALES = ("e8m0", "e4m3", "fp32")
FAR = 60  # exponents beyond which a unit, or one over it, is no number that the kernel multiplies by


class _Form(ctypes.Structure):
    """Struct Form of blocks.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("block", "rows", "scale", "rule", "inference", "zero_point", "fixed")),
        *((name, ctypes.c_int64) for name in ("mantissa", "least", "most")),
        *((name, ctypes.c_double) for name in ("largest", "top")),
        *((name, ctypes.c_int64) for name in ("drawn", "seed")),
    ]


def rounded(x_NK: Tensor, form: Format) -> Tensor:
    """`numerics.blocks.rounded` of a matrix, to the nearest."""
    if form.block == WHOLE and not form.each_row:
        return _rounded(x_NK.reshape(1, -1), form).view(x_NK.shape)
    return _rounded(x_NK, form)


def rounded_rows_reference(x_TK: Tensor, form: Format) -> Tensor:
    """Each row of itself alone; a row with a NaN or an infinity is all NaN."""
    finite_T1 = x_TK.isfinite().all(-1, keepdim=True)
    return reference.rounded(x_TK.where(finite_T1, 0.0), form).where(finite_T1, torch.nan)


def rounded_rows(x_TK: Tensor, form: Format) -> Tensor:
    """Rows [T, K], each rounded of itself alone, in their dtype (`Format.by_row`); one with a NaN or an infinity is all
    NaN."""
    assert form.each_row, form
    return _rounded(x_TK, form)


def drawn_rows_reference(x_TK: Tensor, form: Format, seed: int) -> Tensor:
    finite_T1 = x_TK.isfinite().all(-1, keepdim=True)
    drawn = word_rows(np.full(len(x_TK), seed, np.uint64), np.arange(len(x_TK)), x_TK.shape[1], Stream.ROUNDING)
    words_TK = torch.from_numpy(drawn.astype(np.int64)).to(x_TK.device)
    blocks = reference.quantise(x_TK.where(finite_T1, 0.0), form, "stochastic", words=words_TK)
    return reference.dequantise(blocks, form, x_TK.dtype).where(finite_T1, torch.nan)


def drawn_rows(x_TK: Tensor, form: Format, seed: int) -> Tensor:
    """`rounded_rows`, up by the probability of what is lost, by Philox's words of (seed, row, column). Not of formats
    with a zero point."""
    assert form.each_row and not form.zero_point and 0 <= seed < 1 << 64, (form, seed)
    return _rounded(x_TK, form, seed)


def _rounded(x_TK: Tensor, form: Format, seed: int | None = None) -> Tensor:
    run = kernel("blocks", "round_blocks", x_TK.dtype, "ppiip") if x_TK.device.type == "cpu" and _fits(form) else None
    if run is None and seed is not None:
        return drawn_rows_reference(x_TK, form, seed)
    if run is None:
        return rounded_rows_reference(x_TK, form) if form.each_row else reference.rounded(x_TK, form)
    top = -1.0
    if not form.each_row:
        top = float(torch.linalg.vector_norm(x_TK, torch.inf)) if x_TK.numel() else 0.0
        if form.scale != "e8m0" and not top < float("inf"):
            raise NonFiniteError(
                f"{int((~x_TK.isfinite()).sum())} of {x_TK.numel()} numbers are not finite: {form.name} has none."
            )
    element = form.element
    fixed = isinstance(element, Fixed)
    given = _Form(
        *(form.block, form.rows, SCALES.index(form.scale), RULES.index(form.rule)),
        *(form.chain == "inference", form.zero_point, fixed),
        *(element.mantissa, -element.fraction if isinstance(element, Fixed) else element.least, element.most),
        *(element.largest, top),
        *(seed is not None, ctypes.c_int64(seed or 0).value),
    )
    x_TK = x_TK.contiguous()
    out_TK = torch.empty_like(x_TK)
    run(x_TK.data_ptr(), out_TK.data_ptr(), *x_TK.shape, ctypes.addressof(given))
    return out_TK


def _fits(form: Format) -> bool:
    """Whether the kernel has it: all but what is chosen by a sum or kept by files alone, exponents far from those of
    models, and powers of two alone, whose even code is every other exponent."""
    element = form.element
    near = isinstance(element, Fixed) or (element.least - element.mantissa >= -FAR and element.most <= FAR)
    near &= element.mantissa > 0
    return near and form.chain in ("training", "inference") and form.scale in SCALES
