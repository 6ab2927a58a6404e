"""Configs and headers with values drawn at random: the model that Transformers makes of them, or a ModelError."""

from __future__ import annotations

import json
import math
import struct
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFValueType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tandem.errors import ModelError
from tandem.models.checkpoint import Checkpoint, open_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.families import FAMILIES
from tandem.models.hf_config import from_hf_config, to_hf_config
from tandem.models.parts import expected_shapes
from tandem.models.spec import ModelSpec
from tandem.models.view import PackView

SHAPE: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "intermediate_size_mlp": 40, "num_hidden_layers": 2, "vocab_size": 61,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 6, "moe_layers": [],
}  # fmt: skip
transformers.logging.set_verbosity_error()
TOKENS = (torch.arange(40) * 7) % 61
ROPE = {
    "rope_type": ["default", "linear", "llama3", "yarn"],
    "type": ["linear", "yarn", "longrope"],
    "factor": [2.0, 8, None],
    "low_freq_factor": [1.0, 2],
    "high_freq_factor": [4.0, 1.0],
    "original_max_position_embeddings": [16, 32],
    "rope_theta": [1e4, 500000],
    "partial_rotary_factor": [1.0, 0.5],
    "beta_fast": [32, None],
    "attention_factor": [1.2, None],
    "mscale": [0.7],
    "mscale_all_dim": [0.9],
    "truncate": [True, False],
}
WHOLE: list[dict[str, Any]] = [
    {},
    {"rope_type": "linear", "factor": 2.0},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 3e4},
]
PLAUSIBLE: dict[str, list[Any]] = {
    **{name: [4, 8, 12, 24, None] for name in SHAPE},
    "rope_theta": [1e4, 500000.0, 300],
    "partial_rotary_factor": [1.0, 0.25],
    "original_max_position_embeddings": [16, 32],
    "rms_norm_eps": [1e-5, 1e-2],
    "hidden_act": ["silu", "gelu"],
    "tie_word_embeddings": [True, False],
    "sliding_window": [None, 5, 8],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 1, 2],
    "layer_types": [["full_attention"] * 2, ["sliding_attention", "full_attention"], ["chunked_attention"] * 2],
    "attention_bias": [False, True],
    "mlp_bias": [False, True],
    "attention_chunk_size": [8, None],
    "no_rope_layers": [[1, 0], [0, 0], [1, 1]],
    "no_rope_layer_interval": [1, 2],
    "attn_temperature_tuning": [True, False],
    "floor_scale": [4, 16],
    "attn_scale": [0.5],
    "use_qk_norm": [True, False],
    "interleave_moe_layer_step": [1, 3],
    "eos_token_id": [2, [2, 3], None],
    "quantization_config": [None, {"quant_method": "fp8"}],
    "query_pre_attn_scalar": [None, 64],
    "model_type": list(FAMILIES),
    "architectures": [[one.class_name] for one in FAMILIES.values()],
}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=5)
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, math.inf, -0.0, 1e-320, 1e308, "\ud800", "x" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


def drawn(draw: st.DrawFn, names: dict[str, list[Any]], most: int) -> dict[str, Any]:
    chosen = draw(st.lists(st.sampled_from(sorted(names)), max_size=most, unique=True))
    return {name: draw(st.sampled_from(names[name]) if draw(st.integers(0, 3)) else ANYTHING) for name in chosen}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(sorted(FAMILIES)))
    config = {**SHAPE, "pad_token_id": 0, "model_type": kind, "architectures": [FAMILIES[kind].class_name]}
    for place in draw(st.lists(st.sampled_from(["rope_scaling", "rope_parameters"]), unique=True)):
        config[place] = {**draw(st.sampled_from(WHOLE)), **drawn(draw, ROPE, 2)}
        for name in draw(st.sampled_from([(), (), *((name,) for name in ROPE)])):
            config[place].pop(name, None)
    for name in draw(st.lists(st.sampled_from(sorted(config)), max_size=2)):
        config.pop(name, None)
    return config | drawn(draw, PLAUSIBLE, 4)


