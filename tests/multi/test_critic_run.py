"""Runs with a critic, with credit by turn and with prompts drawn again: what a checkpoint keeps and a row says."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tandem.config import override
from tandem.errors import ConfigError
from tandem.program.pool import RunningEpisode
from tandem.run import local, session
from tandem.run.config import RunConfig
from tests.display import Silent
from tests.multi.test_goldens import digest
from tests.samples import ended
from tests.sums import tiny_arithmetic

MODEL = "new:width=32,layers=2,heads=4,kv_heads=2,ff_width=48,max_position=128"
SMALL = {
    "objective": "policy_gradient",
    "steps": "4",
    "model.source": MODEL,
    "task.heldout_size": "4",
    "evaluation.prompts": "0",
    "evaluation.every": "0",
    "rollout.prompts_per_step": "3",
    "rollout.samples_per_prompt": "4",
    "rollout.max_new_tokens": "8",
    "learner.warmup_steps": "0",
}
CRITICS = {
    "head": {
        "critic.warmup_steps": "1",
        "algo.gae_lambda": "0.9",
        "algo.kl": "k1",
        "algo.kl_weight": "0.1",
        "algo.kl_in_reward": "true",
    },
    "head and trunk": {"critic.trunk_gradient": "0.5", "algo.updates_per_step": "2"},
    "model": {"critic.model": f"{MODEL},seed=1", "critic.model_lr": "1e-3", "algo.gae_step": "turn"},
}


@pytest.fixture(autouse=True)
def graded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards that differ within a group, of a model that can do nothing."""

    def grade(self: RunningEpisode, unheard: int = 0) -> Future[float]:
        return ended(float(sum(map(ord, self.said[-1].content)) % 11) / 10)

    monkeypatch.setattr(RunningEpisode, "score", grade)


def config_of(changes: dict[str, str]) -> RunConfig:
    return override(tiny_arithmetic(), {**SMALL, **changes})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CRITICS)
def test_a_resumed_critic_has_the_bits_of_one_that_never_stopped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The critic, its moments or its warm-up begin anew on a resume, or are not in the checkpoint."""
    whole = config_of({"algo.advantage": "gae", **CRITICS[name]})
    local.train(whole, out=tmp_path / "whole", resume=None, display=Silent())
    with monkeypatch.context() as patch:
        save = local.Session.save

        def stop(self: local.Session, step: int, version: object) -> None:
            save(self, step, version)  # type: ignore[arg-type]
            self.course.reached = "enough"

        patch.setattr(local.Session, "save", stop)
        halves = override(whole, {"checkpoint.every": "2"})
        local.train(halves, out=tmp_path / "halves", resume=None, display=Silent())
    assert rows_of(tmp_path / "halves")[-1]["step"] == 2
    local.train(halves, out=None, resume=tmp_path / "halves", display=Silent())
    ends = [tmp_path / run / "checkpoints" / "step-4" for run in ("whole", "halves")]
    assert digest(ends[0]) == digest(ends[1])
    assert json.loads((ends[0] / "state.json").read_text())["parts"]["critic"]["steps"] == 4
    assert list(ends[0].glob("critic-*.safetensors"))
    rows = [row for row in rows_of(tmp_path / "whole") if row["step"]]
    assert all(row["mismatch"] == 0.0 and row["value_loss"] > 0 for row in rows)
    assert [row["lr"] > 0 for row in rows] == [name != "head", True, True, True]  # a step of warm-up
    ledger = json.loads((tmp_path / "whole" / "ledger.json").read_text())["tokens"]
    assert ledger["total"] == sum(row["tokens"] for row in rows) and ledger["zero_advantage"] == 0


def test_prompts_are_drawn_again_for_groups_of_equal_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch shrinks as prompts are solved, what was drawn in vain is in no count, or drawing never ends."""
    seen: dict[str, int] = {}

    def grade(self: RunningEpisode, unheard: int = 0) -> Future[float]:
        number = seen.setdefault(self.prompt.id, len(seen))
        return ended(1.0 if number % 2 else float(sum(map(ord, self.said[-1].content)) % 11))

    monkeypatch.setattr(RunningEpisode, "score", grade)
    config = config_of({"rollout.redraws": "2", "algo.filter_zero_variance": "true", "steps": "2"})
    _, folder = local.train(config, out=tmp_path / "run", resume=None, display=Silent())
    for row in rows_of(folder):
        assert row["trajectories"] > 12 and row["trained_samples"] + sum(row["dropped"].values()) == row["trajectories"]
        assert row["dropped"]["filtered"] % 4 == 0 and row["trained_samples"] > 8
    ledger = json.loads((folder / "ledger.json").read_text())["tokens"]
    assert ledger["filtered"] > 0 and ledger["total"] == sum(row["tokens"] for row in rows_of(folder))
    monkeypatch.setattr(RunningEpisode, "score", lambda self, unheard: ended(1.0))
    _, folder = local.train(config, out=tmp_path / "equal", resume=None, display=Silent())
    assert [row["trajectories"] for row in rows_of(folder)] == [36, 36]  # 3 prompts, 3 draws of 4


