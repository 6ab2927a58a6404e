"""SmolLM3: Llama, and some layers do not rotate queries and keys (NoPE); those may have a window."""

from __future__ import annotations

from typing import Any

from tandem.models.families.family import Family, layers_of, rotated, windowed, windows_of
from tandem.models.fields import Fields, flag, optional, whole
from tandem.models.spec import ModelSpec


def _read(fields: Fields, layers: int) -> dict[str, Any]:
    rotary = rotated(fields, layers)
    fields.take("max_window_layers", optional(whole()), None)  # published, and of no effect
    reach = windowed(fields, fields.take("use_sliding_window", flag, False))
    kinds = ["full_attention" if turned or reach.window is None else "sliding_attention" for turned in rotary[:layers]]
    return {"attention": layers_of(fields, kinds, reach, rotary)}


def _write(spec: ModelSpec) -> dict[str, Any]:
    turned = [int(layer.rotary) for layer in spec.layer_attention]
    return {"attention_bias": False, "mlp_bias": False, "no_rope_layers": turned, **windows_of(spec)}


_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 4,
    "rope_theta": 2e6,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 128004,
}
SMOLLM3 = Family("smollm3", "SmolLM3ForCausalLM", _read, _write, _DEFAULTS, ("sliding_window",))