def theirs(config: dict[str, Any]) -> Any:
    """The model that Transformers makes; None where it makes none, or one that cannot run."""
    torch.manual_seed(0)
    try:
        made = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
        model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
        with torch.no_grad():
            for name, one in model.named_parameters():
                one.copy_(1 + 0.2 * torch.randn(one.shape) if "norm" in name else torch.randn(one.shape) * 0.3)
            return model, model(TOKENS[None]).logits[0]
    except Exception:  # noqa: BLE001  whatever a library does with such a config
        return None


def small(spec: ModelSpec) -> bool:
    total = sum(math.prod(shape) for shape in expected_shapes(spec).values()) if spec.layers < 9 else 10**9
    return total < 10**5 and spec.max_position < 5000


@given(config=configs())
@settings(max_examples=200)
def test_any_config(config: dict[str, Any]) -> None:
    """A value of config.json is believed where Transformers reads another, or ends in a traceback."""
    try:
        spec = from_hf_config(config)
    except ModelError as error:
        assert len(str(error)) < 600
        return
    made = theirs(config) if small(spec) and spec.vocab_size == 61 else None
    if made is None:
        return
    model, wanted = made
    tensors = dict(model.state_dict())
    renaming = FAMILIES[spec.architecture].renaming
    if renaming is not None:
        named = {str(renaming.read_name(name)): one for name, one in tensors.items()}
        tensors = {name: renaming.read(spec, name, one) for name, one in named.items()}
    if spec.tied_embeddings:
        tensors.pop("lm_head.weight")
    assert {name: tuple(one.shape) for name, one in tensors.items()} == expected_shapes(spec)
    decoder = Decoder(spec, "float32").load(tensors.items())
    with torch.no_grad():
        count = min(40, spec.max_position)
        found = decoder.logits(decoder.forward(TOKENS[:count], PackView([0, count])))
    torch.testing.assert_close(found, wanted[:count], atol=1e-3, rtol=1e-3, equal_nan=True)


FIELDS: dict[str, tuple[Type, Any]] = {
    "context_length": (Type.UINT32, 64),
    "embedding_length": (Type.UINT32, 8),
    "feed_forward_length": (Type.UINT32, 16),
    "block_count": (Type.UINT32, 1),
    "attention.head_count": (Type.UINT32, 2),
    "attention.head_count_kv": (Type.UINT32, 1),
    "attention.layer_norm_rms_epsilon": (Type.FLOAT32, 1e-5),
    "attention.key_length": (Type.UINT32, 4),
    "attention.value_length": (Type.UINT32, 4),
    "rope.dimension_count": (Type.UINT32, 4),
    "rope.freq_base": (Type.FLOAT32, 1e4),
}
MORE = (
    "attention.sliding_window rope.scaling.type rope.scaling.factor rope.scaling.original_context_length expert_count "
    "rope.scaling.yarn_beta_fast rope.scale_linear attention.scale attention.causal rope.scaling.attn_factor"
).split()
NAMES = [f"llama.{name}" for name in (*FIELDS, *MORE)]
NAMES += "general.alignment general.architecture tokenizer.ggml.eos_token_id split.count split.no".split()
REALS = [0.0, -1.0, 4.0, math.nan, math.inf, 1e-38]
VALUES = st.one_of(
    st.tuples(st.sampled_from([Type.UINT32, Type.INT32, Type.UINT64, Type.INT64]), st.integers(0, 2**31 - 1)),
    st.tuples(st.just(Type.INT32), st.integers(-(2**31), -1)),
    st.tuples(st.just(Type.UINT64), st.sampled_from([2**32 - 1, 2**40, 2**63, 2**64 - 1])),
    st.tuples(st.sampled_from([Type.FLOAT32, Type.FLOAT64]), st.sampled_from(REALS)),
    st.tuples(st.just(Type.BOOL), st.booleans()),
    st.tuples(st.just(Type.STRING), st.sampled_from(["", "linear", "yarn", "none", "64", "llama"])),
    st.tuples(st.just(Type.ARRAY), st.sampled_from([[1, 2], [0.5], ["a"], [True]])),
)  # fmt: skip


