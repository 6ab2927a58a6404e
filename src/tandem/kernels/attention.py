"""Causal attention of packed queries over a table of key and value slots.

One operation serves engine and learner. A segment is a run of query rows at consecutive positions; its table names the
slot of every position from 0 to its last row, a page at a time. The engine's slots are pages of the KV pool; the
learner's are the rows of the pack itself (pages of one token), so that samples may share the rows of a common prompt.

A query's result depends on its position, its path and nothing else: keys are reduced in blocks of 64 absolute
positions, and splits of 512 are folded in order (attention.h). Softmax runs in fp32; probabilities are rounded to the
compute dtype before they meet the values.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from tandem.kernels.address import address, rows_address
from tandem.kernels.attention_int8 import int8_attention_reference
from tandem.kernels.build.load import kernel
from tandem.kernels.choice import backend
from tandem.kernels.paths import EVERYTHING, Paths
from tandem.numerics.quantise import from_int8, int4_bytes
from tandem.types import Reach

if TYPE_CHECKING:
    from tandem.kernels.page_pool import KvPool


class _Args(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        *((name, ctypes.c_int64) for name in ("query_stride", "key_stride", "value_stride")),
        *((name, ctypes.c_void_p) for name in ("out", "lse", "row_start", "first_position", "table")),
        *(
            (name, ctypes.c_int64)
            for name in ("table_stride", "page_tokens", "segments", "heads", "kv_heads", "head_size")
        ),
        *((name, ctypes.c_int64) for name in ("window", "chunk", "sinks")),
        ("scale", ctypes.c_float),
        ("kv_scales", ctypes.c_void_p),
        ("coded", ctypes.c_void_p),
    ]


class _Grads(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("dout", "dquery", "dkey", "dvalue")),
        *((name, ctypes.c_int64) for name in ("dquery_stride", "dkey_stride", "dvalue_stride")),
        *((name, ctypes.c_void_p) for name in ("dkey_sum", "dvalue_sum", "component_start")),
        *((name, ctypes.c_int64) for name in ("components", "slots")),
    ]


def _args(
    query_THD: torch.Tensor,
    key_CKD: torch.Tensor,
    value_CKD: torch.Tensor,
    paths: Paths,
    reach: Reach,
    out_THD: torch.Tensor,
    lse_TH: torch.Tensor | None,
    sinks: int = 0,
) -> _Args:
    (rows, heads, size), (slots, kv_heads) = query_THD.shape, key_CKD.shape[:2]
    vector = int4_bytes(size)[0] if key_CKD.dtype == torch.uint8 else size
    assert rows == paths.num_rows and heads % kv_heads == 0, (query_THD.shape, paths.num_rows, key_CKD.shape)
    stored = query_THD.dtype if paths.page_tokens == 1 else key_CKD.dtype
    return _Args(
        rows_address(query_THD, query_THD.dtype, rows, heads, size),
        *(rows_address(x, stored, slots, kv_heads, vector) for x in (key_CKD, value_CKD)),
        query_THD.stride(0),
        key_CKD.stride(0),
        value_CKD.stride(0),
        address(out_THD, query_THD.dtype, rows, heads, size),
        address(lse_TH, torch.float32, rows, heads),
        paths.row_start_S.data_ptr(),
        paths.first_position_S.data_ptr(),
        paths.table_SP.data_ptr(),
        paths.table_SP.stride(0),
        paths.page_tokens,
        paths.first_position_S.shape[0],
        heads,
        kv_heads,
        size,
        reach.window or 0,
        reach.chunk or 0,
        sinks,
        1.0 / math.sqrt(size),
    )


def attention_reference(
    query_THD: torch.Tensor,
    key_CKD: torch.Tensor,
    value_CKD: torch.Tensor,
    paths: Paths,
    reach: Reach = EVERYTHING,
    sinks: int = 0,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attention`, one segment at a time, a full mask, in fp32 (fp64 for fp64 inputs); differentiable."""
    wide = query_THD.dtype if query_THD.dtype == torch.float64 else torch.float32
    group = query_THD.shape[1] // key_CKD.shape[1]
    outs = [query_THD[:0].to(wide)]
    leading = sinks if reach.window else 0
    for s in range(paths.first_position_S.shape[0]):
        start, stop = int(paths.row_start_S[s]), int(paths.row_start_S[s + 1])
        first = int(paths.first_position_S[s])
        own = range(first, first + stop - start)
        # Before what the first query sees, the table may name any page.
        seen = [position for position in range(own.stop) if position >= reach.first_seen(first) or position < leading]
        k_position, q_position = torch.tensor(seen), torch.tensor(own)[:, None]
        pages = paths.table_SP[s].long()[k_position // paths.page_tokens]
        offsets = k_position % paths.page_tokens
        rows = [x[pages * paths.page_tokens + offsets] for x in (key_CKD, value_CKD)]
        if scales is not None:
            rows = [from_int8(x, scales[pages, i, :, offsets], query_THD.dtype) for i, x in enumerate(rows)]
        query = query_THD[start:stop].to(wide)
        key, value = (x.to(wide).repeat_interleave(group, 1) for x in rows)
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[2])
        seen_from = torch.tensor([reach.first_seen(position) for position in own])[:, None]
        hidden = (k_position > q_position) | ((k_position < seen_from) & (k_position >= leading))
        probability = scores.masked_fill(hidden, -math.inf).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", probability, value))
    return torch.cat(outs).to(query_THD.dtype)


