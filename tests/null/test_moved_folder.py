"""A run's folder that is moved away while somebody writes to it, or writes its report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem.errors import RunFolderError, TandemError, WorldError
from tandem.report import html, metrics, plots
from tandem.run.folder import RunFolder
from tests.null.test_folder import Config
from tests.null.test_report import run_folder

STEPS: dict[str, Callable[[RunFolder], Any]] = {
    "a row": lambda run: run.append_metrics({"step": 2}),
    "a plan": lambda run: run.write_plan({"a": 1}),
    "a ledger": lambda run: run.write_ledger({"a": 1}),
    "trajectories": lambda run: run.write_trajectories(2, [{"a": 1}]),
    "more of them": lambda run: run.extend_trajectories(1, [{"b": 1}]),
    "checkpoint": lambda run: saved(run),
}


def saved(run: RunFolder) -> None:
    with run.checkpoint(2) as path:
        (path / "x").write_text("x")
        run.path.rename(run.path.with_name("elsewhere"))


@pytest.mark.parametrize("what", STEPS)
def test_a_run_whose_folder_is_moved_ends_with_a_reason(tmp_path: Path, what: str) -> None:
    """A traceback, where a line is to say that the folder has gone."""
    with RunFolder.create(tmp_path / "run", Config()) as run:
        run.write_trajectories(1, [{"a": 1}])
        if what != "checkpoint":
            run.path.rename(tmp_path / "elsewhere")
        with pytest.raises(WorldError, match="could not be written") as raised:
            STEPS[what](run)
    assert what == "checkpoint" or "is there no more" in str(raised.value)


@pytest.mark.parametrize(
    "place", ["read_metrics", "save_plots", "section", "read_object", "read_trajectories", "follow"]
)
def test_a_report_of_a_folder_that_is_moved_ends_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The same, of a report that is being written."""
    folder = run_folder(tmp_path / "run") if (tmp_path / "run").mkdir() is None else tmp_path
    module = {"read_metrics": metrics, "save_plots": plots}.get(place, html)
    real = getattr(module, place)

    def moves(*given: Any, **named: Any) -> Any:
        found = real(*given, **named)
        found = list(found) if place == "read_trajectories" else found
        if folder.exists():
            folder.rename(tmp_path / "elsewhere")
        return found

    monkeypatch.setattr(module, place, moves)
    with pytest.raises((WorldError, RunFolderError)) as raised:
        html.write_report(folder)
    assert isinstance(raised.value, TandemError) and str(folder) in str(raised.value)
