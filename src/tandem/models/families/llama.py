"""Llama, and Mistral with one window in all layers."""

from __future__ import annotations

from functools import partial
from typing import Any

from tandem.models.families.family import Family, layers_of, windowed
from tandem.models.fields import Fields
from tandem.models.spec import ModelSpec

_LLAMA = {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}
_MISTRAL = {**_LLAMA, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}


def _read(fields: Fields, layers: int, on: bool) -> dict[str, Any]:
    reach = windowed(fields, on)
    kind = "full_attention" if reach.window is None else "sliding_attention"
    return {"attention": layers_of(fields, [kind] * layers, reach, fixed=True)}


def _write_llama(_spec: ModelSpec) -> dict[str, Any]:
    return {"attention_bias": False, "mlp_bias": False}


def _write_mistral(spec: ModelSpec) -> dict[str, Any]:
    return {"sliding_window": spec.attention[0].reach.window}


LLAMA = Family("llama", "LlamaForCausalLM", partial(_read, on=False), _write_llama, _LLAMA, gguf_pairs=True)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    partial(_read, on=True),
    _write_mistral,
    _MISTRAL,
    ("sliding_window",),
    gguf_pairs=False,
)
