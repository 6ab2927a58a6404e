"""Regressions in the step-time algebra of a study's page."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.report.plots import png
from tandem.study.step_time import StepTimes

ARMS: dict[str, dict[str, str]] = {
    "turns": {},
    "turns_waits": {},
    "one_off": {"asynchrony.mode": "one_off"},
    "full": {"asynchrony.mode": "full", "asynchrony.lag": "2"},
    "early": {"asynchrony.mode": "full", "asynchrony.lag": "2", "asynchrony.order": "completion"},
}


def made(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """A result of one run an arm; half a second of each step is useful at the roofline."""
    arms = [{"name": name, "label": name, "panel": "", "overrides": sets} for name, sets in ARMS.items()]
    phases = {"main": {"rollout": 1.5, "environment": 0.5, "learner": 1.9, "publish": 0.1}}
    runs = [
        {
            "arm": name,
            "status": "finished",
            "phases": phases,
            "series": {"seconds": spent, "useful_s": [0.5] * len(spent)},
        }
        for name, spent in seconds.items()
    ]
    return {"arms": arms, "runs": runs, "series_stride": 1}


SECONDS = {"turns": [9.0, 4.0, 4.0], "turns_waits": [9.0, 10.0, 12.0], "full": [1.0, 4.0, 4.0]}
WAITS = ("turns_waits", "one_off", "full", "early")
TIMES = StepTimes("turns", lambda programs: 8.0 if programs == 64 else 5.0, WAITS, (8, 8), skipped=1)


def test_each_mode_is_predicted_from_the_basis_alone() -> None:
    """A step that counts waiting that others overlap, or a lag that divides what it does not; by hand."""
    work = TIMES.work(made(SECONDS))
    assert (work.whole_s, work.engine_s, work.publish_s) == (4.0, 2.0, 0.1)
    found = {name: TIMES.predicted({"name": name, "overrides": sets}, work) for name, sets in ARMS.items()}
    # sync 4 + 8; one off 2 + 8 + 0.1; full (4 + 8) / 3; by completion (4 + 5) / 3 is under what it computes
    assert found == {"turns": 4.0, "turns_waits": 12.0, "one_off": 10.1, "full": 4.0, "early": 4.0}


def test_steps_in_which_queues_fill_do_not_count() -> None:
    """A first step in a mean, or a goodput that is not of the same steps."""
    found = {one.label: one for one in TIMES.timed(made(SECONDS))}
    assert list(found) == list(SECONDS)
    assert (found["turns_waits"].predicted_s, found["turns_waits"].measured_s) == (12.0, 11.0)
    assert found["turns_waits"].goodput == pytest.approx((0.5 / 12, 0.5 / 11))
    assert found["full"].goodput == pytest.approx((0.125, 0.125))


def test_the_section_has_a_line_an_arm_and_a_picture() -> None:
    """An arm that ran and is in no table; a page that fails before the basis has run."""
    section = TIMES(made(SECONDS))
    assert "| turns_waits | 12.00 | 11.00 | 0.92 | 5.8 | 4.17 % | 4.55 % |" in section.text
    assert png(section.pictures["step_time.png"])[:4] == b"\x89PNG"
    lacking = TIMES(made({"full": [1.0]}))
    assert "`turns` has no run yet" in lacking.text and not lacking.pictures