def header(path: Path, changes: dict[str, tuple[Type, Any] | None], factors: list[float] | None = None) -> Path:
    """A model of one small layer whose metadata has `changes`; None removes a value."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in ({f"llama.{name}": value for name, value in FIELDS.items()} | changes).items():
        if value is not None and name != "general.architecture":
            writer.add_key_value(name, value[1], value[0])
        elif value is not None:
            writer.kv_data[0][name].value, writer.kv_data[0][name].type = value[1], value[0]
    shapes = {"attn_norm": (8,), "ffn_norm": (8,), "attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8),
              "attn_output": (8, 8), "ffn_gate": (16, 8), "ffn_up": (16, 8), "ffn_down": (8, 16)}  # fmt: skip
    for name, shape in {
        "token_embd": (32, 8),
        "output_norm": (8,),
        **{f"blk.0.{n}": s for n, s in shapes.items()},
    }.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.1, np.float32))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def opened_or_refused(path: Path) -> Checkpoint | None:
    """Every tensor is read; whatever is raised but ModelError fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opened = open_checkpoint(str(path))
            for _, tensor in opened.tensors():
                assert tensor.isfinite().all() or tensor.numel()
        except ModelError as error:
            assert len(str(error)) < 900
            return None
    return opened


@given(changes=st.dictionaries(st.sampled_from(NAMES), VALUES | st.none(), max_size=2))
@settings(max_examples=200)
def test_any_metadata(changes: dict[str, tuple[Type, Any] | None], tmp_path: Path) -> None:
    """A string, an array, a NaN or 2^63 in a GGUF header ends in a traceback, or becomes a model."""
    opened = opened_or_refused(header(tmp_path / "m.gguf", changes))
    if opened is not None:
        spec = opened.spec
        assert (spec.width, spec.layers, spec.heads, spec.kv_heads, spec.head_size) == (8, 1, 2, 1, 4)
        assert 0 < spec.max_position <= 2**24 and math.isfinite(spec.rope_theta) and spec.rope_theta > 1
        assert (
            math.isfinite(spec.norm_eps) and spec.norm_eps >= 0 and all(0 <= one < 2**31 for one in spec.eos_token_ids)
        )


WORDS = [struct.pack("<I", word) for word in (0, 4, 5, 7, 8, 9, 14, 99, 2**31, 2**32 - 1)]
WORDS += [struct.pack("<Q", word) for word in (0, 1, 2**31, 2**40, 2**61, 2**62, 2**63, 2**64 - 1, 2**64 - 64)]


def test_every_word_of_a_header(tmp_path: Path) -> None:
    """A wrong length, type, count, offset or shape in a GGUF header ends in a traceback, or asks for terabytes."""
    path = header(tmp_path / "m.gguf", {"general.alignment": (Type.UINT32, 32)}, [1.0, 8.0])
    whole = path.read_bytes()
    keys = ("general.alignment", "llama.block_count", "llama.rope.freq_base")
    for name in (*keys, "token_embd.weight", "rope_freqs.weight"):
        at = whole.index(name.encode())
        for start in (at - 8, *(at + len(name) + after for after in (0, 4, 8, 12, 16, 20, 24, 28))):
            for word in WORDS:
                path.write_bytes(whole[:start] + word + whole[start + len(word) :])
                opened_or_refused(path)


FLIPS = st.lists(st.tuples(st.integers(0, 1400), st.integers(1, 255)), min_size=1, max_size=4)


@given(flips=FLIPS, cut=st.sampled_from([9999, 99, 999]))
@settings(max_examples=200)
def test_flipped_bytes_of_a_header(flips: list[tuple[int, int]], cut: int, tmp_path: Path) -> None:
    """A damaged GGUF header ends in a traceback."""
    whole = bytearray(header(tmp_path / "m.gguf", {}, [1.0, 8.0]).read_bytes())
    for place, mask in flips:
        whole[place] ^= mask
    (tmp_path / "m.gguf").write_bytes(whole[:cut])
    opened_or_refused(tmp_path / "m.gguf")


