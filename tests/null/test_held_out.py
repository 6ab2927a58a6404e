"""Regression caught: figures of held-out prompts that hide what was measured, or why nothing was."""

from __future__ import annotations

import io
import json
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from tandem.report import metrics, plots
from tandem.report.compare import lines
from tandem.report.html import write_report
from tandem.report.live import LiveTable, step_line
from tandem.report.metrics import alarms, summary
from tandem.study.result import run_entry


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


def test_runs_over_each_other_leave_out_what_was_not_graded():
    """An accuracy of 0 for an evaluation without a grade; graded tasks whose held-out reward is never drawn."""
    curves = [("one", [{"step": 0, "evaluation": NONE}, row(1, 0.5, evaluation=HALF)])]
    drawn = plots.reward_curves_figure(curves).axes[0].get_lines()
    marks = {
        line.get_marker(): line.get_xydata().tolist()
        for line in drawn
        if len(line.get_xdata()) and line.get_marker() != "None"
    }
    assert marks == {"D": [[1.0, 0.0]], "s": [[1.0, 0.413]]}
    assert [line.get_label() for line in drawn if not len(line.get_xdata())] == ["held-out accuracy", "held-out reward"]
    right = [("one", [row(1, 0.5, evaluation=HALF | {"accuracy": 0.413})])]
    assert "held-out reward" not in [line.get_label() for line in plots.reward_curves_figure(right).axes[0].get_lines()]
    entry = run_entry("a", 0, {"status": "finished", "reason": "", "steps": 1}, curves[0][1])
    assert (entry["before"], entry["after"]) == (None, 0.0)


def test_a_run_that_could_grade_nothing_draws_nothing(tmp_path):
    """An interval of 0 to 100 % for no prompts; axes from -0.04 to 0.04 that read as zeros."""
    rows = [{"step": 0, "evaluation": NONE}, *(row(step, None) for step in (1, 2)), row(3, None, evaluation=NONE)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    page = write_report(tmp_path).read_text()
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == ["lengths", "time"]
    assert "none could be graded; before: none could be graded" in page and "95 %" not in page
    assert "every trajectory of the step failed (and in 2 later steps)" in page
    assert dict(lines([summary(rows)]))["reward"] == ["none could be graded"]


def text_row(step: int, loss: float) -> dict:
    """A step of objective next_token."""
    seconds = {"learner": 1.0, "update": 0.5}
    return {
        "step": step, "trajectories": 8, "failed": 0, "length": 20.0, "length_max": 30, "tokens": 160, "loss": loss,
        "entropy": 5.5, "trained_tokens": 160, "grad_norm": 4.8, "lr": 2e-5, "error_budget": {}, "by_length": [],
        "trained_samples": 8, "tokens_per_s": None, "weights": f"w{step}", "seconds": seconds, "peak_memory_bytes": 1e9,
    }  # fmt: skip


def test_a_run_on_texts_is_shown_by_its_loss(tmp_path):
    """A run of objective next_token of which no step counts, or that claims rewards, KL and sampled tokens."""
    rows = [{"step": 0, "evaluation": HALF}, *(text_row(step, 5.0 - 0.1 * step) for step in range(1, 7))]
    rows[-1]["evaluation"] = HALF | {"accuracy": 0.5, "high": 0.7}
    found = summary(rows)
    assert (found["steps"], found["measure"], found["reward_last"], found["tokens"]) == (6, "loss", None, 0)
    assert found["loss_first"] == pytest.approx(4.7) and found["loss_last"] == pytest.approx(4.6)
    assert alarms(rows) == [] and metrics.time_left_s(rows, 10) == 6.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    page = write_report(tmp_path).read_text()
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        "reward",
        "loss",
        "lengths",
        "entropy",
        "time",
        "update",
        "limits",
    }
    headings = re.findall(r"<th>([^<]*)</th>", page)
    assert headings == ["step", "loss", "length", "longest", "entropy", "gradient", "trained", "time"]
    assert ">4.600<" in page and "Trained tokens" in page and "Sampled" not in page and "Failures" not in page
    assert [axes.get_ylabel() for axes in plots.update_figure(rows).axes] == ["gradient norm", "learning rate"]
    assert plots.loss_figure(rows).axes[0].get_lines()[0].get_ydata().tolist() == [row["loss"] for row in rows[1:]]
    assert [axes.get_ylabel() for axes in plots.limits_figure(rows).axes] == ["memory, GB"]
    beside = dict(lines([found, summary([row(1, 0.5)])]))
    assert beside["loss"] == ["4.700 -> 4.600 (nats per token, five-step means)", "–"]
    assert beside["trained tokens"] == ["960", "–"] and beside["sampled tokens"][0] == beside["reward"][0] == "–"
    with LiveTable(6, io.StringIO(), rows=rows) as live:
        live._console = Console(width=140, record=True, file=io.StringIO())
        live._console.print(live._render())
    shown = live._console.export_text()
    assert "step 6 of 6" in shown and "4.900 to 4.400" in shown and "KL" not in shown and "tok/s" not in shown


def test_the_loss_of_held_out_tasks_is_shown(tmp_path):
    """A run on a corpus of which nobody sees whether it learns more than its rows."""
    rows = [{"step": 0, "heldout": {"loss": 5.5}}, *(text_row(step, 5.0 - 0.1 * step) for step in range(1, 7))]
    rows[-1]["heldout"] = {"loss": 4.125}
    assert summary(rows)["heldout_loss"] == [5.5, 4.125] and "held-out loss 4.125" in step_line(rows[-1], 6, None)
    drawn = plots.loss_figure(rows).axes[0].get_lines()
    assert [line.get_xydata().tolist() for line in drawn if line.get_marker() == "D"] == [[[0.0, 5.5], [6.0, 4.125]]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    page = write_report(tmp_path).read_text()
    assert "Held-out loss" in page and ">4.125<" in page and "before: 5.500" in page and "Held-out accuracy" not in page
    with LiveTable(6, io.StringIO(), rows=rows) as live:
        live._console = Console(width=140, record=True, file=io.StringIO())
        live._console.print(live._render())
        shown = live._console.export_text()
    assert "loss 4.125" in shown and "loss 5.500 to 4.125" in shown
