"""Whole runs that train a drafter on a model's own texts, and one whose engine drafts with it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tandem.cli.main import main
from tandem.config import override
from tandem.errors import ConfigError, ModelError
from tandem.numerics.digest import file_hash
from tandem.recipes.tiny_arithmetic import tiny_arithmetic
from tandem.run import local
from tandem.run.config import RunConfig
from tests.display import Silent

MODEL = "new:width=32,layers=4,heads=4,kv_heads=2,ff_width=48,max_position=128"
SMALL = {
    "model.source": MODEL,
    "objective": "drafter",
    "drafter.on_policy": "true",
    "drafter.steps": "3",
    "drafter.updates": "2",
    "drafter.vocabulary": "200",
    "task.heldout_size": "8",
    "evaluation.prompts": "0",
    "evaluation.every": "0",
    "rollout.prompts_per_step": "4",
    "rollout.samples_per_prompt": "2",
    "rollout.max_new_tokens": "12",
    "learner.lr": "3e-3",
    "learner.warmup_steps": "0",
    "steps": "6",
}
POLICY = {
    "model.source": MODEL,
    "objective": "policy_gradient",
    "task.heldout_size": "8",
    "evaluation.prompts": "0",
    "evaluation.every": "0",
    "rollout.prompts_per_step": "2",
    "rollout.samples_per_prompt": "4",
    "rollout.max_new_tokens": "12",
    "algo.filter_zero_variance": "false",
    "steps": "2",
}


Small = Callable[[dict[str, str]], RunConfig]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A run on questions of a file, which need no child."""
    folder = tmp_path_factory.mktemp("questions")
    for name, first in (("train", 0), ("heldout", 50)):
        rows = [{"question": f"{n} + 12 =", "answer": f"#### {n + 12}"} for n in range(first, first + 40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"environment": "jsonl", "path": f"{folder}/train.jsonl", "heldout_path": f"{folder}/heldout.jsonl"}
    settings = {f"task.{name}": value for name, value in task.items()} | {"task.template": "{question}"}
    cleared = {"task.name": "", "task.parameters": "", "task.reward": "last_number"}
    return lambda changes: override(tiny_arithmetic(), {**changes, **cleared, **settings})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(config: RunConfig, out: Path, resume: Path | None = None) -> list[dict[str, Any]]:
    code, folder = local.train(config, out=None if resume else out, resume=resume, display=Silent())
    assert code == 0
    return rows_of(folder)


FIXED = {"engine.draft.tokens": "3", "engine.draft.lengths": "fixed"}


@pytest.fixture(scope="module")
def trained(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(small(SMALL), folder)
    return folder


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").iterdir(), key=lambda one: int(one.name.removeprefix("step-")))


def test_a_drafter_learns_and_resumes(small: Small, trained: Path, tmp_path: Path) -> None:
    """The model learns in the drafter's place, the drafter does not, or one that goes on has other bits."""
    rows = rows_of(trained)
    assert rows[-1]["loss"] < rows[0]["loss"] and len({row["weights"] for row in rows}) == 1
    assert all(1 <= row["accepted_length_low"] <= row["accepted_length"] <= 4 for row in rows)
    assert {path.name for path in newest(trained).iterdir() if path.suffix == ".safetensors"} == {
        "model.safetensors",
        "optimiser-00001.safetensors",
    }
    config = small(SMALL)
    halves = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=3))
    with pytest.MonkeyPatch.context() as patch:
        save = local.Session.save

        def stop(self: local.Session, step: int, version: Any) -> None:
            save(self, step, version)
            self.course.reached = "enough"

        patch.setattr(local.Session, "save", stop)
        run(halves, tmp_path / "halves")
    resumed = run(halves, tmp_path / "halves", tmp_path / "halves")
    assert [row["step"] for row in resumed] == [1, 2, 3, 4, 5, 6] and resumed[-1]["loss"] == rows[-1]["loss"]
    one, other = (newest(folder) / "model.safetensors" for folder in (trained, tmp_path / "halves"))
    assert file_hash(one) == file_hash(other)


def test_texts_of_a_run_and_a_drafter_that_goes_on(small: Small, trained: Path, tmp_path: Path) -> None:
    """A run's rollouts are no corpus for its drafter, what is held out is not measured, or a drafter begins anew."""
    settings = SMALL | {"drafter.on_policy": "false", "drafter.source": str(trained), "drafter.vocabulary": "0"}
    corpus = {"corpus.sources": str(trained), "corpus.heldout_tasks": "3", "corpus.duplicates": "keep", "steps": "1"}
    rows = run(small(settings | corpus | {"evaluation.every": "1"}), tmp_path / "more")
    assert rows[-1]["loss"] < 0.98 * rows_of(trained)[0]["loss"]
    assert {"accepted_length", "accept_1", "coverage"} <= rows[-1]["heldout"].keys()
    kept = load_file(newest(tmp_path / "more") / "model.safetensors")
    assert kept["lm_head.weight"].shape == (len(kept["d2t"]), 32) and len(kept["d2t"]) < 260


