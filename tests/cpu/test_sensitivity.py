"""What formats cost a model: against the slow way, by hand, and what a file of texts may be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.bench.foretold import predict
from tandem.cli import main
from tandem.errors import ConfigError
from tandem.models.checkpoint import open_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.spec import ModelSpec
from tandem.models.view import PackView
from tandem.numerics.blocks import FORMATS, rounded, sqnr_db
from tandem.report.numerics import pareto_figure, sensitivity_figure
from tandem.run.texts import read_texts
from tandem.study.sensitivity import COLUMNS, Sums, _Pace, batches, pareto, sensitivity

MODEL = "new:layers=3,width=32,heads=4,kv_heads=2,ff_width=40"
TEXTS = ("A fox saw grapes.", "Water boils.", "Two and two are four, as ever.")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def foretold(spec: ModelSpec, form: str) -> dict[str, Any]:
    found = predict(spec, form, "b200", "decode", 4, 64)
    return found | {"seconds": 1e-3 / found["bits_a_parameter"]}  # of a device on which fewer bits take longer


@torch.no_grad()
def slowly(stored: str) -> list[float]:
    """KL of each text, by a model read anew with one tensor of the checkpoint rounded, a text at a time."""
    checkpoint = open_checkpoint(MODEL)
    tokenizer, found = checkpoint.load_tokenizer(), []
    original = dict(checkpoint.tensors())
    changed = {
        name: rounded(tensor, FORMATS["mxfp4"]) if name == stored else tensor for name, tensor in original.items()
    }
    models = [Decoder(checkpoint.spec, "float32").load(tensors.items()) for tensors in (original, changed)]
    for text in TEXTS:
        tokens = torch.tensor(tokenizer.encode(text))
        before, after = (
            one.logits(one.forward(tokens, PackView([0, len(tokens)]))).double().log_softmax(-1) for one in models
        )
        found.append(float((before.exp() * (before - after)).sum()))
    return found


def test_one_matrix_at_a_time_is_a_model_with_that_tensor_rounded(texts: Path) -> None:
    """A pass that begins at another layer than the matrix's, one that still has the matrix before rounded, or rows of
    a fused matrix that belong to its neighbour."""
    found = sensitivity(MODEL, "mxfp4", texts, lambda _: None)
    cells = {(cell["layer"], cell["tensor"]): cell for cell in found["cells"]}
    assert list(cells) == [(layer, column) for layer in range(3) for column in COLUMNS]
    tensors = dict(open_checkpoint(MODEL).tensors())
    names = {
        (0, "q"): "self_attn.q_proj", (1, "v"): "self_attn.v_proj", (2, "o"): "self_attn.o_proj",
        (1, "up"): "mlp.up_proj", (2, "down"): "mlp.down_proj",
    }  # fmt: skip
    counts = [len(open_checkpoint(MODEL).load_tokenizer().encode(text)) for text in TEXTS]
    for (layer, column), name in names.items():
        stored = f"model.layers.{layer}.{name}.weight"
        cell, each = cells[layer, column], slowly(stored)
        assert cell["kl"] == pytest.approx(sum(each) / sum(counts), rel=2e-3, abs=1e-8)
        assert cell["kl"] > 1e-6 and cell["kl_low"] < cell["kl"] < cell["kl_high"]
        back = rounded(tensors[stored].float(), FORMATS["mxfp4"])
        assert cell["sqnr_db"] == pytest.approx(sqnr_db(tensors[stored].float(), back))
    assert (found["texts"], found["tokens"]) == (3, sum(counts))
    assert sensitivity_figure(found).axes[0].images[0].get_array().shape == (3, 7)


def test_all_matrices_in_several_formats(texts: Path) -> None:
    """A format that keeps what the one before rounded; a better format called dominated."""
    forms = ("fp32", "w8a8", "mxfp8_e4m3", "mxfp4", "int4_g32", "mxfp4+mxfp4")
    found = pareto(MODEL, forms, texts, foretold, lambda _: None)
    rows = {row["format"]: row for row in found["rows"]}
    assert rows["fp32"]["kl"] == pytest.approx(0.0, abs=1e-9) and rows["fp32"]["same_top"] == 1.0
    assert rows["fp32"]["perplexity"] == pytest.approx(found["perplexity_before"])
    assert rows["mxfp4"]["kl"] > 5 * rows["mxfp8_e4m3"]["kl"] > 5 * rows["w8a8"]["kl"] > 0
    bits = [row["bits_a_parameter"] for row in found["rows"]]
    assert bits[0] == 32 and bits[1] > bits[2] > bits[4] > bits[3] == bits[5]
    assert rows["mxfp4+mxfp4"]["kl"] > 1.2 * rows["mxfp4"]["kl"]  # rows of activations are rounded too
    for name, row in rows.items():
        for by, key in (("bits", "bits_a_parameter"), ("seconds", "seconds")):
            worse = [other for other in found["rows"] if other[key] <= row[key]]
            assert row["dominated"][by] == any(other["kl"] < row["kl"] for other in worse if other["format"] != name)
    assert any(row["dominated"]["bits"] != row["dominated"]["seconds"] for row in rows.values())
    alone = pareto(MODEL, ("mxfp4",), texts, foretold, lambda _: None)["rows"][0]
    assert alone["kl"] == rows["mxfp4"]["kl"]
    drawn = pareto_figure(found | {"device": "b200", "phase": "decode", "batch": 4, "context": 64})
    assert [text.get_text() for text in drawn.axes[1].texts] != [] and len(drawn.axes[0].texts) == len(forms)


def test_figures_by_hand() -> None:
    """A mean of texts in place of one of tokens, an interval that takes tokens for independent, exp of a sum."""
    sums = Sums([4, 2], [3, 1], [0.4, 0.8], [6.0, 3.0], [6.0, 2.0], [4.0, 1.0])
    figures = sums.figures()
    assert figures["kl"] == pytest.approx(1.2 / 6)
    # Each text's sum less its tokens times the mean: -0.4 and 0.4; sqrt(2 x 0.32) / 6.
    half = 1.959963984540054 * math.sqrt(2 * 0.32) / 6
    assert figures["kl_high"] == pytest.approx(0.2 + half) and figures["kl_low"] == pytest.approx(max(0.0, 0.2 - half))
    assert figures["perplexity"] == pytest.approx(math.exp(9 / 4))
    assert figures["loss_more"] == pytest.approx(1 / 4) and figures["same_top"] == pytest.approx(5 / 6)
    one = Sums([4], [3], [0.4], [6.0], [5.0], [4.0]).figures()
    assert one["kl_low"] is one["perplexity_high"] is one["loss_more_low"] is None


def test_texts_are_lines_or_paragraphs(tmp_path: Path) -> None:
    """A line without a text skipped in silence; a paragraph cut at its line's end."""
    plain = tmp_path / "a.txt"
    plain.write_text("One\ntext.\n\n\n  \n\nAnother.\n")
    assert read_texts(plain, True) == ["One text.", "Another."]
    lines = tmp_path / "a.jsonl"
    for content, message in (
        ('{"text": "a"}\nno\n', "line 2 is no JSON"),
        ('{"t": 1}\n', 'line 1 has no "text"'),
        ("\n", "no text"),
    ):
        lines.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_texts(lines, True)
    with pytest.raises(ConfigError, match="No such file"):
        read_texts(tmp_path / "none.txt", True)


