"""An advisory of noise, a fault in a run's course that none names, or one that tells of settings that don't exist."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tandem.cli import catalogue, main
from tandem.numerics.names import PAGES
from tandem.report.advice import WORSE, Advisor, advise, follow
from tandem.report.evidence import Evidence
from tandem.report.history import MEASURES, History
from tandem.report.html import curve, render_report
from tandem.report.live import LiveTable
from tandem.report.rules import RULES, _difference
from tests.courses import Noise, Row
from tests.tables import check_table

ROOT = Path(__file__).parents[2]


def over(step: int, first: float, last: float, begin: int = 60, end: int = 140) -> float:
    """A level that moves from one value to another in the steps between."""
    return first + (last - first) * min(1.0, max(0.0, (step - begin) / (end - begin)))


def times(row: Row, name: str, factor: float) -> None:
    row[name] *= factor


def set_to(row: Row, name: str, value: float) -> None:
    """Put a share at a level, with the noise that the row has of it kept."""
    row[name] = min(1.0, max(0.0, value + 0.3 * row[name]))


def falls(row: Row, climbs: bool) -> None:
    step = row["step"]
    row["reward"] += over(step, 0.0, 0.3) if climbs else 0.0
    if "evaluation" in row:
        row["evaluation"]["accuracy"] = over(step, 0.62, 0.35)


def slower(row: Row) -> None:
    for phase in row["seconds"]:
        row["seconds"][phase] *= over(row["step"], 1.0, 3.0)


def solve(row: Row) -> None:
    row["reward"], row["zero_variance"] = over(row["step"], 0.3, 0.99, 10, 40), over(row["step"], 0.3, 0.95, 10, 40)


def counted(row: Row, name: str, share: float) -> None:
    row["happened"][name] = round(over(row["step"], 0.02, share) * row["happened"]["tool_calls"])


def lost(row: Row) -> None:
    row["fairness"]["z"] += over(row["step"], 0.0, 3.0)
    row["fairness"]["longer"] += over(row["step"], 0.0, 0.3)


def budget(row: Row, name: str) -> None:
    row["error_budget"][name] *= over(row["step"], 1.0, 6.0)


FAULTS: Mapping[str, Callable[[Row], None]] = {
    "reward_hacking": lambda row: falls(row, climbs=True),
    "held_out_fall": lambda row: falls(row, climbs=False),
    "reward_fall": lambda row: times(row, "reward", over(row["step"], 1.0, 0.5)),
    "entropy_collapse": lambda row: times(row, "entropy", over(row["step"], 1.0, 0.05)),
    "entropy_growth": lambda row: times(row, "entropy", over(row["step"], 1.0, 4.0)),
    "zero_variance": lambda row: set_to(row, "zero_variance", over(row["step"], 0.2, 0.75)),
    "solved": solve,
    "length_growth": lambda row: times(row, "length", over(row["step"], 1.0, 3.0)),
    "length_fall": lambda row: times(row, "length", over(row["step"], 1.0, 0.3)),
    "truncation": lambda row: set_to(row, "truncated", over(row["step"], 0.05, 0.4)),
    "length_bias": lost,
    "ess_collapse": lambda row: times(row, "ess", over(row["step"], 1.0, 0.6)),
    "staleness": lambda row: budget(row, "staleness"),
    "stale_share": lambda row: set_to(row, "stale_share", over(row["step"], 0.05, 0.4)),
    "mismatch_growth": lambda row: budget(row, "mismatch"),
    "rare_gradient": lambda row: set_to(row, "rare_share", over(row["step"], 0.05, 0.4)),
    "clipping": lambda row: set_to(row, "clip_fraction", over(row["step"], 0.02, 0.35)),
    "gradient_spikes": lambda row: times(row, "grad_norm", 30.0 if row["step"] % 23 == 0 else 1.0),
    "critic_blind": lambda row: row.update(explained_variance=row["explained_variance"] - over(row["step"], 0.0, 0.7)),
    "failures": lambda row: row.update(failed=row["failed"] + round(over(row["step"], 0, 30))),
    "malformed_calls": lambda row: counted(row, "malformed_calls", 0.4),
    "tool_errors": lambda row: counted(row, "tool_errors", 0.6),
    "tools_abandoned": lambda row: row["happened"].update(
        tool_calls=round(over(row["step"], 1.0, 0.1) * row["happened"]["tool_calls"]), malformed_calls=0, tool_errors=0
    ),
    "spelt_tokens": lambda row: row.update(spelt_tokens=row["spelt_tokens"] + round(over(row["step"], 0, 20))),
    "kv_pressure": lambda row: times(row, "recomputed_tokens", over(row["step"], 1.0, 60.0)),
    "slowdown": slower,
    "memory_growth": lambda row: times(row, "peak_memory_bytes", 1.0 + 0.002 * row["step"]),
    "alarms_repeated": lambda row: row.update(alarms=["k3 0.2 > 0.01; most of it in p/1"] * (row["step"] > 80)),
}
ALONG = {  # what is as true
    "solved": {"zero_variance"},  # on the way
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name: str) -> None:
    """A fault that grows over eighty steps and that no advisory names, or that raises another's."""
    for seed in range(3):
        rows = []
        for row in Noise(seed).run():
            FAULTS[name](row)
            rows.append(row)
        found = {advisory.name: advisory for advisory in advise(rows)}
        assert name in found, (name, seed, [*found])
        assert {*found} <= {name} | ALONG.get(name, set()), (seed, [one.line() for one in found.values()])
        evidence = found[name].evidence
        assert evidence.first < evidence.last <= 200 and evidence.size >= 1.0
        assert evidence.low <= evidence.high and all(map(math.isfinite, (evidence.start, evidence.end)))
        if evidence.of == "change" and name != "memory_growth":
            assert evidence.low <= evidence.end - evidence.start <= evidence.high


