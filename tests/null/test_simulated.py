"""`tandem study isolation`: its page, remade from the real scheduler on a logical clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.cli.study import FOLDER, study
from tandem.errors import ConfigError
from tandem.study import simulated
from tandem.study.result import dumps

HOME = FOLDER / "isolation"


def test_the_page_is_what_the_simulation_finds() -> None:
    """A change to the scheduler that the published figures do not know, or a page of other figures than its result."""
    one, result = simulated.read(HOME / "simulation.py"), json.loads((HOME / "result.json").read_text())
    assert (HOME / "README.md").read_text() == one.page(result), "write it anew: tandem study isolation"
    inside: Any = one.run.__globals__  # type: ignore[attr-defined]
    assert json.loads(dumps({"windows": inside["windows"]()}))["windows"] == result["windows"]
    by = {row["name"]: row for row in result["latency"]}
    assert by["shares"]["median_s"] <= 1.3 * by["alone, on half an engine"]["median_s"] < by["by arrival"]["median_s"]
    assert all(row["off"] <= 0.05 for row in result["windows"] if row["window_s"] >= 10)


def test_a_simulation_has_no_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flag that a simulation does not know, passed over; or a list that leaves it out."""
    with pytest.raises(ConfigError, match="isolation is a simulation.*Drop --seeds"):
        study("isolation", seeds=3)
    study()
    assert "isolation: What does a tenant get" in capsys.readouterr().out
    (tmp_path / "simulation.py").write_text("")
    with pytest.raises(ConfigError, match="has no simulation"):
        simulated.read(tmp_path / "simulation.py")
