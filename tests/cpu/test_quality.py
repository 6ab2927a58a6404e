"""What formats cost in a task and in RL: beside `tandem eval`, by hand, and what is refused."""

from __future__ import annotations

import json
import math
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tandem.cli import main
from tandem.errors import ConfigError
from tandem.program.pool import RunningEpisode
from tandem.report.numerics import pareto_figure
from tandem.study.quality import rewards
from tandem.study.result import comparisons
from tests.samples import ended

MODEL = "new:width=32,layers=2,heads=4,kv_heads=2,ff_width=48,max_position=128"
PAIR = "mxfp4+mxfp4"
SET = ["task.heldout_size=12", "evaluation.prompts=12", "rollout.max_new_tokens=6"]
SETTINGS = [part for text in SET for part in ("--set", text)]


@pytest.fixture(autouse=True)
def graded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some answers of a model that can do nothing are right, by their letters."""

    def grade(self: RunningEpisode, unheard: int = 0) -> Future[float]:
        return ended(float(sum(map(ord, self.said[-1].content)) % 2))

    monkeypatch.setattr(RunningEpisode, "score", grade)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "texts.txt"
    path.write_text("Two and two are four.\n\nWater boils.")
    return str(path)


def arm(name: str, label: str, **overrides: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "panel": "",
        "overrides": {k.replace("_", "."): v for k, v in overrides.items()},
    }


def result() -> dict[str, Any]:
    """Of two seeds: rewards of the last two steps are 0.5 and 0.7, and with formats less."""
    arms = [
        arm("exact", "bf16"),
        arm("naive", "naive", engine_weights=PAIR),
        arm("qarl", "QARL", model_weights=PAIR),
        arm("eights", "QARL", model_weights="w8a8"),
        arm("moments", "moments", learner_moments="float8"),
    ]
    less = {"exact": 0.0, "naive": -0.4, "qarl": -0.1, "eights": 0.0, "moments": 0.2}
    runs = [
        {
            "arm": name, "seed": seed, "status": "failed" if (name, seed) == ("eights", 1) else "finished",
            "before": 0.1, "after": 0.9 * seed, "heldout_prompts": 4,
            "reward": [9.0, top + more, top + more + 0.02 * seed],
        }
        for name, more in less.items()
        for seed, top in ((0, 0.5), (1, 0.7))
    ]  # fmt: skip
    made = {
        "study": "s", "arms": arms, "runs": runs, "common": {}, "baseline": "exact", "last_steps": 2, "steps": 3,
        "recipe": "tiny", "compare": [[one["name"], "exact"] for one in arms[1:]],
    }  # fmt: skip
    return made | {"comparisons": comparisons(made)}


def test_reward_of_arms_by_hand(tmp_path: Path) -> None:
    """A reward of first steps, of an arm in another format, of a failed run; an interval that is not paired, or is of
    held-out accuracy."""
    (tmp_path / "result.json").write_text(json.dumps(result()))
    found = rewards(tmp_path, ("bf16", PAIR, "w8a8", "nvfp4"))
    assert list(found["rows"]) == ["bf16", PAIR, "w8a8"]  # the moments' arm is of no format
    (exact,), (naive, qarl), (eights,) = found["rows"].values()
    assert (exact["reward"], exact["more"]) == (pytest.approx((0.5 + 0.71) / 2), None)
    assert (naive["label"], qarl["label"]) == ("naive", "QARL") and qarl["reward"] == pytest.approx(0.605 - 0.1)
    # Two values 0.21 apart: t(0.975, 1) = 12.706 times 0.21 / 2.
    assert qarl["high"] - qarl["low"] == pytest.approx(2 * 12.7062 * 0.105, rel=1e-4)
    assert (qarl["more"], qarl["more_low"], qarl["more_high"]) == (pytest.approx(-0.1),) * 3  # alike in each seed
    assert (eights["seeds"], eights["failed"], eights["low"], eights["more_low"]) == (1, 1, None, None)
    with pytest.raises(ConfigError, match="no arm that ended is of nvfp4; its formats are mxfp4.mxfp4, w8a8"):
        rewards(tmp_path / "result.json", ("nvfp4",))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no result of a study"):
        rewards(tmp_path / "other.json", ("nvfp4",))
    with pytest.raises(ConfigError, match="cannot be read"):
        rewards(tmp_path / "none.json", ("nvfp4",))


def test_accuracy_is_that_of_eval(texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another model, other prompts or another comparison than eval's; a format that is not rounded in the task."""
    kept = str(tmp_path / "before.json")
    evaluate = ["eval", "tiny_arithmetic", "--set", f"model.source={MODEL}", *SETTINGS, "--json"]
    assert main.main([*evaluate, "--out", kept]) == 0
    before = json.loads(capsys.readouterr().out)
    assert main.main([*evaluate, "--set", f"model.weights={PAIR}", "--against", kept]) == 0
    alone, compared = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    (tmp_path / "result.json").write_text(json.dumps(result()))
    asked = ["numerics", "pareto", MODEL, "--texts", texts, "--task", "tiny_arithmetic", *SETTINGS]
    picture = tmp_path / "p.png"
    asked += ["--formats", f"bf16,{PAIR}", "--study", str(tmp_path), "--out", str(picture)]
    asked += ["--context", "64"]
    assert main.main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    of = found["task"]
    assert (of["before"], of["prompts"]) == (before["accuracy"], 12) and 0 < before["accuracy"] < 1
    row, measures = of["rows"][PAIR], next(iter(compared["comparison"].values()))["measures"]["accuracy"]
    assert (row["accuracy"], row["low"], row["high"]) == tuple(alone[key] for key in ("accuracy", "low", "high"))
    assert (row["more"], row["more_low"], row["p"]) == tuple(measures[key] for key in ("difference", "low", "p"))
    same = of["rows"]["bf16"]
    assert (same["accuracy"], same["more_low"], same["more_high"]) == (before["accuracy"], 0.0, 0.0)
    assert set(found["study"]["rows"]) == {"bf16", PAIR}
    drawn = pareto_figure(found)
    assert len(drawn.axes) == 6 and len(drawn.axes[4].texts) == 2  # a name a format, though one has two arms
    assert drawn.axes[2].get_ylabel().startswith("accuracy on ") and drawn.axes[5].get_legend() is not None
    heights = {round(float(y), 6) for line in drawn.axes[2].lines for y in line.get_ydata() if not math.isnan(y)}
    assert {round(one["accuracy"], 6) for one in of["rows"].values()} <= heights
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--task", "gsm8k"], "needs its questions"),
        (["--set", "task.name=x"], "others are of --task"),
        (["--task", "tiny_arithmetic", "--set", "model.weights=w8a8"], "leave model.weights=w8a8 out"),
        (["--set", "learner.gradients=x"], "learner.gradients=x is no format"),
    ],
)
def test_wrong_input_is_told(more: list[str], said: str, texts: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A setting that is taken and does nothing."""
    assert main.main(["numerics", "pareto", MODEL, "--texts", texts, "--formats", "bf16,mxfp4", *more]) == 2
    assert said in capsys.readouterr().err
