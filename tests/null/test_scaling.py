"""Regressions in what is foretold of a run: the sigmoid of cost and quality, its intervals, its band and its advice."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import least_squares

from tandem.cli.main import main
from tandem.models.hf_config import to_hf_config
from tandem.models.spec import ModelSpec
from tandem.plan.roofline import step_flop
from tandem.report import sigmoid
from tandem.report.scaling import backtest, course, scaled
from tandem.report.sigmoid import Points, fit, interval

COUNT = 128  # rewards behind a row, each right or wrong
TINY = ModelSpec("llama", vocab_size=32, width=8, ff_width=16, layers=2, heads=2, kv_heads=1, head_size=4)


def sigmoid_of(cost: float, start: float, end: float, half: float, steep: float) -> float:
    return start + (end - start) / (1 + (half / cost) ** steep) if cost else start


def drawn(seed: int, number: int, true: tuple[float, float, float, float], rho: float = 0.0) -> Points:
    """Rows at costs 0, 1, ...: shares of COUNT right answers, whose probability moves by 0.02 from step to step."""
    rng = np.random.default_rng(seed)
    moved, rewards = 0.0, []
    for cost in range(number):
        moved = rho * moved + math.sqrt(1 - rho**2) * rng.normal() if cost else rng.normal()
        right = np.clip(sigmoid_of(cost, *true) + 0.02 * moved, 0, 1)
        rewards.append(rng.binomial(COUNT, right) / COUNT)
    value = np.array(rewards)
    costs = np.arange(number, dtype=float)
    return Points(costs, value, np.zeros(number, int), value * (1 - value), np.full(number, float(COUNT)))


def rows_of(points: Points, tokens: int = 1000) -> list[dict[str, Any]]:
    """The rows of a run with these rewards, a step of `tokens` tokens and 2 s each."""
    rows: list[dict[str, Any]] = [{"step": 0, "time_s": 1.0, "evaluation": {"accuracy": 0.1, "prompts": 100}}]
    for step, reward in enumerate(points.value.tolist(), start=1):
        figures = {"reward": reward, "reward_std": math.sqrt(reward * (1 - reward)), "trajectories": COUNT, "failed": 0}
        rows.append({"step": step, "time_s": 1.0 + 2 * step, "tokens": tokens, **figures})
    return rows


def test_the_search_finds_what_scipy_finds():
    """A local minimum, a bound that is not kept, or levels that are not the best of their curve."""
    costs = np.arange(50, dtype=float)
    for seed, weight in ((0, np.ones(50)), (1, np.linspace(0.2, 3.0, 50))):
        value = drawn(seed, 50, (0.1, 0.8, 15.0, 2.0)).value
        found = sigmoid.search(costs, weight, value[None], (0.0, 1.0))

        def away(at: np.ndarray, weight: np.ndarray = weight, value: np.ndarray = value) -> np.ndarray:
            curve = [sigmoid_of(cost, at[0], at[1], math.exp(at[2]), math.exp(at[3])) for cost in costs]
            return np.sqrt(weight) * (np.array(curve) - value)

        box = ([0, 0, 0, math.log(0.25)], [1, 1, math.log(490), math.log(12)])
        starts = [(0.1, 0.7, math.log(half), steep) for half in (5, 15, 60) for steep in (0.2, 1.0)]
        best = min((least_squares(away, start, bounds=box) for start in starts), key=lambda end: end.cost)
        mine = np.array([column[0] for column in found])
        assert (away(mine) ** 2).sum() == pytest.approx(2 * best.cost, rel=1e-4)
        assert mine == pytest.approx(best.x, rel=0.02, abs=0.005)
    rising = 0.5 * costs / 49  # wants an end beyond the largest value that is allowed
    bound = sigmoid.search(costs, np.ones(50), rising[None], (0.0, 0.5))
    assert bound.asymptote[0] == 0.5 and 0 <= bound.start[0] <= 0.5


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_intervals_hold_the_truth_and_the_band_the_rest(rho):
    """Intervals too narrow (or so wide that they say nothing), and a band at 30 % that the rest of the run leaves."""
    true, trials = (0.1, 0.75, 12.0, 2.0), 24
    held, shares, widths = np.zeros(4), [], []
    for seed in range(trials):
        points = drawn(seed, 100, true, rho)
        draws = fit(points, seed, draws=120).draws
        ends = [interval(column) for column in draws]
        for place, value in enumerate((true[0], true[1], math.log(true[2]), math.log(true[3]))):
            held[place] += ends[place][0] <= value <= ends[place][1]
        widths.append(ends[1][1] - ends[1][0])
        tested = backtest(points)
        assert tested is not None and tested.rows == 30 and tested.later == 70
        shares.append(tested.share)
    assert (held >= 0.7 * trials).all() and held.mean() >= 0.82 * trials  # 0.88 (rho 0.5) and 0.92 of a hundred runs
    assert np.mean(widths) < 0.1
    assert np.mean(shares) >= 0.85


def advised(points: Points, **changes: Any) -> tuple[str, str]:
    found = scaled("run", {"run": [row | changes for row in rows_of(points)]}, {})
    assert found.advice in ("continue", "stop", "cannot tell") and {one.advice for one in found.fits.values()} <= {
        found.advice
    }
    return found.advice, found.because


def test_advice():
    """A run in its rise that is told to stop, one at its end that is told to go on, an end made up for a flat one."""
    assert advised(drawn(0, 100, (0.05, 0.9, 60.0, 2.0)))[0] == "continue"
    assert advised(drawn(0, 200, (0.05, 0.7, 10.0, 3.0)))[0] == "stop"
    advice, because = advised(drawn(0, 80, (0.3, 0.3, 10.0, 1.0)))
    assert advice == "cannot tell" and "show no rise" in because
    advice, because = advised(drawn(0, 60, (0.999, 0.999, 10.0, 1.0)))
    assert advice == "stop" and "no reward is above 1" in because
    up, down = drawn(0, 60, (0.1, 0.8, 10.0, 3.0)), drawn(1, 60, (0.2, 0.8, 30.0, 5.0))
    fell = Points(
        np.arange(120.0),
        np.concatenate([up.value, down.value[::-1]]),
        np.zeros(120, int),
        *(2 * [np.full(120, np.nan)]),
    )
    advice, because = advised(fell)
    assert advice == "cannot tell" and "below the best fifth" in because
    for number in (0, 1, 2, 11):
        advice, because = advised(drawn(0, number, (0.1, 0.8, 3.0, 2.0)))
        assert advice == "cannot tell" and ("too few" in because or "no row" in because)
    runs = {"long": rows_of(drawn(0, 60, (0.1, 0.8, 10.0, 3.0))), "short": rows_of(drawn(0, 1, (0.1, 0.8, 10.0, 3.0)))}
    assert "1 rows of a run are too few" in scaled("both", runs, {}).because
    same = [{**row, "reward": -1.0} if "reward" in row else row for row in rows_of(drawn(0, 30, (0.1, 0.8, 10.0, 3.0)))]
    found = scaled("same", {"same": same}, {})
    assert found.advice == "cannot tell" and "flat at -1" in found.because
    slow = np.cumsum(np.random.default_rng(3).normal(0, 0.02, 60)) + 0.5
    assert (
        advised(Points(np.arange(60.0), np.clip(slow, 0, 1), np.zeros(60, int), *(2 * [np.full(60, np.nan)])))[0]
        == "cannot tell"
    )


def test_rewards_beyond_0_and_1_and_rows_without_spread():
    """A penalty clipped away, or a crash where rows tell the mean alone."""
    points = drawn(0, 120, (0.1, 0.8, 10.0, 3.0))
    rows = [
        {**row, "reward": 10 * row["reward"] - 5, "reward_std": None} if "reward" in row else row
        for row in rows_of(points)
    ]
    found = scaled("run", {"run": rows}, {}).fits["tokens"]
    assert found.parameters["A"].low < 3.0 < found.parameters["A"].high and found.parameters[
        "R0"
    ].value == pytest.approx(-4, abs=0.4)
    assert found.advice == "stop"


def test_costs_by_hand():
    """A reward at the cost of its own step, whose weights it was not of; a clock that began again; a step lost."""
    rows = [
        {"step": 0, "time_s": 5.0, "evaluation": {"accuracy": 0.2, "prompts": 10}},
        {"step": 1, "time_s": 7.0, "tokens": 100, "reward": 0.1, "reward_std": 0.3, "trajectories": 10, "failed": 2},
        {"step": 2, "time_s": 9.0, "tokens": 50, "reward": None, "evaluation": {"accuracy": 0.4, "prompts": 10}},
        {"step": 3, "time_s": 2.0, "tokens": 10, "reward": 0.3},
        {"step": 4, "time_s": 4.0, "tokens": 10, "reward": math.nan},
    ]
    found = course("run", rows, held_out=False, flop=lambda row: 2.0 * row["tokens"])
    assert found.value.tolist() == [0.1, 0.3] and found.unmeasured == 2
    assert (found.cost["tokens"].tolist(), found.cost["seconds"].tolist(), found.cost["FLOP"].tolist()) == (
        [0, 150],
        [5, 9],
        [0, 300],
    )
    assert found.spread[0] == pytest.approx(0.09) and math.isnan(found.spread[1]) and found.count[0] == 8
    held_out = course("run", rows, held_out=True, flop=None)
    assert held_out.value.tolist() == [0.2, 0.4] and held_out.cost["tokens"].tolist() == [0, 150]
    assert held_out.cost["seconds"].tolist() == [5, 9] and "FLOP" not in held_out.cost
    told = scaled("run", {"run": [*rows, *rows_of(drawn(0, 30, (0.1, 0.7, 5.0, 2.0)))[5:]]}, {})
    assert any("2 steps have no finite reward" in note for note in told.notes)


def test_a_step_costs_what_was_drawn():
    """Tokens of dropped or extra groups that cost nothing, ones that are learned again that cost again, or held-out
    answers taken for samples."""
    rows = [
        {
            "step": 0,
            "time_s": 1.0,
            "drawn_tokens": 40,
            "evaluation": {"accuracy": 0.2, "prompts": 9, "failed": 1, "length": 4.0},
        },
        {"step": 1, "time_s": 2.0, "drawn_tokens": 130, "tokens": 100, "reward": 0.1},  # 30 of a group that is dropped
        {"step": 2, "time_s": 3.0, "drawn_tokens": 50, "tokens": 100, "reward": 0.2},  # 50 that were learned before
        {"step": 3, "time_s": 4.0, "drawn_tokens": 70, "tokens": 70, "reward": 0.3},
    ]
    assert course("run", rows, held_out=False, flop=None).cost["tokens"].tolist() == [0, 130, 180]


def test_held_out_accuracy_where_there_is_enough_of_it():
    """A curve of the training reward that is said to be of held-out accuracy, or the other way round."""
    rows = rows_of(drawn(0, 60, (0.1, 0.8, 10.0, 3.0)))
    for row in rows[4::4]:
        row["evaluation"] = {"accuracy": row["reward"] / 2, "prompts": 200}
    found = scaled("run", {"run": rows}, {})
    assert found.measure == "held-out accuracy" and found.fits["tokens"].parameters["A"].value == pytest.approx(
        0.4, abs=0.05
    )
    for row in rows[4:24:4]:
        del row["evaluation"]
    fewer = scaled("run", {"run": rows}, {})  # and too few for a fit of their own
    assert fewer.measure == "training reward" and "11 held-out evaluations are fewer than 12" in fewer.notes[0]
    assert fewer.fits


def test_runs_that_end_apart_widen_the_interval():
    """Seeds pooled as if they were one run: an interval of A that holds none of the next seeds' ends."""
    ends = (0.6, 0.7, 0.8)
    runs = {f"seed {place}": rows_of(drawn(place, 80, (0.1, end, 10.0, 2.5))) for place, end in enumerate(ends)}
    both = scaled("all", runs, {}).fits["tokens"]
    one = scaled("one", {"seed 1": runs["seed 1"]}, {}).fits["tokens"]
    widths = [fitted.parameters["A"].high - fitted.parameters["A"].low for fitted in (both, one)]
    assert widths[0] > 3 * widths[1] and both.parameters["A"].value == pytest.approx(0.7, abs=0.03)
    low, high = both.fit.band(np.array([160_000.0]))
    assert low[0] < 0.6 and high[0] > 0.8


