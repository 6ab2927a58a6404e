"""What a decoder is made of, and its two spellings as a Hugging Face config.json.

Reads both the older spelling (`rope_theta`, `rope_scaling`) and Transformers 5's (`rope_parameters`); writes the older
one, which every version reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from tandem.errors import ModelError
from tandem.models.attention import (
    DEFAULT_CHUNK,
    LayerAttention,
    QueryTemperature,
    attention_from_hf,
    attention_to_hf,
    period,
)
from tandem.types import Reach

ARCHITECTURES: dict[str, str] = {  # Hugging Face model_type -> class name
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
}
ROPE_KINDS = ("linear", "llama3", "yarn")
# What Transformers assumes where config.json is silent. Shared: rms_norm_eps 1e-6, rope_theta 1e4, tied False.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "max_window_layers": 28},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "max_window_layers": 28, "head_dim": 128},
    "llama4_text": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size_mlp": 16384,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "attention_chunk_size": DEFAULT_CHUNK,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    linear: arXiv:2306.15595. yarn: arXiv:2309.00071. llama3: the Llama 3.1 release. The fields are those of
    Transformers' `modeling_rope_utils`; a kind ignores the fields that it does not name.

    >>> RopeScaling("linear", factor=2.0).factor
    2.0
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position: int = 0  # tokens, of pre-training (llama3, yarn)
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: rotations above which a dimension is left alone
    beta_slow: float = 1.0  # yarn: rotations below which a dimension is interpolated
    attention_factor: float | None = None  # yarn: scale of cos and sin; None derives it from factor and mscale
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ModelError(
                f"rotary scaling {self.kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}. "
                "Remove rope_scaling from config.json to use the model within its trained context."
            )
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise ModelError(f"rotary scaling factor is {self.factor}; it must be a positive number.")
        if self.kind != "linear" and self.original_max_position <= 0:
            raise ModelError(f"rotary scaling {self.kind} needs original_max_position_embeddings, a positive integer.")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer: pre-norm, RMSNorm, rotary, gated SiLU feed-forward, grouped-query attention.

    >>> ModelSpec("llama", vocab_size=32, width=8, ff_width=16, layers=1, heads=2, kv_heads=1, head_size=4).head_size
    4
    """

    architecture: str  # a key of ARCHITECTURES
    vocab_size: int  # V
    width: int  # M
    ff_width: int  # F
    layers: int
    heads: int  # H
    kv_heads: int  # K
    head_size: int  # D
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied_embeddings: bool = False
    attention_bias: bool = False  # of the q, k and v projections (Qwen2); the output projection has none
    qk_norm: bool = False  # RMSNorm over each head of q and k before rotation (Qwen3)
    max_position: int = 2048  # tokens
    attention: tuple[LayerAttention, ...] = (LayerAttention(),)  # of the layers in turn, repeated; kept as one period
    query_temperature: QueryTemperature | None = None  # of the layers without rotation
    rotated_norm: bool = False  # each rotated head of q and k is divided by its root mean square (Llama 4)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise _unsupported(self.architecture)
        for name in ("vocab_size", "width", "ff_width", "layers", "heads", "kv_heads", "head_size", "max_position"):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise ModelError(f"the model's {name} is {value!r}; it must be a positive integer.")
        if self.heads % self.kv_heads:
            raise ModelError(f"{self.heads} query heads do not divide into {self.kv_heads} key-value heads.")
        if self.head_size % 2:
            raise ModelError(f"head size {self.head_size} is odd; rotary embedding needs an even one.")
        if not 0 < len(self.attention) <= self.layers:
            raise ModelError(f"the attention of {len(self.attention)} layers is given for {self.layers} layers.")
        for reach in {layer.reach for layer in self.attention}:
            for name, size in (("window", reach.window), ("chunk", reach.chunk)):
                if size is not None and size <= 0:
                    raise ModelError(f"the attention {name} is {size}; it must be positive, or null for none.")
        object.__setattr__(self, "attention", period(self.attention))

    @property
    def layer_attention(self) -> tuple[LayerAttention, ...]:
        """Of each layer."""
        repeats = -(-self.layers // len(self.attention))
        return (self.attention * repeats)[: self.layers]

    @property
    def reaches(self) -> tuple[Reach, ...]:
        """What the queries of each layer see."""
        return tuple(layer.reach for layer in self.layer_attention)


_YARN_DEFAULTS = {field.name: field.default for field in fields(RopeScaling)}


def from_hf_config(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Hugging Face config.json, with Transformers' defaults for what it leaves out.

    Of Llama 4, which is published with images, the text model. Raises ModelError for an architecture, activation, bias,
    rotary kind, attention pattern or mixture of experts that the decoder lacks.
    """
    if (config.get("architectures") or [config.get("model_type")])[0] in ("Llama4ForConditionalGeneration", "llama4"):
        text = {"architectures": [ARCHITECTURES["llama4_text"]], "model_type": "llama4_text"}
        config = {**config.get("text_config", {}), **text, "quantization_config": config.get("quantization_config")}
    architecture = _architecture(config)
    _refuse_variants(config, architecture)
    values = {**_DEFAULTS[architecture], **config}
    width, heads = _whole(values, "hidden_size"), _whole(values, "num_attention_heads")
    max_position = _whole(values, "max_position_embeddings")
    theta, scaling = _rope(values, max_position)
    eos = values.get("eos_token_id")
    llama4 = architecture == "llama4_text"
    tempered = llama4 and values.get("attn_temperature_tuning", True)
    return ModelSpec(
        architecture=architecture,
        vocab_size=_whole(values, "vocab_size"),
        width=width,
        ff_width=_whole(values, "intermediate_size_mlp" if llama4 else "intermediate_size"),
        layers=_whole(values, "num_hidden_layers"),
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_size=values.get("head_dim") or width // max(heads, 1),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        attention_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        max_position=max_position,
        attention=attention_from_hf(values, architecture, _whole(values, "num_hidden_layers")),
        query_temperature=QueryTemperature(float(values.get("attn_scale", 0.1)), int(values.get("floor_scale", 8192)))
        if tempered
        else None,
        rotated_norm=llama4 and bool(values.get("use_qk_norm", True)),
        bos_token_id=values.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (int(eos),),
        pad_token_id=values.get("pad_token_id"),
    )


def to_hf_config(spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """The config.json of `spec` with weights of `dtype` ("bfloat16", ...). from_hf_config gives `spec` back.

    Raises ModelError where no class of Transformers has the spec's biases, norms or attention.
    """
    if spec.attention_bias != (spec.architecture == "qwen2") or spec.qk_norm != (spec.architecture == "qwen3"):
        raise ModelError(
            f"{ARCHITECTURES[spec.architecture]} has no variant with attention_bias={spec.attention_bias}, "
            f"qk_norm={spec.qk_norm}; qwen2 has the biases, qwen3 the norms."
        )
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[spec.architecture]],
        "model_type": spec.architecture,
        "torch_dtype": dtype,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "intermediate_size": spec.ff_width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_position,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_scaling": None if spec.rope_scaling is None else _rope_to_hf(spec.rope_scaling),
        "tie_word_embeddings": spec.tied_embeddings,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": spec.eos_token_ids[0] if len(spec.eos_token_ids) == 1 else list(spec.eos_token_ids) or None,
        "pad_token_id": spec.pad_token_id,
        "use_cache": True,
    }
    if spec.architecture in ("llama", "qwen3", "llama4_text"):
        config["attention_bias"] = False
    if spec.architecture == "llama":
        config["mlp_bias"] = False
    return config | attention_to_hf(spec)


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Hugging Face checkpoint of `spec`, in the order of the forward pass.

    Llama 4's are translated (llama4.py). Projections are [out, in]. A tied model has no `lm_head.weight`.
    """
    width, ff, head = spec.width, spec.ff_width, spec.head_size
    query, key = spec.heads * head, spec.kv_heads * head
    layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (width,)}
    for name, rows in (("q", query), ("k", key), ("v", key)):
        layer[f"self_attn.{name}_proj.weight"] = (rows, width)
        if spec.attention_bias:
            layer[f"self_attn.{name}_proj.bias"] = (rows,)
    if spec.qk_norm:
        layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (head,)
    layer |= {
        "self_attn.o_proj.weight": (width, query),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (ff, width),
        "mlp.up_proj.weight": (ff, width),
        "mlp.down_proj.weight": (width, ff),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, width)}
    for index in range(spec.layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (width,)
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, width)
    return shapes