def test_a_sampler_beside_the_learner_slows_down() -> None:
    """An asynchronous run, whose rows have their sampling with another worker, that no advisory sees slow down."""
    rows = []
    for row in Noise(0).run():
        slower(row)
        rollout = row["seconds"].pop("rollout")
        row |= {"drawn_tokens": row["tokens"], "workers": {"rollouts": {"decode": rollout, "parked": 50.0}}}
        rows.append(row)
    assert "slowdown" in {advisory.name for advisory in advise(rows)}


def test_every_rule_has_a_fault_and_settings_that_exist() -> None:
    """Advice to set what no config has, or an advisory that no test has seen."""
    assert {*FAULTS} == {rule.name for rule in RULES} and len(RULES) == len({rule.name for rule in RULES})
    settings = {setting.name for setting in catalogue.settings()}
    sections = {name.split(".")[0] for name in settings}
    for rule in RULES:
        words = re.findall(r"`([^`]+)`", rule.tries + rule.means)
        dotted = [word for word in words if "." in word and not word.startswith("tandem ")]
        assert dotted and {*dotted} <= settings, (rule.name, {*dotted} - settings)
        for word in {*words} - {*dotted}:
            assert word.startswith("tandem ") or word in sections or word in choices(), (rule.name, word)


def choices() -> set[str]:
    """Values that settings of one of a few take, and names of what pages hold."""
    return {*PAGES} | {word for setting in catalogue.settings() for word in re.findall(r"[a-z0-9_]+", setting.type)}


def test_an_advisory_is_said_once_and_again_when_it_is_much_worse() -> None:
    """A note a look, for a hundred looks, of one advisory; or silence where it gets out of hand."""
    advisor, said = Advisor(), []
    for row in Noise(5).run(300):
        row["failed"] = round(over(row["step"], 2, 100, 60, 280))
        said += [(row["step"], one) for one in advisor.take(row)]
    assert {one.name for _, one in said} == {"failures"}
    sizes = [one.evidence.size for _, one in said]
    assert 2 <= len(said) <= 5 and all(later >= WORSE * size for size, later in pairwise(sizes))
    assert "reward: TimeoutError: late" in said[0][1].line() and said[0][0] == said[0][1].since > 60
    assert said[0][1].advice().endswith("task.reward_on_error.") and "`" not in said[0][1].advice()


def test_what_is_over_is_told_as_over() -> None:
    """A fault that was mended at step 100 and that the report still calls standing, or no longer knows of."""
    rows = []
    for row in Noise(1).run(300):
        row["failed"] = 40 if 60 < row["step"] <= 100 else 1
        rows.append(row)
    gone = next(advisory for advisory in advise(rows) if advisory.name == "failures")
    assert 60 < gone.since < (gone.until or 0) < 120 and f"not since step {gone.until}" in gone.line()
    again = follow(rows)
    assert [one.name for one in again.standing] == [] and again.advisories == advise(rows)
    assert json.loads(json.dumps(gone.record())) == gone.record()


def test_healthy_runs_of_the_studies_are_quiet() -> None:
    """Advisories of real runs in which nothing was wrong; none where an arm made the engine's policy another."""
    for study, arm, wanted in (
        ("staleness", "lag0", set()),
        ("staleness", "lag1_token_tis", set()),
        ("exactness_price", "exact", set()),
        ("rollout_precision", "noise_naive", {"ess_collapse"}),
        ("rollout_precision", "int4_k3", {"ess_collapse"}),
    ):
        runs = json.loads((ROOT / "studies" / study / "result.json").read_text())["runs"]
        for run in (run for run in runs if run["arm"] == arm):
            assert {one.name for one in advise(rows_of(run))} == wanted, (study, arm, run["seed"])


