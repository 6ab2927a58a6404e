"""A tensor of the model with what computing on it needs."""

from __future__ import annotations

import torch

from tandem.kernels.build import kernel
from tandem.kernels.choice import backend

PANEL = 64  # columns of one panel, as in tile.h


def padded(depth: int, dtype: torch.dtype) -> int:
    """The depth of a panel: bf16 is reduced in pairs."""
    return depth + depth % 2 if dtype == torch.bfloat16 else depth


def panels(matrix_NK: torch.Tensor) -> torch.Tensor:
    """An empty buffer for the packed form of [N, K]: ceil(N / 64) panels of depth K."""
    rows, depth = matrix_NK.shape
    size = -(-rows // PANEL) * PANEL * padded(depth, matrix_NK.dtype)
    return torch.empty(size, dtype=matrix_NK.dtype)


class Weight:
    """`value` in the compute dtype; `packed` for the matrix product; `grad` in fp32, summed over microbatches.

    Matrices are [out, in]. The packed form is derived: `repack` follows every change of `value`.
    """

    __slots__ = ("grad", "library", "packed", "value")

    def __init__(self, value: torch.Tensor, *, matrix: bool) -> None:
        self.value = value.contiguous()
        self.packed: torch.Tensor | None = None
        self.grad: torch.Tensor | None = None
        self.library = False  # multiply by torch's library where that is faster, see library.py; not batch-invariant
        if matrix and backend(value) == "cpp" and kernel("linear", "pack_weight", value.dtype, "ppii") is not None:
            self.packed = panels(self.value)
            self.repack()

    def repack(self) -> None:
        """Derive `packed` from `value`."""
        if self.packed is None:
            return
        pack = kernel("linear", "pack_weight", self.value.dtype, "ppii")
        assert pack is not None
        rows, depth = self.value.shape
        pack(self.value.data_ptr(), self.packed.data_ptr(), rows, depth)

    def served(self) -> torch.Tensor:
        """What the matrix products read, [out, in]: recovered from `packed` where there is one, else `value` itself."""
        if self.packed is None:
            return self.value
        unpack = kernel("linear", "unpack_weight", self.value.dtype, "ppii")
        assert unpack is not None
        rows, depth = self.value.shape
        tensor = torch.empty_like(self.value)
        unpack(self.packed.data_ptr(), tensor.data_ptr(), rows, depth)
        return tensor
