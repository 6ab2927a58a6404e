"""What is shown of a run that learns from preferences: its curves, its columns and its words in a log."""

from __future__ import annotations

import json
from pathlib import Path

from tandem.algo.config import SupervisedConfig
from tandem.report import plots
from tandem.report.compare import lines
from tandem.report.html import last_steps, tiles, write_report
from tandem.report.live import step_line
from tandem.report.metrics import loss_unit, summary
from tandem.report.trajectories import _Index
from tests.null.test_report import run_rows, trajectory_row, write_rows


def preferred(count: int = 3) -> list[dict]:
    known = {"loss": 0.6, "length": 9.0, "entropy": 1.0, "grad_norm": 2.0, "trained_samples": 8, "trained_tokens": 70}
    rows = []
    for step in range(1, count + 1):
        sides = {"chosen_logprob": -20.0 - step, "rejected_logprob": -20.0 - 3 * step}
        found = {"preference_accuracy": 0.5 + 0.1 * step, "reward_margin": 0.2 * step, **sides}
        rows.append({"step": step, "seconds": {"learner": 1.0}, "time_s": float(step), **known, **found})
    return rows


def test_both_sides_are_drawn():
    """The rejected answers' log-probs are below the picture or not there, or a run without pairs gets empty axes."""
    accuracy, margin, sides = plots.preference_figure(preferred()).axes
    assert accuracy.get_lines()[0].get_ydata().tolist() == [0.6, 0.7, 0.8] and margin.get_ylim()[0] == 0.0
    drawn = {line.get_label(): line.get_ydata().tolist() for line in sides.get_lines()}
    assert drawn == {"chosen": [-21.0, -22.0, -23.0], "rejected": [-23.0, -26.0, -29.0]}
    assert sides.get_ylim()[0] <= -29.0 and sides.get_ylim()[1] >= -21.0
    assert not plots.shows(plots.preference_figure(run_rows()))


def test_margins_in_a_log_and_on_a_page():
    """A run whose margin falls looks as one whose margin grows."""
    assert "margin 0.40" in step_line(preferred()[1], 3, None) and "margin" not in step_line(run_rows()[1], 3, None)
    headings, newest, *_ = last_steps(preferred())
    shown = dict(zip(headings, newest, strict=True))
    assert shown["right pairs"] == "80 %" and shown["margin"] == "0.60"


def test_headlines_are_of_pairs(tmp_path: Path):
    """A page of preferences heads with a reward that nobody gave, and not with what was learned of the pairs."""
    write_rows(tmp_path, preferred(7))
    shown = {label: (figure, said) for label, figure, said in tiles(summary(preferred(7)), None)}
    assert shown["Right pairs"] == ("100.0 %", "chosen above rejected, of the last 5 steps; first 5: 80 %")
    assert shown["Margin"] == ("1.000", "of rewards, mean of the last 5 steps; first 5: 0.600")
    assert "Reward" not in shown and "Right pairs" in write_report(tmp_path).read_text()
    assert not {"Right pairs", "Margin"} & {label for label, *_ in tiles(summary(run_rows()), None)}


def test_chips_are_sides(tmp_path: Path):
    """The list of programs shows each answer of a pair with a reward, 0 of both, and their mean."""
    index = _Index()
    said = [trajectory_row(n, 0.0, f"says {n}") | {"prompt_id": f"p{n // 2}"} for n in range(4)]
    index.add(1, [row | {"side": ("chosen", "rejected")[n % 2]} for n, row in enumerate(said[:2])] + said[2:])
    assert [(one[3], one[8]) for one in index.record()["programs"]] == [
        (None, "chosen"), (None, "rejected"), (0.0, None), (0.0, None),
    ]  # fmt: skip


def test_a_losss_unit_is_its_reductions(tmp_path: Path):
    """A mean over sequences, or one with weights, is shown as nats per token: in a log, on the page, beside others."""
    unit = SupervisedConfig("sequence_mean", unlikelihood=0.5).unit
    assert unit == "nats per token, a mean over sequences, marked turns by unlikelihood"
    assert SupervisedConfig().unit == "" and SupervisedConfig("trajectory_mean", "advantage").unit == (
        "nats per token, a mean over trajectories, each times exp(advantage / beta)"
    )
    plain = [{"step": n, "loss": 2.0, "length": 9.0, "trained_samples": 8, "trained_tokens": 70} for n in (1, 2)]
    rows = [row | {"loss_unit": unit} for row in plain]
    assert f"loss 2.000 ({unit})" in step_line(rows[0], 2, None) and "(" not in step_line(plain[0], 2, None)
    write_rows(tmp_path, rows)
    assert unit in write_report(tmp_path).read_text() and plots.loss_figure(rows).axes[0].get_ylabel() == unit
    assert lines([summary(rows)]) != lines([summary(plain)]) and unit in dict(lines([summary(rows)]))["loss"][0]
    assert loss_unit(rows + plain) == f"{unit} or nats per token"


def test_how_fast_texts_are_learned(tmp_path: Path):
    """A run that samples nothing has no rate: in a log, in the table, on its page."""
    rows = [row | {"learner_rows": 300, "seconds": {"learner": 0.25, "other": 1.0}} for row in preferred()]
    rows = [row | {"tokens_per_s": 1200.0} for row in rows]
    assert summary(rows)["tokens_per_s"] == 1200.0 and "  1,200 tok/s  " in step_line(rows[1], 3, None)
    headings, newest, *_ = last_steps(rows)
    assert (
        dict(zip(headings, newest, strict=True))["tokens/s"] == "1,200" and "tokens/s" not in last_steps(preferred())[0]
    )
    write_rows(tmp_path, rows)
    assert "1,200 tokens a second of learning" in write_report(tmp_path).read_text()


def test_a_loss_of_pairs_is_of_no_token(tmp_path: Path):
    """A mean over pairs or ratings is shown as nats per token: on the page, its picture, or beside other runs."""
    unlike = {"kl_mismatched": 0.0}
    for rows, unit in ((preferred(), "mean over pairs"), ([row | unlike for row in preferred()], "mean over ratings")):
        write_rows(tmp_path, rows)
        page = write_report(tmp_path).read_text()
        assert unit in page and "nats per token" not in page
        assert plots.loss_figure(rows).axes[0].get_ylabel() == unit
        assert unit in dict(lines([summary(rows)]))["loss"][0]


def test_a_page_says_which_answer_was_chosen(tmp_path: Path):
    """The answers of a step stand there without their sides, or not beside each other."""
    write_rows(tmp_path, preferred())
    (tmp_path / "trajectories").mkdir()
    said = [trajectory_row(n, 0.0, f"says {n}") | {"prompt_id": f"p{n // 2}"} for n in range(8)]
    rows = [row | {"side": ("chosen", "rejected")[n % 2]} for n, row in enumerate(said)]
    (tmp_path / "trajectories" / "step-3.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path).read_text()
    shown = [part.partition("<")[0] for part in page.split("<pre>says ")[1:]]
    assert shown == ["0", "2", "4", "1", "3", "5"]
    assert page.count("<b>chosen</b>") == page.count("<b>rejected</b>") == 3
