"""GGUF files that are written here: blocks against gguf's own code, files against what they were made of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType
from tokenizers import decoders, models, pre_tokenizers, trainers

from tandem.cli.main import main
from tandem.errors import ModelError, NonFiniteError, TandemWarning
from tandem.models.checkpoint import open_checkpoint
from tandem.models.gguf import read_header
from tandem.models.gguf_tokens import _REST, _WORDS, tokenizer_fields
from tandem.models.gguf_write import FILE_TYPES, FLOATS, GgufKind, metadata, write_gguf
from tandem.models.parts import expected_shapes, layer_slots
from tandem.models.spec import LayerAttention, ModelSpec, RopeScaling
from tandem.models.tokenizer import Tokenizer
from tandem.numerics import ggml
from tandem.numerics.blocks import format_of, rounded, sqnr_db
from tandem.numerics.ggml import TYPES, GgmlType
from tandem.numerics.gptq import factor
from tandem.types import Reach

# What gguf's Python writes, to the bit; it has no encoder of the others.
THEIRS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
SPEC = ModelSpec(
    "llama", vocab_size=64, width=128, ff_width=256, layers=2, heads=4, kv_heads=2, head_size=32, norm_eps=1e-5
)


def numbers(rows: int = 24, width: int = 512) -> torch.Tensor:
    """Rows of several sizes, with blocks of zeros, of one number and of one sign, numbers of bf16 and ties."""
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=drawn) * torch.exp2(torch.arange(rows) % 9 - 7.0)[:, None]
    x[3, :256], x[4, 32:64], x[5, :64], x[6, :256] = 0.0, 0.0, 0.3, -0.3
    x[7] = x[7].abs()
    x[8:10] = x[8:10].bfloat16().float()
    x[10] = (x[10] * 4).round() / 4 + 0.0  # of 0 and -0, NumPy and torch call another one the least
    return x


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_blocks_are_what_gguf_reads_and_writes(kind: GgmlType) -> None:
    """Scales, codes or high bits in another place or order than llama.cpp's, or codes that its reference has not."""
    x = numbers()
    coded = ggml.encode(x, kind)
    raw = coded.packed().numpy()
    assert raw.shape == (24, 512 // kind.block * kind.size_bytes)
    read = torch.from_numpy(gguf.dequantize(raw, Kind[kind.name]))
    if coded.whole is None:
        assert torch.equal(read, coded.values())
    else:
        torch.testing.assert_close(read * coded.whole, coded.values(), rtol=2.0**-22, atol=0)
    if kind.name in THEIRS:
        wanted = gguf.quantize(x.numpy(), Kind[kind.name])
        assert (raw != wanted).sum() <= (
            12 if kind.name == "MXFP4" else 0
        )  # its ties go down, and not to the even code
    alone = ggml.encode(x[5:6], kind)
    assert kind.name == "NVFP4" or torch.equal(alone.values(), coded.values()[5:6])


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_scales_are_searched(kind: GgmlType) -> None:
    """Scales that err more than those of a block's ends do, or integers of a super-block that nobody looked for."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    found, plain = sqnr_db(x, ggml.encode(x, kind).values()), sqnr_db(x, rounded(x, format_of(kind.like)))
    # K formats beat integers with scales of 32 bits, and IQ4_NL its own levels spread evenly.
    more = {"Q2_K": 2.0, "Q3_K": 2.5, "Q4_K": 1.1, "Q5_K": 0.9, "Q6_K": 0.8, "IQ4_NL": 2.0, "Q4_0": 1.0}
    assert found > plain + more.get(kind.name, -0.02)


def test_a_group_has_the_least_error() -> None:
    """A search that misses scales: all pairs of a scale and what is taken off, of a super-block of Q2_K, by force."""
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(2))
    coded = ggml.encode(x, TYPES["Q2_K"])
    error = (coded.values() - x).square().view(16, 16).sum(-1)
    d, off = (float(one.view(torch.float16)) for one in coded.heads[2:])
    grid = torch.arange(16.0)
    scales, lows = (d * grid)[:, None, None], (off * grid)[None, :, None]
    for group, own in enumerate(x.view(16, 16)):
        code = ((own + lows) / scales.where(scales > 0, torch.inf)).round().clamp(0, 3)
        least = (code * scales - lows - own).square().sum(-1).min()
        assert error[group] <= 1.1 * least, group


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "IQ4_NL", "Q4_1", "MXFP4"])
def test_gptq_by_a_types_scales(name: str) -> None:
    """GPTQ with the scale of another group, or errors that are made up for in the wrong direction."""
    drawn = torch.Generator().manual_seed(3)
    weight, inputs = torch.randn(32, 256, generator=drawn), torch.randn(512, 256, generator=drawn)
    inputs = inputs @ torch.randn(256, 256, generator=drawn)
    hessian = inputs.T @ inputs
    nearest, better = ggml.encode(weight, TYPES[name]), ggml.gptq(weight, factor(hessian), TYPES[name])
    costs = [float(((one.values() - weight) @ hessian * (one.values() - weight)).sum()) for one in (nearest, better)]
    assert costs[1] < 0.75 * costs[0]
    assert torch.equal(nearest.scales_NG, better.scales_NG)
    read = gguf.dequantize(better.packed().numpy(), Kind[name])
    assert torch.equal(torch.from_numpy(read), better.values())
    assert torch.equal(better.of(better.values()).codes_NK, better.codes_NK)


def test_what_is_no_number() -> None:
    """A NaN that becomes a scale, or a scale beyond fp16 that is written as infinity."""
    x = torch.ones(2, 256)
    x[1, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="1 of 512 numbers are not finite: Q4_K has none"):
        ggml.encode(x, TYPES["Q4_K"])
    with pytest.raises(NonFiniteError, match="scales of Q8_0 are fp16, which ends at 65504"):
        ggml.encode(torch.full((1, 32), 1e8), TYPES["Q8_0"])


def drawn(spec: ModelSpec) -> dict[str, torch.Tensor]:
    found = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=found) for name, shape in expected_shapes(spec).items()}


def save(path: Path, spec: ModelSpec, kind: GgufKind) -> dict[str, torch.Tensor]:
    """What the file was made of: matrices as they read back."""
    tensors, types = drawn(spec), kind.types(spec)
    coded = {name: one and ggml.encode(tensors[name], one) for name, one in types.items()}
    write_gguf(path, spec, tensors, coded, metadata(spec), kind)
    return tensors | {name: one.values() if one else tensors[name].half() for name, one in coded.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": True, "head_size": 16, "rope_theta": 500000.0},
        {"architecture": "mistral"},
        {"architecture": "qwen2", "attention_bias": True, "rope_scaling": RopeScaling("linear", 2.0)},
        {"architecture": "qwen3", "qk_norm": True, "rope_scaling": RopeScaling("yarn", 4.0, 1024)},
        {"max_position": 131072, "rope_scaling": RopeScaling("llama3", 8.0, 8192)},
    ],
    ids=["llama", "tied", "mistral", "qwen2", "qwen3", "llama3"],
)
def test_a_model_is_read_back(changes: dict[str, Any], tmp_path: Path) -> None:
    """Metadata, a name or an order of rows that another model is read from; biases left where q's rows were moved."""
    spec = dataclasses.replace(SPEC, **changes)
    tensors = save(tmp_path / "m.gguf", spec, GgufKind.read("gguf:f32"))
    again = open_checkpoint(str(tmp_path / "m.gguf"))
    assert again.spec == dataclasses.replace(spec, architecture=spec.architecture.replace("mistral", "llama"))
    read = dict(again.tensors())
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], one) for name, one in tensors.items())


