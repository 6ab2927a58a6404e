"""Files of quantised matrices: what packages wrote reads to their bits, what is written reads back, and each convention
on which formats differ, by hand.

The vectors are made by tests/others/quantised_vectors.py; tests/others/test_files.py has the packages read ours.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.cli.main import main
from tandem.engine.config import EngineConfig
from tandem.engine.runner import DecoderRunner
from tandem.errors import ConfigError, ModelError, NonFiniteError, TandemWarning
from tandem.kernels.eights import Eights, product_reference
from tandem.kernels.fours import Fours
from tandem.models.checkpoint import Checkpoint, open_checkpoint
from tandem.models.codes import described, hold_codes
from tandem.models.config import ModelConfig
from tandem.models.decoder import Decoder
from tandem.models.fields import Fields
from tandem.models.quantised.opened import METHODS, take_scheme
from tandem.models.quantised.scheme import Held, refuse_blocks
from tandem.models.quantised.write import kind_of, write
from tandem.numerics import quantise as codes_of
from tandem.numerics.blocks import FORMATS, Blocks, dequantise
from tandem.numerics.compare import same_bits
from tandem.numerics.packing import AWQ_ORDER, pack, to_awq_order, unpack
from tandem.run.parts import build_parts
from tandem.surgery.quantise import Method, quantised

VECTORS = Path(__file__).parents[1] / "goldens" / "quantised.safetensors"
KEPT = [0, 3, 31]
KINDS = (
    "compressed-tensors:int4_g32",
    "compressed-tensors:int4_g32_asym",
    "compressed-tensors:int3_g64",
    "compressed-tensors:int8_g32",
    "compressed-tensors:int8_row",
    "compressed-tensors:int8_row_asym",
    "compressed-tensors:fp8_row",
    "compressed-tensors:fp8_tensor",
    "compressed-tensors:fp8_128x128",
    "compressed-tensors:nvfp4",
    "compressed-tensors:mxfp4_rceil",
    "awq:int4_g32_asym",
    "awq:int4_g64",
    "gptq:int4_g32",
    "gptq:int3_g32",
    "gptq:int8_row",
    "gptq_v2:int4_g32_asym",
    "gptq_v2:int2_g32_asym",
    "fp8",
    "modelopt",
    "modelopt:nvfp4_four_six",
    "mxfp4:mxfp4_even",
)


@pytest.fixture(scope="module")
def vectors() -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    flat, cases = load_file(VECTORS), {}
    for name, tensor in flat.items():
        method, case, part = name.split("/")
        cases.setdefault(f"{method}/{case}", {})[part] = tensor
    with safe_open(VECTORS, "pt") as opened:
        return cases, json.loads(opened.metadata()["cases"])


def _names() -> list[str]:
    with safe_open(VECTORS, "pt") as opened:
        return sorted(json.loads(opened.metadata()["cases"]))


@pytest.mark.parametrize("case", _names())
def test_what_packages_wrote(case: str, vectors: tuple[dict[str, dict[str, Tensor]], dict[str, Any]]) -> None:
    """A nibble order, a zero point, a scale's direction or an order of rounding that is not the package's."""
    cases, told = vectors
    parts = dict(cases[case])
    theirs = parts.pop("values")
    scheme = METHODS[case.partition("/")[0]](Fields(case, told[case]["config"]))
    held = scheme.held("m", parts)
    values = held.values().to(theirs.dtype)
    assert torch.equal(values[KEPT], theirs), (values[KEPT] - theirs).abs().max()
    raw = (values + 0).contiguous().view(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(raw).hexdigest()[:16] == told[case]["digest"]
    assert scheme.shape({n: tuple(x.shape) for n, x in parts.items()}, parts) == tuple(values.shape)
    found = held.codes()
    if found is not None:
        assert torch.equal(codes_of.dequantise(found, torch.bfloat16), held.values().bfloat16())  # -0 of e2m1 is 0


@pytest.fixture(scope="module")
def small() -> Checkpoint:
    found = open_checkpoint("new:width=64,layers=1,heads=4,kv_heads=2,ff_width=192,max_position=64")
    drawn = list(found.tensors())
    found.tensors = lambda without=(): iter(drawn)  # type: ignore[method-assign, misc]
    return found


def written(folder: Path, source: Checkpoint, text: str, change: Callable[[str, Blocks], Blocks] | None = None) -> Any:
    """The kind and the codes."""
    kind, tensors = kind_of(text), {n: t.bfloat16() for n, t in source.tensors()}
    codes = quantised(source.spec, tensors, Method(), kind.form).blocks
    tensors = {name: one for name, one in tensors.items() if name not in codes}
    if change is not None:
        codes = {name: change(name, one) for name, one in codes.items()}
    write(folder, source.spec, tensors, kind, codes, source.load_tokenizer())
    return kind, codes


@pytest.mark.filterwarnings("ignore::tandem.errors.TandemWarning")
@pytest.mark.parametrize("text", KINDS)
def test_what_is_written_reads_back(text: str, small: Checkpoint, tmp_path: Path) -> None:
    """A model that its own reader gives other values, or that the engine's codes stand for otherwise."""
    kind, codes = written(tmp_path / "m", small, text)
    again, held = open_checkpoint(str(tmp_path / "m")), 0
    assert again.spec == small.spec
    wanted = dict(small.tensors())
    for name, tensor in again.tensors():
        if name not in codes:
            assert torch.equal(tensor, wanted[name].bfloat16())
            continue
        assert same_bits(tensor, dequantise(codes[name], kind.form)), name
        found = again.codes(name)
        if found is not None:
            held += 1
            assert torch.equal(codes_of.dequantise(found, torch.bfloat16), tensor.bfloat16()), name
    coded = kind.form.rows == 1 and not text.startswith("compressed-tensors:fp8") and text[-8:] != "row_asym"
    assert held == (len(codes) if coded else 0)
    own, found = again.coded_bytes, [again.codes(name) for name in codes]
    if coded:  # what the plan of memory counts: codes, scales of 32 bits, and the embedding, which is the head, in bf16
        embedding = again.spec.vocab_size * again.spec.width * 2
        bits = sum(one.codes_NK.numel() * one.bits + one.scales_NG.numel() * 32 for one in found if one is not None)
        assert bits / 8 + embedding <= own < 2.1 * bits / 8 + embedding
    else:
        assert own == 0


