"""`tandem study` on a small random model: killed, interrupted, gone on with, and with an arm that fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem import env
from tandem.cli import main
from tandem.study import runs

WAIT_S = 60.0
STEPS = 6
SOURCES = Path(__file__).parents[2] / "src"
STUDY = """
from pathlib import Path

from tandem.engine.config import EngineConfig
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.program.environment import Environment
from tandem.rollout.config import RolloutConfig
from tandem.run.config import EvaluationConfig, RunConfig
from tandem.study.study import Arm, Study
from tandem.train.config import LearnerConfig
from tandem.types import Message, Prompt

HERE = Path(__file__).parent


class Letters(Environment):
    # rewards that differ within nearly every group

    def prompt(self, split: str, index: int) -> Prompt:
        return Prompt(f"{split}/{index}", (Message("user", f"{split[0]} {index} please"),), {})

    def reward(self, prompt: Prompt, text: str) -> float:
        return float(sum(map(ord, text)) %% 11) / 10


def tiny() -> RunConfig:
    return RunConfig(
        name="tiny",
        steps=1,
        model=ModelConfig(str(HERE / "model")),
        task=TaskConfig(str(HERE / "study.py") + ":Letters", heldout_size=8),
        rollout=RolloutConfig(prompts_per_step=4, samples_per_prompt=4, max_new_tokens=8),
        engine=EngineConfig(kv_memory_bytes=4 << 20),
        learner=LearnerConfig(lr=3e-3),
        evaluation=EvaluationConfig(prompts=4),
    )


def study() -> Study:
    stops = {"engine.noise": "0.5", "alarms.action": "stop", "alarms.k3": "0"}
    return Study(
        name="twins",
        question="Is a run its own twin?",
        recipe=tiny,
        arms=(Arm("plain", "plain"), Arm("twin", "twin"), Arm("stops", "stops", stops)),
        baseline="plain",
        steps=%d,
        shows_not="Anything.",
    )
"""


@pytest.fixture(scope="module")
def study_file(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_model(folder / "model")
    (folder / "study.py").write_text(STUDY % STEPS)
    return folder / "study.py"


def column(folder: Path, name: str) -> list[Any]:
    """A value of each row of a run."""
    path = folder / "metrics.jsonl"
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(row)[name] for row in rows if row.endswith("\n")]


def outcomes(out: Path) -> dict[str, int]:
    """When each run that ended did so."""
    return {str(path.parent.relative_to(out)): path.stat().st_mtime_ns for path in out.glob("*/seed-*/outcome.json")}


def kill_in_the_middle(study_file: Path, out: Path) -> None:
    """SIGKILL while the second run of the study trains."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tandem", "study", str(study_file), "--out", str(out), "--threads", "1"],
        env=env.child(PYTHONPATH=str(SOURCES), TANDEM_THREADS="2"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    until = time.monotonic() + WAIT_S
    while len(column(out / "twin" / "seed-0", "step")) < 2:
        assert child.poll() is None, child.stderr.read().decode() if child.stderr else ""
        assert time.monotonic() < until, f"the second run of the study did not begin in {WAIT_S} s"
        time.sleep(0.002)
    child.kill()
    child.communicate()


def test_killed_interrupted_and_gone_on_with(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A study that begins anew after a kill or Ctrl-C, loses or repeats a step, or ends at the arm that fails."""
    out = tmp_path / "out"
    asked = ["study", str(study_file), "--out", str(out), "--json"]

    kill_in_the_middle(study_file, out)
    first = outcomes(out)
    assert "plain/seed-0" in first and "twin/seed-0" not in first
    assert json.loads((out / "plain" / "seed-0" / "outcome.json").read_text())["threads"] == 1
    monkeypatch.setenv("TANDEM_THREADS", "1")

    update = runs.Quiet.update

    def interrupt(self: runs.Quiet, row: Any) -> None:
        update(self, row)
        if row["step"] == 3 and "twin/seed-1" not in outcomes(out) and "plain/seed-1" in outcomes(out):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runs.Quiet, "update", interrupt)
    assert main.main(asked) == 130
    second = outcomes(out)
    assert set(second) == {"plain/seed-0", "twin/seed-0", "stops/seed-0", "plain/seed-1"}
    assert column(out / "twin" / "seed-1", "step") == [0, 1, 2, 3]
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 4
    monkeypatch.setattr(runs.Quiet, "update", update)

    assert main.main(asked) == 0
    ended = outcomes(out)
    assert len(ended) == 9
    assert {name: ended[name] for name in first} == first and {name: ended[name] for name in second} == second
    for seed in range(3):
        plain, twin = (out / arm / f"seed-{seed}" for arm in ("plain", "twin"))
        assert column(plain, "step") == column(twin, "step") == list(range(STEPS + 1))
        weights = column(plain, "weights")
        assert weights == column(twin, "weights") and len(set(weights)) == STEPS + 1
        assert not (out / "twin" / f"seed-{seed}" / "checkpoints").exists()

    result = json.loads(capsys.readouterr().out)
    assert [run["status"] for run in result["runs"]] == ["finished", "finished", "failed"] * 3
    assert all(run["steps"] == 0 and run["reason"].startswith("AlarmError: step 1") for run in result["runs"][2::3])
    rewards = {(run["arm"], run["seed"]): run["reward"] for run in result["runs"]}
    assert rewards["plain", 0] != rewards["plain", 1] and max(rewards["plain", 0]) > 0.0
    found = next(found for found in result["comparisons"] if (found["arm"], found["measure"]) == ("twin", "reward"))
    assert found["differences"] == {"0": 0.0, "1": 0.0, "2": 0.0} and found["verdict"] == "no difference shown"
    assert str(tmp_path) not in (out / "README.md").read_text().replace(str(study_file), "")
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"

    assert main.main([*asked, "--arm", "plain", "--time"]) == 0
    timed = {arm["name"]: arm.get("quiet_seconds_per_step") for arm in json.loads(capsys.readouterr().out)["arms"]}
    assert timed["plain"] > 0 and timed["twin"] is None and outcomes(out) == ended
    assert main.main(["study", str(study_file), "--out", str(out), "--seeds", "0"]) == 0
