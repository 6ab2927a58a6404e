"""Runs that learn from preferences: to the bit after a stop, and the reference asked once for each answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.config import override
from tandem.errors import ConfigError, TaskError
from tandem.recipes.tiny_arithmetic import tiny_arithmetic
from tandem.run import local, reference
from tandem.run.config import RunConfig
from tandem.run.judge import Judge
from tandem.run.reference import FILE, KeptLogprobs
from tandem.types import Message
from tests.display import Silent

SMALL = {
    "objective": "preference",
    "model.source": "new:width=32,layers=2,heads=4,kv_heads=2,ff_width=48,max_position=128",
    "evaluation.prompts": "0",
    "evaluation.every": "0",
    "rollout.prompts_per_step": "4",
    "learner.lr": "3e-3",
    "learner.schedule": "constant",
    "learner.warmup_steps": "0",
    "learner.microbatch_tokens": "256",
    "checkpoint.every": "5",
    "steps": "9",
}


class Noted(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def pairs(path: Path, count: int = 12) -> Path:
    rows = [
        {"prompt": f"{n} + 1", "chosen": f"It is {n + 1}.", "rejected": f"No idea, {n} perhaps?"} for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small(path: Path, loss: str, **changes: str) -> RunConfig:
    return override(tiny_arithmetic(), {**SMALL, "corpus.sources": str(path), "preference.loss": loss, **changes})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_resumes_and_asks_the_reference_once(tmp_path: Path) -> None:
    """The second epoch or a resumed run scores its answers again, or has other weights than one that never stopped."""
    config = small(pairs(tmp_path / "pairs.jsonl"), "dpo", **{"corpus.heldout_tasks": "2"})
    code, folder = local.train(config, out=tmp_path / "whole", resume=None, display=Silent())
    rows = {row["step"]: row for row in rows_of(folder)}
    assert code == 0 and rows[1]["loss"] == pytest.approx(0.6931471805599453, rel=1e-9)
    assert rows[9]["loss"] < 0.3 and rows[9]["preference_accuracy"] == 1.0
    assert rows[9]["heldout"]["preference_accuracy"] == 1.0 and rows[9]["heldout"]["loss"] < 0.5
    kept = KeptLogprobs(folder / FILE)
    assert len(kept) == 24
    trained = [rows[step]["referred_answers"] for step in range(1, 10)]
    assert sum(trained) + rows[0].get("referred_answers", 0) == 24 and trained[4:] == [0] * 5

    with pytest.MonkeyPatch.context() as patch:
        save = local.Session.save

        def stop(self: local.Session, step: int, version: object) -> None:
            save(self, step, version)  # type: ignore[arg-type]
            self.course.reached = "enough"

        patch.setattr(local.Session, "save", stop)
        local.train(config, out=tmp_path / "halves", resume=None, display=Silent())
    assert rows_of(tmp_path / "halves")[-1]["step"] == 5

    def asked(*given: object) -> None:
        raise AssertionError("the reference was made again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "reference_of", asked)
        local.train(config, out=None, resume=tmp_path / "halves", display=Silent())
    assert rows_of(tmp_path / "halves")[-1]["weights"] == rows[9]["weights"]


@pytest.mark.parametrize("loss", ["kto", "orpo", "reward_model"])
def test_other_losses_in_a_run(tmp_path: Path, loss: str) -> None:
    """A loss that no run can have: its columns are not there, or its rows lack what it measures."""
    config = small(pairs(tmp_path / "pairs.jsonl"), loss, steps="8", **{"corpus.heldout_tasks": "2"})
    _, folder = local.train(config, out=tmp_path / "run", resume=None, display=Silent())
    first, last = rows_of(folder)[0], rows_of(folder)[-1]
    before, after = first["heldout"], last["heldout"]
    assert last["step"] == 8 and after["loss"] < before["loss"] and last["loss"] < before["loss"]
    assert after["reward_margin"] > before["reward_margin"] + 0.05
    assert (folder / FILE).exists() == (loss == "kto")
    assert ("kl_mismatched" in last) == (loss == "kto") and ("preference_accuracy" in after) == (loss != "kto")
    assert last["tokens_per_s"] == last["learner_rows"] / last["seconds"]["learner"]
    kept = [json.loads(line) for line in (folder / "trajectories" / "step-8.jsonl").read_text().splitlines()]
    told = {(row["side"], "perhaps?" in row["text"]) for row in kept if row["side"] != "of another prompt"}
    assert told and told <= {("chosen", False), ("rejected", True)}
    assert any(row["side"] == "of another prompt" for row in kept) == (loss == "kto")
    head = folder / "checkpoints" / "step-8" / "reward_head.safetensors"
    assert head.exists() == (loss == "reward_model")


def test_a_reward_model_of_a_reward_model(tmp_path: Path) -> None:
    """What the first run's head has learned is thrown away in silence: the second begins at log 2."""
    config = small(pairs(tmp_path / "pairs.jsonl"), "reward_model", steps="4", **{"corpus.heldout_tasks": "2"})
    first, second = Noted(), Noted()
    _, folder = local.train(config, out=tmp_path / "first", resume=None, display=first)
    again = override(config, {"model.source": str(folder), "steps": "1"})
    _, other = local.train(again, out=tmp_path / "second", resume=None, display=second)
    begun, ended = rows_of(other)[0]["heldout"], rows_of(folder)[-1]["heldout"]
    assert begun == ended and begun["loss"] < 0.69
    assert "the reward head begins as a new one of zeros" in first.notes
    assert "the reward head begins as that of model.source, which is a reward model" in second.notes


