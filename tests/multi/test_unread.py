"""Settings without a use in a training run: said by name, and without any effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.cli import main
from tandem.cli.train import train_recipe
from tandem.config import override
from tandem.errors import ConfigError
from tandem.plan import memory
from tandem.recipes.smollm2_sft_cpu import smollm2_sft_cpu
from tandem.recipes.tiny_arithmetic import tiny_arithmetic
from tandem.run import local
from tandem.run.unread import unread
from tests.display import Silent
from tests.multi.test_sft import SMALL

UNREAD = {
    "rollout.samples_per_prompt": "3", "rollout.prompts_per_step": "2", "rollout.redraws": "1",
    "rollout.temperature": "0.5", "rollout.top_k": "4", "rollout.top_p": "0.5", "rollout.min_p": "0.1",
    "rollout.max_new_tokens": "9", "rollout.stop_strings": "a", "rollout.max_turns": "2",
    "rollout.max_program_tokens": "7", "rollout.deadline_s": "5", "rollout.history": "render",
    "engine.batch_tokens": "512", "engine.page_tokens": "32", "engine.order": "longest", "engine.draft.by": "lookup",
    "engine.noise": "0.1", "sync.lag": "1", "alarms.action": "stop", "alarms.k1": "0.01",
    "evaluation.temperature": "0.5", "evaluation.samples": "2", "evaluation.top_k": "3", "evaluation.stop_reward": "1",
    "task.seed": "5", "task.system": "Be brief.", "task.template": "{question}?", "task.train_size": "3",
    "learner.final_share": "0.5", "workers.restarts": "1",
}  # fmt: skip
SAMPLED = {"objective": "policy_gradient"}
READ = {"learner.beta2": "0.99", "rollout.keep_tokens": "true", "evaluation.every": "4", "task.format": "chat"}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    turns = ([("user", f"{n} + {n % 7} ="), ("assistant", str(n + n % 7))] for n in range(24))
    rows = ({"messages": [{"role": role, "content": text} for role, text in row]} for row in turns)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def learned(chats: Path, folder: Path, changes: dict[str, str]) -> list[dict[str, Any]]:
    config = override(smollm2_sft_cpu(), {**SMALL, "corpus.sources": str(chats), "steps": "2", **changes})
    assert sorted(name for names in unread(config, changes).values() for name in names) == sorted(changes)
    assert not unread(config, READ)
    code, _ = local.train(config, out=folder, resume=None, display=Silent())
    assert code == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row.get(key) for key in ("loss", "grad_norm", "weights", "heldout", "lr")} for row in rows]


def test_what_is_said_to_have_no_use_has_none(chats: Path, tmp_path: Path) -> None:
    """A setting that a run reads is named among those without a use, or one that it does not read is not."""
    assert learned(chats, tmp_path / "set", UNREAD) == learned(chats, tmp_path / "plain", {})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "next_token", "rollout.top_k": "4", "alarms.k1": "1"}, ["rollout.top_k", "alarms.k1"]),
        ({"objective": "next_token", "rollout.max_new_tokens": "9", "engine.page_tokens": "32"}, []),
        ({"objective": "next_token", "evaluation.prompts": "0", "engine.page_tokens": "32"}, ["engine.page_tokens"]),
        ({"objective": "distil", "distil.teacher": "m", "distil.on_policy": "true", "rollout.max_turns": "2"}, []),
        ({"rollout.temperature": "0.5", "alarms.k1": "1", "engine.page_tokens": "32", "sync.lag": "1", **SAMPLED}, []),
        ({"learner.final_share": "0.5", "learner.schedule": "constant"}, ["learner.final_share"]),
        ({"select.power": "2", **SAMPLED}, ["select.power"]),
        ({"select.power": "2", "select.window": "64", "learner.final_share": "0", **SAMPLED}, []),
    ],
)
def test_each_is_named(
    settings: dict[str, str], said: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a person sets to see its effect has none, and nothing says so; or what has one is said to have none."""

    def stopped(*_: Any) -> None:
        raise ConfigError("stopped")

    monkeypatch.setattr(local, "plan", stopped)
    flags = [f"--set={name}={value}" for name, value in settings.items()]
    assert main.main(["train", "tiny_arithmetic", "--plan", *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "has no use for" in line]
    named = [name for name in settings if any(f" {name}:" in line or f" {name}," in line for line in lines)]
    assert sorted(named) == sorted(said), lines


def test_the_library_says_so_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`tandem.train` takes a setting without a use in silence."""

    def stopped(*_: Any) -> None:
        raise ConfigError("stopped")

    monkeypatch.setattr(memory, "check_counts", stopped)
    with pytest.raises(ConfigError, match="stopped"):
        train_recipe(tiny_arithmetic, {"objective": "next_token", "rollout.top_k": 4})
    assert "tandem train has no use for rollout.top_k: objective next_token samples nothing." in capsys.readouterr().err
