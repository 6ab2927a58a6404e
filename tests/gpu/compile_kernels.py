"""Compiles every kernel for a GPU (compute capability 9.0), with none here; prints what is wrong. For test_compile.

Arguments of the model's shape are constants; everything else is a pointer or a number that a kernel must not be
specialised on, or batches of other sizes would run other binaries.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tandem.kernels.gpu import (
    attention,
    attention_backward,
    codes,
    eights,
    linear,
    norm,
    page_sum,
    rotary,
    sample,
    swiglu,
)
from tandem.kernels.gpu.tiles import HOPPER, PLAIN, Tile
from tandem.kernels.page_sum import GOLDEN

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
    "block_segment": "*i32",
    "block_at": "*i32",
    "block_part": "*i32",
    "delta": "*fp32",
    "dkey": "*fp32",
    "dvalue": "*fp32",
    "logits": "*fp32",
    "temperature": "*fp32",
    "entropy": "*fp32",
    "best": "*fp64",
    "best_id": "*i64",
    "tokens": "*i64",
    "logprobs": "*fp32",
    "parts": "*fp32",
    "sums": "*fp32",
    "accumulators": "*fp32",
    "found": "*i64",
    "starts": "*i64",
    "scales": "*fp32",
    "addresses": "*i64",
    "pages": "*i64",
}
NUMBERS = {"eps": "fp32", "sign": "fp32", "scale": "fp32"}
INTEGERS = {"rows", "stride", "stream", "spans", "query_stride", "key_stride", "value_stride", "table_stride"}
INTEGERS |= {"page_tokens", "apart", "grad_stride", "page_stride"}

HEADS = {
    "heads": 9,
    "kv_heads": 3,
    "size": 64,
    "group_block": 4,
    "size_block": 64,
    "tile": 64,
    "block": 64,
    "span": 512,
}
BACKWARD = {name: size for name, size in HEADS.items() if name != "span"}
CODES = {"heads": 3, "size": 64, "block_h": 32, "block_d": 64}
PRODUCT = {"columns": 960, "depth": 576, "super_t": 8}

CASES: list[tuple[Any, dict[str, Any]]] = [
    (attention.attention_kernel, {**HEADS, "window": 0, "chunk": 0, "sinks": 0, "scaled": 0}),
    (attention.attention_kernel, {**HEADS, "window": 100, "chunk": 0, "sinks": 4, "scaled": 0}),
    (attention.attention_kernel, {**HEADS, "window": 0, "chunk": 64, "sinks": 0, "scaled": 0}),
    (attention.fold_kernel, {"heads": 9, "size": 64, "size_block": 64}),
    (attention_backward.query_kernel, {**BACKWARD, "window": 100, "chunk": 0}),
    (attention_backward.key_kernel, {**BACKWARD, "window": 0, "chunk": 64}),
    (norm.norm_kernel, {"width": 576, "block_m": 1024, "block_t": 2}),
    (page_sum.page_sum_kernel, {"pools": 60, "block": 1024, "golden": GOLDEN}),
    (rotary.rotate_kernel, {"heads": 9, "half": 32, "block_t": 4, "block_h": 16, "block_d": 32}),
    (rotary.store_kernel, {"width": 192, "head": 64, "block": 1024}),
    (swiglu.swiglu_kernel, {"width": 1536, "block": 1024}),
    (sample.blocks_kernel, {"vocab": 49152, "block": 2048}),
    (sample.statistics_kernel, {"blocks": 24, "block_b": 32}),
    (sample.draw_kernel, {"vocab": 49152, "block": 2048}),
    (sample.finish_kernel, {"vocab": 49152, "blocks": 24, "block_b": 32}),
    (sample.words_kernel, {"block": 64}),
]
WIDE = (linear.linear_kernel, eights.eights_kernel, codes.codes_kernel)
EXACT = (eights.round_rows_kernel, eights.eights_kernel, codes.codes_kernel)
# Elements of codes, scales as they are kept, scales as the kernel takes them, group.
STORED = [
    (codes.INT8, "fp32", codes.PLAIN, 576),
    (codes.INT4, "fp32", codes.PLAIN, 64),
    (codes.UINT4, "fp16", codes.PLAIN, 32),
    (codes.FP4, "u8", codes.E8M0, 32),
    (codes.FP4, "u8", codes.TIMES, 16),
    (codes.FP4, "u8", codes.OVER, 16),
]
SHARED_BYTES = 227 << 10  # that a program may use on this target


def product_case(tile: Tile) -> tuple[Any, dict[str, Any]]:
    sizes = {"block_t": tile.rows, "block_n": tile.columns, "block_k": tile.depth}
    return linear.linear_kernel, {**PRODUCT, **sizes, "has_bias": True, "has_residual": True}


def narrow(tile: Tile, stored: list[tuple[Any, str, Any, int]]) -> Iterator[str]:
    """Of products of 8 bits, and of those by codes, through a tile."""
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
    sizes = {**PRODUCT, "block_t": tile.rows, "block_n": tile.columns, "has_bias": True, "has_residual": True}
    for kind, imprecise in (("i8", 0), ("fp8e4nv", eights.IMPRECISE)):
        kinds = {"codes": f"*{kind}", "weight": f"*{kind}", "weight_scales": "*fp32"}
        given = {**sizes, "block_k": eights.DEPTH, "imprecise": imprecise}
        yield from complaints(eights.eights_kernel, given, "bf16", kinds, **options)
    for element, scale, scaled, group in stored:
        kinds = {"codes": "*i8" if element == codes.INT8 else "*u8", "scales": f"*{scale}", "minima": f"*{scale}"}
        given = {"element": element.value, "scaled": scaled.value, "group": group, "block_k": tile.depth}
        given |= {"has_minima": element == codes.UINT4, "unit": math.gcd(group, tile.depth)}
        yield from complaints(codes.codes_kernel, {**sizes, **given}, "bf16", {**kinds, "whole": "*fp32"}, **options)


def complaints(
    kernel: Any, constants: dict[str, Any], dtype: str, kinds: dict[str, str] | None = None, **options: int
) -> list[str]:
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
            signature[name] = (
                (kinds or {}).get(name) or NUMBERS.get(name) or POINTERS.get(name) or words.get(name) or f"*{dtype}"
            )
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=TARGET, options=options)
    if re.search(r"\b(atom|red)\.", compiled.asm["ptx"]):
        found.append(f"{kernel.__name__} adds with atomics")
    if "tf32" in compiled.asm["ptx"]:
        found.append(f"{kernel.__name__} multiplies fp32 in TF32")
    if compiled.metadata.shared > SHARED_BYTES:
        found.append(f"{kernel.__name__} takes {compiled.metadata.shared} bytes of shared memory, {constants}")
    if kernel in EXACT and re.search(r"\b(fma\.rn\.f32|\w+(\.\w+)*\.ftz)\b", compiled.asm["ptx"]):
        found.append(f"{kernel.__name__} contracts a product with a sum, or flushes denormals")
    products = set(re.findall(r"\b(mma\.sync|wgmma\.mma_async)[\w.:]*\.m\d+n\d+(k\d+)", compiled.asm["ptx"]))
    deep = "k32" if kernel is eights.eights_kernel else "k16"
    if kernel in WIDE and dtype == "bf16" and products != {("wgmma.mma_async", deep)}:
        found.append(f"{kernel.__name__} multiplies by {products}, {constants}")
    return found


if __name__ == "__main__":
    lines = [line for case in CASES for line in complaints(*case, "bf16")]
    for tile in (*PLAIN, *HOPPER):
        lines += complaints(*product_case(tile), "bf16", num_warps=tile.warps, num_stages=tile.stages)
    lines += complaints(*product_case(PLAIN[0]), "fp32", num_warps=PLAIN[0].warps, num_stages=PLAIN[0].stages)
    for tile, stored in ((PLAIN[0], STORED), (HOPPER[0], STORED[4:5])):  # the others differ in numbers alone
        lines += narrow(tile, stored)
    for kind, largest in (("i8", 127.0), ("fp8e4nv", 448.0)):
        given = {"width": 576, "largest": largest, "block_t": 2, "block_m": 1024}
        lines += complaints(eights.round_rows_kernel, given, "bf16", {"codes": f"*{kind}"}, enable_fp_fusion=False)
    POINTERS |= {"key": "*fp8e4nv", "value": "*fp8e4nv", "pool": "*fp8e4nv"}
    lines += [line for case in (CASES[1], CASES[9]) for line in complaints(*case, "bf16")]
    POINTERS |= {"key": "*i8", "value": "*i8", "pool": "*i8"}
    of_codes = (attention.attention_kernel, {**CASES[1][1], "scaled": 1}), (rotary.store_codes_kernel, CODES)
    lines += [line for case in of_codes for line in complaints(*case, "bf16")]
    print(*lines, sep="\n", end="")