def test_generates_with_it(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A verb that takes a drafter for a model, or says something else with it."""
    said = []
    for more in ([], ["--draft", f"eagle3:{trained}"]):
        assert main(["generate", MODEL, "Hi.", "--max-new-tokens", "24", *more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0]
    assert main(["generate", MODEL, "Hi.", "--draft", f"dflash:{trained}"]) == 2
    assert "is of kind eagle3" in capsys.readouterr().err


def test_rollouts_that_it_drafts_change_no_weight(small: Small, trained: Path, tmp_path: Path) -> None:
    """A policy that learns otherwise for its engine's drafter; or one that drafts nothing, or is planned no memory."""
    plain = run(small(POLICY), tmp_path / "plain")
    by = {
        "engine.draft.by": "eagle3",
        "engine.draft.tokens": "3",
        "engine.draft.lengths": "fixed",
        "engine.draft.model": str(trained),
    }
    drafted = run(small(POLICY | by), tmp_path / "drafted")
    assert [row["weights"] for row in drafted] == [row["weights"] for row in plain]
    assert all(row["drafted_tokens"] > 10 for row in drafted) and sum(row["accepted_tokens"] for row in drafted) > 0
    lines = {line.name for line in local.plan(small(POLICY | by)).lines}
    assert {"drafter", "drafter's keys and values"} <= lines


def test_a_drafter_of_blocks(small: Small, tmp_path: Path) -> None:
    """Blocks that no run can train, save, go on from or draft by; or that change a weight."""
    own = {"drafter.kind": "dflash", "drafter.vocabulary": "0"}
    rows = run(small(SMALL | own | {"drafter.depth": "2", "steps": "4"}), tmp_path / "blocks")
    assert rows[-1]["loss"] < rows[0]["loss"] and "accepted_length" in rows[-1]
    more = {"drafter.source": str(tmp_path / "blocks"), "steps": "1"}
    assert run(small(SMALL | own | more), tmp_path / "more")[0]["loss"] < rows[0]["loss"]
    with pytest.raises(ConfigError, match="is a dflash of blocks of 4; drafter.kind is eagle3"):
        run(small(SMALL | more | {"drafter.vocabulary": "0"}), tmp_path / "other")
    by = {
        "engine.draft.by": "dflash",
        "engine.draft.tokens": "3",
        "engine.draft.lengths": "fixed",
        "engine.draft.model": str(tmp_path / "blocks"),
    }
    plain = run(small(POLICY), tmp_path / "plain")
    drafted = run(small(POLICY | by | {"engine.draft.vocabulary": "100"}), tmp_path / "drafted")
    assert [row["weights"] for row in drafted] == [row["weights"] for row in plain]
    assert all(row["drafted_tokens"] > 10 for row in drafted)
    with pytest.raises(ConfigError, match="is of kind dflash"):
        run(small(POLICY | by | {"engine.draft.by": "eagle3"}), tmp_path / "other")


def test_a_drafter_with_states(small: Small, tmp_path: Path) -> None:
    """Recurrent layers that no run can train, save, go on from, plan or draft by; or that change a weight."""
    own = {"drafter.kind": "mixed"}
    rows = run(small(SMALL | own | {"drafter.mixers": "linear,attention,gru", "steps": "4"}), tmp_path / "states")
    assert rows[-1]["loss"] < rows[0]["loss"] and "accepted_length" in rows[-1]
    more = {"drafter.source": str(tmp_path / "states"), "drafter.vocabulary": "0", "steps": "1"}
    assert run(small(SMALL | own | more), tmp_path / "more")[0]["loss"] < rows[0]["loss"]
    by = {"engine.draft.by": "mixed", "engine.draft.model": str(tmp_path / "states")} | FIXED
    plain = run(small(POLICY), tmp_path / "plain")
    drafted = run(small(POLICY | by), tmp_path / "drafted")
    assert [row["weights"] for row in drafted] == [row["weights"] for row in plain]
    assert all(row["drafted_tokens"] > 10 for row in drafted) and sum(row["accepted_tokens"] for row in drafted) > 0
    fixed = {"engine.kv_memory_bytes": str(64 << 10), "engine.page_tokens": "16", "model.dtype": "float32"}
    lines = {line.name: line.size_bytes for line in local.plan(small(POLICY | by | fixed)).lines}
    heads, width, pages = 2 * 8, 32, (64 << 10) // (4 * 2 * 2 * 8 * 16 * 4)  # of 4 layers' keys and values
    kept = 16 * 4 * (2 * heads + 2 * width) + 4 * (heads * 8 + width)  # one layer's, the model's states, and its own
    assert lines["drafter's keys and values"] % kept == 0 and lines["drafter's keys and values"] // kept > pages


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "next_token", "drafter.on_policy": "false"}, "drafter is configured, but objective is"),
        ({"adapter.rank": "4"}, "objective is drafter and adapter is True"),
        ({"drafter.layers": "1,3"}, r"allowed are 0 to 2"),
        ({"drafter.vocabulary": "999"}, "drafter.vocabulary is 999, of 259 tokens"),
        ({"drafter.vocabulary": "0", "drafter.vocabulary_of": "x"}, "say how many tokens, with drafter.vocabulary"),
        ({"engine.draft.by": "eagle3"}, "Give both"),
        ({"drafter.kind": "mixed"}, "drafter.mixers empty"),
        ({"drafter.mixers": "gru"}, "drafter.kind is eagle3 and drafter.mixers gru"),
    ],
)
def test_refused(changes: dict[str, str], said: str, small: Small, tmp_path: Path) -> None:
    """A setting that is ignored, or that fails once the run has begun."""
    with pytest.raises(ConfigError, match=said):
        run(small(SMALL | changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_drafter_of_another_model_is_refused(small: Small, trained: Path, tmp_path: Path) -> None:
    """Drafts of a drafter that was trained for another model, or a model that is taken for a drafter."""
    by = {"engine.draft.by": "eagle3", "engine.draft.model": str(trained)}
    other = {"model.source": MODEL.replace("width=32", "width=64")}
    with pytest.raises(ModelError, match="drafts for a model of width 32 and 259 tokens"):
        run(small(POLICY | by | other), tmp_path / "run")
    with pytest.raises(ModelError, match="LlamaForCausalLMEagle3"):
        run(small(POLICY | {"model.source": str(trained)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
