"""What a decoder is made of, and its two spellings as a Hugging Face config.json.

Reads both the older spelling (`rope_theta`, `rope_scaling`) and Transformers 5's (`rope_parameters`); writes the older
one, which every version reads.
"""

from __future__ import annotations

import math
import re
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
from tandem.models.fields import Fields, flag, listed, number, optional, shown, table, text, token_id, token_ids, whole
from tandem.types import Reach

ARCHITECTURES: dict[str, str] = {  # Hugging Face model_type -> class name
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
}
ROPE_KINDS = ("linear", "llama3", "yarn")
# No published model comes near; a file that says more would fill the memory before its tensors are looked at.
MOST_LAYERS, MOST_POSITIONS = 4096, 2**24
# Fields that change the forward pass, here or in other families, and the values (the first where the file is silent)
# under which they do not. Transformers' classes ignore most of them; whoever wrote one trained with it.
_VARIANTS: dict[str, tuple[Any, ...]] = {
    name: values
    for names, values in (
        ("hidden_act", ("silu", "swish")),
        ("attention_bias mlp_bias rope_interleaved use_mrope use_qk_norm use_bidirectional_attention", (None, False)),
        ("is_causal", (None, True)),
        ("quantization_config quantization compression_config per_layer_config", (None, {})),
        ("transformers_weights", (None, "model.safetensors", "model.safetensors.index.json")),
        ("num_experts num_local_experts", (None, 0)),
        ("sliding_window clip_qkv query_pre_attn_scalar attention_multiplier", (None,)),
        ("attn_logit_softcapping final_logit_softcapping", (None,)),
        ("embedding_multiplier residual_multiplier lm_head_multiplier logits_scaling logit_scale", (None, 1)),
        ("scale_emb scale_depth embedding_scale", (None, 1)),
    )
    for name in names.split()
}
_OWN = {  # those that an architecture reads, or whose class has them whatever the file says
    "mistral": ("sliding_window",),
    "qwen2": ("sliding_window", "attention_bias"),
    "qwen3": ("sliding_window",),
    "llama4_text": ("use_qk_norm", "num_local_experts"),
}
_PASS = re.compile("scal|multipl|cap|clip|clamp|rope|rotary|norm|bias|window|attn|attention|head|layer|expert|moe")
_SILENT = set(
    "attention_dropout attn_implementation _attn_implementation num_experts_per_tok num_local_experts".split()
)
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
    """The spec of a Hugging Face config.json, with Transformers' defaults for what it leaves out; see `read_config`."""
    return read_config(Fields("config.json", config))[0]


def read_config(fields: Fields) -> tuple[ModelSpec, list[str]]:
    """The spec of a config.json, and its names that sound like the forward pass and that no class of ours reads.

    Of Llama 4, which is published with images, the text model. Raises ModelError for an architecture, activation, bias,
    rotary kind, attention pattern or mixture of experts that the decoder lacks, and for a value of the wrong kind.
    """
    named = fields.take("architectures", optional(listed(text)), None)
    kind = fields.take("model_type", optional(text), None)
    if (named[0] if named else kind) in ("Llama4ForConditionalGeneration", "llama4"):
        named, kind = (ARCHITECTURES["llama4_text"],), "llama4_text"
        inner = fields.take("text_config", table, {})
        fields = Fields(fields.where, inner | {"quantization_config": fields.values.get("quantization_config")})
        fields.taken.update(("architectures", "model_type"))
    architecture = _architecture(fields.where, named, kind)
    _refuse_variants(fields, architecture)
    fields = Fields(fields.where, {**_DEFAULTS[architecture], **fields.values}, fields.taken)
    width, heads = fields.take("hidden_size", whole(1)), fields.take("num_attention_heads", whole(1))
    layers = fields.take("num_hidden_layers", whole(1, MOST_LAYERS))
    max_position = fields.take("max_position_embeddings", whole(1, MOST_POSITIONS))
    rope = fields.take("rope_scaling", optional(table), None) or fields.take("rope_parameters", optional(table), None)
    turned = Fields(f"the rotary part of {fields.where}", rope or {})
    theta, scaling = _rope(fields, turned, max_position)
    size = whole(1)
    head_size = fields.take("head_dim", optional(size), None)
    if head_size is None and "head_dim" in fields.values and architecture in ("qwen2", "qwen3"):
        fields.take("head_dim", size)  # their classes take no null
    llama4 = architecture == "llama4_text"
    temperature = QueryTemperature(fields.take("attn_scale", number(), 0.1), fields.take("floor_scale", whole(), 8192))
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=fields.take("vocab_size", size),
        width=width,
        ff_width=fields.take("intermediate_size_mlp" if llama4 else "intermediate_size", size),
        layers=layers,
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", optional(size), None) or heads,
        head_size=head_size or width // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=fields.take("rms_norm_eps", number(0.0), 1e-6),
        tied_embeddings=fields.take("tie_word_embeddings", flag, False),
        attention_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        max_position=max_position,
        attention=attention_from_hf(fields, architecture, layers),
        query_temperature=temperature if llama4 and fields.take("attn_temperature_tuning", flag, True) else None,
        rotated_norm=llama4 and fields.take("use_qk_norm", flag, True),
        bos_token_id=fields.take("bos_token_id", token_id, None),
        eos_token_ids=fields.take("eos_token_id", token_ids, ()),
        pad_token_id=fields.take("pad_token_id", token_id, None),
    )
    known = fields.taken | _SILENT
    unread = [name for name, value in fields.values.items() if value and name not in known and _PASS.search(name)]
    return spec, unread + [name for name in turned.values if name not in turned.taken]


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