WALK = '''
from tandem.program.environment import Environment, Fold, Step
from tandem.types import Message, Prompt


class Walk(Environment):
    """The context starts anew at each turn, with where one stands in it."""

    def prompt(self, split, index):
        return Prompt(f"{split}/{index}", (Message("user", f"walk {index}, please. " * 2),), {})

    def reward(self, prompt, text):
        return 0.0

    def observe(self, prompt, turns):
        said = [message.content for message in turns if message.role == "assistant"]
        at = sum(map(ord, said[-1])) % 2
        again = [*prompt.messages, Message("user", f"you stand at door {at} of two")]
        return Step(Fold(again), reward=at / 4, state=f"turn {len(said)}")
'''


@pytest.mark.parametrize("credit", ["step", "gigpo"])
def test_turns_have_credit_of_their_own_and_the_bits_of_the_engine(
    credit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step earned is lost on its way, all turns get one advantage, or a branch of the tree has other bits."""
    (tmp_path / "walk.py").write_text(WALK)
    given, select = [], session.samples_from_groups

    def spied(*arguments: Any) -> Any:
        given.append((arguments[1], select(*arguments)))
        return given[-1][1]

    monkeypatch.setattr(session, "samples_from_groups", spied)
    changes = {
        "task.environment": f"{tmp_path / 'walk.py'}:Walk",
        "rollout.max_turns": "3",
        "rollout.prompts_per_step": "2",
        "algo.credit": credit,
        "algo.discount": "0.5",
        "steps": "2",
    }
    _, folder = local.train(config_of(changes), out=tmp_path / "run", resume=None, display=Silent())
    rows = [row for row in rows_of(folder) if row["step"]]
    assert [row["mismatch"] for row in rows] == [0.0, 0.0] and all(row["ratio_error"] == 0.0 for row in rows)
    groups, selection = given[0]
    program = groups[0].programs[0]
    assert [t.columns["turns"].max() for t in program[1:]] == [1, 2] and "turns" not in program[0].columns
    assert {s for t in program[:2] for s in t.columns["states"] if s} == {"turn 1", "turn 2"}
    of_program: dict[str, set[float]] = {}
    for sample in selection.samples:
        found = sample.columns["advantages"][sample.columns["loss_mask"]]
        assert len(set(found.tolist())) == 1
        of_program.setdefault(sample.id.rpartition("/")[0], set()).add(found[0])
    assert any(len(values) > 1 for values in of_program.values())
    for (_, batch), row in zip(given, rows, strict=True):
        alone = sum(max(s.columns["loss_mask"].nonzero()[0]) for s in batch.samples)
        assert row["learner_rows"] < 0.7 * alone


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"critic.lr": "0.5"}, "nothing asks it"),
        ({"algo.advantage": "gae", "critic.warmup_steps": "4"}, "never learn"),
        ({"rollout.redraws": "1"}, "filter_zero_variance"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, str], says: str, tmp_path: Path) -> None:
    """A run goes on for hours with a critic that nothing asks, or ends in the middle of its first step."""
    with pytest.raises(ConfigError, match=says):
        local.train(config_of(changes), out=tmp_path / "run", resume=None, display=Silent())


def test_a_critic_that_reads_other_tokens(tmp_path: Path, write_model: Any) -> None:
    """A critic of another vocabulary reads ids as words that nobody wrote."""
    write_model(tmp_path / "other")
    changes = {"algo.advantage": "gae", "critic.model": str(tmp_path / "other")}
    with pytest.raises(ConfigError, match="they have to read the same"):
        local.train(config_of(changes), out=tmp_path / "run", resume=None, display=Silent())
