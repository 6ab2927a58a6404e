"""A ModelSpec as a Hugging Face config.json: what all families have alike; families/ has the rest.

Reads both the older spelling (`rope_theta`, `rope_scaling`) and Transformers 5's (`rope_parameters`); writes the older
one, which every version reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields as fields_of
from typing import Any

from tandem.errors import ModelError
from tandem.models.families import FAMILIES, Family, family_of, unsupported
from tandem.models.fields import Fields, flag, listed, number, optional, shown, table, text, token_id, token_ids, whole
from tandem.models.spec import MOST_LAYERS, MOST_POSITIONS, ROPE_KINDS, ModelSpec, RopeScaling

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
NAMED = token_id(2**32)  # of bos and pad, which no pass of ours uses: some models name one beyond their vocabulary
_PASS = re.compile("scal|multipl|cap|clip|clamp|rope|rotary|norm|bias|window|attn|attention|head|layer|expert|moe")
_SILENT = set(
    "attention_dropout attn_implementation _attn_implementation num_experts_per_tok num_local_experts".split()
)
_YARN_DEFAULTS = {field.name: field.default for field in fields_of(RopeScaling)}


def from_hf_config(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Hugging Face config.json, with Transformers' defaults for what it leaves out; see `read_config`."""
    return read_config(Fields("config.json", config))[0]


def read_config(fields: Fields) -> tuple[ModelSpec, list[str]]:
    """The spec of a config.json, and its names that sound like the forward pass and that no class of ours reads.

    Of a model that is published with images, the text model. Raises ModelError for an architecture, activation, bias,
    rotary kind, attention pattern or mixture of experts that the decoder lacks, and for a value of the wrong kind.
    """
    named = fields.take("architectures", optional(listed(text)), None)
    kind = fields.take("model_type", optional(text), None)
    family = next((one for one in FAMILIES.values() if (named[0] if named else kind) in one.within), None)
    if family is not None:
        inner = fields.take("text_config", table, {})
        fields = Fields(fields.where, inner | {"quantization_config": fields.values.get("quantization_config")})
        fields.taken.update(("architectures", "model_type"))
    else:
        family = _family(fields.where, named, kind)
    fields = Fields(fields.where, {**family.defaults, **fields.values}, fields.taken)
    layers = fields.take("num_hidden_layers", whole(1, MOST_LAYERS))
    _refuse_variants(fields, family)
    width, heads = fields.take("hidden_size", whole(1)), fields.take("num_attention_heads", whole(1))
    max_position = fields.take("max_position_embeddings", whole(1, MOST_POSITIONS))
    rope = fields.take("rope_scaling", optional(table), None) or fields.take("rope_parameters", optional(table), None)
    turned = Fields(f"the rotary part of {fields.where}", rope or {})
    theta, scaling = _rope(fields, turned, max_position)
    size = whole(1)
    vocabulary = fields.take("vocab_size", size)
    spec = ModelSpec(
        architecture=family.architecture,
        vocab_size=vocabulary,
        width=width,
        ff_width=fields.take(family.ff_width, size),
        layers=layers,
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", optional(size), None) or heads,
        head_size=fields.take("head_dim", optional(size), None) or width // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=fields.take("rms_norm_eps", number(0.0), 1e-6),
        tied_embeddings=fields.take("tie_word_embeddings", flag, False),
        attention_bias=family.attention_bias,
        qk_norm=family.qk_norm,
        max_position=max_position,
        bos_token_id=fields.take("bos_token_id", NAMED, None),
        eos_token_ids=fields.take("eos_token_id", token_ids(vocabulary), ()),
        pad_token_id=fields.take("pad_token_id", NAMED, None),
        **family.read(fields, layers),
    )
    known = fields.taken | _SILENT
    unread = [name for name, value in fields.values.items() if value and name not in known and _PASS.search(name)]
    return spec, unread + [name for name in turned.values if name not in turned.taken]


def to_hf_config(spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """The config.json of `spec` with weights of `dtype` ("bfloat16", ...). from_hf_config gives `spec` back.

    Raises ModelError where no class of Transformers has the spec's biases, norms or attention.
    """
    family = family_of(spec.architecture)
    if spec.attention_bias != family.attention_bias or spec.qk_norm != family.qk_norm:
        raise ModelError(
            f"{family.class_name} has no variant with attention_bias={spec.attention_bias}, "
            f"qk_norm={spec.qk_norm}; qwen2 has the biases, qwen3 the norms."
        )
    own = family.write(spec)
    again = family.read(Fields("config.json", {**family.defaults, **own}), spec.layers)
    layers = again["attention"], again.get("query_temperature"), again.get("rotated_norm", False)
    if layers != (spec.layer_attention, spec.query_temperature, spec.rotated_norm):
        raise ModelError(
            f"Transformers' {spec.architecture} has no variant with these layers: {spec.attention}, query_temperature="
            f"{spec.query_temperature}, rotated_norm={spec.rotated_norm}. mistral has one window, qwen2 and qwen3 one "
            "window in some layers, smollm3 that and layers without rotation, llama4_text one chunk size, layers "
            "without rotation, the temperature and the norm."
        )
    config: dict[str, Any] = {
        "architectures": [family.class_name],
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
    return config | own


def _family(where: str, named: tuple[str, ...] | None, kind: str | None) -> Family:
    classes = {one.class_name: one for one in FAMILIES.values()}
    if named:
        if named[0] not in classes:
            raise unsupported(named[0])
        if kind not in (None, classes[named[0]].architecture):
            raise ModelError(
                f"{where} has architectures {named[0]} and model_type {shown(kind)}, which are two models. "
                "Transformers follows model_type; mend the one that is wrong."
            )
        return classes[named[0]]
    if kind is None:
        raise ModelError(f"{where} names neither architectures nor model_type; it is not a model's config.")
    return family_of(kind)


def _refuse_variants(fields: Fields, family: Family) -> None:
    for name, neutral in _VARIANTS.items():
        fields.taken.add(name)
        if name in family.own:
            continue
        value = fields.values.get(name, neutral[0])
        if not any(value == one for one in neutral):
            raise ModelError(
                f"{fields.where} has {name} = {shown(value)}, which the {family.architecture} decoder does not have. "
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
