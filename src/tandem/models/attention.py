"""How each layer of a decoder attends, and how a Hugging Face config.json says so.

Layers see all positions, a sliding window or chunks (`types.Reach`), and rotate queries and keys or not. Qwen says
which of its layers have the window, Llama 4 which have chunks and which rotate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tandem.errors import ModelError
from tandem.models.fields import Fields, flag, listed, optional, shown, text, whole
from tandem.types import Reach

if TYPE_CHECKING:
    from tandem.models.spec import ModelSpec

DEFAULT_CHUNK = 8192  # tokens: Transformers' for Llama 4


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What the queries of a layer see, and whether queries and keys are rotated by position.

    >>> LayerAttention(Reach(chunk=16)).rotary
    True
    """

    reach: Reach = Reach()
    rotary: bool = True  # False: no position embedding (NoPE)


@dataclass(frozen=True, slots=True)
class QueryTemperature:
    """Queries grow with the logarithm of their position, so that attention over many keys stays sharp (2501.19399).

    >>> [round(QueryTemperature().factor(position), 4) for position in (0, 8190, 8191, 100_000)]
    [1.0, 1.0, 1.0693, 1.2565]
    """

    scale: float = 0.1
    floor: int = 8192  # tokens in a row that share a factor

    def __post_init__(self) -> None:
        if self.floor <= 0:
            raise ModelError(f"floor_scale of the query temperature is {self.floor}; it must be positive.")

    def factor(self, position: int) -> float:
        """What the query at `position` is multiplied by."""
        return 1 + self.scale * math.log1p((position + 1) // self.floor)


def period(layers: tuple[LayerAttention, ...]) -> tuple[LayerAttention, ...]:
    """The shortest start of `layers` that gives them when repeated."""
    return next(
        layers[:count]
        for count in range(1, len(layers) + 1)
        if all(layer == layers[index % count] for index, layer in enumerate(layers))
    )


def attention_from_hf(fields: Fields, architecture: str, layers: int) -> tuple[LayerAttention, ...]:
    """Of each layer; one entry where all are alike. `fields` have Transformers' defaults for what the file left out."""
    rotary: tuple[int, ...] = (1,) * layers
    given = fields.take("layer_types", optional(listed(text)), None)
    if architecture == "llama4_text":
        interval = fields.take("no_rope_layer_interval", whole(1), 4)
        listed_ones = fields.take("no_rope_layers", optional(listed(whole(0, 1))), None)
        rotary = listed_ones or tuple(int((index + 1) % interval != 0) for index in range(layers))
        special, reach = "chunked_attention", Reach(chunk=fields.take("attention_chunk_size", optional(whole()), None))
        kinds = ["chunked_attention" if turned else "full_attention" for turned in rotary]
    else:
        special, first, on = "sliding_attention", 0, architecture == "mistral"
        if architecture in ("qwen2", "qwen3"):
            first, on = fields.take("max_window_layers", whole()), fields.take("use_sliding_window", flag, False)
        window = fields.take("sliding_window", optional(whole()), 4096 if on else None)
        reach = Reach(window=window if on else None)
        kinds = [
            "sliding_attention" if reach.window is not None and index >= first else "full_attention"
            for index in range(layers)
        ]
    alike = given is None or architecture not in ("llama", "mistral") or list(given) == kinds
    found = kinds if given is None else list(given)
    windowless = special == "sliding_attention" and reach.window is None and special in found
    unknown = [kind for kind in found if kind not in (special, "full_attention")]
    if unknown or len(found) != layers or len(rotary) < layers or windowless or not alike:
        raise ModelError(
            f"{fields.where} has {len(found)} layer_types and {len(rotary)} no_rope_layers for {layers} layers"
            f"{f', one of them {shown(unknown[0])}' if unknown else ''}; one a layer is needed, each "
            f"{special + ' or ' if reach != Reach() else ''}full_attention{'' if alike else ', as its class has them'}."
        )
    return tuple(
        LayerAttention(reach if kind == special else Reach(), bool(turned))
        for kind, turned in zip(found, rotary, strict=False)
    )


def attention_to_hf(spec: ModelSpec) -> dict[str, Any]:
    """The part of config.json that says how the layers attend.

    Raises ModelError where the class of Transformers has no such layers.
    """
    kind, layers = spec.architecture, spec.layer_attention
    windows = sorted({reach.window for reach in spec.reaches if reach.window is not None})
    chunks = sorted({reach.chunk for reach in spec.reaches if reach.chunk is not None})
    uniform = len(spec.attention) == 1
    limits = {"llama": 0, "mistral": int(uniform), "qwen2": 1, "qwen3": 1, "llama4_text": 0}
    llama4 = kind == "llama4_text"
    plain = all(layer.rotary for layer in layers) and not spec.rotated_norm and spec.query_temperature is None
    if len(windows) > limits[kind] or len(chunks) > int(llama4) or not (llama4 or plain):
        raise ModelError(
            f"Transformers' {kind} has no variant with these layers: {spec.attention}, query_temperature="
            f"{spec.query_temperature}, rotated_norm={spec.rotated_norm}. mistral has one window, qwen2 and qwen3 one "
            "window in some layers, llama4_text one chunk size, layers without rotation, the temperature and the norm."
        )
    window = windows[0] if windows else None
    if kind == "mistral":
        return {"sliding_window": window}
    if kind in ("qwen2", "qwen3"):
        full = [reach.window is None for reach in spec.reaches]
        config = {"use_sliding_window": bool(windows), "sliding_window": window, "max_window_layers": full.count(True)}
        types = {"layer_types": ["full_attention" if whole else "sliding_attention" for whole in full]}
        return config | types if windows else config
    if not llama4:
        return {}
    temperature = spec.query_temperature or QueryTemperature()
    return {
        "intermediate_size_mlp": spec.ff_width,
        "moe_layers": [],
        "no_rope_layers": [int(layer.rotary) for layer in layers],
        "layer_types": ["full_attention" if r.chunk is None else "chunked_attention" for r in spec.reaches],
        "attention_chunk_size": chunks[0] if chunks else DEFAULT_CHUNK,
        "attn_temperature_tuning": spec.query_temperature is not None,
        "attn_scale": temperature.scale,
        "floor_scale": temperature.floor,
        "use_qk_norm": spec.rotated_norm,
    }