def rows_of(run: Mapping[str, Any]) -> list[Row]:
    """The rows of a run, as far as a study's result.json keeps them."""
    rows: list[Row] = []
    for at, reward in enumerate(run["reward"]):
        known = {name: values[at] for name, values in run["series"].items() if values[at] is not None}
        parts = {name.split(".")[1]: known.pop(name) for name in [*known] if name.startswith("error_budget.")}
        known.pop("seconds", None)
        rows.append({"step": at + 1, "reward": reward, **known, "error_budget": parts})
    shares = {0: run["before"], len(rows): run["after"]}
    rows.insert(0, {"step": 0})
    for at, accuracy in shares.items():
        if accuracy is not None:
            rows[at]["evaluation"] = {"accuracy": accuracy, "prompts": run["heldout_prompts"]}
    return rows


def test_newcombes_interval_is_his() -> None:
    """An interval of a difference of shares that is not the one named (Newcombe 1998, table II, method 10)."""
    for (a, of_a, b, of_b), wanted in {
        (56, 70, 48, 80): (0.0524, 0.3339),
        (9, 10, 3, 10): (0.1705, 0.8090),
        (5, 56, 0, 29): (-0.0381, 0.1926),
    }.items():
        assert _difference(a, of_a, b, of_b, 1.959964) == pytest.approx(wanted, abs=1e-4)


def test_a_measure_is_read_from_a_row_by_hand() -> None:
    """A share over the wrong whole, or a step that lacks a measure counted as 0."""
    history = History()
    row = Noise(0).row(7) | {
        "failed": 32, "tokens": 1000, "recomputed_tokens": 250, "learner_rows": 500, "spelt_tokens": 64,
        "happened": {"tool_calls": 64, "malformed_calls": 8, "unreadable_calls": 8, "tool_timeouts": 4},
        "seconds": {"rollout": 2.0, "learner": 3.0}, "evaluation": {"accuracy": 0.75, "prompts": 8},
    }  # fmt: skip
    history.take(row)
    history.take({"step": 8, "reward": None, "seconds": {}, "happened": {}, "entropy": math.inf})
    history.take({"step": 9, "evaluation": {"accuracy": 0.0, "prompts": 0}})
    values = {name: history.values[name] for name in ("failed", "recomputed", "a_token", "a_row", "spelt", "calls")}
    assert values == {
        "failed": [0.25], "recomputed": [0.25], "a_token": [2.0], "a_row": [6.0], "spelt": [0.5], "calls": [0.5]
    }  # fmt: skip
    assert (history.values["malformed"], history.values["tool_errors"]) == ([0.25], [0.0625])
    assert history.rows == 2 and history.series("entropy")[0] == [7] and history.evaluations == [(7, 6.0, 8)]
    assert {*history.values} == {*MEASURES} and history.series("alarms") == ([], [])
    assert [field.name for field in dataclasses.fields(Evidence)][:3] == ["measure", "first", "last"]


def table() -> str:
    lines = ["| name | what is seen | what it may mean | what to try |", "|---|---|---|---|"]
    for rule in RULES:
        cells = (f"`{rule.name}`", *(text.replace("|", "\\|") for text in (rule.seen, rule.means, rule.tries)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_table_in_the_docs_is_this_one(request: pytest.FixtureRequest) -> None:
    """Docs that lack an advisory, or tell another level than the code has."""
    check_table(request, "docs/advisories.md", "advisories", table())


def test_a_log_a_terminal_and_a_page_show_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An advisory that is found and shown nowhere, is shown at each step, or whose text a page takes for markup."""
    rows = []
    for row in Noise(4).run(120):
        row |= {"failed": 3 if row["step"] < 60 else 60, "failures": ["60 x reward: <b>no</b>"]}
        rows.append(row)
    log, screen = io.StringIO(), io.StringIO()
    with LiveTable(120, stream=log) as table:
        for row in rows:
            table.update(row)
    said = [line for line in log.getvalue().splitlines() if line.startswith("advisory ")]
    assert len(said) == 1 and said[0].startswith("advisory failures (step 79)") and "Try: Read the reasons" in said[0]
    with LiveTable(120, stream=log, as_json=True, rows=rows[:70]) as table:
        for row in rows[70:]:
            table.update(row)
    assert capsys.readouterr().err.count("advisory failures (step 79)") == 1
    Console(file=screen, width=100, height=40).print(table._render())
    assert screen.getvalue().count("advisory failures (step 79)") == 1  # it stands, beside the rows

    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = render_report(tmp_path, rows)
    assert "<b>failures</b> since step 79" in page and page.count("<polyline points=") == 1
    assert "reward: &lt;b&gt;no&lt;/b&gt;" in page and "<code>task.reward_deadline_s</code>" in page
    shown = curve(follow(rows).history, advise(rows)[0].evidence)
    assert shown is not None and (shown["low"], shown["high"]) == ("2.3 %", "46.9 %")
    assert shown["left"] + shown["width"] == pytest.approx(100.0) and shown["points"].startswith("0.0,95.0 ")
    assert "Advisories" not in render_report(tmp_path, rows[:50])
    assert main.main(["report", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["advisories"]
    assert [(one["name"], one["until"]) for one in told] == [("failures", None)]
