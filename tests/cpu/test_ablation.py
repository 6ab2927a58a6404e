"""One tensor at a time: against the model written slowly, in fp64, with that tensor rounded and no other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.cli import main
from tandem.errors import ConfigError
from tandem.kernels.rounding import kept_of
from tandem.models.checkpoint import open_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.rope import rope_tables
from tandem.models.view import PackView
from tandem.numerics.blocks import FORMATS, Format, format_of, rounded, sqnr_db
from tandem.report.numerics import gradient_figure, sensitivity_figure
from tandem.study.gradients import gradient_errors
from tandem.study.sensitivity import sensitivity

MODEL = "new:layers=3,width=32,heads=4,kv_heads=2,ff_width=40"
TEXTS = ("A fox saw grapes.", "Water boils.", "Two and two are four, as ever.")
PARTS = ("rows", "kv", "logits")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def by_row(x: Tensor, form: Format) -> Tensor:
    """Each row by itself, whatever the format shares."""
    flat = x.float().reshape(-1, x.shape[-1])
    return torch.stack([rounded(row, form) for row in flat]).view(x.shape).double()


Hook = Callable[[int, str, Tensor], Tensor]


def slow_logits(tensors: dict[str, Tensor], tokens: Tensor, hook: Hook) -> Tensor:
    """Of one text: [T, V], fp64; `hook` sees each tensor that can be rounded, by its layer and name."""
    spec = open_checkpoint(MODEL).spec
    w = {name: tensor.double() for name, tensor in tensors.items()}
    cos, sin = (table[: len(tokens), None].double() for table in rope_tables(spec, spec.max_position))

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + spec.norm_eps).rsqrt() * w[name]

    def turn(x: Tensor) -> Tensor:
        one, other = x.chunk(2, -1)
        return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)

    x = w["model.embed_tokens.weight"][tokens]
    mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    for layer in range(spec.layers):
        p = f"model.layers.{layer}."
        h = hook(layer, "x of q, k, v", norm(x, p + "input_layernorm.weight"))
        q, k, v = (
            (h @ w[f"{p}self_attn.{name}_proj.weight"].T).view(len(tokens), -1, spec.head_size) for name in "qkv"
        )
        k, v = hook(layer, "keys", turn(k)), hook(layer, "values", v)
        k, v = (one.repeat_interleave(spec.heads // spec.kv_heads, 1) for one in (k, v))
        scores = torch.einsum("qhd,khd->hqk", turn(q), k) / math.sqrt(spec.head_size)
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(mask, -math.inf).softmax(-1), v).flatten(1)
        x = x + hook(layer, "x of o", mixed) @ w[p + "self_attn.o_proj.weight"].T
        h = hook(layer, "x of gate, up", norm(x, p + "post_attention_layernorm.weight"))
        act = torch.nn.functional.silu(h @ w[p + "mlp.gate_proj.weight"].T) * (h @ w[p + "mlp.up_proj.weight"].T)
        x = x + hook(layer, "x of down", act) @ w[p + "mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return hook(9, "logits", hook(9, "x of head", norm(x, "model.norm.weight")) @ hook(9, "head", head).T)


def slowly(form: Format, at: int, name: str) -> tuple[float, float]:
    """KL a token, and decibels, of all texts."""
    checkpoint = open_checkpoint(MODEL)
    tensors, tokenizer = dict(checkpoint.tensors()), checkpoint.load_tokenizer()
    kl, count, given, back = 0.0, 0, [], []

    def round_one(layer: int, what: str, x: Tensor) -> Tensor:
        if (layer, what) != (at, name):
            return x
        made = rounded(x.float(), form).double() if what == "head" else by_row(x, form)
        given.append(x.flatten()), back.append(made.flatten())
        return made

    for text in TEXTS:
        tokens = torch.tensor(tokenizer.encode(text))
        before, after = (slow_logits(tensors, tokens, hook).log_softmax(-1) for hook in (lambda _, __, x: x, round_one))
        kl += float((before.exp() * (before - after)).sum())
        count += len(tokens)
    return kl / count, sqnr_db(torch.cat(given), torch.cat(back))


@pytest.mark.parametrize("name", ["mxfp4", "w8a8"])
def test_each_tensor_alone(name: str, texts: Path) -> None:
    """A row, a key or a logit rounded in another layer, before its rotation, or by another row's scale; a cell whose
    tensor stays rounded in the next."""
    form = format_of("int8_row") if name == "w8a8" else FORMATS[name]
    found = sensitivity(MODEL, name, texts, lambda _: None, PARTS)
    cells = {(cell["layer"], cell["tensor"]): cell for cell in found["cells"]}
    assert len(cells) == 3 * 6 + 3
    places = [(0, "x of q, k, v"), (2, "x of o"), (1, "x of gate, up"), (2, "x of down"), (0, "keys"), (2, "values")]
    places += [(9, "x of head"), (9, "logits"), (9, "head")]
    for at, column in places if name == "mxfp4" else places[4:8]:
        cell = cells[None if at == 9 else at, column]
        kl, decibels = slowly(form, at, column)
        assert cell["kl"] == pytest.approx(kl, rel=5e-3, abs=2e-8), (at, column)
        assert cell["sqnr_db"] == pytest.approx(decibels, abs=0.05), (at, column)
    both = sensitivity(MODEL, name, texts, lambda _: None, ("weights", *PARTS))["cells"]
    known = {(cell["layer"], cell["tensor"]): cell for cell in both}
    assert all(known[at]["kl"] == cell["kl"] for at, cell in cells.items()) and len(known) == 3 * 13 + 3
    drawn = sensitivity_figure(found | {"cells": both})
    grid = drawn.axes[1].images[0].get_array()
    assert grid.shape == (4, 16) and int((~torch.tensor(grid.filled(math.nan)).isnan()).sum()) == 3 * 13 + 3
    assert drawn.axes[0].get_yticklabels()[-1].get_text() == "out"


def test_rows_have_a_format_of_their_own(texts: Path) -> None:
    """The format of matrices taken for that of rows."""
    pair = sensitivity(MODEL, "mxfp4+mxfp8_e4m3", texts, lambda _: None, ("weights", "kv"))["cells"]
    alone = {
        (cell["layer"], cell["tensor"]): cell["kl"]
        for name, kinds in (("mxfp4", ("weights",)), ("mxfp8_e4m3", ("kv",)))
        for cell in sensitivity(MODEL, name, texts, lambda _: None, kinds)["cells"]  # type: ignore[arg-type]
    }
    assert {(cell["layer"], cell["tensor"]): cell["kl"] for cell in pair} == alone
    plain = sensitivity(MODEL, "bf16", texts, lambda _: None, ("kv", "rows"))["cells"]
    assert all(40 < cell["sqnr_db"] < 60 for cell in plain)


def test_keys_and_values_by_a_rule_of_many_tokens(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Values rounded beside keys, another layer's, or all layers' KL that is not that of the engine's policy."""
    name = "kivi2_r8_sinks2"
    found = sensitivity(MODEL, name, texts, lambda _: None, ("kv",))
    checkpoint, kept = open_checkpoint(MODEL), kept_of(name)
    assert kept is not None and kept.span is not None
    one = kept._replace(span=replace(kept.span, keys=None))
    tokenizer, tensors = checkpoint.load_tokenizer(), dict(checkpoint.tensors())
    plain = Decoder(checkpoint.spec, "float32").load(tensors.items())
    whole = Decoder(checkpoint.spec, "float32", kept=kept).load(tensors.items())
    values = Decoder(checkpoint.spec, "float32").load(tensors.items())
    values.layers[1].mix.heads = replace(values.layers[1].mix.heads, kept=one)
    sums, count = {"whole": 0.0, "values": 0.0}, 0
    for text in map(json.loads, texts.read_text().splitlines()):
        tokens_T = torch.tensor(tokenizer.encode(text["text"]))
        count += len(tokens_T)
        with torch.no_grad():
            before, *others = (
                one.logits(one.forward(tokens_T, PackView([0, len(tokens_T)]))).double().log_softmax(-1)
                for one in (plain, whole, values)
            )
        for which, after in zip(sums, others, strict=True):
            sums[which] += float((before.exp() * (before - after)).sum())
    cells = {(cell["layer"], cell["tensor"]): cell for cell in found["cells"]}
    assert found["kv"]["kl"] == pytest.approx(sums["whole"] / count, rel=1e-2) and found["kv"]["kl"] > 1e-6
    assert cells[1, "values"]["kl"] == pytest.approx(sums["values"] / count, rel=1e-2)
    assert 5 < found["kv"]["sqnr_db"] < 25 and len(cells) == 6
    asked = ["numerics", "sensitivity", MODEL, "--texts", str(texts), "--format", name, "--tensors", "kv"]
    assert main.main(asked) == 0
    assert f"all keys and values at once: {found['kv']['sqnr_db']:.2f} dB, KL " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="kivi2 is a rule of keys and values: leave all but kv out"):
        sensitivity(MODEL, "kivi2", texts, lambda _: None, ("rows", "kv"))


