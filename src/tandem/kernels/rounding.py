"""What matrices are rounded to where they are multiplied, and the rows that they multiply, by the names of configs.

`w8a8` and `w4a8` have products of their own (eights.py, fours.py). Other formats are rounded by their rules, in bf16
or fp32 where the product reads them: the numbers are the format's, the product is the one of model.dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tandem.errors import ConfigError
from tandem.kernels.blocks import rounded, rounded_rows
from tandem.kernels.choice import backend
from tandem.kernels.quantise import dequantise, quantise
from tandem.kernels.sizes import GROUP
from tandem.numerics.blocks import WHOLE_ROW, Format, format_of
from tandem.numerics.elements import Fixed
from tandem.numerics.kv import SpanRule, span_rule
from tandem.numerics.names import kv_parts
from tandem.numerics.quantise import INT4, Quantised, from_e4m3, to_e4m3

EIGHTS = Format("int8_row", Fixed("int8", 8, 0), WHOLE_ROW, "fp32", each_row=True)  # rows of w8a8, as they read back
BITS = {"int8": 8, "int4": 4}
PRODUCTS = {"w8a8": (8, 0), "w4a8": (4, GROUP)}  # bits of matrices, and inputs of a group


class Rounding(NamedTuple):
    """Of the matrices of layers, and of the rows that they multiply; embedding, head and norms keep their precision."""

    bits: int = 0  # of integers; 0: a format
    group: int = 0  # inputs that share an integer's scale; 0: all of a row
    products: bool = False  # w8a8, w4a8: rows are integers of 8 bits too, and so are the products
    form: Format | None = None
    rows: Format | None = None  # of the rows that are multiplied; None: as they are

    def __bool__(self) -> bool:
        return bool(self.bits or self.form or self.rows)

    def codes(self, matrix_NK: Tensor) -> Quantised:
        """A matrix as integers."""
        assert self.bits, self
        return quantise(matrix_NK, self.bits, self.group or matrix_NK.shape[1])

    def matrix(self, matrix_NK: Tensor) -> Tensor:
        """A matrix as it reads back, in its dtype. NonFiniteError where it has what the format has not."""
        if self.bits:
            return dequantise(self.codes(matrix_NK), matrix_NK.dtype)
        return matrix_NK if self.form is None else rounded(matrix_NK, self.form)

    def multiplied(self, x_TK: Tensor) -> Tensor:
        """Rows as they are multiplied, in their dtype. A row with a NaN or an infinity is all NaN."""
        if self.products:
            if backend(x_TK) == "triton":
                from tandem.kernels.gpu.eights import rounded_rows as gpu

                return gpu(x_TK)
            return rounded_rows(x_TK, EIGHTS)
        return x_TK if self.rows is None else rounded_rows(x_TK, self.rows)


NOT_ROUNDED = Rounding()


def rounding_of(name: str, group: int = 64) -> Rounding:
    """By a setting: same, int8 and int4 (in groups of `group` inputs), w8a8, w4a8, or a format of numerics/blocks.py
    and behind a + one for the rows: nvfp4, fp8_128x128+fp8_1x128, same+mxfp8_e4m3. ConfigError for others.

    >>> rounding_of("mxfp4+mxfp8_e4m3").rows.bits, rounding_of("w8a8").products, bool(rounding_of("same"))
    (8.25, True, False)
    """
    if name in BITS:
        return Rounding(BITS[name], group)
    if name in PRODUCTS:
        return Rounding(*PRODUCTS[name], products=True)
    matrices, _, rows = name.partition("+")
    try:
        form, own = (None if part in ("", "same") else format_of(part) for part in (matrices, rows))
        return Rounding(form=form, rows=None if own is None else own.by_row())
    except ConfigError as error:
        raise ConfigError(
            f"{name!r} rounds nothing that is known: {error} Give such a format, same, int8, int4, w8a8 or w4a8, "
            "and behind a + what rows are rounded to where they are multiplied."
        ) from error


class Kept(NamedTuple):
    """What keys and values are rounded to: the vector of a token and head alone when it is made, or a span's at once
    when it is full."""

    name: str
    form: Format | None  # of a vector; None: e4m3 at unit scale
    sinks: int = 0  # first positions, which stay as they are
    span: SpanRule | None = None  # in place of `form`

    def rounded(self, x_TKD: Tensor, positions_T: Tensor | None = None) -> Tensor:
        """Keys or values as they are attended to, in their dtype and in memory of their own. A vector with a NaN or an
        infinity is all NaN; at unit scale infinity is 448. positions_T: needed where there are sinks."""
        assert self.span is None, self.name
        if self.form is None:
            made_TKD = from_e4m3(to_e4m3(x_TKD), x_TKD.dtype)
        else:
            made_TKD = rounded_rows(x_TKD.reshape(-1, x_TKD.shape[-1]), self.form).view(x_TKD.shape)
        if not self.sinks:
            return made_TKD
        assert positions_T is not None, self.name
        return made_TKD.where((positions_T >= self.sinks)[:, None, None], x_TKD)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TKD, made_TKD):  # type: ignore[no-untyped-def]
        return made_TKD

    @staticmethod
    def backward(ctx, dx_TKD):  # type: ignore[no-untyped-def]
        return dx_TKD, None


def through(x: Tensor, made: Tensor) -> Tensor:
    """`made`, whose gradient is that of x, which it was made of."""
    return _Through.apply(x, made.detach())


def kept_of(name: str) -> Kept | None:
    """By `model.kv` or `engine.kv_dtype`; None: of same. ConfigError for others.

    >>> kept_of("int8").form == EIGHTS, kept_of("float8_e4m3").form, kept_of("same")
    (True, None, None)
    """
    form, tokens, sinks = kv_parts(name)
    if tokens:
        return Kept(name, None, sinks, span_rule(form, tokens, sinks))
    if form in ("same", "float8_e4m3"):
        return None if form == "same" else Kept(name, None, sinks)
    own = {"int8": EIGHTS, "int4": INT4}.get(form)
    return Kept(name, (own or format_of(form)).by_row(), sinks)
