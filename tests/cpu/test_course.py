"""Regressions in what a run aims at: its best checkpoint, and the target that ends it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tandem.algo.config import AlgoConfig
from tandem.engine.config import EngineConfig
from tandem.errors import ConfigError, RunFolderError
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.rollout.config import RolloutConfig
from tandem.rollout.evaluate import Evaluation
from tandem.run import local
from tandem.run.config import CheckpointConfig, EvaluationConfig, RunConfig
from tandem.run.course import Course
from tandem.study.runs import Quiet


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> RunConfig:
    folder = tmp_path_factory.mktemp("run")
    write_model(folder / "model")
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(4)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig(
        name="tiny",
        steps=6,
        model=ModelConfig(str(folder / "model")),
        task=TaskConfig("jsonl", path=str(folder / "sums.jsonl"), reward="last_number", heldout_size=4),
        rollout=RolloutConfig(prompts_per_step=2, samples_per_prompt=4, max_new_tokens=3),
        engine=EngineConfig(kv_memory_bytes=4 << 20),
        algo=AlgoConfig(),
        evaluation=EvaluationConfig(prompts=4, every=1),
        checkpoint=CheckpointConfig(keep=1, best=True),
    )


def scored(patch: pytest.MonkeyPatch, accuracies: Sequence[float], rewards: Sequence[float] | None = None) -> None:
    """Held-out results by step, as if the model had been that good."""

    def evaluate(session: local.Session, step: int) -> dict[str, Any]:
        reward = rewards[step] if rewards else accuracies[step]
        return asdict(Evaluation(accuracies[step], 0.0, 1.0, 4, 0, reward, 3.0))

    patch.setattr(local.Session, "evaluate", evaluate)


def run(config: RunConfig, out: Path, resume: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    notes: list[str] = []
    given: dict[str, Any] = {"out": None, "resume": out} if resume else {"out": out, "resume": None}
    assert local.train(config, **given, display=Quiet(notes.append))[0] == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], notes


def checkpoints(folder: Path) -> tuple[list[str], str]:
    root = folder / "checkpoints"
    return sorted(path.name for path in root.glob("step-*")), (root / "best").readlink().name


def test_the_best_step_stays(config: RunConfig, tmp_path: Path, monkeypatch) -> None:
    """The best checkpoint pruned by later ones, or replaced by one no better, or a resume that forgets which it was."""
    scored(monkeypatch, [0.9, 0.1, 0.4, 0.4, 0.2, 0.3, 0.1, 0.4, 0.5, 0.1], [0, 0, 0.5, 0.5, 0, 0, 0, 0.4, 0, 0])
    out = tmp_path / "run"
    run(config, out)
    assert checkpoints(out) == (["step-2", "step-6"], "step-2")
    assert json.loads((out / "checkpoints/best/state.json").read_text())["step"] == 2
    run(replace(config, steps=7), out, resume=True)
    assert checkpoints(out) == (["step-2", "step-7"], "step-2")
    run(replace(config, steps=9), out, resume=True)
    assert checkpoints(out) == (["step-8", "step-9"], "step-8")


def test_graded_tasks_have_a_best_by_reward(config: RunConfig, tmp_path: Path, monkeypatch) -> None:
    """The first step kept as the best for ever, where rewards are graded and no answer is wholly right."""
    scored(monkeypatch, [0.0] * 7, [0.9, 0.1, 0.2, 0.6, 0.5, 0.6, 0.1])
    run(config, tmp_path / "run")
    assert checkpoints(tmp_path / "run") == (["step-3", "step-6"], "step-3")


def test_accuracy_ends_a_run(config: RunConfig, tmp_path: Path, monkeypatch) -> None:
    """A run that goes on past its target, ends on the accuracy before training, or is trained on by a resume."""
    scored(monkeypatch, [0.9, 0.1, 0.4, 0.5, 0.2, 0.3, 0.1])
    aim = replace(config, evaluation=replace(config.evaluation, stop_accuracy=0.5))
    out = tmp_path / "run"
    rows, notes = run(aim, out)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[3]["reached"] == "held-out accuracy is 0.5, the target 0.5"
    assert notes[-1] == "step 3: held-out accuracy is 0.5, the target 0.5; the run ends here"
    assert checkpoints(out) == (["step-3"], "step-3") and (out / "ledger.json").is_file()
    rows, notes = run(aim, out, resume=True)
    assert len(rows) == 4 and notes == [
        "held-out accuracy is 0.5, the target 0.5, so nothing is left to do. To go on, set evaluation.stop_* anew."
    ]
    rows, _ = run(config, out, resume=True)  # without the target
    assert [row["step"] for row in rows] == [*range(7)]
    with pytest.raises(RunFolderError, match="evaluation.every"):
        run(replace(config, evaluation=replace(config.evaluation, every=2)), out, resume=True)


def test_reward_ends_a_run_with_an_evaluation(config: RunConfig, tmp_path: Path, monkeypatch) -> None:
    """A run that its reward ends without the evaluation after training, or before five steps were seen."""
    scored(monkeypatch, [0.1] * 7)
    aim = EvaluationConfig(prompts=4, stop_reward=-1.0)
    rows, notes = run(replace(config, evaluation=aim, checkpoint=CheckpointConfig()), tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5] and "evaluation" in rows[5]
    assert notes[-1].startswith("step 5: the mean reward of 5 steps is ") and notes[-1].endswith("the run ends here")


def test_a_course_is_a_function_of_the_rows() -> None:
    """A window of rewards that a resume begins anew, or a failed step counted as a reward of 0."""
    rewards = [0.0, 1.0, None, 1.0, 1.0, 0.5, 1.0, 0.0]
    config = EvaluationConfig(stop_reward=0.9)
    seen = []
    for cut in range(1, len(rewards) + 1):
        course = Course(config)
        for step, reward in enumerate(rewards[:cut], start=1):
            course.take({"step": step, "reward": reward})
        seen.append(bool(course.reached))
    assert seen == [False] * 6 + [True, True]  # (1 + 1 + 1 + 0.5 + 1) / 5 = 0.9 at the seventh


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda: EvaluationConfig(stop_accuracy=0.5), "Set evaluation.every"),
        (lambda: EvaluationConfig(every=1, stop_accuracy=50.0), "stop_accuracy is 50.0"),
        (lambda: EvaluationConfig(stop_reward=float("inf")), "stop_reward is inf"),
        (lambda: RunConfig("a", 1, ModelConfig("m"), checkpoint=CheckpointConfig(best=True)), "checkpoint.best is on"),
    ],
)
def test_targets_that_cannot_be_met_are_refused(changed: Callable[[], object], said: str) -> None:
    """A target in per cent, or one that nothing measures on the way, found after the run."""
    with pytest.raises(ConfigError, match=said):
        changed()