@pytest.mark.parametrize(
    ("form", "kinds", "said"),
    [
        ("fp8_128x128", ("kv",), "rounds tiles of 128 rows.*Give a format of rows behind a"),
        ("mxfp4+mxfp4", ("weights",), r"leave \+mxfp4 out, or add --tensors rows"),
        ("mxfp5", ("rows",), "is no format"),
    ],
)
def test_what_rounds_no_row_is_refused(form: str, kinds: Any, said: str, texts: Path) -> None:
    """A format whose rows hang on each other, rounded otherwise than it says."""
    with pytest.raises(ConfigError, match=said):
        sensitivity(MODEL, form, texts, lambda _: None, kinds)


def exact_gradients(changed: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Tensor]:
    """Of -log p of all next tokens, by torch's own backward pass over the slow model."""
    checkpoint = open_checkpoint(MODEL)
    tensors = {name: tensor.double().requires_grad_() for name, tensor in checkpoint.tensors()}
    tokenizer = checkpoint.load_tokenizer()
    for text in TEXTS:
        tokens = torch.tensor(tokenizer.encode(text))
        logits = slow_logits(tensors, tokens, lambda _, __, x: x)
        torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum").backward()
    return {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}


def test_gradients_are_those_of_the_next_tokens(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of another loss, of a text's last token, or of a fused matrix's neighbour."""
    from tandem.study import gradients

    kept: list[dict[tuple[int, str], Tensor]] = []
    run = gradients._gradients

    def watched(*given: Any) -> dict[tuple[int, str], Tensor]:
        kept.append(run(*given))
        return kept[-1]

    monkeypatch.setattr(gradients, "_gradients", watched)
    found = gradient_errors(MODEL, "mxfp8_e4m3", texts, lambda _: None)
    wanted = exact_gradients()
    rooms = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}
    for (layer, name), gradient in kept[0].items():
        right = wanted[f"model.layers.{layer}.{rooms.get(name, 'mlp')}.{name}_proj.weight"]
        torch.testing.assert_close(gradient.double(), right, rtol=1e-3, atol=1e-5 * float(right.abs().max()))
    by_place = {(cell["layer"], cell["tensor"]): cell for cell in found["cells"]}
    for at, exact in kept[0].items():
        assert by_place[at]["sqnr_db"] == pytest.approx(sqnr_db(exact, kept[1][at]), abs=1e-6)
        cosine = torch.nn.functional.cosine_similarity(exact.flatten(), kept[1][at].flatten(), 0)
        assert by_place[at]["cosine"] == pytest.approx(float(cosine), abs=1e-5)
    whole = sqnr_db(*(torch.cat([gradient.flatten() for gradient in one.values()]) for one in kept))
    assert found["sqnr_db"] == pytest.approx(whole, abs=1e-6) and 15 < whole < 40
    worse = gradient_errors(MODEL, "nvfp4+stochastic+hadamard", texts, lambda _: None)
    assert 0 < worse["sqnr_db"] < found["sqnr_db"] - 10 and worse["cosine"] < found["cosine"]
    assert gradient_figure(found).axes[0].images[0].get_array().shape == (3, 7)


def test_the_command_shows_both(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flag that is taken and does nothing; a table that lacks what is of no layer."""
    asked = ["numerics", "sensitivity", MODEL, "--texts", str(texts), "--out", str(tmp_path / "a.png")]
    assert main.main([*asked, "--format", "nvfp4", "--tensors", "kv,logits"]) == 0
    table = capsys.readouterr().out
    assert "keys  values   head  x of head  logits" in table and "\n  out " in table
    assert main.main([*asked, "--format", "mxfp8_e5m2+mxfp8_e4m3", "--tensors", "gradients"]) == 0
    assert "gradients in mxfp8_e5m2+mxfp8_e4m3, all matrices: " in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert main.main([*asked, "--format", "nvfp4", "--tensors", "keys"]) == 2
    assert "'keys' is none. Give some of weights, rows, kv, logits" in capsys.readouterr().err
    assert main.main([*asked, "--format", "nvfp5", "--tensors", "gradients"]) == 2
    assert "learner.gradients=nvfp5 is no format" in capsys.readouterr().err


def test_the_model_is_as_it_was(texts: Path) -> None:
    """A model that is slow_logits' in no pass: the reference would prove nothing."""
    checkpoint = open_checkpoint(MODEL)
    tokens = torch.tensor(checkpoint.load_tokenizer().encode(TEXTS[0]))
    decoder = Decoder(checkpoint.spec, "float32").load(checkpoint.tensors())
    with torch.no_grad():
        ours = decoder.logits(decoder.forward(tokens, PackView([0, len(tokens)])))
        slow = slow_logits(dict(checkpoint.tensors()), tokens, lambda _, __, x: x)
    torch.testing.assert_close(ours.double(), slow, rtol=1e-4, atol=1e-4)