def test_the_engine_holds_the_codes_of_a_file(small: Checkpoint, tmp_path: Path) -> None:
    """Matrices of a file that are opened into bf16 where products by their codes have the same bits."""
    written(tmp_path / "m", small, "gptq:int4_g32")
    checkpoint = open_checkpoint(str(tmp_path / "m"))
    decoder = Decoder(checkpoint.spec, "bfloat16")
    if not decoder.compiled:
        pytest.skip("products by codes are compiled")
    decoder.load(checkpoint.tensors(hold_codes(decoder, checkpoint)))
    assert described(decoder) == "4 matrices of 4 bits"
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    name = "model.layers.0.self_attn.o_proj.weight"
    value = dict(checkpoint.tensors())[name].bfloat16()
    found = decoder.layers[0].mix.out.codes.product(x)  # type: ignore[union-attr]
    torch.testing.assert_close(found.float(), x.float() @ value.float().T, rtol=2e-2, atol=2e-2)
    # and by rows in 8 bits, where nothing learns
    asked = EngineConfig(weights="w4a8", page_tokens=4, max_sequences=4, batch_tokens=64, kv_memory_bytes=1 << 20)
    runner = build_parts(ModelConfig(str(tmp_path / "m")), asked, learns=False).engine.runner
    assert isinstance(runner, DecoderRunner)
    for (name, one), (_, other) in zip(runner.decoder.weights(), decoder.weights(), strict=True):
        if other.codes is not None:
            assert isinstance(one.codes, Fours) and one.codes.packed.equal(other.codes.packed), name


def test_rows_of_8_bits_are_served_as_they_lie(small: Checkpoint, tmp_path: Path) -> None:
    """A file for w8a8, SmoothQuant's, is opened and rounded once more, by scales that are not the file's."""
    written(tmp_path / "m", small, "compressed-tensors:int8_row")
    checkpoint = open_checkpoint(str(tmp_path / "m"))
    asked = EngineConfig(weights="w8a8", page_tokens=4, max_sequences=4, batch_tokens=64, kv_memory_bytes=1 << 20)
    if not Decoder(checkpoint.spec, "bfloat16").compiled:
        pytest.skip("products by codes are compiled")
    runner = build_parts(ModelConfig(str(tmp_path / "m")), asked, learns=False).engine.runner
    assert isinstance(runner, DecoderRunner)
    filed, own = checkpoint.codes("model.layers.0.self_attn.o_proj.weight"), runner.decoder.layers[0].mix.out.codes
    assert filed is not None and isinstance(own, Eights) and not own.is_rounded
    assert torch.equal(own.scales[: len(filed.codes_NK)], filed.scales_NG[:, 0].float())
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(own.product(x), product_reference(x, filed))


