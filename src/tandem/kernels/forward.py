"""The structs of forward.cpp: a decoder's whole forward pass over pages of keys and values in one call.

The reference is the same pass an operation at a time, `models.decoder.Decoder.forward`: the bits are equal.
"""

from __future__ import annotations

import ctypes

KINDS = ("embedding", "norms", "qkv", "rotate and store", "attention", "out", "gate, up, SwiGLU", "down")
MATRICES = ("qkv", "out", "gate_up", "down")  # of a layer
FEW = 8  # rows up to which every thread has its own normed copy of them, as in forward.cpp


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


def _sizes(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


class MatrixArgs(ctypes.Structure):
    _fields_ = _pointers("packed", "codes", "eights", "fours")


class LayerArgs(ctypes.Structure):
    _fields_ = [
        *((name, MatrixArgs) for name in MATRICES),
        *_pointers("norm", "feed_norm", "q_norm", "k_norm", "qkv_bias", "keys", "values", "scales"),
        *_sizes("group", "rotary"),
    ]


class AdapterMatrixArgs(ctypes.Structure):
    _fields_ = [*_pointers("down", "scales", "pieces", "factor"), *_sizes("num_pieces", "ranks")]


class AdapterLayerArgs(ctypes.Structure):
    _fields_ = [(name, AdapterMatrixArgs) for name in MATRICES]


class AdapterArgs(ctypes.Structure):
    _fields_ = [*_pointers("layers"), *_sizes("begin", "end", "last_begin", "last_end")]


class GroupArgs(ctypes.Structure):
    _fields_ = [*_pointers("table", "last_table", "slots"), *_sizes("table_stride", "window", "chunk", "sinks")]


class ForwardArgs(ctypes.Structure):
    _fields_ = [
        *_pointers("layers", "groups", "embedding", "norm", "tokens", "positions", "last_rows"),
        *_pointers("row_start", "first_position", "last_start", "last_positions", "cosine", "sine"),
        *_pointers("hidden", "normed", "qkv", "attended", "both", "act", "out"),
        *_pointers(
            "adapters", "adapter_rows", "adapter_last", "lowered", "codes", "code_scales", "code_starts", "seconds"
        ),
        *_pointers("taps", "tap_slots", "tapped"),
        *_sizes("num_layers", "num_groups", "rows", "segments", "num_last", "width", "ff_width"),
        *_sizes("heads", "kv_heads", "head_size", "page_tokens", "num_adapters", "ranks", "deepest", "num_taps"),
        ("eps", ctypes.c_float),
    ]
