"""Runs whose steps begin more groups than they take."""

from __future__ import annotations

import json
import threading
from concurrent.futures import Future
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tandem.config import override
from tandem.program.pool import RunningEpisode
from tandem.run import local
from tests.display import Silent
from tests.samples import ended
from tests.sums import tiny_arithmetic

SMALL = {
    "steps": "2",
    "objective": "policy_gradient",
    "model.source": "new:width=32,layers=2,heads=4,kv_heads=2,ff_width=48,max_position=128",
    "task.heldout_size": "4",
    "evaluation.prompts": "0",
    "rollout.prompts_per_step": "3",
    "rollout.samples_per_prompt": "4",
    "rollout.max_new_tokens": "12",
    "rollout.stop_strings": '["1", "2", "e"]',
    "rollout.extra_prompts": "5",
    "learner.warmup_steps": "0",
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def paid(self: RunningEpisode) -> float:
    return float(sum(map(ord, self.said[-1].content)) % 11)


def test_a_run_takes_the_same_groups_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that depend on which grader was quicker; tokens of groups beyond the batch that nobody counts."""
    random = Random(1)

    def slowly(self: RunningEpisode, unheard: int = 0) -> Future[float]:
        future: Future[float] = Future()
        threading.Timer(random.random() / 50, future.set_result, [paid(self)]).start()
        return future

    found = []
    for place, score in enumerate((lambda self, unheard=0: ended(paid(self)), slowly, slowly)):
        monkeypatch.setattr(RunningEpisode, "score", score)
        _, folder = local.train(
            override(tiny_arithmetic(), SMALL), out=tmp_path / str(place), resume=None, display=Silent()
        )
        rows = rows_of(folder / "metrics.jsonl")
        found.append([(row["weights"], row["reward"], row["tokens"]) for row in rows])
        for row in rows:
            assert (row["trajectories"], row["extra_programs"]) == (12, 20) and row["extra_tokens"] > 0
            kept = rows_of(folder / f"trajectories/step-{row['step']}.jsonl")
            prompts = {int(one["prompt_id"].rpartition("/")[2]) for one in kept}
            assert len(prompts) == 3 and prompts <= set(range(8 * (row["step"] - 1), 8 * row["step"]))
        ledger = json.loads((folder / "ledger.json").read_text())["tokens"]
        assert ledger["surplus"] == sum(row["extra_tokens"] for row in rows)
        assert ledger["total"] == sum(row["tokens"] + row["extra_tokens"] for row in rows)
    assert found[0] == found[1] == found[2]
    assert found[0][0][0] != found[0][1][0]


def test_redraws_draw_extra_prompts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of equal rewards fills the batch, or a redraw takes all of its groups."""
    seen: dict[str, int] = {}

    def grade(self: RunningEpisode, unheard: int = 0) -> Future[float]:
        return ended(1.0 if seen.setdefault(self.prompt.id, len(seen)) % 3 else paid(self))

    monkeypatch.setattr(RunningEpisode, "score", grade)
    changes = {"rollout.extra_prompts": "1", "rollout.redraws": "9", "algo.filter_zero_variance": "true", "steps": "1"}
    _, folder = local.train(
        override(tiny_arithmetic(), SMALL | changes), out=tmp_path / "run", resume=None, display=Silent()
    )
    (row,) = rows_of(folder / "metrics.jsonl")
    kept = rows_of(folder / "trajectories/step-1.jsonl")
    rewards: dict[str, set[float]] = {}
    for one in kept:
        rewards.setdefault(one["prompt_id"], set()).add(one["reward"])
    assert sum(len(distinct) > 1 for distinct in rewards.values()) == 3  # as many as the batch needs, and no more
    assert row["dropped"]["filtered"] == 4 * (len(rewards) - 3) and row["trajectories"] == 4 * len(rewards)
    assert row["extra_programs"] >= 4 * (len(seen) - len(rewards))


def test_weights_of_a_race_are_the_same_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights by what was seen of withdrawn groups, which depends on the machine; or that no loss ever sees."""
    random, found = Random(2), {}

    def slowly(self: RunningEpisode, unheard: int = 0) -> Future[float]:
        future: Future[float] = Future()
        threading.Timer(random.random() / 50, future.set_result, [paid(self)]).start()
        return future

    for place, weights in enumerate(("none", "inverse", "inverse")):
        monkeypatch.setattr(
            RunningEpisode, "score", slowly if place == 2 else lambda self, unheard=0: ended(paid(self))
        )
        lengths = {"rollout.stop_strings": json.dumps([*"0123456789abcdefghijklmnopqrstuvwxyz"])}
        lengths |= {"rollout.samples_per_prompt": "2", "rollout.max_new_tokens": "40", "rollout.prompts_per_step": "8"}
        settings = {**SMALL, **lengths, "steps": "3", "algo.fairness.weights": weights}
        config = override(tiny_arithmetic(), settings)
        _, folder = local.train(config, out=tmp_path / str(place), resume=None, display=Silent())
        rows = rows_of(folder / "metrics.jsonl")
        found[place] = [row["weights"] for row in rows]
        for row in rows:
            parts, fairness = row["lengths"], row["fairness"]
            assert sum(line["dispatched"] for line in parts) == 26 and sum(line["kept"] for line in parts) == 16
            assert fairness["longer"] > 0.5 and fairness["kept_length"] < fairness["dispatched_length"]
            assert all(
                0 <= line["keep_low"] <= line["keep"] <= line["keep_high"] <= 1 for line in parts if line["keep"]
            )
            assert ("weight_max" in fairness) == (weights == "inverse")
            if weights == "inverse":
                assert fairness["weight_max"] > 1 and fairness["weighted_length"] > fairness["kept_length"]
    assert found[1] == found[2] and found[0] != found[1]