@given(flips=FLIPS)
@settings(max_examples=200)
def test_flipped_bytes_of_safetensors(flips: list[tuple[int, int]], tmp_path: Path) -> None:
    """A damaged header of a safetensors file ends in a traceback."""
    spec = ModelSpec("llama", 32, 8, 16, 1, 2, 1, 4, tied_embeddings=True)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(spec, "float32")))
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in expected_shapes(spec).items()}, path)
    whole = bytearray(path.read_bytes())
    for place, mask in flips:
        whole[place % len(whole)] ^= mask
    path.write_bytes(whole)
    opened_or_refused(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"llama.block_count": (Type.STRING, "1")},
            r"llama\.\*\) has block_count = '1'; a whole number from 1 to 4096",
        ),
        ({"llama.block_count": (Type.UINT32, 10**9)}, "block_count = 1000000000; a whole number from 1 to 4096"),
        ({"llama.block_count": (Type.BOOL, True)}, "block_count = True"),
        ({"llama.context_length": (Type.UINT64, 2**40)}, "context_length = 1099511627776; a whole number"),
        ({"llama.attention.head_count": (Type.ARRAY, [2, 2])}, "head_count = array"),
        ({"llama.rope.freq_base": (Type.FLOAT32, math.nan)}, "rope.freq_base = nan"),
        ({"llama.attention.value_length": (Type.UINT32, 2)}, "value_length = 2 for heads of 4"),
        (
            {"llama.attention.scale": (Type.FLOAT32, 0.3)},
            "llama.attention.scale = 0.3.*, which the decoder does not have",
        ),
        ({"llama.attention.causal": (Type.BOOL, False)}, "llama.attention.causal = False"),
        ({"llama.rope.scaling.attn_factor": (Type.FLOAT32, 0.9)}, "attn_factor = 0.8999"),
        ({"llama.embedding_length": None}, "lacks embedding_length; a whole number"),
        ({"general.alignment": (Type.UINT32, 0)}, "general.alignment = 0"),
        ({"general.alignment": (Type.STRING, "32")}, "general.alignment = '32'"),
    ],
)
def test_metadata_that_is_refused(changes: dict[str, tuple[Type, Any] | None], message: str, tmp_path: Path) -> None:
    """A value of the wrong kind in a GGUF header, or one that changes the pass, is not named, or goes unseen."""
    with pytest.raises(ModelError, match=message):
        open_checkpoint(str(header(tmp_path / "m.gguf", changes)))


def test_metadata_that_changes_the_rotation(tmp_path: Path) -> None:
    """llama.cpp's older name of a linear factor, or a factor without a type, is passed over; an id of -1 is a token."""
    for name in ("rope.scale_linear", "rope.scaling.factor"):
        scaling = open_checkpoint(
            str(header(tmp_path / "m.gguf", {f"llama.{name}": (Type.FLOAT32, 4.0)}))
        ).spec.rope_scaling
        assert scaling is not None and (scaling.kind, scaling.factor) == ("linear", 4.0)
    changes = {"tokenizer.ggml.eos_token_id": (Type.UINT32, 2**32 - 1), "tokenizer.ggml.bos_token_id": (Type.INT32, -1)}
    spec = open_checkpoint(str(header(tmp_path / "m.gguf", dict(changes)))).spec
    assert (spec.eos_token_ids, spec.bos_token_id) == ((), None)
    both = {"llama.rope.scaling.factor": (Type.FLOAT32, 4.0)}
    with pytest.raises(ModelError, match="frequency factors and linear scaling"):
        open_checkpoint(str(header(tmp_path / "m.gguf", dict(both), [1.0, 8.0])))
    for factors in ([math.nan, 1.0], [math.inf, 1.0], [0.0, 0.0], [1.0], [1.0, 2.0, 3.0]):
        with pytest.raises(ModelError, match=r"rotary frequency factors|should hold 2 factors"):
            open_checkpoint(str(header(tmp_path / "m.gguf", {}, factors)))


def test_arrays_of_arrays(tmp_path: Path) -> None:
    """Arrays nested by the thousand, which GGUF's readers refuse, end in a traceback of too deep a recursion."""
    name = b"x"
    nested = struct.pack("<IQ", 9, 1) * 50_000 + struct.pack("<IQI", 4, 1, 7)
    body = struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(name)) + name + struct.pack("<I", 9) + nested
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + body)
    with pytest.raises(ModelError, match="has an array of unknown type 9"):
        open_checkpoint(str(tmp_path / "m.gguf"))