def test_three_bits_lie_over_word_bounds() -> None:
    """Ten codes of 3 bits to a word, as compressed-tensors packed them before it packed them densely."""
    codes = torch.arange(64).remainder(8)[None]
    words = pack(codes, 3)
    assert words.shape == (1, 6) and torch.equal(unpack(words, 3, 64).long(), codes)
    assert words[0, 0].item() & 0xFFFFFFFF == sum((i % 8) << 3 * i for i in range(11)) & 0xFFFFFFFF  # 10 and two bits
    scale, shape = torch.ones(1, 1), torch.tensor([1, 64])
    sparse = torch.stack(
        [sum(codes[0, i + j].int() << 3 * j for j in range(min(10, 64 - i))) for i in range(0, 64, 10)]
    )
    config = {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 3, "strategy": "channel"}}}}
    scheme = METHODS["compressed-tensors"](Fields("c", config))
    for one in (words, sparse[None].int()):
        parts = {"weight_packed": one, "weight_scale": scale, "weight_shape": shape}
        assert torch.equal(scheme.held("m", parts).values(), codes.float() - 4)
    with pytest.raises(ModelError, match="8 words a row for 64 codes of 3 bits; 6 are needed"):
        scheme.held("m", {"weight_packed": torch.zeros(1, 8).int(), "weight_scale": scale, "weight_shape": shape})


def test_awq_order() -> None:
    """Outputs of a word in another order than AutoAWQ's, or zero points in order where codes are not."""
    words = pack(to_awq_order(torch.arange(8)[None]), 4)
    nibbles = [words.item() >> 4 * i & 15 for i in range(8)]
    assert nibbles == list(AWQ_ORDER) == [0, 2, 4, 6, 1, 3, 5, 7]
    scheme = METHODS["awq"](Fields("c", {"group_size": 1}))
    parts = {"qweight": words, "qzeros": pack(to_awq_order(torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1]])), 4)}
    held = scheme.held("m", parts | {"scales": torch.ones(1, 8).half()})
    assert held.values().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 6]


@pytest.mark.parametrize(("version", "zero"), [("gptq", 4), ("gptq_v2", 3)])
def test_zero_points_of_gptq(version: str, zero: int) -> None:
    """GPTQ's first format read with the zero points of the second: all weights off by a step."""
    scheme = METHODS["gptq"](Fields("c", {"bits": 4, "group_size": 8, "checkpoint_format": version}))
    parts = {"qweight": pack(torch.arange(8).expand(8, 8), 4).t(), "scales": torch.full((1, 8), 0.5).half()}
    held = scheme.held("m", parts | {"qzeros": pack(torch.full((1, 8), 3), 4)})
    assert held.values()[0].tolist() == [0.5 * (code - zero) for code in range(8)]
    wrapped = scheme.held("m", parts | {"qzeros": pack(torch.full((1, 8), 15), 4)})
    assert float(wrapped.values()[0, 0]) == (0.0 if version == "gptq" else -7.5)


def test_scales_of_the_tensor(small: Checkpoint, tmp_path: Path) -> None:
    """A scale of the tensor that divides where the format multiplies: weights 2688^2 / amax^2 too large."""
    for text, part, way in (("compressed-tensors:nvfp4", "weight_global_scale", -1), ("modelopt", "weight_scale_2", 1)):
        written(tmp_path / way.__str__(), small, text)
        stored = load_file(tmp_path / str(way) / "model.safetensors")
        amax = max(
            float(t.bfloat16().abs().max())
            for n, t in small.tensors()
            if ".0.self_attn.q_" in n or ".0.self_attn.k_" in n or ".0.self_attn.v_" in n
        )
        scales = [float(stored[f"model.layers.0.self_attn.{x}_proj.{part}"]) for x in "qkv"]
        assert len(set(scales)) == 1  # readers have one product for the three
        assert scales[0] == pytest.approx((amax / 2688) ** way, rel=1e-6)


