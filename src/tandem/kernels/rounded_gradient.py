"""What the two products of a matrix's backward pass multiply, rounded to a format: dx = dy W, and dW = dy^T x.

Blocks lie along what is summed: outputs for dx, rows (tokens) for dW, so dy is rounded twice, and W and x are again,
whatever the forward pass rounded them to. A scale of a whole tensor is one of each row there. Products are those of
the run's dtype: this tells what a format does to a gradient, and saves no time. NVFP4's training (2509.25149) is
nvfp4+stochastic+hadamard, but for its scales of W, which are of tiles of 16 x 16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tandem.errors import ConfigError
from tandem.kernels.blocks import drawn_rows, rounded_rows
from tandem.numerics.blocks import SIGNS, Format, format_of, hadamard
from tandem.numerics.names import gradient_parts

OF_INPUT, OF_WEIGHT = 2, 3  # uses of Philox's words: others than those of eights_gradient.py


class Operands(NamedTuple):
    """How they are rounded.

    >>> operands_of("mxfp8_e5m2+mxfp8_e4m3+stochastic").dy.element.name
    'e5m2'
    """

    dy: Format | None  # None: as it is
    met: Format | None  # of W and x
    stochastic: bool = False  # dy; W and x are rounded to the nearest
    hadamard: bool = False  # 16 rows of dy and of x at a time are turned alike before they meet

    def of_input(self, dy_TN: Tensor, value_NK: Tensor) -> tuple[Tensor, Tensor]:
        """dy and W as dx = dy W multiplies them."""
        return self._drawn(dy_TN, OF_INPUT), _along_rows(value_NK, self.met)

    def of_weight(self, dy_TN: Tensor, x_TK: Tensor) -> tuple[Tensor, Tensor]:
        """dy and x as dW = dy^T x multiplies them; turned ones have rows of zeros in their last 16, if there are."""
        dy_NT, x_KT = dy_TN.T.contiguous(), x_TK.T.contiguous()
        if self.hadamard:
            dy_NT, x_KT = _turned(dy_NT), _turned(x_KT)
        x_KT = x_KT if self.met is None else rounded_rows(x_KT, self.met)
        return self._drawn(dy_NT, OF_WEIGHT).T.contiguous(), x_KT.T.contiguous()

    def _drawn(self, dy: Tensor, use: int) -> Tensor:
        """Rows [.., summed], rounded; words are keyed by the largest size, so that a gradient is a function of what it
        is made of."""
        if self.dy is None:
            return dy
        if not self.stochastic:
            return rounded_rows(dy.contiguous(), self.dy)
        most = int(dy.float().abs().max().view(torch.int32)) if dy.numel() else 0
        return drawn_rows(dy.contiguous(), self.dy, most << 32 | use)


def _along_rows(value: Tensor, form: Format | None) -> Tensor:
    """Rounded with blocks along the first axis."""
    return value if form is None else rounded_rows(value.T.contiguous(), form).T.contiguous()


def _turned(x: Tensor) -> Tensor:
    """Each 16 numbers of a row, zeros behind the last, by NVFP4's Hadamard transform; rounded to bf16."""
    return hadamard(functional.pad(x, (0, -x.shape[-1] % len(SIGNS)))).to(x.dtype)


def operands_of(name: str) -> Operands:
    """Of a `learner.gradients` that is a format. ConfigError for an unknown one, tiles of several rows, and stochastic
    rounding of a zero point."""
    first, second, ways = gradient_parts(name)
    try:
        dy, met = (None if part == "same" else format_of(part).by_row() for part in (first, second))
    except ConfigError as error:
        raise ConfigError(f"learner.gradients={name}: {error}") from error
    if "stochastic" in ways and (dy is None or dy.zero_point):
        raise ConfigError(
            f"learner.gradients={name}: {first} has no stochastic rounding. Leave +stochastic out, or give the "
            "gradient a format without a zero point."
        )
    return Operands(dy, met, "stochastic" in ways, "hadamard" in ways)
