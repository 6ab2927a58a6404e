"""Whole runs that distil from a corpus: with the teacher beside, from stored log-probs, and of spans of text."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tandem.cli.main import main
from tandem.columns import Columns
from tandem.config import dump, override
from tandem.corpus.teacher import Stored
from tandem.errors import ConfigError, CorpusError, RunFolderError, TandemWarning
from tandem.models.adapter import AdapterSet
from tandem.models.checkpoint import open_checkpoint, save_checkpoint
from tandem.models.config import AdapterConfig
from tandem.models.peft import save_adapter
from tandem.run import local
from tandem.run.config import RunConfig
from tandem.run.distil import load_teacher, weights_hash
from tandem.run.reading import SELECTIONS
from tandem.types import Group, Prompt, Trajectory
from tests.display import Silent
from tests.multi.test_distil_run import SMALL, TEACHER, run
from tests.sums import tiny_arithmetic


def chats(path: Path, turns: Sequence[int]) -> Path:
    """A row of so many turns each."""
    rows = []
    for number, count in enumerate(turns):
        said = [
            ({"role": "user", "content": f"{number}+{n}?"}, {"role": "assistant", "content": f"={number + n}"})
            for n in range(count)
        ]
        rows.append(json.dumps({"messages": [one for pair in said for one in pair]}))
    path.write_text("".join(row + "\n" for row in rows))
    return path


def taught(source: Path, **changes: str) -> RunConfig:
    return override(tiny_arithmetic(), {**SMALL, "corpus.sources": str(source), "corpus.heldout_tasks": "2", **changes})


def saved(folder: Path, source: str) -> str:
    """A model on disk."""
    checkpoint = open_checkpoint(source)
    save_checkpoint(folder, checkpoint.spec, dict(checkpoint.tensors()), checkpoint.load_tokenizer(), "bfloat16")
    return str(folder)


def test_log_probs_of_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows are stored once an epoch, held-out ones not, a row gets another's, or a changed file is learned from."""
    teacher, source = saved(tmp_path / "teacher", TEACHER), chats(tmp_path / "chats.jsonl", [1, 2, 1, 3, 1, 2, 1, 1])
    config = taught(
        source, **{"distil.top_k": "200", "distil.teacher": teacher, "corpus.max_tokens": "64", "steps": "4"}
    )
    live = run(config, tmp_path / "live")
    stored = tmp_path / "stored"
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from tandem.config import load\nfrom tandem.run.config import RunConfig\n\n\n"
        f"def small() -> RunConfig:\n    return load(RunConfig, {dump(config)!r})\n"
    )
    command = ["convert", "teacher", f"{recipe}:small", "--out", str(stored), "--json", "--set", "steps=1"]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    counts = live[0]["corpus"]
    texts = counts["trained_rows"] + counts["heldout_rows"] + counts["pieces"] - counts["split_rows"]
    assert said["texts"] == len(Stored(stored)) == texts
    again = override(config, {"distil.teacher": str(stored), "checkpoint.every": "2"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tandem.run.distil.load_teacher", None)
        kept = run(again, tmp_path / "kept")
    for one, other in zip(kept, live, strict=True):
        if other["step"]:
            assert one["divergence"] == pytest.approx(other["divergence"], rel=0.02)
    assert kept[0]["heldout"]["divergence"] == pytest.approx(live[0]["heldout"]["divergence"], rel=0.02)
    assert kept[-1]["epochs"]["chats"] > 1.0  # a row that came twice was stored once

    elsewhere = chats(tmp_path / "others.jsonl", [1, 1, 1, 1])
    with pytest.raises(ConfigError, match=r"log-probs of the sources chats, and others of corpus.sources is not among"):
        run(override(again, {"corpus.sources": str(elsewhere)}), tmp_path / "another")
    with pytest.raises(ConfigError, match="holds log-probs of chats, and corpus.sources is empty"):
        local.plan(override(again, {"corpus.sources": "", "corpus.heldout_tasks": "0", "corpus.max_tokens": "0"}))
    chats(source, [1, 2, 1, 3, 1, 2, 1, 1, 1])
    with pytest.raises(ConfigError, match=r"chats of corpus.sources was changed since.*`tandem convert teacher`"):
        run(again, tmp_path / "changed")


def test_a_teacher_that_is_another_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run goes on with another teacher than it began with, or nobody is told that the stored one was trained on."""
    teacher, source = saved(tmp_path / "teacher", TEACHER), chats(tmp_path / "chats.jsonl", [1] * 8)
    config = taught(source, **{"distil.top_k": "20", "distil.teacher": teacher, "steps": "2"})
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from tandem.config import load\nfrom tandem.run.config import RunConfig\n\n\n"
        f"def small() -> RunConfig:\n    return load(RunConfig, {dump(config)!r})\n"
    )
    stored = tmp_path / "stored"
    assert main(["convert", "teacher", f"{recipe}:small", "--out", str(stored)]) == 0
    kept = override(config, {"distil.teacher": str(stored)})
    for name, one in (("live", config), ("kept", kept)):
        with warnings.catch_warnings():
            warnings.simplefilter("error", TandemWarning)
            run(one, tmp_path / name)
    for folder in (tmp_path / "teacher", stored):
        folder.rename(folder.with_name(f"{folder.name} before"))
    saved(tmp_path / "teacher", TEACHER.replace("seed=5", "seed=6"))
    with pytest.raises(RunFolderError, match="distil.teacher .* hashes to .* now, and the run began"):
        local.train(config, out=None, resume=tmp_path / "live", display=Silent())
    assert main(["convert", "teacher", f"{recipe}:small", "--out", str(stored)]) == 0
    with pytest.raises(RunFolderError, match="it was trained on, or written anew"):
        local.train(kept, out=None, resume=tmp_path / "kept", display=Silent())
    before = override(config, {"distil.teacher": f"{stored} before"})
    with pytest.warns(TandemWarning, match="holds log-probs of .* as it was, .* there are others now"):
        local.plan(before)
    capsys.readouterr()


def test_a_teacher_with_an_adapter(tmp_path: Path) -> None:
    """A teacher that was trained by LoRA teaches as the model that it was trained on, or counts as the same."""
    folder = tmp_path / "adapter"
    base = saved(tmp_path / "base", TEACHER)
    config = tiny_arithmetic().model
    plain = load_teacher(base, config)
    adapter = AdapterSet(plain, AdapterConfig(rank=4)).draw(seed=1)
    for one in adapter.additions:
        one.piece.up.value += 0.1
    adapter.repack()
    save_adapter(folder, adapter)
    written = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(written | {"base_model_name_or_path": base}))
    worn = load_teacher(str(folder), config)
    assert worn.adapter is not None and weights_hash(str(folder)) != weights_hash(base)
    source = chats(tmp_path / "chats.jsonl", [1] * 8)
    rows = [
        run(taught(source, **{"distil.teacher": one, "steps": "1"}), tmp_path / f"run {place}")[-1]
        for place, one in enumerate((base, str(folder)))
    ]
    assert rows[0]["teacher_nll"] != rows[1]["teacher_nll"] and rows[0]["nll"] == rows[1]["nll"]


def test_marked_turns_are_not_distilled(tmp_path: Path) -> None:
    """corpus.error_turns=mark is not heard: a turn that failed is taught, and counts among the tokens."""
    columns = Columns.of(tokens=(5, 9, 2, 7, 3), loss_mask=(False, True, True, True, True))
    columns = columns.having(failed=np.array([False, True, True, False, False]))
    whole = Columns.of(tokens=(5, 9), loss_mask=(False, True)).having(failed=np.array([False, True]))
    groups = [Group(Prompt("p", ()), (Trajectory("p/0", "p", columns), Trajectory("p/1", "p", whole)))]
    config = override(tiny_arithmetic(), SMALL)
    found = SELECTIONS["distil"](config, groups)
    (sample,) = found.samples
    assert sample.columns["loss_mask"].tolist() == [False, False, False, True, True]
    assert found.prompts[0].tokens == 2 and found.count("masked") == 1


def test_no_text_beyond_the_teachers_positions(tmp_path: Path) -> None:
    """A row that the student can read and the teacher can't ends the run when its turn comes."""
    source = chats(tmp_path / "chats.jsonl", [1] * 6 + [9])
    few = TEACHER.replace("max_position=128", "max_position=64")
    config = taught(source, **{"distil.teacher": few, "learner.microbatch_tokens": "128", "steps": "3"})
    rows = run(config, tmp_path / "run")
    assert rows[0]["corpus"]["split_rows"] == 1 and rows[0]["corpus"]["pieces"] > 1


def test_spans_of_a_corpus(tmp_path: Path) -> None:
    """A teacher of other tokens is told another conversation than the answer's, or held-out rows lack its spans."""
    spans = {"distil.spans": "true", "distil.divergence": "k1+", "steps": "2"}
    source = chats(tmp_path / "chats.jsonl", [1] * 8)
    rows = run(taught(source, **spans), tmp_path / "run")
    assert rows[-1]["spanned"] == rows[0]["heldout"]["spanned"] == 1.0 and rows[0]["heldout"]["divergence"] != 0.0
    several = chats(tmp_path / "several.jsonl", [1, 1, 2, 1, 1, 1])
    for turns in ("all", "last"):
        with pytest.raises(CorpusError, match=r"several.jsonl line 3: distil.spans compares one answer to a prompt"):
            run(taught(several, **spans, **{"corpus.turns": turns}), tmp_path / turns)
    counted = run(taught(several, **spans, **{"corpus.bad": "count"}), tmp_path / "counted")
    assert counted[0]["corpus"]["refused: no single answer"] == 1
    document = tmp_path / "document.txt"
    document.write_text("1 + 2 = 3\n")
    with pytest.raises(CorpusError, match="this is a document"):
        run(taught(document, **spans, **{"corpus.heldout_tasks": "0"}), tmp_path / "document")