def test_a_reward_model_pays_programs(tmp_path: Path) -> None:
    """task.reward pays something else than the reward model says, asks for answers that it never reads, or finds out
    in the midst of a run that a folder holds no reward model."""
    made = small(pairs(tmp_path / "pairs.jsonl"), "reward_model", steps="3")
    local.train(made, out=tmp_path / "judge", resume=None, display=Silent())
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": f"{n} + 1"}) + "\n" for n in range(6)))
    sampled = {
        "objective": "policy_gradient",
        "model.source": SMALL["model.source"],
        "task.environment": "jsonl",
        "task.path": str(questions),
        "task.reward": f"model:{tmp_path / 'judge'}",
        "task.heldout_size": "2",
        "evaluation.prompts": "0",
        "evaluation.every": "0",
        "rollout.prompts_per_step": "2",
        "rollout.samples_per_prompt": "2",
        "rollout.max_new_tokens": "6",
        "steps": "1",
    }
    paid = override(tiny_arithmetic(), sampled)
    code, folder = local.train(paid, out=tmp_path / "paid", resume=None, display=Silent())
    found = [json.loads(line) for line in (folder / "trajectories" / "step-1.jsonl").read_text().splitlines()]
    assert code == 0 and len(found) == 4 and not any(row["failure"] for row in found), found
    judge = Judge(tmp_path / "judge")
    renderer = judge._loaded.renderer
    texts = [renderer.text(row["tokens"]["ids"][-row["sampled_tokens"] :]) for row in found]
    asked = [[Message(**one) for one in row["prompt"]] for row in found]
    wanted = judge.rewards(list(zip(asked, texts, strict=True)))
    assert [row["reward"] for row in found] == wanted and len(set(wanted)) > 1
    with pytest.raises(TaskError, match=r"task\.reward=model:.*paid: .*is no reward model"):
        local.train(
            override(paid, {"task.reward": f"model:{folder}"}), out=tmp_path / "no", resume=None, display=Silent()
        )
    assert not (tmp_path / "no").exists()


def test_a_store_that_was_cut_short(tmp_path: Path) -> None:
    """A record that a crash tore, or a bit that flipped, is believed; or what comes after it is lost for good."""
    path, kept = tmp_path / FILE, KeptLogprobs(tmp_path / FILE)
    keys = [bytes([n]) * 16 for n in range(4)]
    values = [np.float32(np.arange(1, n + 2) * -0.3).astype(np.float64) for n in range(4)]
    kept.put(keys[:2], values[:2])
    kept.put(keys[2:3], values[2:3])
    whole = path.read_bytes()
    assert [found.tolist() for found in KeptLogprobs(path).get(keys[:3])] == [one.tolist() for one in values[:3]]
    path.write_bytes(whole[:-3])
    torn = KeptLogprobs(path)
    assert len(torn) == 2 and keys[2] not in torn
    torn.put(keys[3:], values[3:])
    assert len(KeptLogprobs(path)) == 3 and keys[3] in KeptLogprobs(path)
    flipped = bytearray(whole)
    flipped[22] ^= 1
    path.write_bytes(bytes(flipped))
    assert len(KeptLogprobs(path)) == 0


def test_preferences_without_a_source(tmp_path: Path) -> None:
    """A run begins that has nothing to learn from, or preference.* is ignored under another objective."""
    config = small(pairs(tmp_path / "pairs.jsonl"), "dpo")
    with pytest.raises(ConfigError, match="objective is preference and corpus.sources is empty"):
        local.train(override(config, {"corpus.sources": ""}), out=tmp_path / "run", resume=None, display=Silent())
    other = override(config, {"objective": "next_token", "preference.beta": "0.2"})
    with pytest.raises(ConfigError, match=r"preference\.\* is of objective preference"):
        local.train(other, out=tmp_path / "run", resume=None, display=Silent())
