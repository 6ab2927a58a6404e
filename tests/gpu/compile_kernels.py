"""Compiles every kernel for a GPU (compute capability 9.0), with none here; prints what is wrong. For test_compile.

Arguments of the model's shape are constants; everything else is a pointer or a number that a kernel must not be
specialised on, or batches of other sizes would run other binaries.
"""

from __future__ import annotations

import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tandem.kernels.gpu import attention, linear, norm, rotary, sample, swiglu

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {
    "positions": "*i64",
    "slots": "*i64",
    "seeds": "*i64",
    "cos": "*fp32",
    "sin": "*fp32",
    "lse": "*fp32",
    "row_start": "*i32",
    "first_position": "*i32",
    "table": "*i32",
    "tile_segment": "*i32",
    "tile_row": "*i32",
    "logits": "*fp32",
    "temperature": "*fp32",
    "entropy": "*fp32",
    "best": "*fp64",
    "best_id": "*i64",
}
NUMBERS = {"eps": "fp32", "sign": "fp32", "scale": "fp32"}
INTEGERS = {"rows", "stride", "stream", "query_stride", "key_stride", "value_stride", "table_stride", "page_tokens"}

HEADS = {"heads": 9, "kv_heads": 3, "size": 64, "group_block": 4, "size_block": 64, "tile": 64, "block": 64}
PRODUCT = {"columns": 960, "depth": 576, "block_t": 64, "block_n": 64, "block_k": 64}
CASES: list[tuple[Any, dict[str, Any]]] = [
    (linear.linear_kernel, {**PRODUCT, "has_bias": True, "has_residual": True}),
    (norm.norm_kernel, {"width": 576, "block_m": 1024, "block_t": 2}),
    (rotary.rotate_kernel, {"heads": 9, "half": 32, "block_t": 4, "block_h": 16, "block_d": 32}),
    (rotary.store_kernel, {"width": 192, "head": 64, "block": 1024}),
    (swiglu.swiglu_kernel, {"width": 1536, "block": 1024}),
    (attention.attention_kernel, {**HEADS, "window": 0, "sinks": 0}),
    (attention.attention_kernel, {**HEADS, "window": 100, "sinks": 4}),
    (sample.statistics_kernel, {"vocab": 49152, "block": 1024}),
    (sample.draw_kernel, {"vocab": 49152, "block": 1024}),
    (sample.words_kernel, {"block": 64}),
]


def complaints(kernel: Any, constants: dict[str, Any], dtype: str) -> list[str]:
    signature: dict[str, str] = {}
    found = []
    for parameter in kernel.params:
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGERS:
            signature[name] = "i32"
            if not parameter.do_not_specialize:
                found.append(f"{kernel.__name__} is specialised on {name}")
        else:
            words = {"out": "*i64", "x": "*fp32"} if kernel.__module__ == sample.__name__ else {}
            signature[name] = NUMBERS.get(name) or POINTERS.get(name) or words.get(name) or f"*{dtype}"
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=TARGET)
    if re.search(r"\b(atom|red)\.", compiled.asm["ptx"]):
        found.append(f"{kernel.__name__} adds with atomics")
    if "tf32" in compiled.asm["ptx"]:
        found.append(f"{kernel.__name__} multiplies fp32 in TF32")
    return found


if __name__ == "__main__":
    for kernel, constants in CASES:
        for line in complaints(kernel, constants, "bf16"):
            print(line)
    POINTERS |= {"key": "*fp8e4nv", "value": "*fp8e4nv", "pool": "*fp8e4nv"}
    for kernel, constants in (CASES[3], CASES[6]):
        for line in complaints(kernel, constants, "bf16"):
            print(line)
    for line in complaints(*CASES[0], "fp32"):
        print(line)