def test_batches_hold_whole_texts() -> None:
    """A text cut in two, whose second half sees nothing of the first; one of a token, which predicts nothing."""
    tokenizer = open_checkpoint(MODEL).load_tokenizer()
    found = batches(["a" * 600, "b" * 300, "c", "d" * 300], tokenizer, 500)
    assert [batch.bounds for batch in found] == [(0, 500, 800), (0, 300)]
    with pytest.raises(ConfigError, match="no text has two tokens"):
        batches(["a"], tokenizer, 500)


def test_the_command_writes_a_table_and_a_picture(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture that is not written, JSON that is none, a format that is asked for twice at once."""
    picture = tmp_path / "s.png"
    asked = ["numerics", "sensitivity", MODEL, "--texts", str(texts)]
    assert main.main([*asked, "--format", "mxfp4", "--out", str(picture), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["cells"]) == 21
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main.main([*asked, "--format", "mxfp4,nvfp4"]) == 2
    assert "takes one format" in capsys.readouterr().err
    assert main.main(["numerics", "pareto", MODEL, "--texts", str(texts), "--format", "mxfp4"]) == 2
    assert "two or more" in capsys.readouterr().err


def test_pictures_exaggerate_nothing() -> None:
    """0.3 dB over all colours, steps of a colour bar of unequal width, or a KL of nothing drawn as one of 1e-9."""
    cells = [{"layer": 0, "tensor": f"t{i}", "sqnr_db": 20.4 + 0.05 * i, "kl": kl} for i, kl in enumerate((0.0, 2e-9))]
    found = {"model": "m", "format": "nvfp4", "texts": 1, "tokens": 9, "layers": 1, "cells": cells}
    figure = sensitivity_figure(found)
    left, right = (axes.images[0] for axes in figure.axes[:2])
    assert left.norm.vmax - left.norm.vmin == pytest.approx(6) and right.norm.vmax / right.norm.vmin == pytest.approx(
        10
    )
    assert left.cmap.N == right.cmap.N == 24
    assert [text.get_text() for text in figure.axes[1].texts] == ["<"]
    rows = [{"format": name, "bits_a_parameter": bits, "seconds": bits, "kl": kl, "kl_low": None} for name, bits, kl in
            (("fp32", 32, 1e-12), ("bf16", 16, 1e-5))]  # fmt: skip
    drawn = pareto_figure({"model": "m", "texts": 1, "tokens": 9, "rows": rows, "device": "b200", "phase": "decode",
                           "batch": 1, "context": 9})  # fmt: skip
    points = [line.get_markerfacecolor() for line in drawn.axes[0].lines if line.get_marker() == "o"]
    assert points[0] == "white" != points[1] and "hollow: below 1e-9" in drawn.axes[0].get_ylabel()


def test_two_formats_are_two(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A format that is given twice passes for two that are compared."""
    assert main.main(["numerics", "pareto", MODEL, "--formats", "bf16,bf16", "--texts", str(texts)]) == 2
    assert "names bf16 twice" in capsys.readouterr().err


def test_progress_is_told_by_the_tensor(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes without a line; an estimate that leaves out the batches to come."""
    monkeypatch.setattr("tandem.study.sensitivity.BATCH_ROWS", 20)
    notes: list[str] = []
    found = sensitivity(MODEL, "mxfp4", texts, notes.append)
    assert [note.split(";")[1].split(" tensors")[0] for note in notes if "; " in note] == [
        f" {n} of 21" for _ in range(len(notes) // 22) for n in range(1, 22)
    ]
    assert len(notes) == 66 and len(found["cells"]) == 21
    pace = _Pace(0.0, [1.0, 0.5], 1.0)
    pace.begun_s -= 10.0
    assert pace.told().startswith("1 of 2 tensors, about 30 s")  # one more here, and two of the next batch
