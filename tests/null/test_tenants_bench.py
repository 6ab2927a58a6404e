"""`tandem bench schedule` on few steps."""

from __future__ import annotations

import pytest

from tandem.bench import tenants
from tandem.cli.bench import Work, _run
from tandem.cli.bench_tables import show_schedule


def test_a_decision_is_timed_by_order(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The bench measures an idle scheduler, or one whose steps are all full where one tenant cuts them short."""
    monkeypatch.setattr(tenants, "STEPS", 6)
    found = _run(Work.SCHEDULE, [], 1)
    rows = {row["order"]: row["rows"] for row in found["rows"]}
    assert rows["arrival"] == rows["shares"] == 256 > rows["one of few"] > 1
    show_schedule(found)
    assert "1,000 programs, 256 running" in capsys.readouterr().out
