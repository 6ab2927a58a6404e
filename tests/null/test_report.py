"""Regression caught: a report whose figures are not those of the run, or that shows model output as HTML."""

from __future__ import annotations

import io
import json
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import tandem.types
from tandem.errors import RunFolderError
from tandem.report import metrics, plots
from tandem.report.html import agreement, failures, render_report, write_report
from tandem.report.live import LiveTable, sparkline, step_line
from tandem.report.metrics import alarms, read_metrics, summary, time_left_s
from tandem.run.ledger import Ledger, split_rollout


def row(step: int, reward: float | None, **changes: object) -> dict:
    seconds = {"rollout": 2.0, "learner": 1.5, "update": 0.25, "other": 0.25}
    return {
        "step": step, "time_s": 4.0 * step, "reward": reward, "reward_std": 0.4, "trained_samples": 100, "failed": 0,
        "trajectories": 128, "length": 10.0 + step, "length_max": 64, "entropy": 0.5, "loss": 0.0, "kl": 0.0,
        "ratio_max": 1.0, "clip_fraction": 0.0, "grad_norm": 1.0, "lr": 2e-5, "tokens": 1600, "tokens_per_s": 800.0,
        "zero_variance": 0.25, "mismatch": 0.0, "seconds": seconds, "peak_memory_bytes": 2_000_000_000 + step,
        "weights": f"digest{step:02d}",
    } | changes  # fmt: skip


def run_rows(number: int = 12) -> list[dict]:
    """Reward 0.05 a step upwards, held-out accuracy before, at 6 and at the end."""
    before = {"accuracy": 0.08, "low": 0.05, "high": 0.126, "prompts": 200}
    rows = [{"step": 0, "time_s": 0.5, "evaluation": before, "seconds": {"evaluate": 0.5}}]
    rows += [row(step, 0.05 * step) for step in range(1, number + 1)]
    rows[6]["evaluation"] = {"accuracy": 0.4, "low": 0.33, "high": 0.47, "prompts": 200}
    rows[number]["evaluation"] = {"accuracy": 0.62, "low": 0.551, "high": 0.685, "prompts": 200}
    return rows


def write_rows(folder: Path, rows: list[dict], tail: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows) + tail)
    return folder


def test_read_metrics_leaves_out_a_torn_line_and_merges_a_step(tmp_path):
    """A killed run whose report cannot be made; an evaluation row that hides the step's training row."""
    rows = [row(2, 0.2), row(1, 0.1), {"step": 2, "evaluation": {"accuracy": 0.5}}]
    folder = write_rows(tmp_path / "run", rows, tail='{"step": 3, "rewa')
    read = read_metrics(folder)
    assert [entry["step"] for entry in read] == [1, 2]
    assert (read[1]["reward"], read[1]["evaluation"]["accuracy"]) == (0.2, 0.5)
    assert read == read_metrics(folder / "metrics.jsonl")
    for wrong in ('{"step"', "3", "[]", '{"reward": 1.0}', '{"step": null}'):
        (folder / "metrics.jsonl").write_text(f'{{"step": 1}}\n{wrong}\n{{"step": 3}}\n')
        with pytest.raises(RunFolderError, match="line 2 is not the row of a step"):
            read_metrics(folder)
    with pytest.raises(RunFolderError, match="is a file. Give the run's folder"):
        write_report(folder / "metrics.jsonl")
    with pytest.raises(RunFolderError, match="does not exist"):
        read_metrics(tmp_path / "nothing.jsonl")