def test_rows_lie_as_llama_cpp_has_them(tmp_path: Path) -> None:
    """q and k in Hugging Face's order of rows, which this reader would turn back and llama.cpp would not."""
    tensors = save(tmp_path / "m.gguf", SPEC, GgufKind.read("gguf:f32"))
    opened = gguf.GGUFReader(tmp_path / "m.gguf")
    raw = {one.name: torch.from_numpy(np.array(one.data)) for one in opened.tensors}
    for own, name, heads in (("q", "attn_q", 4), ("k", "attn_k", 2)):
        weight = tensors[f"model.layers.1.self_attn.{own}_proj.weight"]
        # convert_hf_to_gguf.py, LlamaModel.permute
        wanted = weight.reshape(heads, 2, len(weight) // heads // 2, 128).swapaxes(1, 2).reshape(weight.shape)
        assert torch.equal(raw[f"blk.1.{name}.weight"], wanted)
    assert torch.equal(raw["blk.1.attn_v.weight"], tensors["model.layers.1.self_attn.v_proj.weight"])
    assert all(one.data_offset % 32 == 0 for one in opened.tensors)
    assert opened.fields["general.file_type"].contents() == 0 and len(opened.tensors) == 2 * 9 + 3


@pytest.mark.filterwarnings("ignore::tandem.errors.TandemWarning")
@pytest.mark.parametrize("name", [*TYPES, "F16", "BF16"])
def test_files_read_back_to_their_codes(name: str, tmp_path: Path) -> None:
    """A type whose rows are turned in another unit than rows, or NVFP4 without its tensors' scales."""
    kind = GgufKind.read(f"gguf:{name}")
    spec = dataclasses.replace(SPEC, layers=1, width=256, ff_width=288 if name != "NVFP4" else 256, head_size=64)
    tensors = save(tmp_path / "m.gguf", spec, kind)
    again = open_checkpoint(str(tmp_path / "m.gguf"))
    for one, tensor in again.tensors():
        wanted = tensors[one] if tensors[one].ndim == 1 else tensors[one].to(tensor.dtype)
        assert torch.equal(tensor, wanted), one
    assert again.gguf is not None
    formats = {own: one.format for own, one in again.gguf.entries.items()}
    assert formats["blk.0.attn_q.weight"] == formats["blk.0.ffn_up.weight"] == int(Kind[name])
    assert formats["token_embd.weight"] == int(Kind.F16 if name == "F16" else Kind.BF16)
    assert formats["blk.0.attn_norm.weight"] == int(Kind.F32)
    if name == "NVFP4":
        assert again.gguf.entries["blk.0.attn_q.scale"].shape == (1,)


@pytest.mark.parametrize(
    ("name", "width", "other"),
    [("Q2_K", 576, "Q4_0"), ("Q3_K", 576, "Q4_0"), ("Q4_K", 576, "Q5_0"), ("Q5_K", 576, "Q5_1")]
    + [("Q6_K", 576, "Q8_0"), ("Q6_K", 48, None), ("Q4_0", 48, None)],
)
def test_widths_that_blocks_do_not_divide(name: str, width: int, other: str | None) -> None:
    """Another type than llama-quantize takes for a width (its tensor_type_fallback), or one that nobody is told of."""
    spec = dataclasses.replace(SPEC, width=width, ff_width=768, heads=3, kv_heads=3, head_size=width // 3)
    with pytest.warns(TandemWarning, match=f"do not divide a width of {width}: 12 matrices are in {other or 'F16'}"):
        found = GgufKind.read(f"gguf:{name}").types(spec)
    assert {found[one] for slot in layer_slots(spec) if slot.columns == width for one in slot.shapes()} == {
        TYPES[other] if other else None
    }
    assert found["model.layers.1.mlp.down_proj.weight"] is TYPES[name]


def test_file_types_are_llama_cpp_s() -> None:
    """A file that says it is mostly of another type."""
    for name, number in FILE_TYPES.items():
        label = LlamaFileType(number).name.removeprefix("ALL_").removeprefix("MOSTLY_")
        assert label in (name, f"{name}_S", f"{name}_MOE"), name
    assert set(FILE_TYPES) == {*TYPES, *FLOATS}


def test_what_no_file_can_say() -> None:
    """A file that llama.cpp reads as another model: its windows, its layers without rotation, its factors left out."""
    for changes, told in (
        ({"architecture": "smollm3"}, "a model of family smollm3 cannot be written as GGUF; those of llama, mistral"),
        ({"architecture": "qwen2", "attention": (LayerAttention(Reach(window=8)),)}, "see a window of keys"),
        ({"attention": (LayerAttention(), LayerAttention(rotary=False))}, "cannot say the model's attention = "),
        ({"rope_scaling": RopeScaling("llama3", 8.0, 4096)}, "cannot say the model's rope_scaling = "),
        ({"rope_scaling": RopeScaling("yarn", 8.0, 4096, mscale=0.7)}, "cannot say the model's rope_scaling = "),
    ):
        with pytest.raises(ModelError, match=told):
            metadata(dataclasses.replace(SPEC, **changes))
    with pytest.raises(ModelError, match="NVFP4 has blocks of 64, which do not divide a width of 96"):
        GgufKind.read("gguf:NVFP4").types(dataclasses.replace(SPEC, width=96))


def trained(splitter: Any, whole: bool = False) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=whole))
    backend.pre_tokenizer, backend.decoder = splitter, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["the cat sat on the mat, and 12 of 345 dogs didn't; they're naïve "] * 9, trainer)
    backend.add_tokens([tokenizers.AddedToken("[tool]", special=False, normalized=False)])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, "{{ messages }}</s>")


