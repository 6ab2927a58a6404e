"""Regressions in .ci/check.py: each rule of the house sees the tree that breaks it, and not the one that keeps it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("house_check", ROOT / ".ci" / "check.py")
assert spec is not None and spec.loader is not None
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)

Complain = Callable[[dict[str, str]], list[str]]


@pytest.fixture
def complain(tmp_path: Path) -> Complain:
    """Complaints about a tree of the given files, flags and the slim import left out."""

    def run(files: dict[str, str]) -> list[str]:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        paths = check.tracked(tmp_path)
        trees = check.parse(tmp_path, paths)
        found = [check.check_imports, check.check_circles, check.check_budgets, check.check_names]
        return [
            *(line for one in found for line in one(tmp_path, trees)),
            *check.check_paths(tmp_path, paths),
            *check.check_links(tmp_path, paths),
        ]

    return run


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("train/step.py", "from tandem.engine.pages import PagePool\n"),
        ("engine/engine.py", "import tandem.train.step\n"),
        ("engine/engine.py", "def f():\n    from tandem import train\n"),
        ("engine/engine.py", "from ..train import step\n"),
        ("engine/engine.py", "from importlib import import_module\nimport_module('tandem.train.step')\n"),
        ("engine/engine.py", "try:\n    import tandem.rollout\nexcept ImportError:\n    pass\n"),
        ("models/decoder.py", "from tandem import algo\n"),
        ("report/html.py", "from tandem.run import folder\n"),
        ("errors.py", "from tandem import config\n"),
        ("numerics/random.py", "import tandem.kernels.philox\n"),
        ("rollout/rollout.py", "from tandem.sync import publish\n"),
        ("engine/order.py", "from tandem import RunConfig\n"),
    ],
)
def test_import_order(complain: Complain, file: str, text: str) -> None:
    """An import against the order of the rows passes: at the top, in a function, relative or by name."""
    (line,) = complain({f"src/tandem/{file}": text})
    assert "which is not in a row above it" in line or "they never import each other" in line or "front door" in line


def test_imports_that_keep_the_order(complain: Complain) -> None:
    """A lawful import refused: a lower row, the own folder, a type under TYPE_CHECKING."""
    kept = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tandem.train import step\n    import torch\n"
    files = {
        "src/tandem/engine/pages.py": kept,
        "src/tandem/engine/engine.py": "import torch, tandem\nfrom tandem.engine import pages\nfrom . import pages\n",
        "src/tandem/cli/train.py": "from tandem.run import local\nfrom tandem import env\n",
        "src/tandem/config.py": "from tandem.errors import ConfigError\n",
        "src/tandem/__init__.py": "from tandem.types import Prompt\n",
        "recipes/sums.py": "from tandem.run.config import RunConfig\n",
    }
    assert complain(files) == []


@pytest.mark.parametrize(
    "back", ["from tandem.run import a\n", "from .a import f\n", "def f():\n    import tandem.run.a\n"]
)
def test_circle_of_imports(complain: Complain, back: str) -> None:
    """Two modules of one folder import each other, at the top or in a function; a type alone is no circle."""
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import tandem.run.d\n"
    files = {
        "src/tandem/run/a.py": "from tandem.run.b import g\n",
        "src/tandem/run/b.py": back,
        "src/tandem/run/c.py": f"import tandem.run.a\n{typed}",
        "src/tandem/run/d.py": "from tandem.run import c\n",
    }
    (line,) = complain(files)
    assert line.startswith("src/tandem/run/a.py: ") and "run/a -> run/b -> run/a;" in line


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("src/tandem/engine/schedule.py", "def f():\n    import torch\n", "imports torch"),
        ("src/tandem/algo/config.py", "from torch import Tensor\n", "imports torch"),
        ("recipes/sums.py", "import torch.nn\n", "imports torch"),
        ("src/tandem/run/local.py", "import ray\n", "imports ray"),
        ("src/tandem/run/local.py", "import os\nos.environ['A'] = '1'\n", "reads the environment"),
        ("src/tandem/run/local.py", "import os\nos.getenv('A')\n", "reads the environment"),
        ("src/tandem/run/local.py", "from os import environ\n", "reads the environment"),
        ("src/tandem/helping/x.py", "", "in no row"),
        ("src/tandem/a.py", "", "in no row"),
        ("src/tandem/run/loop.py", "import torch\n", "no tensor"),
        ("src/tandem/run/loop.py", "def f(config):\n    if config.async_:\n        pass\n", "`if config.`"),
        ("src/tandem/run/loop.py", "def f():\n" + "    pass\n" * 60, "61 lines; 60 at most"),
        ("src/tandem/run/x.py", "x = 1\n" * 501, "501 lines; 500 at most"),
        ("src/tandem/kernels/x.cpp", "\n" * 801, "801 lines; 800 at most"),
        ("src/tandem/run/x.py", "def f():\n" + "    pass\n" * 80, "81 lines; 80 at most"),
        ("tests/cpu/test_x.py", "def f():\n" + "    pass\n" * 80, "81 lines; 80 at most"),
        ("src/tandem/run/x.py", "def f(a, b, c, d, *e, f=1, g=2, h=3, **i):\n    pass\n", "9 parameters; 8 at most"),
        ("src/tandem/run/utils.py", "", "module is named utils"),
        ("src/tandem/run/common/x.py", "", "module is named common"),
        ("src/tandem/run/x.py", "def process(batch):\n    pass\n", "function is named process"),
        ("src/tandem/run/x.py", "def f(*, data):\n    pass\n", "argument is named data"),
        ("src/tandem/run/x.py", "f = lambda item: 1\n", "argument is named item"),
        ("src/tandem/run/x.py", "class PageManager:\n    pass\n", "class PageManager is named Manager"),
        ("docs/a.md", "[x](b.md)\n", "leads to no file"),
        ("docs/a.md", "![x](../pictures/p.png)\n", "leads to no file"),
        ("docs/a.md", "# One, two\n[x](#one)\n", "leads to no heading"),
        ("docs/a.md", "see " + "/wo" + "rk/shared/x\n", "absolute path"),
        ("src/tandem/run/x.py", "A = '" + "/ho" + "me/me/x'\n", "absolute path"),
    ],
)
def test_rule_is_held(complain: Complain, file: str, text: str, message: str) -> None:
    """A rule of the house that no longer sees what breaks it."""
    lines = complain({file: text})
    assert len(lines) == 1 and message in lines[0] and lines[0].startswith(file.partition("/x.cpp")[0]), lines


def test_lawful_tree(complain: Complain) -> None:
    """A rule that refuses what the design allows."""
    files = {
        "src/tandem/env.py": "import os\nHOME = os.environ['HOME']\n",
        "src/tandem/run/ray.py": "import ray\n",
        "src/tandem/kernels/x.py": "def f():\n" + "    pass\n" * 200,
        "src/tandem/run/x.py": "class A:\n    def f(self, a, b, c, d, e, f, g, h):\n        metadata = 1\n",
        "src/tandem/run/loop.py": "def f(stages):\n" + "    pass\n" * 59,
        "docs/a.md": "# One, two\n[x](#one-two) [y](../README.md#a-b) [z](https://x.org/home/y) `[no](no.md)`\n",
        "README.md": "# A b\n[docs](docs) [a](docs/a.md)\n```\n[n](n)\n```\n/proc/cpuinfo ~/work/x a/tmp/b\n",
        "p.png": "",
    }
    assert complain(files) == []


def test_raised_budget(complain: Complain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A budget that cannot be raised by a line with a reason, or is raised without one."""
    monkeypatch.setattr(check, "NAMES_ALLOWED", {})
    files = {"src/tandem/run/x.py": "def long():\n" + "    pass\n" * 599}
    assert len(complain(files)) == 2
    monkeypatch.setattr(
        check, "RAISED", {"src/tandem/run/x.py": (600, "a table"), "src/tandem/run/x.py:long": (600, "")}
    )
    assert complain(files) == []
    assert [line for line in check.check_tables(tmp_path) if "no reason" in line]
    (tmp_path / "src/tandem/run/x.py").unlink()
    assert len([line for line in check.check_tables(tmp_path) if "names no file" in line]) == 2


