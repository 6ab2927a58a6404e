"""What is shown of a critic: its curves, its column and its words in a log."""

from __future__ import annotations

import re

from tandem.report import plots
from tandem.report.html import render_report
from tandem.report.live import step_line
from tests.null.test_report import Page, row, run_folder, run_rows


def critic_rows(number: int = 4) -> list[dict]:
    known = {"value_loss": 0.5, "explained_variance": -40.0, "values_mean": -0.25, "returns_mean": 0.5}
    return [row(1, 0.1, **known)] + [row(s, 0.1, **known | {"explained_variance": 0.4}) for s in range(2, number + 1)]


def test_what_the_critic_knew_is_drawn_where_there_is_one():
    """A critic worse than the mean is below the picture, one bad step flattens the rest, or none reads as zeros."""
    value_loss, explained, means = plots.critic_figure(critic_rows()).axes
    assert value_loss.get_lines()[0].get_ydata().tolist() == [0.5] * 4 and value_loss.get_ylim()[0] == 0.0
    assert explained.get_lines()[0].get_ydata().tolist() == [-40.0, 0.4, 0.4, 0.4] and explained.get_ylim()[0] == -1.0
    assert {line.get_label(): line.get_ydata()[0] for line in means.get_lines()} == {"returns": 0.5, "values": -0.25}
    assert means.get_ylim()[0] <= -0.25
    assert not plots.shows(plots.critic_figure(run_rows()))


def test_the_critic_in_a_log_and_on_a_page(tmp_path):
    """A run whose critic knows nothing looks as one whose critic does; a column of blanks where there is none."""
    text = " ".join(Page(render_report(run_folder(tmp_path / "run"), critic_rows())).words)
    assert "gradient critic equal groups" in re.sub(r"\s+", " ", text) and "40 %" in text
    assert "critic 40 %" in step_line(critic_rows()[1], 12, None) and "critic" not in step_line(row(1, 0.1), 12, None)
