"""A tensor of the model with what computing on it needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tandem.kernels.address import address
from tandem.kernels.build.load import kernel
from tandem.kernels.choice import backend
from tandem.kernels.codes import Codes, fits
from tandem.kernels.large import large
from tandem.kernels.sizes import PANEL
from tandem.numerics.quantise import Quantised


def padded(depth: int, dtype: torch.dtype) -> int:
    """The depth of a panel: bf16 is reduced in pairs."""
    return depth + depth % 2 if dtype == torch.bfloat16 else depth


def packed_size(rows: int, depth: int) -> int:
    """Elements of the packed form: ceil(rows / 64) panels of this depth."""
    return -(-rows // PANEL) * PANEL * depth


def panels(matrix_NK: torch.Tensor, *, zero: bool = False) -> torch.Tensor:
    """An empty buffer for the packed form of [N, K]; of zeros where that is zeros."""
    rows, depth = matrix_NK.shape
    return large(packed_size(rows, padded(depth, matrix_NK.dtype)), dtype=matrix_NK.dtype, zero=zero)


def matrix_addresses(weight: Weight) -> tuple[int | None, int | None]:
    """Of `packed` and of `codes`, one of them null: what a kernel multiplies by."""
    if weight.codes is not None:
        return None, weight.codes.words.data_ptr()
    (rows, depth), dtype = weight.value.shape, weight.value.dtype
    assert weight.packed is not None, (rows, depth, dtype)
    return address(weight.packed, dtype, packed_size(rows, padded(depth, dtype))), None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A matrix's low-rank addition, x W^T + (scale x down^T) up^T, each product rounded once (Hu et al., 2106.09685).

    down: [R, K]; up: [N, R]. Their gradients are their own.
    """

    down: Weight
    up: Weight
    scale: float


class Weight:
    """`value` in the compute dtype; `packed` for the matrix product; `grad` in fp32, summed over microbatches.

    Matrices are [out, in]. The packed form is derived: `repack` follows every change of `value`. A matrix that is only
    served may be `codes` in place of `packed`, or `serve`; its `value` then has a shape and no memory, unless rows are
    looked up. A shard is a weight of fewer rows or columns (`Slot.shard`).
    """

    __slots__ = ("adapter", "codes", "grad", "library", "packed", "value")

    def __init__(self, value: torch.Tensor, *, matrix: bool, zero: bool = False) -> None:
        """zero: `value` is all zeros, so the packed form is too; neither is touched before something is loaded."""
        self.value = value.contiguous()
        self.packed: torch.Tensor | None = None
        self.codes: Codes | None = None
        self.grad: torch.Tensor | None = None  # None: frozen
        self.adapter: Adapter | None = None  # added by `linear` and `swiglu_down`
        self.library = False  # multiply by torch's library where that is faster, see library.py; not batch-invariant
        if matrix and backend(value) == "cpp" and kernel("linear", "pack_weight", value.dtype, "ppii") is not None:
            self.packed = panels(self.value, zero=zero)
            if not zero:
                self.repack()

    def repack(self) -> None:
        """Derive `packed` from `value`."""
        if self.packed is None:
            return
        pack = kernel("linear", "pack_weight", self.value.dtype, "ppii")
        assert pack is not None
        rows, depth = self.value.shape
        pack(address(self.value, self.packed.dtype, rows, depth), self.packed.data_ptr(), rows, depth)

    def serve(self) -> None:
        """Only products read this weight from now on: where they read `packed`, `value` lets its memory go."""
        if self.packed is not None and not self.library:
            self.value = torch.empty_like(self.value, device="meta")

    def hold(self, quantised: Quantised, *, rows: bool = False) -> bool:
        """Multiply by these codes from now on, whose values in bf16 have the same products to the last bit.

        `rows`: keep `value` for the look-up of rows; the caller fills it. False, and nothing changed, where this weight
        is not packed for bf16 products or the codes have no packed form.
        """
        ready = self.codes is not None or (self.packed is not None and self.value.dtype == torch.bfloat16)
        if not ready or self.library or not fits(quantised):
            return False
        assert quantised.codes_NK.shape == self.value.shape, (quantised.codes_NK.shape, self.value.shape)
        self.codes, self.packed = Codes(quantised), None
        if not rows:
            self.value = torch.empty_like(self.value, device="meta")
        return True

    def served(self, room: torch.Tensor | None = None) -> torch.Tensor:
        """What the matrix products read, [out, in]: recovered from `packed` or `codes`, else `value` itself.

        `room`, bytes, may be what it is recovered into: fresh memory costs more than the copy.
        """
        if self.codes is not None:
            return self.codes.values()
        if self.packed is None:
            return self.value
        unpack = kernel("linear", "unpack_weight", self.value.dtype, "ppii")
        assert unpack is not None
        rows, depth = self.value.shape
        tensor = torch.empty_like(self.value) if room is None else room[: self.value.nbytes].view(self.value.dtype)
        unpack(self.packed.data_ptr(), tensor.data_ptr(), rows, depth)
        return tensor.view(rows, depth)