def test_operations_of_a_step_by_counting():
    """FLOP that leave out the cache, the head or the learner, or count them twice."""
    layer = 8 * (2 * 4 + 2 * 1 * 4) + 8 * 8 + 3 * 8 * 16  # q and k, v; o; gate, up and down
    prompt, sampled, programs = 10, 4, 6
    row = {"tokens": programs * sampled, "trajectories": programs, "cached_tokens": programs * 8}
    row["run_tokens"] = programs * (prompt - 8 + sampled)
    products = met = 0
    for position in range(8, prompt + sampled):
        products += 2 * 2 * layer
        met += position + 1
    once = products + 2 * sampled * 32 * 8 + 4 * 2 * 2 * 4 * met
    assert step_flop(TINY, row) == programs * once
    learned = {"learner_rows": 2 * prompt + 4 * sampled, "trained_tokens": 4 * sampled, "trained_samples": 4}
    forward = 2 * 2 * layer * (2 * prompt + 4 * sampled) + 2 * 4 * sampled * 32 * 8
    behind = sum(position + 1 for position in range(prompt, prompt + sampled))
    forward += 4 * 2 * 2 * 4 * (4 * behind + 2 * prompt * prompt / 2)
    assert step_flop(TINY, row | learned) - programs * once == pytest.approx(3 * forward)


