"""Methods on whole models: what is only written otherwise computes the same, what is rounded is of its format, and what
matrices are given is what they are given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.bench import quantise as bench
from tandem.bench.fidelity import fidelity
from tandem.cli.main import main
from tandem.errors import ConfigError, NonFiniteError
from tandem.kernels.swiglu import swiglu_reference
from tandem.models import layer as layers
from tandem.models.aside import written_aside
from tandem.models.checkpoint import open_checkpoint, save_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.scratch import new_tokenizer
from tandem.models.spec import LayerAttention, ModelSpec, QueryTemperature
from tandem.models.view import PackView
from tandem.numerics.blocks import FORMATS, dequantise, quantise, rounded
from tandem.numerics.rotation import random_hadamard, random_orthogonal
from tandem.numerics.scaling import awq_scales
from tandem.run.texts import pieces
from tandem.surgery.calibrate import SITES, Inputs, moments, walk
from tandem.surgery.fold import alike, fold_scales, fuse_norms, matrix, rotated, slots
from tandem.surgery.quantise import Method, quantised
from tandem.surgery.turn import learned_turn, slope
from tests.cpu.test_prune import random_model

TOKENS = torch.randint(0, 97, (90,), generator=torch.Generator().manual_seed(1))
TEXTS = [TOKENS[:50].tolist(), TOKENS[50:].tolist()]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tied_embeddings": True},
    "qwen2": {"architecture": "qwen2", "attention_bias": True},
    "qwen3": {"architecture": "qwen3", "qk_norm": True, "tied_embeddings": True},
    "llama4": {
        "architecture": "llama4_text",
        "rotated_norm": True,
        "attention": (LayerAttention(), LayerAttention(rotary=False)),
        "query_temperature": QueryTemperature(floor=16),
    },
}


def model_of(name: str = "llama", layers: int = 2) -> tuple[ModelSpec, dict[str, Tensor]]:
    made = random_model(layers=layers, **FAMILIES[name])
    return made.spec, {name: tensor.clone() for name, tensor in made.export()}


def logits(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    decoder = Decoder(spec, "float32").load(tensors.items())
    with torch.no_grad():
        return decoder.logits(decoder.forward(TOKENS, PackView([0, 50, 90])))


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_and_rotations_change_no_logit(family: str) -> None:
    """A scale or a rotation is undone at another place than it is done, in one of the families."""
    spec, tensors = model_of(family)
    wanted = logits(spec, tensors)
    scaled, drawn = dict(tensors), torch.Generator().manual_seed(2)
    for index in range(spec.layers):
        for site, slot in slots(spec, index).items():
            if site in SITES:
                s_K = torch.rand(slot.columns, generator=drawn).add(0.3)
                fold_scales(spec, scaled, index, site, alike(spec, site, s_K))
    torch.testing.assert_close(logits(spec, scaled), wanted, rtol=1e-4, atol=1e-4)
    fused_spec, fused = fuse_norms(spec, tensors)
    assert not fused_spec.tied_embeddings and bool((fused["model.norm.weight"] == 1).all())
    turned = rotated(fused_spec, fused, random_orthogonal(spec.width), random_orthogonal(spec.head_size, 1))
    torch.testing.assert_close(logits(fused_spec, turned), wanted, rtol=1e-4, atol=1e-4)
    assert float(
        (turned["model.layers.1.mlp.down_proj.weight"] - tensors["model.layers.1.mlp.down_proj.weight"]).norm()
    )
    for name in ("smooth", "hadamard"):
        made = quantised(spec, tensors, Method.read(name), None, TEXTS)
        torch.testing.assert_close(logits(made.spec, made.tensors), wanted, rtol=1e-4, atol=1e-4)
        assert not made.blocks


def test_inputs_are_those_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Second moments are of another matrix's inputs, or of a text that sees the one before it."""
    spec, tensors = model_of("qwen2")
    decoder = Decoder(spec, "float32").load(tensors.items())
    monkeypatch.setattr("tandem.surgery.calibrate.PANEL", 12)
    found: dict[tuple[int, str], Inputs] = {}

    def change(index: int, seen: Mapping[str, Inputs]) -> None:
        found.update({(index, site): inputs for site, inputs in seen.items()})

    walk(decoder, TEXTS, change, sequential=False)
    given: dict[int, list[Tensor]] = {}
    linear, down = layers.linear, layers.swiglu_down

    def watched(x, weight, *rest):  # type: ignore[no-untyped-def]
        given.setdefault(id(weight), []).append(x)
        return linear(x, weight, *rest)

    def watched_down(gate_up, weight, residual):  # type: ignore[no-untyped-def]
        given.setdefault(id(weight), []).append(swiglu_reference(gate_up))
        return down(gate_up, weight, residual)

    monkeypatch.setattr(layers, "linear", watched)
    monkeypatch.setattr(layers, "swiglu_down", watched_down)
    with torch.no_grad():
        for text in TEXTS:
            decoder.forward(torch.tensor(text), PackView([0, len(text)]))
    for layer in decoder.layers:
        for site in SITES:
            weight = getattr(layer.mix if site in ("qkv", "out") else layer.feed, site)
            x = torch.cat(given[id(weight)]).double()
            own = found[layer.index, site]
            torch.testing.assert_close(own.hessian_KK.double(), x.T @ x, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(own.mean_K.double(), x.abs().mean(0), rtol=1e-4, atol=1e-5)
            assert torch.equal(own.largest_K, x.abs().amax(0).float()) and own.rows == 90


def test_what_is_rounded_is_seen_behind_it() -> None:
    """GPTQ calibrates a matrix on what the model gave before those in front of it were rounded."""
    spec, tensors = model_of()
    decoder = Decoder(spec, "bfloat16").load(tensors.items())
    sums: list[tuple[int, str, bool]] = []

    def change(index: int, seen: Mapping[str, Inputs]) -> None:
        ((site, inputs),) = seen.items()
        sums.append((index, site, bool(inputs.hessian_KK.any())))
        if (index, site) == (0, "qkv"):
            decoder.layers[0].mix.qkv.value.zero_()
            decoder.layers[0].mix.qkv.repack()
        if (index, site) == (0, "gate_up"):
            decoder.layers[0].feed.gate_up.value.zero_()
            decoder.layers[0].feed.gate_up.repack()

    walk(decoder, TEXTS, change, sequential=True)
    assert [site for _, site, _ in sums] == list(SITES) * 2
    assert [(index, site) for index, site, some in sums if not some] == [(0, "out"), (0, "down")]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(("nearest", form) for form in ("int4_g32_asym", "nvfp4", "fp8_128x128", "fp8_tensor")),
        *(("gptq", form) for form in ("nvfp4", "fp8_tensor")),
        *(("awq", form) for form in ("int4_g32_asym", "fp8_128x128")),
        ("smooth", "int8_g128"),
        ("hadamard", "mxfp4"),
        ("rotation", "nvfp4"),
        ("awq+gptq", "nvfp4"),
        ("hadamard+gptq", "int4_g32_asym"),
    ],
)
def test_matrices_are_of_their_format(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix is left out or rounded twice, its codes are another tensor's, or the head is rounded too."""
    monkeypatch.setattr("tandem.surgery.turn.STEPS", 2)
    spec, tensors = model_of("qwen2")
    made = quantised(spec, tensors, Method.read(name), FORMATS[form], TEXTS)
    wanted = [n for index in range(2) for site in SITES for n in slots(spec, index)[site].shapes()]
    assert sorted(made.blocks) == sorted(wanted)
    for matrix_name, blocks in made.blocks.items():
        assert torch.equal(dequantise(blocks, FORMATS[form]), made.tensors[matrix_name])
    if name == "nearest":
        slot = slots(spec, 1)["gate_up"]
        together = [slot] if form == "nvfp4" else [replace(slot, stored=(one,)) for one in slot.stored]
        for one in together:
            assert torch.equal(matrix(made.tensors, one), rounded(matrix(tensors, one), FORMATS[form]))
        for other in tensors.keys() - made.blocks.keys():
            assert torch.equal(made.tensors[other], tensors[other])
    before, after = logits(spec, tensors), logits(made.spec, made.tensors)
    assert 0 < float((after - before).norm() / before.norm()) < 0.9


def test_methods_in_their_order() -> None:
    """GPTQ errs more than the nearest, or hardly less, on the outputs of a matrix that it rounds."""
    spec, tensors = model_of(layers=1)
    form = FORMATS["int4_g32"]
    found: dict[str, Inputs] = {}
    decoder = Decoder(spec, "bfloat16").load(tensors.items())
    walk(decoder, TEXTS, lambda _, seen: found.update(seen), sequential=False)
    by_gptq = quantised(spec, tensors, Method.read("gptq"), form, TEXTS)
    for site in SITES:
        slot = slots(spec, 0)[site]
        given = matrix(tensors, slot)
        errors = [matrix(by_gptq.tensors, slot) - given, dequantise(quantise(given, form), form) - given]
        costs = [float(((error @ found[site].hessian_KK) * error).sum()) for error in errors]
        assert costs[0] < 0.75 * costs[1], site


def test_a_rotation_that_rounds_nothing_has_no_slope() -> None:
    """The gradient misses the embedding, the head, or what a matrix writes: turning alone would lower the loss."""
    spec, tensors = fuse_norms(*model_of())
    decoder = Decoder(spec, "float32")
    for _, weight in decoder.weights():
        weight.grad = torch.zeros(weight.value.shape)
    turn = random_orthogonal(spec.width)
    loss, gradient = slope(decoder, tensors, turn, None, TEXTS)
    skew = gradient @ turn.T
    assert float((skew - skew.T).norm()) < 1e-4 * float(gradient.norm())
    again, _ = slope(decoder, tensors, torch.eye(spec.width), None, TEXTS)
    assert loss == pytest.approx(again, rel=1e-4)
    rough, gradient = slope(decoder, tensors, turn, FORMATS["int4_g32"], TEXTS)
    skew = gradient @ turn.T
    assert rough != loss and float((skew - skew.T).norm()) > 1e-2 * float(gradient.norm())


def test_what_cannot_be_done_is_named() -> None:
    """A missing text, format or Hadamard matrix, a damaged weight or a NaN ends in a traceback or in nonsense."""
    spec, tensors = model_of()
    form = FORMATS["int4_g32"]
    for name in ("gptq", "awq", "smooth", "rotation"):
        with pytest.raises(ConfigError, match="there is no text: --texts"):
            quantised(spec, tensors, Method.read(name), form, [[]])
    with pytest.raises(ConfigError, match="none is given, or floats: --format"):
        quantised(spec, tensors, Method.read("awq"), None, TEXTS)
    for name in ("gtpq", "nearest+gptq", "gptq+awq", "awq+smooth"):
        with pytest.raises(ConfigError, match=r"--method .* is not known"):
            Method.read(name)
    odd = random_model(layers=1, width=36 * 2 + 2)
    with pytest.raises(ConfigError, match=r"order 74 is built here .* --method rotation"):
        quantised(odd.spec, dict(odd.export()), Method.read("hadamard"), form)
    bad = dict(tensors)
    bad["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"] * torch.inf
    for name in ("nearest", "awq", "smooth", "hadamard", "rotation"):
        for one in (form, FORMATS["mxfp4"]):
            with pytest.raises(NonFiniteError, match=r"layer 0, down \(.*down_proj.weight\): 1,536 of 1,536"):
                quantised(spec, bad, Method.read(name), one, TEXTS)
    bad = {name: tensor.clone() for name, tensor in tensors.items()}
    bad["model.layers.1.self_attn.k_proj.weight"][3, 5] = torch.nan
    bad["model.embed_tokens.weight"][2, 2:4] = -torch.inf
    with pytest.raises(NonFiniteError, match=r"outside the layers \(.*\): 2 of .*; layer 1, qkv \(.*k_proj.*: 1 of"):
        quantised(spec, bad, Method.read("nearest"), FORMATS["mxfp4"])
    huge = {name: tensor * 1e37 if "gate_proj" in name else tensor for name, tensor in tensors.items()}
    huge["model.layers.0.post_attention_layernorm.weight"] = tensors["model.norm.weight"] * 100
    with pytest.raises(NonFiniteError, match="layer 0, gate_up: its numbers overflow"):
        quantised(spec, huge, Method.read("hadamard"), FORMATS["mxfp4"])
    few = {name: tensor * 1e30 if "up_proj" in name else tensor for name, tensor in tensors.items()}
    with pytest.raises(NonFiniteError, match="layer 0: inputs of down are not finite"):
        quantised(spec, few, Method.read("smooth"), form, TEXTS)
    zero = dict(tensors) | {"model.embed_tokens.weight": torch.zeros_like(tensors["model.embed_tokens.weight"])}
    by_gptq, nearest = (quantised(spec, zero, Method.read(name), form, TEXTS) for name in ("gptq", "nearest"))
    assert all(torch.equal(by_gptq.tensors[name], nearest.tensors[name]) for name in by_gptq.blocks)


def test_a_learned_rotation_goes_down() -> None:
    """The loss of the rounded model is climbed, so that a rotation ends worse than it began."""
    spec, tensors = model_of()
    fused_spec, fused = fuse_norms(spec, tensors)
    form, decoder = FORMATS["int4_g32"], Decoder(fused_spec, "bfloat16")
    for _, weight in decoder.weights():
        weight.grad = torch.zeros(weight.value.shape)
    start, _ = slope(decoder, fused, random_hadamard(spec.width), form, TEXTS)
    end, _ = slope(decoder, fused, learned_turn(fused_spec, fused, form, TEXTS), form, TEXTS)
    assert end < start - 0.01


def test_scales_of_a_value_head_are_the_mean_of_its_readers() -> None:
    """A value head's scale is that of the first query head that reads it, whatever the others are given."""
    spec = replace(model_of()[0], heads=4, kv_heads=2, head_size=2)
    x_K = torch.arange(8.0).square()
    wanted = torch.tensor([2.0, 5.0, 2.0, 5.0, 26.0, 37.0, 26.0, 37.0])
    assert torch.equal(alike(spec, "out", x_K), wanted) and torch.equal(alike(spec, "down", x_K), x_K)


def test_moments_are_of_all_packs() -> None:
    """A size is the last pack's alone."""
    parts = [torch.tensor([[1.0, -9.0], [2.0, 1.0]]), torch.tensor([[-3.0, 0.5]])]
    found = moments(parts, 2)
    assert (found.largest_K.tolist(), found.rows) == ([3.0, 9.0], 3)
    assert torch.equal(found.mean_K, torch.tensor([2.0, 3.5]))
    assert found.hessian_KK.tolist() == [[14.0, -8.5], [-8.5, 82.25]]


@pytest.mark.parametrize("form", ["mxfp4", "nvfp4"])
def test_scales_lie_around_one(form: str) -> None:
    """Scales are not divided by the root of their largest and smallest, so that a scale of the tensor, or of few bits,
    is out of reach."""
    drawn = torch.Generator().manual_seed(4)
    weight_NK = torch.randn(8, 64, generator=drawn)
    mean_K = 1e-3 * torch.rand(64, generator=drawn).add(0.01)
    x = torch.randn(99, 64, generator=drawn) * mean_K
    s_K, exponent = awq_scales(weight_NK, x.T @ x, mean_K, FORMATS[form])
    assert exponent > 0
    assert float(s_K.max() * s_K.min()) == pytest.approx(1.0, rel=1e-4)


def test_fidelity_of_a_model_to_itself_and_to_another() -> None:
    """KL or perplexity is of other tokens than the texts', or in another unit."""
    spec, tensors = model_of()
    one = Decoder(spec, "float32").load(tensors.items())
    same = fidelity(one, one, TEXTS)
    assert same.kl == pytest.approx(0, abs=1e-6) and same.nll_rise == 0 and same.same_top == 1 and same.tokens == 88
    made = quantised(spec, tensors, Method.read("nearest"), FORMATS["mxfp4"])
    other = fidelity(Decoder(made.spec, "float32").load(made.tensors.items()), one, TEXTS)
    logp, logq = (logits(*model).log_softmax(-1).double() for model in ((made.spec, made.tensors), (spec, tensors)))
    rows = torch.tensor([row for row in range(90) if row not in (49, 89)])
    kl = (logq.exp() * (logq - logp)).sum(-1)[rows].mean()
    assert other.kl == pytest.approx(float(kl), rel=1e-3)
    nll = -logp[rows, TOKENS[rows + 1]].mean()
    assert other.perplexity == pytest.approx(float(nll.exp()), rel=1e-3)
    assert other.same_top == pytest.approx(float((logp.argmax(-1) == logq.argmax(-1))[rows].float().mean()))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is written is not what the method gave, does not load, or a flag of another kind is taken silently."""
    made = random_model(layers=1, vocab_size=259, tied_embeddings=True)
    save_checkpoint(tmp_path / "model", made.spec, dict(made.export()), new_tokenizer(), "float32")
    (tmp_path / "text.txt").write_text("Janet's ducks lay 16 eggs a day. " * 60)
    (tmp_path / "few.jsonl").write_text('{"text": "Nine byte"}\n{"text": "Less"}\n')
    command = [
        "convert",
        "quantise",
        str(tmp_path / "model"),
        "--format",
        "nvfp4",
        "--texts",
        str(tmp_path / "text.txt"),
    ]
    assert (
        main([*command, "--method", "hadamard+gptq", "--sequences", "2", "--out", str(tmp_path / "made"), "--json"])
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["matrices"] == 7 and told["bits"] == 4.5
    opened = open_checkpoint(str(tmp_path / "made"))
    read = dict(opened.tensors())
    assert all(tensor.dtype == torch.float32 for tensor in read.values()) and not opened.spec.tied_embeddings
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        units = read[name].unflatten(1, (-1, 16))
        assert all(len(block.abs().unique()) <= 8 for row in units for block in row)  # e2m1 has so many sizes
    assert (
        main(["convert", "quantise", str(tmp_path / "model"), "--method", "hadamard", "--out", str(tmp_path / "t")])
        == 0
    )
    assert "nothing rounded" in capsys.readouterr().out
    for wrong, said in (
        (["--method", "gptq", "--format", "int4_g32"], "there is no text"),
        (["--method", "nearest"], "none is given, or floats: --format"),
        ([], "give --format"),
        (["--format", "int5_x"], "is no format"),
        (["--format", "gptq", "--method", "gptq", "--texts", "nothing.txt"], "blocks of 128 do not divide"),
        (["--format", "nvfp4", "--size", "layers=1"], "are not of `convert quantise`"),
        (["--format", "awk"], "Did you mean awq"),
        (["--format", "nvfp4", "--texts", str(tmp_path / "text.txt")], "nearest looks at no text"),
        (["--method", "hadamard", "--texts", str(tmp_path / "text.txt")], "hadamard looks at no text"),
        (["--format", "nvfp4", "--sequences", "4"], "there is none. Leave it out"),
        (["--format", "nvfp4", "--method", "gptq", "--texts", str(tmp_path / "few.jsonl")], "its longest has 9"),
    ):
        assert main(["convert", "quantise", str(tmp_path / "model"), "--out", str(tmp_path / "wrong"), *wrong]) == 2
        assert said in capsys.readouterr().err
    command[3:5] = ["--format", "gptq:int4_g16"]
    assert main([*command, "--method", "awq+gptq", "--out", str(tmp_path / "codes")]) == 0
    assert "7 matrices" in capsys.readouterr().out
    packed = dict(open_checkpoint(str(tmp_path / "codes")).tensors())["model.layers.0.mlp.up_proj.weight"]
    assert all(len(block.abs().unique()) <= 9 for row in packed.float().unflatten(1, (-1, 16)) for block in row)
    assert main(["convert", "prune", "m", "--out", str(tmp_path / "wrong"), "--method", "gptq"]) == 2
    assert "are of `convert quantise`" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


def test_the_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has another text's figures, or the bench measures a method that did nothing."""
    made = random_model(layers=1, vocab_size=259, tied_embeddings=True, max_position=1024)
    save_checkpoint(tmp_path / "model", made.spec, dict(made.export()), new_tokenizer(), "float32")
    monkeypatch.setattr(bench, "MODEL", str(tmp_path / "model"))
    monkeypatch.setattr(bench, "SEQUENCES", 2)
    for name in ("calibration", "held"):
        (tmp_path / name).write_text(f"{name} of a model. " * 40)
    bench.table(tmp_path / "calibration", tmp_path / "held", ["nearest:int8_g128", "gptq:mxfp4"])
    fine, rough = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert fine["kl"] < 0.05 * rough["kl"] and fine["tokens"] == len("held of a model. ") * 40 - 2
    assert fine["teacher_perplexity"] == rough["teacher_perplexity"] and fine["sqnr_db"] > 35
    assert main(["bench", "quantise", "--rounds", "1", "--json"]) == 0
    assert [row["cpu_s"] > 0 for row in json.loads(capsys.readouterr().out)["rows"]] == [True] * 3


def test_what_is_there_already_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of the user's beside the target is taken into what is written, or removed with what failed."""
    made = random_model(layers=1, vocab_size=259, tied_embeddings=True)
    save_checkpoint(tmp_path / "model", made.spec, dict(made.export()), new_tokenizer(), "float32")
    for name in ("p.part", "q.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    command = ["convert", "quantise", str(tmp_path / "model"), "--format"]
    assert main([*command, "nvfp4", "--out", str(tmp_path / "p"), "--json"]) == 0
    assert "mine.txt" not in {path.name for path in (tmp_path / "p").iterdir()}
    prune = ["convert", "prune", str(tmp_path / "model"), "--size", "ff_width=16", "--out", str(tmp_path / "q")]
    assert main(prune) == 0 and "mine.txt" not in {path.name for path in (tmp_path / "q").iterdir()}
    capsys.readouterr()
    assert main([*command, "awq:int4_g32", "--dtype", "float16", "--out", str(tmp_path / "model")]) == 2
    with pytest.raises(RuntimeError), written_aside(tmp_path / "new" / "r") as aside:
        aside.write_text("half")
        raise RuntimeError
    with pytest.raises(ConfigError, match="is there already"), written_aside(tmp_path / "r") as aside:
        aside.write_text("ours")
        (tmp_path / "r").write_text("theirs")
    assert (tmp_path / "r").read_text() == "theirs"
    assert [(tmp_path / name / "mine.txt").read_text() for name in ("p.part", "q.part")] == ["mine", "mine"]
    assert {path.name for path in tmp_path.rglob("*.part")} == {"p.part", "q.part"}


def test_calibration_says_what_it_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON's braces are calibrated on, a piece runs over two texts, or fewer pieces than asked are taken in silence."""
    made = random_model(layers=1, vocab_size=259, tied_embeddings=True)
    save_checkpoint(tmp_path / "model", made.spec, dict(made.export()), new_tokenizer(), "float32")
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a" * 70, "b" * 1100, "short", "c" * 20)))
    tokenizer = new_tokenizer()
    found = pieces(lines, 9, tokenizer, 4096)
    assert [tokenizer.decode(one) for one in found.taken] == ["a" * 70, "b" * 512, "b" * 512, "b" * 76, "c" * 20]
    assert [len(one) for one in pieces(lines, 2, tokenizer, 64).taken] == [64, 64]
    command = ["convert", "quantise", str(tmp_path / "model"), "--format", "nvfp4", "--method", "gptq", "--json"]
    assert main([*command, "--texts", str(lines), "--out", str(tmp_path / "p")]) == 0
    told = capsys.readouterr()
    size = made.spec.max_position
    assert json.loads(told.out)["tokens"] == sum(map(len, pieces(lines, 128, tokenizer, size).taken)) >= 1190
    assert "pieces (" in told.err and "128 are asked for" in told.err
    assert main(["convert", "quantise", str(tmp_path / "p"), "--format", "nvfp4", "--out", str(tmp_path / "q")]) == 0
    assert "in few bits already" not in capsys.readouterr().err  # its values are floats
    command[4:5] = ["awq:int4_g16"]
    assert main([*command[:5], "--out", str(tmp_path / "codes")]) == 0
    capsys.readouterr()
    assert (
        main(["convert", "quantise", str(tmp_path / "codes"), "--format", "fp8_row", "--out", str(tmp_path / "r")]) == 0
    )
    assert "in few bits already (awq): what these lost is lost, and they are rounded again" in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path / "codes"), "--format", "gguf:F32", "--out", str(tmp_path / "f.gguf")]) == 0
    assert "in few bits already (awq): what these lost is lost. Better" in capsys.readouterr().err  # nothing is rounded
    exact = {name: torch.ones_like(tensor) for name, tensor in made.export()}
    save_checkpoint(tmp_path / "ones", made.spec, exact, new_tokenizer(), "float32")
    assert (
        main([*command[:2], str(tmp_path / "ones"), "--format", "e2m1/16:e8m0", "--out", str(tmp_path / "o"), "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["sqnr_db"] is None