def test_summary_by_hand():
    """A headline that counts the wrong steps, averages rates, or takes a resumed clock for the whole time."""
    rows = run_rows()
    rows.append(row(13, None, failed=128, trained_samples=0, mismatch=0.01, time_s=3.0))  # a clock that began again
    figures = summary(rows)
    assert figures["steps"] == 13 and figures["last_step"] == 13
    assert figures["reward_first"] == pytest.approx((0.05 + 0.1 + 0.15 + 0.2 + 0.25) / 5)
    assert figures["reward_last"] == pytest.approx((0.4 + 0.45 + 0.5 + 0.55 + 0.6) / 5)
    assert (figures["evaluation_before"]["step"], figures["evaluation_before"]["accuracy"]) == (0, 0.08)
    assert (figures["evaluation_after"]["step"], figures["evaluation_after"]["high"]) == (12, 0.685)
    assert figures["tokens"] == 13 * 1600
    assert figures["tokens_per_s"] == 800.0
    assert figures["wall_s"] == 48.0 + 3.0
    assert list(figures["seconds"]) == ["rollout", "learner", "update", "evaluate", "other"]
    assert figures["shares"]["learner"] == pytest.approx(13 * 1.5 / (13 * 4.0 + 0.5))
    assert sum(figures["shares"].values()) == pytest.approx(1.0)
    assert (figures["failed"], figures["trained_samples"]) == (128, 1200)
    assert (figures["peak_memory_bytes"], figures["mismatch_max"], figures["weights"]) == (
        2_000_000_013,
        0.01,
        "digest13",
    )
    empty = summary([])
    assert (empty["steps"], empty["reward_last"], empty["evaluation_after"], empty["shares"]) == (0, None, None, {})
    assert summary(rows[:3])["evaluation_after"] is None


def test_tokens_a_second_is_total_over_total():
    """The mean of the steps' rates, which short steps distort; or no rate where another worker samples."""
    rows = [row(1, 0.1, tokens=100, seconds={"rollout": 1.0}), row(2, 0.1, tokens=900, seconds={"rollout": 3.0})]
    assert summary(rows)["tokens_per_s"] == 250.0
    workers = {"rollouts": {"prefill": 1.0, "decode": 2.0, "host": 1.0, "cores": 5.0}}
    ahead = row(3, 0.1, tokens=900, seconds={"buffer": 3.0}, drawn_tokens=2000, workers=workers)
    assert summary([*rows, ahead])["tokens_per_s"] == 375.0


def test_time_left_is_the_median_of_the_last_ten():
    """An estimate that one slow step (compilation, a checkpoint) spoils."""
    rows = [row(0, None, seconds={"evaluate": 500.0}) | {"step": 0}]
    rows = [{"step": 0, "seconds": {"evaluate": 500.0}}] + [row(step, 0.1) for step in range(1, 5)]
    rows.append(row(5, 0.1, seconds={"rollout": 2.0, "checkpoint": 90.0}))
    assert time_left_s(rows, 15) == 10 * 4.0
    assert time_left_s(rows, 5) == 0.0
    assert time_left_s(rows[:1], 5) is None


def test_alarms_name_metric_value_threshold_and_step():
    """A flood of failures or a policy mismatch that no one is told of; noise on a good run."""
    rows = run_rows()
    assert alarms(rows) == []
    rows[3]["failed"] = 64
    for number in (4, 6, 9):
        rows[number]["alarms"] = [f"k3 0.{number} > 0.01; most of it in p/3"]
    rows[7]["alarms"] = ["ESS 0.2 < 0.5"]
    rows.append(row(13, None))
    text = "\n".join(alarms(rows))
    assert "step 3: failed trajectories 50% > 10%" in text
    assert "step 4: k3 0.4 > 0.01; most of it in p/3 (and in 2 later steps)" in text and "k3 0.6" not in text
    assert "step 7: ESS 0.2 < 0.5" in text
    assert "step 13: reward is not a number" in text
    assert len(alarms(rows)) == 4


def test_sparkline_scale():
    """A curve stretched so that the top is cut, or averaged in unequal bins."""
    assert sparkline([0.0, 1.0], 8, low=0.0, high=1.0) == "▁█"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([3.0, 3.0], 8) == "▁▁"
    assert sparkline([-5.0, 9.0], 8, low=0.0, high=1.0) == "▁█"
    assert sparkline([], 8) == ""


@given(st.lists(st.integers(0, 7), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 80))
def test_sparkline_width(levels, times, width):
    """A sparkline wider than its place breaks the table; one that is cut to it, or whose bins overlap, hides values."""
    values = [level for level in levels for _ in range(times)]
    assert sparkline(values, len(levels), low=0, high=7) == "".join("▁▂▃▄▅▆▇█"[level] for level in levels)
    rising = sparkline(sorted(values), width, low=0, high=7)
    assert len(rising) == min(len(values), width) and list(rising) == sorted(rising)