def test_picture_of_the_house(complain: Complain, tmp_path: Path) -> None:
    """A picture of the rooms that shows an import which is gone, or lacks a new one, passes."""
    files = {
        "src/tandem/train/step.py": "from tandem.algo import loss\nfrom tandem.errors import UserError\n",
        "docs/pictures/house.svg": "<svg><desc>train imports algo; train imports nouns</desc></svg>",
    }
    complain(files)
    assert list(check.check_picture(tmp_path, check.parse(tmp_path, check.tracked(tmp_path)))) == []
    complain({"src/tandem/train/step.py": "from tandem.models import decoder\nfrom tandem.errors import UserError\n"})
    (line,) = check.check_picture(tmp_path, check.parse(tmp_path, check.tracked(tmp_path)))
    assert "train imports algo; train imports models" in line and "python .ci/house.py" in line


def test_flags_and_slim(tmp_path: Path) -> None:
    """A changed flag, or a torch at import, that the check does not see."""
    package = tmp_path / "src" / "tandem"
    (package / "cli").mkdir(parents=True)
    (tmp_path / "tests" / "goldens").mkdir(parents=True)
    (tmp_path / "tests" / "goldens" / "flags.txt").write_text("train --out\n")
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("")
    (package / "cli" / "__init__.py").write_text("")
    (package / "cli" / "main.py").write_text("def flags():\n    return ['train --to']\n")
    (line,) = check.check_flags(tmp_path)
    assert "-train --out" in line and "+train --to" in line
    assert list(check.check_slim(tmp_path, {})) == []
    (tmp_path / "src" / "torch.py").write_text("")
    (package / "__init__.py").write_text("import torch\n")
    assert list(check.check_slim(tmp_path, {})) == ["tandem loads torch"]


def test_null_tests_import_no_torch() -> None:
    """A test of tests/null that needs torch, so that the suite without torch does not run."""
    for path in (ROOT / "tests" / "null").glob("*.py"):
        assert not re.search(r"^\s*(import|from) torch\b", path.read_text(), flags=re.MULTILINE), path
