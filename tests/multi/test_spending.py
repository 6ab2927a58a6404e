"""Runs that choose their prompts, stop groups early and draw others in place of equal ones."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tandem.config import override
from tandem.errors import ConfigError
from tandem.program.pool import RunningEpisode
from tandem.recipes.tiny_arithmetic import tiny_arithmetic
from tandem.run import local
from tandem.run.config import RunConfig, check_training
from tandem.run.stream import PromptStream
from tests.display import Silent
from tests.multi.test_extra_prompts import rows_of
from tests.samples import ended

SMALL = {
    "steps": "4",
    "objective": "policy_gradient",
    "model.source": "new:width=32,layers=2,heads=4,kv_heads=2,ff_width=48,max_position=128",
    "task.heldout_size": "4",
    "evaluation.prompts": "0",
    "rollout.prompts_per_step": "4",
    "rollout.samples_per_prompt": "6",
    "rollout.max_new_tokens": "12",
    "rollout.stop_strings": '["1", "2", "e"]',
    "learner.warmup_steps": "0",
    "select.window": "24",
    "select.fresh": "5",
    "select.first_samples": "2",
    "select.error": "0.6",
    "select.audit": "0.2",
    "rollout.redraws": "1",
    "algo.filter_zero_variance": "true",
}


def config_of(changes: Mapping[str, str] | None = None) -> RunConfig:
    return override(tiny_arithmetic(), {**SMALL, **(changes or {})})


def paid(self: RunningEpisode) -> float:
    """Half of the prompts are answered right now and then, the others never."""
    number = int(self.prompt.id.rpartition("/")[2])
    return float(number % 2 == 0 and sum(map(ord, self.said[-1].content)) % 3 == 0)


def at_once(self: RunningEpisode, unheard: int = 0) -> Future[float]:
    return ended(paid(self))


def run(path: Path, changes: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    local.train(config_of(changes), out=path, resume=None, display=Silent())
    return rows_of(path / "metrics.jsonl")


def test_drawing_prompts_is_a_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds in which an environment is asked for prompts, redraws too, that no phase claims: an open ledger."""
    ahead, calls = PromptStream.ahead, list[int]()

    def slow(self: PromptStream, count: int) -> Any:
        calls.append(count)
        time.sleep(0.05)
        return ahead(self, count)

    monkeypatch.setattr(PromptStream, "ahead", slow)
    rows = run(tmp_path / "run", {"steps": "2"})
    read_s = sum(row["seconds"]["read"] for row in rows if row["step"])
    assert len(calls) > 2 and read_s >= 0.05 * len(calls)
    assert json.loads((tmp_path / "run/ledger.json").read_text())["seconds"]["main"]["read"] >= read_s - 1e-3


def results(rows: list[dict[str, Any]]) -> list[Any]:
    return [[row.get(key) for key in ("weights", "reward", "tokens", "task_reward", "spared_programs")] for row in rows]


def test_a_run_chooses_the_same_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, stops or weights that depend on how long graders take; tokens without a fate; chances that the rows
    lack."""
    drawn = random.Random(1)

    def slowly(self: RunningEpisode, unheard: int = 0) -> Future[float]:
        future: Future[float] = Future()
        threading.Timer(drawn.random() / 50, future.set_result, [paid(self)]).start()
        return future

    found = []
    for place, score in enumerate((at_once, slowly)):
        monkeypatch.setattr(RunningEpisode, "score", score)
        rows = run(tmp_path / str(place))
        found.append(results(rows))
        ledger = json.loads((tmp_path / str(place) / "ledger.json").read_text())["tokens"]
        assert ledger["total"] == sum(row["tokens"] for row in rows) and ledger["decided"] > 0
        assert sum(row["spared_programs"] for row in rows) > 0 < sum(row["redrawn_groups"] for row in rows)
        for row in rows:
            kept = rows_of(tmp_path / str(place) / f"trajectories/step-{row['step']}.jsonl")
            assert len(kept) == row["trajectories"] and all(0 < one["selection"]["chance"] <= 1 for one in kept)
            stopped = {one["prompt_id"] for one in kept if one["selection"]["stopped"]}
            assert len(stopped) == row["stopped_groups"]
            asked = {int(one["prompt_id"].rpartition("/")[2]) for one in kept}
            assert asked <= set(range(5 * (row["step"] - 1), 5 * (row["step"] - 1) + 24))
    assert found[0] == found[1] and len({weights for weights, *_ in found[0]}) == 4


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_chooses_as_one_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """Beliefs that are lost with a checkpoint, or that hold rewards of a step that is done again."""
    monkeypatch.setattr(RunningEpisode, "score", at_once)
    whole = results(run(tmp_path / "whole"))
    folder = tmp_path / "stopped"
    spent = local.Session.learn

    def fails(self: local.Session, step: int, batch: Any) -> Any:
        if step == stop + 1:
            raise OSError("the machine went away")
        return spent(self, step, batch)

    monkeypatch.setattr(local.Session, "learn", fails)
    with pytest.raises(OSError, match="went away"):
        run(folder)
    monkeypatch.setattr(local.Session, "learn", spent)
    local.train(config_of(), out=None, resume=folder, display=Silent())
    assert results(rows_of(folder / "metrics.jsonl")) == whole


def test_chosen_prompts_teach_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice that goes by nothing; an estimate of the task's reward that is that of the chosen."""
    monkeypatch.setattr(RunningEpisode, "score", at_once)
    changes = {
        "steps": "24",
        "rollout.redraws": "0",
        "learner.lr": "1e-9",
        "select.bucket": "draw",
        "select.fresh": "1",
    }
    chosen = run(tmp_path / "chosen", changes)
    even = run(tmp_path / "even", {**changes, "select.power": "0"})

    def mean(rows: list[dict[str, Any]], key: str) -> float:
        return sum(row[key] for row in rows[10:]) / len(rows[10:])

    assert mean([row["selection"] for row in chosen], "met") > 1.3 * mean([row["selection"] for row in even], "met")
    assert mean(chosen, "task_reward") == pytest.approx(mean(even, "task_reward"), abs=0.06)


def test_weights_reach_the_learner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """select.weigh that changes nothing, or other things than what is learned."""
    monkeypatch.setattr(RunningEpisode, "score", at_once)
    plain = run(tmp_path / "plain", {"steps": "2"})
    weighed = run(tmp_path / "weighed", {"steps": "2", "select.weigh": "true"})
    assert plain[0]["weights"] == weighed[0]["weights"]  # nothing was believed of any prompt, so all chances were equal
    assert plain[1]["tokens"] == weighed[1]["tokens"] and plain[1]["selection"] == weighed[1]["selection"]
    assert plain[1]["loss"] != weighed[1]["loss"] and plain[1]["weights"] != weighed[1]["weights"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select.window": "3", "select.fresh": "1"}, "asks 4 prompts"),
        ({"select.fresh": "25"}, "1 to that"),
        ({"select.first_samples": "6"}, "no group could be stopped"),
        ({"select.first_samples": "1"}, "2 or more"),
        ({"select.first_samples": "0"}, "no group is stopped"),
        ({"algo.advantage": "reinforce_pp"}, "have a gradient"),
        ({"algo.kl": "k3", "algo.kl_weight": "0.1"}, "have a gradient"),
        ({"objective": "next_token"}, "samples nothing"),
        (
            {"select.window": "0", "select.first_samples": "0", "select.audit": "0", "select.weigh": "true"},
            "nothing is chosen",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, str], message: str) -> None:
    """A choice that is not made, or that changes a gradient in silence."""
    with pytest.raises(ConfigError, match=message):
        check_training(config_of(changes))