def test_a_log_gets_one_plain_line_a_step():
    """Escape sequences or a redrawn table in a CI log."""
    stream = io.StringIO()
    with LiveTable(12, stream, title="sums  exact") as live:
        for entry in run_rows():
            live.update(entry)
        live.note("saved")
    first, *printed = stream.getvalue().splitlines()
    assert first == "sums  exact" and len(printed) == 14 and printed[-1] == "saved"
    assert "\x1b" not in stream.getvalue()
    assert printed[1] == (
        "step  1/12  reward 0.050  length 11.0 (max 64)  entropy 0.500  KL 0  800 tok/s  "
        "4.0 s (rollout 50 %, learner 38 %, update 6 %, other 6 %)  about 44 s left"
    )
    assert "held-out 62.0 % [55.1, 68.5] of 200" in printed[12]
    lost = row(4, None, failed=3, failures=["3 x reward: ZeroDivisionError: division by zero"])
    assert "failed 3 (3 x reward: ZeroDivisionError: division by zero)" in step_line(lost, 12, None)
    assert "failed 3" in step_line(row(4, None, failed=3), 12, None) and "reward –" in step_line(row(4, None), 12, None)


def test_a_log_in_ascii_does_not_crash():
    """A blank value (a dash) in a log of a C locale: UnicodeEncodeError ends the run."""
    raw = io.BytesIO()
    with LiveTable(12, io.TextIOWrapper(raw, encoding="ascii")) as live:
        live.update(row(1, None))
    assert b"reward ?" in raw.getvalue()


def test_json_mode_prints_a_row_a_step(capsys):
    """Notes or a table among the rows that a program reads."""
    with LiveTable(12, as_json=True) as live:
        live.note("loading the model")
        for entry in run_rows():
            live.update(entry)
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == run_rows()
    assert err == "tandem\nloading the model\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("width", "height"), [(60, 24), (80, 15), (120, 24)])
def test_live_table_fits_the_terminal(width, height, monkeypatch):
    """A table taller or wider than the terminal scrolls and flickers; a figure of another step."""
    monkeypatch.setenv("TERM", "xterm-256color")
    live = LiveTable(20, Terminal(), title="tandem train tiny")
    assert live._live is not None
    live._console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    live._rows = run_rows()
    live.note("saving")
    live._console.print(live._render())
    lines = live._console.file.getvalue().splitlines()
    text = "\n".join(lines)
    assert len(lines) < height and max(map(len, lines)) <= width
    assert re.search(r"^ +12 +0\.600 +22\.0 +64 +0\.500 +0 +800 +4\.0 s", text, re.M)
    assert ("equal groups" in text) == (width >= 90)
    for wanted in ("tandem train tiny", "8.0 % [5.0", "rollout 49 %", "step 12 of 20", "▁", "saving"):
        assert wanted in text, wanted


def test_live_table_runs_on_a_terminal(monkeypatch):
    """The live display is never started, its last state is wiped, or of what came before the last line alone stays."""
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    table = LiveTable(12, stream)
    table.note("chats: 42 rows, 1 refused")
    table.note("all rows once are about 12 steps")
    with table as live:
        assert stream.getvalue().startswith("chats: 42 rows, 1 refused\nall rows once")
        live.note("first rollout")
        for entry in run_rows():
            live.update(entry)
    assert "step 12 of 12" in stream.getvalue().rsplit("reward    ", 1)[1]
    assert "done" in stream.getvalue()


def lines_by_label(figure) -> dict[str, list[tuple[float, float]]]:
    axes = figure.axes[0]
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def test_reward_figure_draws_the_rows():
    """A point dropped or shifted by a step; a band that is not the interval; a legend without the lines."""
    figure = plots.reward_figure(run_rows())
    axes = figure.axes[0]
    drawn = lines_by_label(figure)
    assert drawn["reward, each step"] == [(step, pytest.approx(0.05 * step)) for step in range(1, 13)]
    assert drawn["mean of 5 steps"][0] == (1, 0.05)
    assert drawn["mean of 5 steps"][11] == (12, pytest.approx(0.5))
    (errorbar,) = axes.containers
    assert list(zip(*errorbar[0].get_data(), strict=True)) == [(0, 0.08), (6, 0.4), (12, 0.62)]
    segments = errorbar[2][0].get_segments()
    assert [[pytest.approx(end[1]) for end in bar] for bar in segments] == [[0.05, 0.126], [0.33, 0.47], [0.551, 0.685]]
    band = axes.collections[0].get_paths()[0].vertices
    assert (6.0, 0.33) in {(x, round(y, 3)) for x, y in band} and (12.0, 0.685) in {(x, round(y, 3)) for x, y in band}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "reward, each step", "mean of 5 steps", "held-out accuracy, 95 %",
    ]  # fmt: skip
    assert axes.get_ylim() == (0.0, 1.0)
    beyond = [row(1, -3.0), row(2, 4.0)]
    low, high = plots.reward_figure(beyond).axes[0].get_ylim()
    assert low <= -3.0 and high >= 4.0