def split_by(pattern: str) -> Any:
    regex = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([regex, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


SPLITS = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "smollm": (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        False,
    ),
    "llama-bpe": (split_by(_WORDS + r"\p{N}{1,3}" + _REST), True),
    "qwen2": (split_by(_WORDS + r"\p{N}" + _REST), False),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_tokeniser_is_read_back(name: str, tmp_path: Path) -> None:
    """Merges, control tokens or a splitting by another name: a file that reads text as other tokens."""
    own = trained(*SPLITS[name])
    spec = dataclasses.replace(SPEC, vocab_size=own.vocab_size + 5, layers=1)
    kind, fields = GgufKind.read("gguf:F16"), tokenizer_fields(own, own.vocab_size + 5)
    assert fields["tokenizer.ggml.pre"] == name
    write_gguf(tmp_path / "m.gguf", spec, drawn(spec), {}, metadata(spec) | fields, kind)
    listed = read_header(tmp_path / "m.gguf").fields
    assert listed["tokenizer.ggml.tokens"][-5:] == [f"[PAD{own.vocab_size + at}]" for at in range(5)]
    kinds = listed["tokenizer.ggml.token_type"].tolist()
    assert kinds[:3] == [3, 3, 1] and kinds[own.vocab_size - 1 :] == [4, 5, 5, 5, 5, 5]
    assert listed["tokenizer.ggml.merges"][0] == " ".join(json.loads(own.backend.to_str())["model"]["merges"][0])
    if name in ("llama-bpe", "qwen2"):  # read by Transformers
        return
    again = open_checkpoint(str(tmp_path / "m.gguf")).load_tokenizer()
    text = "the cat</s> they're 12 of[tool] the\n\nnaïve mat"
    assert again.encode(text) == own.encode(text) and again.decode(own.encode(text)) == text
    assert (again.bos_token_id, again.eos_token_id, again.chat_template) == (0, 1, own.chat_template)


def test_tokenisers_that_have_no_name() -> None:
    """Text that llama.cpp splits by another rule than the model was trained with."""
    with pytest.raises(ModelError, match=r"llama.cpp has no name for that is known here \(gpt-2, smollm"):
        tokenizer_fields(trained(split_by(r"\d+")), 330)
    with pytest.raises(ModelError, match="has no name for"):  # llama.cpp keeps whole words of llama-bpe
        tokenizer_fields(trained(SPLITS["llama-bpe"][0], False), 330)
    with pytest.raises(ModelError, match="is no byte-level BPE"):
        tokenizer_fields(trained(pre_tokenizers.Whitespace()), 330)


def convert(*args: str) -> int:
    return main(["convert", "quantise", *args])


@pytest.mark.filterwarnings("ignore::tandem.errors.TandemWarning")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A method whose codes do not reach the file, a tokeniser lost on the way, or a file that is overwritten."""
    model, texts = "new:width=128,layers=1,heads=2,kv_heads=1,ff_width=256,max_position=64", tmp_path / "t.txt"
    texts.write_text("one two three four five. " * 40)
    first, second = str(tmp_path / "a.gguf"), str(tmp_path / "b.gguf")
    given = ("--format", "gguf:IQ4_NL", "--method", "hadamard+gptq", "--texts", str(texts), "--sequences", "4")
    assert convert(model, *given, "--out", first, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert convert(model, *given[:3], "hadamard", "--out", str(tmp_path / "n.gguf"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["sqnr_db"] > found["sqnr_db"] + 0.2  # which errs least on its inputs
    assert (found["file"], found["format"], found["bits"], found["matrices"]) == ("gguf", "IQ4_NL", 4.5, 7)
    assert found["bytes"] == Path(first).stat().st_size and found["sqnr_db"] > 15
    assert convert(first, "--format", "gguf:q8_0", "--dtype", "float32", "--out", second) == 0
    one, two = open_checkpoint(first), open_checkpoint(second)
    assert one.spec == two.spec and not one.spec.tied_embeddings
    assert one.load_tokenizer().encode("a<|im_end|>") == two.load_tokenizer().encode("a<|im_end|>")
    assert one.load_tokenizer().chat_template == two.load_tokenizer().chat_template
    for name, tensor in one.tensors():
        other = dict(two.tensors())[name]
        coded = name.endswith("proj.weight")
        assert torch.equal(other, ggml.encode(tensor, TYPES["Q8_0"]).values() if coded else tensor.float()), name
    assert not list(tmp_path.glob("*.part"))
    for args, told in (
        ((first, "--format", "gguf:Q4_0", "--out", second), "b.gguf is there already. Choose another file"),
        ((first, "--format", "gguf:Q4_0", "--out", str(tmp_path / "c")), "a GGUF file's name ends with .gguf"),
        ((first, "--format", "gguf:Q4_M", "--out", str(tmp_path / "c.gguf")), "write gguf:TYPE, as gguf:Q4_K"),
        ((first, "--format", "gguf:F16", "--method", "gptq", "--out", str(tmp_path / "c.gguf")), "rounds to a format"),
        ((first, "--format", "gguf:F16", "--dtype", "float32", "--out", str(tmp_path / "c.gguf")), "a file of float16"),
    ):
        assert convert(*args) == 2
        assert told in capsys.readouterr().err
