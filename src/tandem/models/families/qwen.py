"""Qwen 2 with biases and Qwen 3 with norms of queries and keys; both may have one window in some layers."""

from __future__ import annotations

from typing import Any

from tandem.models.families.family import Family, layers_of, windowed, windows_of
from tandem.models.fields import Fields, flag, whole
from tandem.models.spec import ModelSpec

_QWEN2 = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "max_window_layers": 28}
_QWEN3 = {**_QWEN2, "head_dim": 128}


def _read(fields: Fields, layers: int) -> dict[str, Any]:
    if "head_dim" in fields.values:
        fields.take("head_dim", whole(1))  # their classes take no null
    first = fields.take("max_window_layers", whole())
    reach = windowed(fields, fields.take("use_sliding_window", flag, False))
    most = layers if reach.window is None else min(first, layers)
    kinds = ["full_attention"] * most + ["sliding_attention"] * (layers - most)
    return {"attention": layers_of(fields, kinds, reach)}


def _write(spec: ModelSpec) -> dict[str, Any]:
    bias = {} if spec.attention_bias else {"attention_bias": False}
    return {**bias, **windows_of(spec), "max_window_layers": [reach.window for reach in spec.reaches].count(None)}


QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    _read,
    _write,
    _QWEN2,
    ("sliding_window", "attention_bias"),
    attention_bias=True,
    gguf_pairs=False,
)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read, _write, _QWEN3, ("sliding_window",), qk_norm=True, gguf_pairs=False)