def test_time_figure_stacks_to_the_whole_step():
    """Bars that overlap instead of standing on each other; shares that are not the run's."""
    rows = run_rows()
    axes = plots.time_figure(rows).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["rollout 49 %", "learner 37 %", "update 6 %", "evaluate 1 %", "other 6 %"]
    tops = {}
    for container in axes.containers:
        for bar in container:
            centre = round(bar.get_x() + bar.get_width() / 2)
            assert bar.get_y() == pytest.approx(tops.get(centre, 0.0))
            tops[centre] = bar.get_y() + bar.get_height()
    assert tops == {0: pytest.approx(0.5)} | {step: pytest.approx(4.0) for step in range(1, 13)}
    assert len({tuple(container[0].get_facecolor()) for container in axes.containers}) == 5


def test_lengths_and_entropy_figures():
    """Mean and longest exchanged; a missing value drawn as zero."""
    rows = run_rows()
    rows[3]["entropy"] = None
    drawn = lines_by_label(plots.lengths_figure(rows))
    assert drawn["mean"][0] == (1, 11.0) and drawn["longest"][0] == (1, 64.0)
    (line,) = plots.entropy_figure(rows).axes[0].get_lines()
    assert list(line.get_xdata()) == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12]


def test_what_happened_in_programs_is_drawn_a_program():
    """Counts of a step drawn as they are, so that a larger step looks as if its programs did more; a name left out."""
    rows = [row(1, 0.1, turns=2.5, happened={"tool_calls": 64}), row(2, 0.2, turns=3.0, happened={"splits": 32})]
    strips = {axes.get_ylabel(): axes.get_lines()[0] for axes in plots.agents_figure(rows).axes}
    drawn = {name: list(zip(*line.get_data(), strict=True)) for name, line in strips.items()}
    assert drawn == {"turns": [(1, 2.5), (2, 3.0)], "tool calls": [(1, 0.5)], "splits": [(2, 0.25)]}
    assert not plots.shows(plots.agents_figure(run_rows()))


@pytest.mark.parametrize("name", plots.FIGURES)
def test_every_figure_is_labelled(name):
    """An axis without its unit; a picture that cannot be drawn before the first step."""
    for rows in (run_rows(), run_rows()[:1], []):
        every = plots.FIGURES[name](rows).axes
        assert every[0].get_title(loc="left") or every[0].get_title()
        assert every[-1].get_xlabel() == "step (optimiser updates)"
        assert all(axes.get_ylabel() for axes in every)


def test_reward_curves_of_three_seeds(tmp_path):
    """A seed left out of the README's picture, or two that look the same."""
    curves = [(f"seed {seed}", [row(step, 0.01 * step * seed) for step in range(1, 41)]) for seed in (1, 2, 3)]
    axes = plots.reward_curves_figure(curves).axes[0]
    named = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    assert [line.get_label() for line in named] == ["seed 1", "seed 2", "seed 3"]
    assert [line.get_ydata()[-1] for line in named] == [pytest.approx(0.38 * seed) for seed in (1, 2, 3)]
    assert len({line.get_color() for line in named}) == len({line.get_linestyle() for line in named}) == 3
    path = tmp_path / "seeds.png"
    path.write_bytes(plots.png(lambda: plots.reward_curves_figure(curves, "Seeds")))
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert (width, height) == (1200, 680)


def test_the_same_rows_give_the_same_picture():
    """A date or a global setting in the file: README pictures change in every commit."""
    rows = run_rows()
    first = plots.png(lambda: plots.reward_figure(rows))
    assert first == plots.png(lambda: plots.reward_figure(rows))
    assert first != plots.png(lambda: plots.reward_figure(rows), dark=True)


HOSTILE = '<script>alert("x")</script><img src=x onerror=y> & "quoted" {{ 7 * 7 }}'


