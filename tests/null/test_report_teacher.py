"""What is shown of a run that learns from a teacher: its curves, its column and its words in a log."""

from __future__ import annotations

from tandem.report import plots
from tandem.report.html import last_steps
from tandem.report.live import step_line
from tests.null.test_report import run_rows
from tests.null.test_report_preference import preferred


def taught(count: int = 3) -> list[dict]:
    rows = []
    for row in preferred(count):
        row = {name: value for name, value in row.items() if name not in ("preference_accuracy", "reward_margin")}
        rows.append(row | {"divergence": 1.0 / row["step"], "nll": 3.0 / row["step"], "teacher_nll": 0.5})
    return rows


def test_a_student_is_drawn_beside_its_teacher():
    """The divergence is nowhere to be seen, the teacher's curve is the student's, or SFT is shown as distillation."""
    divergence, nll = plots.teacher_figure(taught()).axes
    assert divergence.get_lines()[0].get_ydata().tolist() == [1.0, 0.5, 1.0 / 3.0]
    drawn = {line.get_label(): line.get_ydata().tolist() for line in nll.get_lines()}
    assert drawn == {"teacher": [0.5, 0.5, 0.5], "student": [3.0, 1.5, 1.0]}
    written = [{name: row[name] for name in row if name not in ("divergence", "teacher_nll")} for row in taught()]
    assert not plots.shows(plots.teacher_figure(written)) and not plots.shows(plots.teacher_figure(run_rows()))


def test_divergence_in_a_log_and_on_a_page():
    """A student that goes away from its teacher looks as one that comes near."""
    assert "divergence 0.500" in step_line(taught()[1], 3, None) and "divergence" not in step_line(
        run_rows()[1], 3, None
    )
    headings, newest, *_ = last_steps(taught())
    assert dict(zip(headings, newest, strict=True))["divergence"] == "0.333"
