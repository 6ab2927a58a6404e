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
from tandem.study.sensitivity import COLUMNS, Sums, batches, pareto, read_texts, sensitivity

MODEL = "new:layers=3,width=32,heads=4,kv_heads=2,ff_width=40"
TEXTS = ("A fox saw grapes.", "Water boils.", "Two and two are four, as ever.")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def foretold(spec: ModelSpec, form: str) -> dict[str, Any]:
    return predict(spec, form, "b200", "decode", 4, 64)


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
        worse = [other for other in found["rows"] if other["bits_a_parameter"] <= row["bits_a_parameter"]]
        assert row["dominated"] == any(other["kl"] < row["kl"] for other in worse if other["format"] != name)
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
    assert read_texts(plain) == ["One text.", "Another."]
    lines = tmp_path / "a.jsonl"
    for content, message in (
        ('{"text": "a"}\nno\n', "line 2 is no JSON"),
        ('{"t": 1}\n', 'line 1 has no "text"'),
        ("\n", "no text"),
    ):
        lines.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_texts(lines)
    with pytest.raises(ConfigError, match="No such file"):
        read_texts(tmp_path / "none.txt")


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