def trajectory_row(program: int, reward: float | None, text: str, failure: dict | None = None) -> dict:
    return {
        "program_id": f"p{program // 8}/{program:02d}", "prompt_id": f"p{program // 8}",
        "prompt": [{"role": "user", "content": f"What is {program} + 1? <b>"}], "answer": str(program + 1),
        "text": text, "reward": reward, "sampled_tokens": 9, "stop_reason": "stop_token", "failure": failure,
    }  # fmt: skip


def run_folder(path: Path) -> Path:
    write_rows(path, run_rows())
    (path / "config.json").write_text(json.dumps({"name": "tiny <recipe>", "steps": 12, "learner": {"lr": 2e-5}}))
    (path / "trajectories").mkdir()
    older = [trajectory_row(0, None, "", {"where": "deadline", "reason": "over 5 s"})]
    latest = [trajectory_row(n, float(n >= 16), "right" if n >= 16 else HOSTILE) for n in range(32)]
    latest += [trajectory_row(40 + n, None, "", {"where": "reward", "reason": "returned <nan>"}) for n in range(3)]
    for step, rows in ((9, older), (12, latest)):
        (path / f"trajectories/step-{step}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    ledger = Ledger()
    for entry in run_rows():
        known = {phase: seconds for phase, seconds in entry["seconds"].items() if phase != "other"}
        ledger.spend(split_rollout(known, {}))
    ledger.lose("trained", 15_000)
    (path / "ledger.json").write_text(json.dumps(ledger.close({"main": 46.0}, live_tokens=4_200)))
    return path


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_report_holds_the_run_and_escapes_the_model(tmp_path):
    """Model output run as script by the reader's browser; a page that needs the network; figures of another run."""
    folder = run_folder(tmp_path / "run")
    path = write_report(folder, ["learner.lr: 1e-05 -> 2e-05 <"])
    source = path.read_text()
    page = Page(source)
    assert page.open == []
    text = re.sub(r"\s+", " ", " ".join(page.words))
    assert path == folder / "report.html"
    assert {tag for tag, _ in page.tags} & {"script", "b", "link", "iframe"} <= {"b"}
    assert not [a for tag, a in page.tags if any(name.startswith("on") for name in a)]
    images = [a for tag, a in page.tags if tag in ("img", "source")]
    assert len(images) == 16 and all((a.get("src") or a["srcset"]).startswith("data:image/png;base64,") for a in images)
    assert "http" not in source
    assert HOSTILE in "".join(page.words) and "<script" not in source
    for wanted in (
        "tiny <recipe>", "step 12 of 12", "weights digest12", "0.500", "first 5: 0.150", "62.0 %", "95 %: 55.1 to 68.5",
        "before: 8.0 % [5.0, 12.6] of 200", "19.2 k", "800 a second of rollout", "2.00 GB", "equal to the last bit",
        "Sampled in step 12", "deadline over 5 s 1", "reward returned <nan> 3", "15,000", "78.1 %", "in flight",
        "4,200", "19,200", "unaccounted", "learner.lr: 1e-05 -> 2e-05 <", "What is 16 + 1? <b>",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "Look at these" not in text
    for name in ("reward", "lengths", "entropy", "time"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_report_shows_what_the_scheduler_did(tmp_path):
    """A pool too small, whose sequences are preempted and computed again, unseen; a row of another version refused."""
    folder, rows = run_folder(tmp_path / "run"), run_rows()
    did = {"cached_tokens": 14_200, "recomputed_tokens": 731, "preemptions": 12, "evicted_pages": 45}
    rows[12] |= did
    text = re.sub(r"\s+", " ", " ".join(Page(render_report(folder, rows)).words))
    assert "tokens/s cached tokens recomputed tokens preemptions evicted pages time" in text
    assert "800 14.2 k 731 12 45 4.0 s" in text and "800 – – – – 4.0 s" in text
    assert "preempted 12 (731 tokens again)" in step_line(rows[12], 12, None)
    assert "preempted" not in step_line(rows[11] | {"preemptions": 0}, 12, None)


def test_report_shows_declared_drift(tmp_path):
    """A run in int4 whose report says only that it differed: not by how much, where, or past which threshold."""
    folder = run_folder(tmp_path / "run")
    rows = run_rows()
    for number, entry in enumerate(rows[1:], start=1):
        drift = {"k3": 0.001 * number, "ess": 1.0 - 0.01 * number, "mismatch": 0.1 * number}
        budget = {"staleness": 0.0, "mismatch": 0.01, "sampling": 0.0, "masking": 0.0}
        decile = {"samples": 13, "length": 8.0, "k3": 0.0042}
        entry |= {**drift, "error_budget": budget, "by_length": [decile], "alarms": ["ess 0.4 < 0.5"]}
    write_rows(folder, rows)
    (folder / "plan.json").write_text(
        json.dumps({"numerics": "departs from exact: int4 <weights>", "memory": {"peak_bytes": 3_800_000_000}})
    )
    (folder / "config.json").write_text(json.dumps({"name": "tiny", "alarms": {"k3": 0.01, "ess": None}}))
    page = Page(write_report(folder).read_text())
    text = re.sub(r"\s+", " ", " ".join(page.words))
    for wanted in (
        "Declared: departs from exact: int4 <weights>.", "differ by at most 1.2 nats (step 12), in 12 of 12 steps",
        "k3 KL of behaviour to learner, nats a token 0.012 0.012 12 > 0.01",
        "ess effective share of the tokens, unclamped 0.880 0.880 12 off", "0.004", "samples length k3",
        "step 1: ess 0.4 < 0.5 (and in 11 later steps)", "of the run's process; planned: 3.80 GB",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert (folder / "budget.png").read_bytes().startswith(b"\x89PNG")


def test_report_shows_best_and_worst_of_different_prompts(tmp_path):
    """Three siblings of one prompt shown as the best; the same trajectory as best and worst."""
    folder = run_folder(tmp_path / "run")
    page = render_report(folder, run_rows())
    assert page.count(">right<") == 3
    best, worst = page.split("<h3>Worst</h3>")
    assert re.findall(r"expected <b>(\d+)</b>", best) == ["17", "25", "18"]
    assert re.findall(r"expected <b>(\d+)</b>", worst) == ["16", "8", "15"]
    few = "".join(json.dumps(trajectory_row(n, n / 4, "x")) + "\n" for n in range(4))
    (folder / "trajectories/step-12.jsonl").write_text(few)
    assert re.findall(r"expected <b>(\d+)</b>", render_report(folder, run_rows())) == ["4", "3", "2", "1"]


def test_failures_are_counted_by_reason(tmp_path):
    """Failures of earlier steps left out, or reasons run together."""
    folder = run_folder(tmp_path / "run")
    assert failures(folder) == [("reward", "returned <nan>", 3), ("deadline", "over 5 s", 1)]


def test_report_before_the_first_step(tmp_path):
    """A report of a run that has only been evaluated, or has no config, ends in a traceback."""
    folder = write_rows(tmp_path / "run", run_rows()[:1])
    page = Page(write_report(folder).read_text())
    assert "No training step has finished yet." in "".join(page.words)
    assert "8.0 %" in "".join(page.words)


def test_agreement_says_what_was_measured():
    """'Equal to the last bit' printed of a run that was not."""
    rows = run_rows()
    assert "equal to the last bit for every trained token of 12 steps" in agreement(rows)
    rows[4]["mismatch"] = 1e-7
    assert agreement(rows) == "Engine and learner log-probs differ by at most 1e-07 nats (step 4), in 1 of 12 steps."
    assert agreement(rows[:1]) is None


def test_report_and_folder_load_no_torch():
    """`tandem report` or `--help` that waits seconds for torch; pyplot, which looks for a display."""
    source = str(Path(tandem.types.__file__).parents[1])
    code = (
        "import sys; import tandem.report.html, tandem.report.live, tandem.run.ledger, tandem.run.folder, "
        "tandem.run.stop; print([m for m in ('torch', 'matplotlib.pyplot', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r}); {code}"],
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert found.stdout == "[]\n"


def test_series_skips_what_is_not_a_number():
    """NaN, null or a missing key drawn as a point or averaged into a headline."""
    rows = [
        {"step": 1, "x": 1},
        {"step": 2, "x": None},
        {"step": 3},
        {"step": 4, "x": float("nan")},
        {"step": 5, "x": 2.5},
    ]
    assert metrics.series(rows, "x") == ([1, 5], [1.0, 2.5])