def llama3_frequency_factors(spec: ModelSpec, scaling: RopeScaling) -> list[float]:
    """D/2 divisors of the rotary frequencies under the llama3 scaling, as llama.cpp stores them in `rope_freqs.weight`.

    Wavelengths shorter than original/high keep their frequency, longer than original/low are divided by `factor`,
    and those between are blended (Transformers' `_compute_llama3_parameters`).
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    factors = []
    for index in range(spec.head_size // 2):
        wavelength = 2 * math.pi * spec.rope_theta ** (2 * index / spec.head_size)
        smooth = min(max((scaling.original_max_position / wavelength - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return factors


def _unsupported(name: str) -> ModelError:
    return ModelError(
        f"architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES.values())} "
        f"({', '.join(ARCHITECTURES)}). Choose a model of one of these families."
    )


def _architecture(config: Mapping[str, Any]) -> str:
    classes = {name: kind for kind, name in ARCHITECTURES.items()}
    named = config.get("architectures") or []
    if named:
        if named[0] not in classes:
            raise _unsupported(str(named[0]))
        return classes[named[0]]
    kind = config.get("model_type")
    if kind is None:
        raise ModelError("config.json names neither architectures nor model_type; it is not a model's config.")
    if kind not in ARCHITECTURES:
        raise _unsupported(str(kind))
    return str(kind)


def _refuse_variants(config: Mapping[str, Any], architecture: str) -> None:
    refused = {
        "hidden_act": config.get("hidden_act") not in (None, "silu", "swish"),
        "attention_bias": bool(config.get("attention_bias")) and architecture != "qwen2",
        "mlp_bias": bool(config.get("mlp_bias")),
        "quantization_config": bool(config.get("quantization_config")),
    }
    if architecture == "llama4_text":
        experts = config.get("moe_layers")
        step, layers = config.get("interleave_moe_layer_step", 1), config.get("num_hidden_layers", 48)
        experts = list(range(step - 1, layers, step)) if experts is None else experts
        if experts:
            raise ModelError(
                f"config.json has mixture-of-experts layers ({len(experts)} of {layers}, layer {experts[0]} first), "
                "which the decoder does not have. Choose a model whose layers are all dense (an empty moe_layers)."
            )
    for name, present in refused.items():
        if present:
            raise ModelError(
                f"config.json has {name} = {config[name]!r}, which the {architecture} decoder does not have. "
                "Choose a model without it (an unquantised one, for quantization_config)."
            )


def _whole(values: Mapping[str, Any], name: str) -> int:
    if not isinstance(values.get(name), int):
        raise ModelError(f"config.json has {name} = {values.get(name)!r}; an integer is needed.")
    return int(values[name])


def _rope(config: Mapping[str, Any], max_position: int) -> tuple[float, RopeScaling | None]:
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        raise ModelError(f"config.json gives rotary parameters by layer type ({', '.join(nested)}); one set is needed.")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ModelError(f"partial_rotary_factor is {partial}; only whole heads (1.0) are supported.")
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    original = int(rope.get("original_max_position_embeddings") or max_position)
    factor = rope.get("factor")
    if factor is None and kind == "yarn":
        factor = max_position / original
    if kind in ROPE_KINDS and not isinstance(factor, (int, float)):
        raise ModelError(f"rotary scaling {kind} has factor = {factor!r}; a number is needed.")
    if kind != "yarn":
        return theta, RopeScaling(
            kind,
            float(factor or 0),
            0 if kind == "linear" else original,
            float(rope.get("low_freq_factor", 1.0)),
            float(rope.get("high_freq_factor", 4.0)),
        )
    return theta, RopeScaling(
        "yarn",
        float(factor or 0),
        original,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        attention_factor=rope.get("attention_factor"),
        mscale=rope.get("mscale"),
        mscale_all_dim=rope.get("mscale_all_dim"),
        truncate=bool(rope.get("truncate", True)),
    )


def _rope_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return values
    values["original_max_position_embeddings"] = scaling.original_max_position
    if scaling.kind == "llama3":
        return values | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"):
        if getattr(scaling, name) != _YARN_DEFAULTS[name]:
            values[name] = getattr(scaling, name)
    return values
