"""Regressions in what `tandem recipes` and `tandem --version` tell."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

import tandem
from tandem.cli.catalogue import comments, settings, summaries
from tandem.cli.main import main, versions
from tandem.cli.recipes import find_recipe
from tandem.config import flatten, override, parsed

RECIPE = "smollm2_arithmetic_cpu"
SOURCES = Path(tandem.__file__).parent


@dataclass(frozen=True)
class Odd:
    one: str = "# none"  # of one, ümlaut
    # of no field
    two: tuple[int, ...] = (
        1,  # inside
        2,
    )  # of two
    three: int = 3


def test_a_comment_is_of_its_own_field() -> None:
    """The meaning of another setting, of a value, or of a # in a text."""
    assert comments(Odd) == {"one": "of one, ümlaut", "two": "of two", "three": ""}


def test_every_setting_says_what_it_means() -> None:
    """A setting that is listed without a meaning, under another name, or with a default that --set reads otherwise."""
    recipe = find_recipe(RECIPE)()
    known = {each.name: each for each in settings()}
    assert list(known) == list(flatten(recipe))
    assert [name for name, each in known.items() if len(each.meaning) < 5] == []
    assert {name for name, each in known.items() if each.default is None} == {"name", "steps", "model.source"}
    plain = override(recipe, {name: each.default for name, each in known.items() if each.default is not None})
    assert plain == type(recipe)(recipe.name, recipe.steps, type(recipe.model)(recipe.model.source))
    assert known["learner.schedule"].type == "one of 'constant', 'linear', 'cosine'"


def test_recipes_lists_recipes_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe or a setting left out of the list."""
    assert main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert (
        listed["recipes"] == summaries() and summaries()[RECIPE] == (find_recipe(RECIPE).__doc__ or "").splitlines()[0]
    )
    assert [row["name"] for row in listed["settings"]] == list(flatten(find_recipe(RECIPE)()))
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {row['name']} = " in printed and row["meaning"] in printed for row in listed["settings"])
    assert printed.startswith(f"{RECIPE}\n    GRPO on sums")


def test_a_recipe_shows_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    """The defaults shown for a recipe's own values, or a value that --set would not read back."""
    recipe = find_recipe(RECIPE)()
    assert main(["recipes", RECIPE, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["settings"]
    values = {row["name"]: row["value"] for row in rows}
    assert parsed(recipe, values) == flatten(recipe)
    assert main(["recipes", RECIPE, "--setting", "Peak learning"]) == 0
    assert (
        capsys.readouterr().out == "* learner.lr = 2e-05\n      peak learning rate (float, 0 to 1, 1e-06 by default)\n"
    )
    assert main(["recipes", "--setting", "lerner.lr"]) == 2
    assert "Did you mean learner.lr" in capsys.readouterr().err
    assert main(["recipes", "smollm2_arithmetics"]) == 2 and RECIPE in capsys.readouterr().err


def test_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A report of a fault without the version, or with the commit of a repository that tandem was only installed in."""
    assert main(["--version"]) == 0
    printed = capsys.readouterr().out
    assert re.fullmatch(
        r"tandem \d+\.\d+\.\d+( \(commit [0-9a-f]+(-dirty)?\))?, torch \d\S+, Python 3\.\d+\.\d+\n", printed
    )
    assert "commit" not in versions(tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"], ["tag", "v9"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"\(commit (\w+)\)", versions(tmp_path))
    assert found and head.startswith(found[1])