def attention(
    query_THD: torch.Tensor,
    key_CKD: torch.Tensor,
    value_CKD: torch.Tensor,
    paths: Paths,
    reach: Reach = EVERYTHING,
    lse_TH: torch.Tensor | None = None,
    sinks: int = 0,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, H, D]. C slots of keys and values; rows may be strided. Fills `lse_TH` (fp32) where it is given.

    A query at position q sees the keys at `reach.first_seen(q)` <= k <= q and, under a window, those at k < `sinks`.
    Keys and values may be stored as float8_e4m3fn, widened exactly to the dtype of the query, or as int8 with `scales`
    (page_pool.py), multiplied as attention_int8.py says.
    """
    if backend(query_THD) == "triton":
        from tandem.kernels.gpu import attention as gpu

        return gpu.attention(query_THD, key_CKD, value_CKD, paths, reach, lse_TH, sinks, scales)
    run = kernel("attention", "attention", query_THD.dtype, "p")
    if run is None and scales is not None:
        key_CK, value_CK = (x.transpose(1, 2).flatten(0, 1) for x in scales.unbind(1))
        key, value = (key_CKD, key_CK), (value_CKD, value_CK)
        return int8_attention_reference(query_THD, key, value, paths, reach, sinks)
    if run is None:
        return attention_reference(query_THD, key_CKD, value_CKD, paths, reach, sinks)
    assert paths.page_tokens == 1 and scales is None, "the C++ kernels read larger pages, and codes, from a KvPool"
    out_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype)
    args = _args(query_THD, key_CKD, value_CKD, paths, reach, out_THD, lse_TH, sinks)
    run(ctypes.addressof(args))
    return out_THD


def paged_attention(
    query_THD: torch.Tensor, pool: KvPool, paths: Paths, reach: Reach = EVERYTHING, sinks: int = 0
) -> torch.Tensor:
    """`attention` over the pages of a pool, with the bits that the same keys and values give as rows.

    Whatever lies in slots that no query sees, and in the table for pages that none sees, does not matter.
    """
    assert paths.page_tokens == pool.page_tokens, (paths.page_tokens, pool.page_tokens)
    if not pool.packed and pool.suffix == "_int4":
        pages, table_SP = paths.table_SP.unique(return_inverse=True)
        slots_N = (pages[:, None] * pool.page_tokens + torch.arange(pool.page_tokens)).flatten()
        read = replace(paths, table_SP=table_SP.int())
        return attention_reference(query_THD, *pool.rows(slots_N), read, reach, sinks)
    if not pool.packed:
        return attention(query_THD, pool.keys, pool.values, paths, reach, sinks=sinks, scales=pool.scales)
    library = f"attention{pool.suffix}" if pool.scales is not None else "attention"
    run = kernel(library, f"attention{pool.suffix}", query_THD.dtype, "p")
    assert run is not None and query_THD.dtype == pool.dtype, (query_THD.dtype, pool.dtype)
    out_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype)
    key_CKD, value_CKD = (x.view(-1, pool.kv_heads, pool.vector) for x in (pool.keys, pool.values))  # for its shape
    args = _args(query_THD, key_CKD, value_CKD, paths, reach, out_THD, None, sinks)
    args.kv_scales = None if pool.scales is None else pool.scales.data_ptr()
    run(ctypes.addressof(args))
    return out_THD


def attention_backward(
    dout_THD: torch.Tensor,
    out_THD: torch.Tensor,
    lse_TH: torch.Tensor,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    paths: Paths,
    reach: Reach = EVERYTHING,
    source_C: torch.Tensor | None = None,
) -> None:
    """Write the gradients of query [T, H, D], key and value [C, K, D] into `grads` (rows may be strided).

    Pages are of one token. Beside the CPU C slots may follow those of `grads`, copies of their rows `source_C` (int64)
    as they were rounded: their gradients are added to those of the rows. On a GPU the slots must be the query's rows
    themselves, each the key of some query.
    """
    query_THD, key_CKD, value_CKD = qkv
    if backend(query_THD) == "triton":
        from tandem.kernels.gpu import attention_backward as gpu

        assert source_C is None, "copies of rows have gradients on the CPU alone"
        return gpu.attention_backward(dout_THD, out_THD, lse_TH, qkv, grads, paths, reach)
    component_start = paths.component_start
    copies = 0 if source_C is None else len(source_C)
    assert paths.page_tokens == 1 and component_start is not None and len(key_CKD) == len(grads[1]) + copies, copies
    run = kernel("attention", "attention_backward", query_THD.dtype, "pp")
    assert run is not None
    args = _args(query_THD, key_CKD, value_CKD, paths, reach, out_THD, lse_TH)
    sums = torch.zeros(2, *key_CKD.shape)
    dquery, dkey, dvalue = grads
    grad_args = _Grads(
        address(dout_THD, query_THD.dtype, *query_THD.shape),
        rows_address(dquery, query_THD.dtype, *query_THD.shape),
        *(rows_address(x, query_THD.dtype, len(dkey), *key_CKD.shape[1:]) for x in (dkey, dvalue)),
        dquery.stride(0),
        dkey.stride(0),
        dvalue.stride(0),
        sums[0].data_ptr(),
        sums[1].data_ptr(),
        address(component_start, torch.int32, len(component_start)),
        len(component_start) - 1,
        len(dkey),
    )
    run(ctypes.addressof(args), ctypes.addressof(grad_args))
    if source_C is not None and len(source_C):
        rows = len(dkey)
        sums[:, :rows].index_add_(1, source_C, sums[:, rows:])
        dkey.copy_(sums[0, :rows]), dvalue.copy_(sums[1, :rows])
