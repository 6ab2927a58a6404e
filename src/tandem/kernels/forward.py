"""The structs of forward.cpp: a decoder's whole forward pass over pages of keys and values in one call.

The reference is the same pass an operation at a time, `models.decoder.Decoder.forward`: the bits are equal.
"""

from __future__ import annotations

import ctypes

KINDS = ("embedding", "norms", "qkv", "rotate and store", "attention", "out", "gate, up, SwiGLU", "down")
FEW = 8  # rows up to which every thread has its own normed copy of them, as in forward.cpp


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


def _sizes(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


class MatrixArgs(ctypes.Structure):
    _fields_ = _pointers("packed", "codes")


class LayerArgs(ctypes.Structure):
    _fields_ = [
        *((name, MatrixArgs) for name in ("qkv", "out", "gate_up", "down")),
        *_pointers("norm", "feed_norm", "q_norm", "k_norm", "qkv_bias", "keys", "values", "scales"),
        *_sizes("group", "rotary"),
    ]


class GroupArgs(ctypes.Structure):
    _fields_ = [*_pointers("table", "last_table", "slots"), *_sizes("table_stride", "window", "chunk", "sinks")]


class ForwardArgs(ctypes.Structure):
    _fields_ = [
        *_pointers("layers", "groups", "embedding", "norm", "tokens", "positions", "last_rows"),
        *_pointers("row_start", "first_position", "last_start", "last_positions", "cosine", "sine"),
        *_pointers("hidden", "normed", "qkv", "attended", "both", "act", "out", "seconds"),
        *_sizes("num_layers", "num_groups", "rows", "segments", "num_last", "width", "ff_width"),
        *_sizes("heads", "kv_heads", "head_size", "page_tokens"),
        ("eps", ctypes.c_float),
    ]
