"""Regressions in settings from files: another value than --set gives, or one that is lost in silence."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandem.cli.main import main
from tandem.cli.recipes import find_recipe
from tandem.cli.settings import assignments
from tandem.config import flatten, override, render
from tandem.errors import ConfigError

RECIPE = find_recipe("smollm2_arithmetic_cpu")()

TOML = """
steps = 7
rollout.stop_strings = ["a,b", "1"]
[task]
system = ""
parameters = { min_terms = 3, name = "007" }
[learner]
activation_checkpointing = "off"
lr = 1e-5
[algo.correction]
reject = ["geometric"]
[algo.price]
budget = 9
"""
YAML = """
steps: 7
rollout: {stop_strings: ["a,b", "1"]}
task:
  system: ""
  parameters:
    min_terms: 3
    name: "007"
learner: {activation_checkpointing: off, lr: 1e-5}
algo.correction:
  reject: [geometric]
algo.price.budget: 9
"""


def read(tmp_path: Path, name: str, text: str) -> Any:
    (tmp_path / name).write_text(text)
    return override(RECIPE, assignments(RECIPE, [tmp_path / name], []))


@pytest.mark.parametrize(("name", "text"), [("a.toml", TOML), ("a.yaml", YAML)])
def test_a_file_says_what_set_says(tmp_path: Path, name: str, text: str) -> None:
    """`off` read as false, 1e-5 as a text, "1" as a number, or a table of parameters as settings of those names."""
    config = read(tmp_path, name, text)
    expected = override(
        RECIPE,
        {
            "steps": "7", "learner.lr": "1e-5", "rollout.stop_strings": '"a,b","1"', "task.system": "",
            "task.parameters": 'min_terms=3,name="007"', "learner.activation_checkpointing": "off",
            "algo.correction.reject": "geometric", "algo.price.budget": "9",
        },
    )  # fmt: skip
    assert config == expected and config.learner.lr == 1e-5 and config.task.parameters[1] == ("name", "007")


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        place = tree
        *groups, last = name.split(".")
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = _plain(value)
    return tree


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return getattr(value, "value", value)


@settings(deadline=None)
@example(lr=1.0, system="", stops=["\xa0", "\u2003x"], parameters=[], budget=None)
@given(
    lr=st.floats(1e-12, 1.0),
    system=st.text(st.characters(exclude_categories=["Cs", "Cc"])),
    stops=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)),
    parameters=st.lists(
        st.tuples(st.text("ab_", min_size=1), st.one_of(st.integers(), st.booleans(), st.text('a1 ,=("')))
    ),
    budget=st.none() | st.floats(1.0, 9.0),
)
def test_a_dump_of_all_settings_reads_back(
    tmp_path_factory: pytest.TempPathFactory, lr: float, system: str, stops: Any, parameters: Any, budget: Any
) -> None:
    """A value that PyYAML writes and tandem reads as another: quotes, commas, numbers as texts, nothing."""
    texts = {
        "learner.lr": render(lr), "task.system": system, "rollout.stop_strings": render(tuple(stops)),
        "task.parameters": render(tuple(parameters)), "algo.price.budget": render(budget),
    }  # fmt: skip
    config = override(RECIPE, texts)
    assert yaml.safe_load(written := yaml.safe_dump(nested(flatten(config)), allow_unicode=True)) is not None
    assert read(tmp_path_factory.mktemp("dump"), "all.yaml", written) == config


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "[learner]\nlrr = 1", "no setting is named learner.lrr. Did you mean learner.lr"),
        ("a.yaml", "learner: 3", "learner is a group of settings"),
        ("a.toml", 'steps = "many"', "steps=many: 'many' is not"),
        ("a.toml", "name = 2026-11-28", "name is the date 2026-11-28, which no setting takes. Quote it."),
        ("a.toml", "steps = 1\nsteps = 2", "a.toml cannot be read"),
        ("a.yaml", "steps: 1\nsteps: 2", "line 2: steps is no name, or was there before"),
        ("a.yaml", "learner: {lr: 1}\nlearner.lr: 2", "sets learner.lr twice"),
        ("a.yaml", "steps: [", "cannot be read"),
        ("a.yaml", "name: &a b\nsteps: *a", "line 1: no & or "),
        ("a.yaml", "- steps", "holds no settings"),
        ("a.yaml", "? [a]\n: b", "is no name"),
        ("a.yaml", "a: &a [*a]", "cannot be read"),
        ("a.toml", "steps = ", "cannot be read"),
        ("a.json", "{}", "must end in .toml, .yaml, .yml"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    """A misspelt or doubled setting of a file ignored; an error without the file's name, or on many lines."""
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, name, text)
    assert said in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_the_page_reads_word_for_word(tmp_path: Path) -> None:
    """A file that a reader copies from docs/configs.md and that is refused, or sets other things than it shows."""
    page = (Path(__file__).parents[2] / "docs" / "configs.md").read_text()
    text, _ = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    config = read(tmp_path, "page.toml", text)
    assert (config.steps, config.learner.lr, config.rollout.stop_strings) == (40, 1e-5, ("\n\n",))
    assert config.task.parameters == (("min_terms", 3), ("max_terms", 3))


def test_files_come_before_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--set overruled by a file, or each of them checked before the other is there."""
    (tmp_path / "a.toml").write_text("evaluation.prompts = 900\nsteps = 3\n")
    (tmp_path / "b.yml").write_text("steps: 4\n")
    files = [tmp_path / "a.toml", tmp_path / "b.yml"]
    assigned = assignments(RECIPE, files, ["task.heldout_size=900"])
    assert assigned == {"evaluation.prompts": "900", "steps": "4", "task.heldout_size": "900"}
    assert override(RECIPE, assigned).steps == 4
    assert assignments(RECIPE, files, ["steps=5"])["steps"] == "5"
    for verb in ("train", "eval"):
        assert main([verb, "smollm2_arithmetic_cpu", "--config", str(tmp_path / "nowhere.toml")]) == 2
        assert "nowhere.toml cannot be read: No such file" in capsys.readouterr().err
    assert tomllib.loads((tmp_path / "a.toml").read_text()) == {"evaluation": {"prompts": 900}, "steps": 3}
