"""What Triton's interpreter needs in order to keep the contract of kernels/gpu where there is no GPU.

The interpreter runs a kernel in NumPy. As it comes (Triton 3.6) it reads bf16 operands of a product as integers,
truncates to bf16, rounds to 8 bits without a carry, leaves the order of a product's sum to the host's BLAS, whose rows
depend on their place, and takes no loop bound under NumPy 2.4. `mend` replaces these. Its arithmetic is not a GPU's:
its bits are compared with its own bits alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter


def widen_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """To the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def ordered_product(left: NDArray[Any], right: NDArray[Any], start: NDArray[Any]) -> NDArray[Any]:
    """start + left @ right, the depth added in order: an element depends on its row and its column alone."""
    total = start.copy()
    for k in range(left.shape[1]):
        total += left[:, k : k + 1] * right[k : k + 1]
    return total


def to_fp32(operand: Any) -> NDArray[np.float32]:
    if operand.dtype.scalar == tl.bfloat16:
        return widen_bf16(operand.data)
    if operand.dtype.scalar == tl.float8e4nv:
        return torch.from_numpy(operand.data.copy()).view(torch.float8_e4m3fn).float().numpy()
    return operand.data.astype(np.float32)


def from_fp32(values: NDArray[np.float32], kind: Any) -> NDArray[Any]:
    """Bits of the nearest number of a narrow type, as the interpreter stores them."""
    if kind == tl.bfloat16:
        return round_bf16(values)
    if kind == tl.float8e4nv:
        return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return values.astype(np.float16 if kind == tl.float16 else np.float32)


def mend() -> None:
    """Replace these in the interpreter; once a program."""
    builder = interpreter.InterpreterBuilder
    narrow = {tl.float8e4nv, tl.bfloat16, tl.float16, tl.float32}
    cast, patch_tensor = builder.cast_impl, interpreter._patch_lang_tensor

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if {source.dtype.scalar, target.scalar} <= narrow:
            return interpreter.TensorHandle(from_fp32(to_fp32(source), target.scalar), target.scalar)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        return cast_impl(self, source, target)

    def create_dot(self: Any, left: Any, right: Any, start: Any, precision: Any, imprecise: Any) -> Any:
        if left.dtype.scalar == tl.int8:
            product = start.data + left.data.astype(np.int32) @ right.data.astype(np.int32)
        else:
            product = ordered_product(to_fp32(left), to_fp32(right), start.data)
        return interpreter.TensorHandle(product, start.dtype.scalar)

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    builder.cast_impl, builder.create_dot, builder.create_fp_to_fp = cast_impl, create_dot, create_fp_to_fp
    interpreter._patch_lang_tensor = patch
