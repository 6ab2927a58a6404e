"""Regression caught: answers of an evaluation that hang on what else is asked, or are not kept as they were drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem.cli.main import main
from tandem.config import override
from tandem.errors import ConfigError
from tandem.models.config import ModelConfig
from tandem.rollout.config import RolloutConfig
from tandem.run import evaluate, local
from tandem.run.config import RunConfig
from tandem.run.evaluate import evaluate_tasks
from tandem.run.model import load
from tandem.types import Group
from tests.display import Silent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Path:
    """A random model whose answers hang on the prompt."""
    path = tmp_path_factory.mktemp("model")
    write_model(path, scale=10)
    return path


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of a file, one greedy and one of samples."""
    path = tmp_path_factory.mktemp("suite")
    rows = [{"question": f"{n}+{n}=", "answer": 2 * n} for n in range(6)]
    (path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    of_file = f'task.environment = "jsonl"\ntask.heldout_path = "{path}/sums.jsonl"\ntask.reward = "last_number"\n'
    drawn = "evaluation.samples = 4\nevaluation.temperature = 2.0\nevaluation.top_k = 60\n"
    (path / "suite.toml").write_text(f"[greedy]\n{of_file}[drawn]\n{of_file}{drawn}")
    return path / "suite.toml"


def evaluated(folder: Path, suite: Path, out: Path, *more: str) -> dict[str, Any]:
    asked = ["eval", str(folder), "--suite", str(suite), "--set", "rollout.max_new_tokens=6", "--out", str(out), *more]
    assert main(asked) == 0
    return json.loads(out.read_text())["tasks"]


def texts(task: dict[str, Any]) -> dict[str, list[str]]:
    return {row["id"]: [sample["text"] for sample in row["samples"]] for row in task["prompts"]}


def test_answers_are_a_function_of_prompt_seed_and_number(folder: Path, suite: Path, tmp_path: Path, capsys) -> None:
    """Samples of a prompt that are all alike, are others when fewer are asked for, or ignore the seed."""
    found = evaluated(folder, suite, tmp_path / "a.json")
    assert capsys.readouterr().out.splitlines()[2].startswith("greedy  6 x 1")
    drawn = texts(found["drawn"])
    assert len(drawn) == 6 and all(len(samples) == 4 for samples in drawn.values())
    assert sum(len(set(samples)) for samples in drawn.values()) > 12
    again = evaluated(
        folder, suite, tmp_path / "b.json", "--set", "evaluation.prompts=3", "--set", "task.heldout_size=6"
    )
    assert texts(again["drawn"]) == dict(list(drawn.items())[:3])
    other = evaluated(folder, suite, tmp_path / "c.json", "--set", "seed=1")
    assert texts(other["drawn"]) != drawn and texts(other["greedy"]) == texts(found["greedy"])
    model = load(folder)
    asked = [row["messages"] for row in found["greedy"]["prompts"]]
    assert [answer.text for answer in model.generate(asked, max_new_tokens=6)] == [
        sample for samples in texts(found["greedy"]).values() for sample in samples
    ]
    assert main(["eval", str(tmp_path / "c.json"), "--against", str(tmp_path / "a.json")]) == 0
    assert "drawn: asked otherwise: seed 0 there and 1 here" in capsys.readouterr().out
    assert main(["eval", str(tmp_path / "b.json"), "--against", str(tmp_path / "a.json")]) == 2
    assert "3 of the one and 0 of the other are not in both" in capsys.readouterr().err


def test_an_unfinished_file_goes_on_by_the_same_weights(folder: Path, suite: Path, tmp_path: Path, capsys) -> None:
    """A file whose tasks were answered by two models; a task that is asked on its own is answered otherwise."""
    path = tmp_path / "a.json"
    whole = evaluated(folder, suite, path)
    part = json.loads(path.read_text()) | {"unfinished": ["drawn"]}
    del part["tasks"]["drawn"]
    path.write_text(json.dumps(part | {"weights": "9f2c"}))
    asked = ["eval", str(folder), "--suite", str(suite), "--set", "rollout.max_new_tokens=6", "--out", str(path)]
    assert main(asked) == 2 and "what is kept came from 9f2c" in capsys.readouterr().err
    path.write_text(json.dumps(part))
    assert evaluated(folder, suite, path) == whole


@pytest.mark.parametrize("answered", [2, 8])  # of the first task, and of the second
def test_an_interrupted_task_goes_on_with_its_answers(
    answered: int, folder: Path, suite: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of a task that was interrupted are asked again, in another order, or their answers are lost."""
    whole = evaluated(folder, suite, tmp_path / "whole.json")
    path, asked, kept = tmp_path / "a.json", list[str](), evaluate.answer_row

    def counted(group: Group, text: Any) -> dict[str, Any]:
        if len(asked) == answered:
            raise KeyboardInterrupt
        asked.append(group.prompt.id)
        return kept(group, text)

    monkeypatch.setattr(evaluate, "answer_row", counted)
    again = ["eval", str(folder), "--suite", str(suite), "--set", "rollout.max_new_tokens=6", "--out", str(path)]
    assert main(again) == 130
    there = json.loads(path.read_text())
    name = ("greedy", "drawn")[answered > 6]
    assert [row["id"] for row in there["begun"][name]["prompts"]] == asked[6 * (answered > 6) :]
    if answered < 6:
        assert main(["eval", str(path)]) == 2 and "none of its tasks has ended" in capsys.readouterr().err
    changed = {**there["begun"][name]["prompts"][0], "hash": "0"}
    of = there["begun"][name] | {"prompts": [changed]}
    path.write_text(json.dumps(there | {"begun": {name: of}}))
    assert main(again) == 2 and "that is another now" in capsys.readouterr().err
    path.write_text(json.dumps(there))
    answered = 99
    assert evaluated(folder, suite, path) == whole
    assert f"2 prompts of {name}; going on with " in capsys.readouterr().err
    assert sorted(asked) == sorted(row["id"] for task in whole.values() for row in task["prompts"])
    assert not json.loads(path.read_text()).keys() & {"begun", "unfinished"}


def test_fewer_samples_are_the_first_of_more(folder: Path, suite: Path, tmp_path: Path) -> None:
    """A sample that hangs on how many others are drawn beside it."""
    four = texts(evaluated(folder, suite, tmp_path / "a.json")["drawn"])
    more = evaluated(
        folder, suite, tmp_path / "b.json", "--set", "evaluation.samples=2", "--set=evaluation.temperature=2"
    )
    assert texts(more["drawn"]) == {name: samples[:2] for name, samples in four.items()}


def test_a_prompt_that_is_too_long_fails_alone(folder: Path, tmp_path: Path, capsys) -> None:
    """One prompt beyond the model's positions ends the evaluation, and no other is asked."""
    positions = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    questions = ["1+1=", "7" * (2 * positions), "2+2="]
    rows = [{"question": text, "answer": 2 * n} for n, text in enumerate(questions)]
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    drawn = ("--set", "evaluation.samples=2", "--set", "evaluation.temperature=1", "--set", "rollout.max_new_tokens=4")
    assert main(["eval", str(folder), "--task", "jsonl", "--path", str(path), *drawn, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompts"], found["samples"], found["failed"]) == (2, 2, 2)
    (reason,) = found["failures"]
    assert reason.startswith("2 x prompt: its prompt of ") and f"{positions} positions" in reason


def test_tasks_share_the_model(folder: Path, suite: Path) -> None:
    """A second model in memory, or a task that is asked of the first one's."""
    config = RunConfig("ask", 1, ModelConfig(str(folder)), rollout=RolloutConfig(max_new_tokens=4))
    few = {"task.heldout_size": 2, "evaluation.prompts": 2}
    tasks = {"a": override(config, few), "b": override(config, few | {"model.dtype": "float32"})}
    with pytest.raises(ConfigError, match="task b has its own model"):
        list(evaluate_tasks(tasks))
    with pytest.raises(ConfigError, match="wanted a RunConfig"):
        list(evaluate_tasks({"a": "runs/x"}))  # type: ignore[dict-item]


def test_a_run_evaluates_by_samples(folder: Path, tmp_path: Path) -> None:
    """Held-out samples of a run that are greedy, all alike, or counted as prompts."""
    config = override(
        RunConfig("sums", 1, ModelConfig(str(folder)), rollout=RolloutConfig(prompts_per_step=2, samples_per_prompt=2)),
        {
            "rollout.max_new_tokens": 4,
            "task.heldout_size": 5,
            "evaluation.prompts": 5,
            "evaluation.samples": 3,
            "evaluation.temperature": 1.0,
            "evaluation.top_p": 0.9,
        },
    )
    code, path = local.train(config, out=tmp_path / "run", resume=None, display=Silent())
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert code == 0 and [row["evaluation"]["prompts"] for row in rows] == [5, 5]
    assert all(row["evaluation"]["failed"] == 0 and row["evaluation"]["high"] < 0.5 for row in rows)
    lost = json.loads((path / "ledger.json").read_text())["tokens"]["evaluated"]
    assert 2 * 15 <= lost <= 2 * 15 * 4
