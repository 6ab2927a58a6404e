"""Regressions in the page that lays runs over each other, and in the curves that it shares with a report."""

from __future__ import annotations

import json
import re
import warnings
from functools import partial
from pathlib import Path

import matplotlib as mpl
import pytest

from tandem.cli.main import main
from tandem.report import plots
from tandem.report.compare import compare


def run_rows() -> list[dict]:
    """Reward 0.05 a step upwards, held-out accuracy before and at the end."""
    evaluation = {"accuracy": 0.08, "low": 0.05, "high": 0.126, "prompts": 200}
    rows: list[dict] = [{"step": 0, "evaluation": evaluation}]
    for step in range(1, 13):
        figures = {"reward": 0.05 * step, "grad_norm": 1.0, "lr": 2e-5, "clip_fraction": 0.0, "kl": 0.0, "length": 9.0}
        rows.append({"step": step, **figures, "truncated": 0.5, "peak_memory_bytes": 2_000_000_000 + step})
    rows[-1]["evaluation"] = evaluation | {"accuracy": 0.62}
    return rows


def write_rows(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def comparable(path: Path, **changes: object) -> Path:
    write_rows(path, run_rows())
    config = {"name": "tiny <b>", "steps": 12, "seed": 0, "learner": {"lr": 2e-5, "beta1": 0.9}} | changes
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_runs_laid_over_each_other(tmp_path, capsys):
    """A run left out, a setting that differs unseen, one that is alike shown, or a page that needs the network."""
    folders = [
        comparable(tmp_path / "a"),
        comparable(tmp_path / "b", learner={"lr": 1e-5, "beta1": 0.9}),
        comparable(tmp_path / "c", name="other", extra="[new]"),
    ]
    write_rows(folders[1], [row | {"reward": 0.25} if "reward" in row else row for row in run_rows()])
    out = tmp_path / ("a_long_folder" * 8) / "page.html"  # a path broken over lines is no path
    out.parent.mkdir()
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "[new]" in printed and f"wrote {out}" in printed
    source = out.read_text()
    assert "http" not in source and "<script" not in source and "<b>" not in source
    body = source.partition("<body>")[2]
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body)).replace("&lt;", "<").replace("&gt;", ">")
    for wanted in (
        "3 runs", "reward 0.150 -> 0.500 (five-step means) 0.250 -> 0.250 (five-step means) 0.150 -> 0.500",
        "setting a b other name tiny <b> tiny <b> other learner.lr 2e-05 1e-05 2e-05 extra – – [new]",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "learner.beta1" not in text
    tables = re.findall(r"<table>.*?</table>", body, re.S)  # else one long value takes the width, and labels break
    assert all(cell.startswith(' class="') for table in tables for cell in re.findall(r"<t[dh]( class=[^>]*|)>", table))
    shown = re.findall(r' src(?:set)?="(.{22})', body)
    assert shown == ["data:image/png;base64,"] * 8
    assert main(["report", *map(str, folders), "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"]["learner.lr"] == {"a": "2e-05", "b": "1e-05", "other": "2e-05"}
    assert told["runs"]["b"]["reward_last"] == 0.25
    assert main(["report", str(folders[0]), "--out", str(out)]) == 2 and "--out" in capsys.readouterr().err
    (folders[0] / "config.json").write_text("{")
    assert main(["report", *map(str, folders)]) == 2 and "config.json is damaged" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart(tmp_path):
    """Two lines of one name in a legend."""
    folders = [comparable(tmp_path / name) for name in ("x/run", "y/run", "z/last")]
    assert compare(folders).names == (str(folders[0]), str(folders[1]), "last")
    assert len(set(compare([folders[0], folders[0]]).names)) == 2


def test_strips_draw_each_run_in_its_units():
    """A run's line under another's name; bytes on an axis of gigabytes; a curve missing."""
    runs = [("one", run_rows()), ("two", [entry | {"lr": 1e-5} for entry in run_rows()])]
    drawn = plots.strips_figure("t", plots.LIMITS, runs).axes
    assert [axes.get_ylabel() for axes in drawn] == ["KL, nats", "cut off, share", "memory, GB"]
    assert list(drawn[2].get_lines()[0].get_ydata())[0] == pytest.approx(2.000000001)
    rates = plots.strips_figure("t", plots.UPDATE, runs).axes[1]
    assert {line.get_label(): set(line.get_ydata()) for line in rates.get_lines()} == {"one": {2e-5}, "two": {1e-5}}
    assert len({line.get_linestyle() for line in rates.get_lines()}) == 2
    assert rates.get_ylim()[0] == 0 and rates.get_ylim()[1] > 2e-5
    assert plots.update_figure(run_rows()).axes[0].get_legend() is None


@pytest.mark.parametrize("number", [2, 4, 24])
def test_long_names_and_many_runs_leave_room_for_the_curves(number):
    """A legend that takes the whole picture, or names that are cut to the part in which they are alike."""
    runs = [(f"runs/of/a/very/long/path/that/goes/on/seed-{place}", run_rows()) for place in range(number)]
    for draw in (partial(plots.strips_figure, "t", plots.UPDATE, runs), partial(plots.reward_curves_figure, runs)):
        with mpl.rc_context(plots.STYLE), warnings.catch_warnings():
            warnings.simplefilter("error")  # constrained_layout warns where no room is left
            figure = draw()
            figure.canvas.draw()
        legend = figure.axes[0].get_legend()
        shown = [text.get_text() for text in legend.get_texts() if text.get_text() != "held-out accuracy"]
        assert len(set(shown)) == number and set(map(len, shown)) == {28}
        assert all(axes.get_position().height > 0.08 for axes in figure.axes)
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.y1 <= figure.bbox.height