def _architecture(where: str, named: tuple[str, ...] | None, kind: str | None) -> str:
    classes = {name: kind for kind, name in ARCHITECTURES.items()}
    if named:
        if named[0] not in classes:
            raise _unsupported(named[0])
        if kind not in (None, classes[named[0]]):
            raise ModelError(
                f"{where} has architectures {named[0]} and model_type {shown(kind)}, which are two models. "
                "Transformers follows model_type; mend the one that is wrong."
            )
        return classes[named[0]]
    if kind is None:
        raise ModelError(f"{where} names neither architectures nor model_type; it is not a model's config.")
    if kind not in ARCHITECTURES:
        raise _unsupported(kind)
    return kind


def _refuse_variants(fields: Fields, architecture: str) -> None:
    if architecture == "llama4_text":
        experts = fields.take("moe_layers", optional(listed(whole())), None)
        step = fields.take("interleave_moe_layer_step", whole(1), 1)
        layers = fields.take("num_hidden_layers", whole(1, MOST_LAYERS), 48)
        if experts is None:
            experts = tuple(range(step - 1, layers, step))
        if experts:
            raise ModelError(
                f"{fields.where} has mixture-of-experts layers ({len(experts)} of {layers}, layer {experts[0]} first), "
                "which the decoder does not have. Choose a model whose layers are all dense (an empty moe_layers)."
            )
    for name, neutral in _VARIANTS.items():
        fields.taken.add(name)
        if name in _OWN.get(architecture, ()):
            continue
        value = fields.values.get(name, neutral[0])
        if not any(value == one for one in neutral):
            raise ModelError(
                f"{fields.where} has {name} = {shown(value)}, which the {architecture} decoder does not have. "
                "Choose a model without it (an unquantised one, for quantization_config), or take out a field that the "
                "model was not trained with."
            )


def _rope(fields: Fields, rope: Fields, max_position: int) -> tuple[float, RopeScaling | None]:
    """`rope` is rope_scaling, or rope_parameters where that is empty: Transformers does not merge them."""
    nested = [name for name, value in rope.values.items() if isinstance(value, Mapping)]
    if nested:
        raise ModelError(
            f"{fields.where} gives rotary parameters by layer type ({', '.join(nested)}); one set is needed."
        )
    for place in (rope, fields):
        partial = place.take("partial_rotary_factor", optional(number()), None)
        if partial not in (None, 1.0):
            raise ModelError(f"partial_rotary_factor is {partial}; only whole heads (1.0) are supported.")
    theta = rope.take("rope_theta", number(above=1.0), fields.take("rope_theta", number(above=1.0), 10000.0))
    kind: Any = rope.take("rope_type", text, rope.take("type", text, "default"))
    if kind == "default":
        return theta, None
    if kind not in ROPE_KINDS:
        return theta, RopeScaling(kind, 1.0)  # says which there are
    if kind == "linear":
        return theta, RopeScaling(kind, rope.take("factor", number(above=0.0)))
    # One beside the rotary part goes before one within it.
    original = rope.take("original_max_position_embeddings", whole(1), max_position)
    original = fields.take("original_max_position_embeddings", whole(1), original)
    if kind == "llama3":
        low, high = (rope.take(f"{name}_freq_factor", number(above=0.0)) for name in ("low", "high"))
        if high <= low:
            raise ModelError(f"{rope.where} has high_freq_factor = {high:g}; it must be above low_freq_factor {low:g}.")
        return theta, RopeScaling(kind, rope.take("factor", number(above=0.0)), original, low, high)
    factor, turns, scale = (optional(one) for one in (number(above=0.0), number(0.0, 1e6), number(0.0)))
    return theta, RopeScaling(
        kind,
        rope.take("factor", factor) or max_position / original,
        original,
        beta_fast=rope.take("beta_fast", turns, None) or 32.0,
        beta_slow=rope.take("beta_slow", turns, None) or 1.0,
        attention_factor=rope.take("attention_factor", optional(number()), None),
        mscale=rope.take("mscale", scale, None),
        mscale_all_dim=rope.take("mscale_all_dim", scale, None),
        truncate=rope.take("truncate", flag, True),
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
