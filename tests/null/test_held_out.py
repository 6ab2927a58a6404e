"""Regression caught: figures of held-out prompts that hide what was measured, or why nothing was."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

from rich.console import Console

from tandem.report import plots
from tandem.report.html import write_report
from tandem.report.live import LiveTable, step_line


def row(step: int, reward: float | None, **changes: object) -> dict:
    return {"step": step, "reward": reward, "length": 3.0, "length_max": 4, "seconds": {"rollout": 2.0}} | changes


HALF = {"accuracy": 0.0, "low": 0.0, "high": 0.02, "prompts": 200, "failed": 0, "reward": 0.413, "failures": []}
NONE = HALF | {"prompts": 0, "high": 1.0, "failed": 2, "reward": None, "failures": ["2 x reward: ValueError: no"]}


def test_rewards_between_0_and_1_are_shown(tmp_path):
    """A run whose graded rewards rise, and whose every figure of held-out prompts says 0.0 %."""
    rows = [{"step": 0, "evaluation": HALF}, row(1, 0.4), row(2, 0.5, evaluation=HALF | {"reward": 0.721})]
    assert "held-out 0.0 % [0.0, 2.0] of 200, reward 0.721" in step_line(rows[2], 2, None)
    with LiveTable(2, io.StringIO(), rows=rows) as live:
        wide = Console(width=140, record=True, file=io.StringIO())
        live._console = wide
        wide.print(live._render())
    shown = wide.export_text()
    assert "0.0 %, 0.72" in shown and "reward 0.413 to 0.0 % [0.0, 2.0] of 200, reward 0.721" in shown
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    page = write_report(tmp_path).read_text()
    assert "mean reward 0.721" in page and "reward 0.413" in page


def test_an_evaluation_without_a_grade_says_why():
    """An accuracy of 0.0 % where no answer could be graded; a step or an evaluation that fails for no stated reason."""
    reason = "failed 2 (2 x reward: ValueError: no)"
    assert step_line({"step": 0, "evaluation": NONE}, 2, None) == f"step 0/2  held-out none could be graded, {reason}"
    stream = io.StringIO()
    with LiveTable(2, stream) as live:
        live._live = SimpleNamespace(refresh=lambda: None, stop=lambda: None)
        for entry in ({"step": 0, "evaluation": NONE}, row(1, None, failed=128, failures=["128 x deadline: late"])):
            live.update(entry)
            live._console = Console(width=140, file=stream)
            live._console.print(live._render())
    assert f"evaluation 0: {reason}" in stream.getvalue()
    assert "step 1: failed 128 (128 x deadline: late)" in stream.getvalue()
    figure = plots.reward_figure([{"step": 0, "evaluation": NONE}, row(1, 0.5, evaluation=HALF)])
    (reward,) = [line for line in figure.axes[0].get_lines() if line.get_label() == "held-out reward"]
    assert (list(reward.get_xdata()), list(reward.get_ydata())) == ([1], [0.413])