def run_folder(path: Path, points: Points, seed: int = 0, **changes: Any) -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(points)))
    (path / "config.json").write_text(json.dumps({"name": "tiny <b>", "seed": seed, "steps": 80} | changes))
    return path


def test_the_command(tmp_path, capsys):
    """A page without its section, seeds that are not fitted together, or figures that JSON has otherwise."""
    folders = [run_folder(tmp_path / f"s{seed}", drawn(seed, 80, (0.1, 0.7, 10.0, 2.5)), seed) for seed in (0, 1)]
    (folders[0] / "plan.json").write_text(json.dumps({"model": to_hf_config(TINY, "bfloat16")}))
    aside = folders[0] / "set_aside" / "after-step-9.1"
    aside.mkdir(parents=True)
    (aside / "metrics.jsonl").write_text(json.dumps({"step": 10, "tokens": 700, "seconds": {"rollout": 3.0}}) + "\n")
    assert main(["report", str(folders[0]), "--scaling"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "tiny <b>: stop. Doubling the cost" in printed and "by FLOP" in printed
    assert "1 steps that resumes set aside (700 tokens, 3.0 s)" in printed and "hold no run_tokens" in printed
    page = (folders[0] / "report.html").read_text()
    assert "Cost and quality" in page and "<b>tiny &lt;b&gt;: stop." in page and "http" not in page
    assert (folders[0] / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["report", str(folders[0])]) == 0 and "Cost and quality" not in (folders[0] / "report.html").read_text()

    folders.append(run_folder(tmp_path / "other", drawn(5, 6, (0.1, 0.7, 10.0, 2.5)), 0, steps=6))
    capsys.readouterr()
    out = tmp_path / "both.html"
    assert main(["report", *map(str, folders), "--scaling", "--json", "--out", str(out)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(one["runs"], one["advice"]) for one in told["scaling"]] == [
        (["s0", "s1"], "stop"),
        (["other"], "cannot tell"),
    ]
    both = told["scaling"][0]
    assert set(both["units"]) == {"tokens", "seconds"} and any("no FLOP" in note for note in both["notes"])
    assert both["units"]["tokens"]["A"]["low"] < 0.7 < both["units"]["tokens"]["A"]["high"]
    assert both["units"]["tokens"]["now"] == 79_000 and both["units"]["tokens"]["backtest"]["later"] > 80
    assert told["scaling_picture"] == str(tmp_path / "both-scaling.png") and (tmp_path / "both-scaling.png").exists()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", out.read_text()))
    assert "6 rows of a run are too few: a fit needs 12" in text and "Cost and quality" in text