def changed(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> str:
    """A model's tensors and config, changed."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.filterwarnings("ignore::tandem.errors.TandemWarning")
@pytest.mark.parametrize(
    ("text", "change", "said"),
    [
        ("gptq:int4_g32", lambda t, c: t.pop(f"{Q}.qzeros"), rf"the parts of {Q}.weight do not fit.*A part is missing"),
        (
            "gptq:int4_g32",
            lambda t, c: c["quantization_config"].update(group_size=16),
            "2 groups of 16 for 64 inputs; 4",
        ),
        ("gptq:int4_g32", lambda t, c: c["quantization_config"].update(bits=8), "should be|has shape|groups"),
        (
            "gptq:int4_g32",
            lambda t, c: c["quantization_config"].update(checkpoint_format="marlin"),
            "layout 'marlin'; read",
        ),
        (
            "awq:int4_g32",
            lambda t, c: c["quantization_config"].update(version="gemv"),
            "layout 'gemv'; read are 4 bits",
        ),
        ("awq:int4_g32", lambda t, c: t.pop(f"{Q}.scales"), "do not fit one another"),
        (
            "awq:int4_g32",
            lambda t, c: c["quantization_config"].update(quant_method="bitsandbytes"),
            "'bitsandbytes', which",
        ),
        (
            "modelopt",
            lambda t, c: t.update({f"{Q}.pre_quant_scale": torch.ones(64)}),
            "pre_quant_scale, which multiplies",
        ),
        ("modelopt", lambda t, c: c["quantization_config"].update(group_size=32), "in blocks of 32. The config"),
        (
            "modelopt",
            lambda t, c: c["quantization_config"].update(quant_algo="W4A8_AWQ"),
            "ModelOpt's 'W4A8_AWQ'; read",
        ),
        ("compressed-tensors:nvfp4", lambda t, c: t.pop(f"{Q}.weight_global_scale"), "has no weight_global_scale"),
        ("compressed-tensors:int4_g32", lambda t, c: t.pop(f"{Q}.weight_shape"), "its config wants"),
        (
            "compressed-tensors:int4_g32",
            lambda t, c: c["quantization_config"].update(format="marlin-24"),
            "layout 'marlin-24'; read are pack-quantized",
        ),
        (
            "compressed-tensors:int4_g32",
            lambda t, c: c["quantization_config"].update(transform_config={"u": 1}),
            "rotations in the forward pass",
        ),
        (
            "compressed-tensors:int8_row",
            lambda t, c: c["quantization_config"].update(quantization_status="frozen"),
            "not stored as codes",
        ),
        (
            "fp8",
            lambda t, c: c["quantization_config"].update(weight_block_size=[32, 32]),
            "in blocks of 32 x 32. The config",
        ),
        ("fp8", lambda t, c: t.update({"model.x": torch.ones(2, dtype=torch.uint8)}), "tensor model.x is of U8"),
        (
            "mxfp4",
            lambda t, c: t.update({f"{Q}_scales": t[f"{Q}_scales"][:, :1].clone()}),
            "1 scales of blocks of 32 for 64",
        ),
    ],
)
def test_files_that_do_not_fit(
    text: str, change: Callable[..., None], said: str, small: Checkpoint, tmp_path: Path
) -> None:
    """A traceback, or weights that are silently others, where a part is missing or a config says what is not read."""
    written(tmp_path / "m", small, text)
    with pytest.raises(ModelError, match=said):
        list(open_checkpoint(changed(tmp_path / "m", change)).tensors())


def test_what_is_left_out_is_said(small: Checkpoint, tmp_path: Path) -> None:
    """Activations that a file rounds, scales of keys and values, dropped without a word; two global scales mixed."""
    written(tmp_path / "a", small, "compressed-tensors:int8_row")
    with pytest.warns(TandemWarning, match="not read: its rounding of activations to 8 bits: products are of the"):
        open_checkpoint(str(tmp_path / "a"))
    written(tmp_path / "b", small, "modelopt")

    def scales(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors |= {f"{Q}.input_scale": torch.ones(()), f"{Q}.k_scale": torch.ones(())}
        tensors[f"{Q}.weight_scale_2"] = tensors[f"{Q}.weight_scale_2"] * 2
        config["quantization_config"] |= {"kv_cache_quant_algo": "FP8"}

    before = dict(open_checkpoint(str(tmp_path / "b")).tensors())
    said = (
        rf"its scales of keys and values.*2 scales of activations or of keys and values, {Q}.input_scale first; one "
        r"global scale for each of 1 fused matrices, which have several \(model.layers.0.self_attn.q_proj/k_proj/v_proj"
    )
    with pytest.warns(TandemWarning, match=said):
        found = open_checkpoint(changed(tmp_path / "b", scales))
    after = dict(found.tensors())
    assert torch.equal(after[f"{Q}.weight"], before[f"{Q}.weight"] * 2)
    assert torch.equal(after[Q.replace("q_", "k_") + ".weight"], before[Q.replace("q_", "k_") + ".weight"])


def test_configs_beside_config_json(small: Checkpoint, tmp_path: Path) -> None:
    """AutoGPTQ's and ModelOpt's own files of settings left unread: 'no such tensor' for a model that is fine."""
    for text, file in (("gptq:int4_g32", "quantize_config.json"), ("modelopt", "hf_quant_config.json")):
        folder = tmp_path / file
        written(folder, small, text)
        config = json.loads((folder / "config.json").read_text())
        own = config.pop("quantization_config")
        if file.startswith("hf"):
            own = {"producer": {"name": "modelopt"}, "quantization": own}
        wanted = dict(open_checkpoint(str(folder)).tensors())
        (folder / "config.json").write_text(json.dumps(config))
        (folder / file).write_text(json.dumps(own))
        assert all(torch.equal(one, wanted[name]) for name, one in open_checkpoint(str(folder)).tensors())
    assert take_scheme(tmp_path, {"text_config": {"quantization_config": {}}}) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gptk", "Files are compressed-tensors, awq, .*Did you mean gptq"),
        ("awq:int8_g128", "awq files have integers of 4 bits in groups, and not int8_g128"),
        ("fp8:nvfp4", "fp8 files have fp8_128x128, and not nvfp4"),
        ("compressed-tensors:mxint8", "and not mxint8. Choose int4_g128"),
        ("gptq:int4_x", "'int4_x' is no format"),
    ],
)
def test_formats_that_no_file_has(text: str, said: str) -> None:
    """A format written in a file whose readers take it for another."""
    with pytest.raises(ConfigError, match=said):
        kind_of(text)


def test_what_can_not_be_written(small: Checkpoint, tmp_path: Path) -> None:
    """A block that does not divide a width, a scale that fp16 has not, a zero point of 0, scales of two quantisers."""
    kind = kind_of("awq:int4_g128_asym")
    with pytest.raises(ModelError, match="blocks of 128 do not divide a width of 192. Choose blocks of 64"):
        refuse_blocks("down", 192, kind.form.block)
    large = {name: tensor * 1e7 for name, tensor in small.tensors()}
    with pytest.raises(NonFiniteError, match="layer 0, qkv: int4_g128_asym has scales up to .* fp16 does not have"):
        quantised(small.spec, large, Method(), kind.form)
    with pytest.raises(ModelError, match="q_proj.weight: a zero point is 0, which GPTQ's first format can't hold"):
        written(
            tmp_path / "a",
            small,
            "gptq:int4_g32_asym",
            lambda name, one: one._replace(zeros=torch.zeros_like(one.zeros)),  # type: ignore[arg-type]
        )
    with pytest.raises(ModelError, match=r"up_proj.weight have 2 scales of the tensor"):
        written(
            tmp_path / "b",
            small,
            "modelopt",
            lambda name, one: one._replace(whole=one.whole * (1 + ("up_proj" in name))),  # type: ignore[operator]
        )
    with pytest.raises(
        ModelError, match=r"scales of torch.float32 \(64, 2\); int4_g32 has codes .* torch.float16 \(64, 2\)"
    ):
        written(tmp_path / "c", small, "gptq:int4_g32", lambda name, one: one._replace(scales=one.scales.float()))


def test_the_command(small: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command whose folder can't be read again, or that writes over one that is there."""
    source, out = "new:width=64,layers=1,heads=4,kv_heads=2,ff_width=128", str(tmp_path / "m")
    assert main(["convert", "quantise", source, "--format", "awq:int4_g32_asym", "--out", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["matrices"], found["bits"], found["file"]) == (7, 4.625, "awq") and 18 < found["sqnr_db"] < 24
    assert main(["convert", "quantise", source, "--format", "awq", "--out", out]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["convert", "quantise", source, "--out", out + "2"]) == 2
    assert "give --format" in capsys.readouterr().err


def test_codes_of_odd_shapes() -> None:
    """A matrix held as codes that products can't read: ragged groups, columns in an order of their own."""
    blocks = Blocks(torch.zeros(4, 20, dtype=torch.uint8), torch.ones(4, 5))
    assert Held(blocks, FORMATS["int4_g128"]).codes() is None
    form = kind_of("gptq:int4_g32").form
    ordered = Held(
        Blocks(torch.full((4, 64), 3, dtype=torch.uint8), torch.tensor([[1.0, 2.0]] * 4)), form, torch.arange(64) % 2
    )
    assert ordered.codes() is None and ordered.values()[0, :4].tolist() == [3, 6, 3, 6]
    assert re.match("int4", form.name)
