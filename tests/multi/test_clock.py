"""A run whose prompts have a date keeps the date it began with."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.config import EngineConfig
from tandem.errors import RunFolderError
from tandem.kernels.build.toolchain import compiler
from tandem.models import tokenizer as clocked
from tandem.models.config import ModelConfig
from tandem.models.tokenizer import Tokenizer
from tandem.program.config import TaskConfig
from tandem.program.pool import RunningEpisode
from tandem.rollout.config import RolloutConfig
from tandem.run import local
from tandem.run.clock import started
from tandem.run.config import EvaluationConfig, RunConfig
from tandem.train.config import LearnerConfig
from tests.display import Silent
from tests.samples import ended

pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels are not batch-invariant")
DATED = "Today is {{ strftime_now('%d %B') }}.\n"


@pytest.fixture
def config(tmp_path: Path, write_model: Callable[..., None]) -> RunConfig:
    write_model(tmp_path / "model", scale=10)
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(DATED + template.read_text())
    sums = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(6) for b in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    return RunConfig(
        name="tiny",
        steps=4,
        model=ModelConfig(str(tmp_path / "model")),
        task=TaskConfig("jsonl", path=str(tmp_path / "sums.jsonl"), reward="last_number", heldout_size=4),
        rollout=RolloutConfig(prompts_per_step=3, samples_per_prompt=4, max_new_tokens=12),
        engine=EngineConfig(kv_memory_bytes=4 << 20),
        learner=LearnerConfig(lr=3e-3, microbatch_tokens=500),
        evaluation=EvaluationConfig(prompts=2),
    )


class Day:
    """What the tokeniser's module knows as `datetime`, on a day of May."""

    def __init__(self, number: int) -> None:
        self.number = number

    def now(self) -> datetime:
        return datetime(2030, 5, self.number, 12)


def weights(folder: Path) -> list[str]:
    return [json.loads(line)["weights"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_has_the_date_it_began_with(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run resumed, or evaluated, the next day asks with another date, and so ends in other weights."""
    prompts: list[str] = []
    render = Tokenizer.render_text

    def watched(self: Tokenizer, *given: Any) -> str:
        prompts.append(render(self, *given))
        return prompts[-1]

    def graded(self: RunningEpisode, unheard: int = 0) -> Future[float]:
        return ended(float(sum(map(ord, self.said[-1].content)) % 11))

    def sit(day: int, steps: int, out: Path | None, resume: Path | None = None) -> Path:
        monkeypatch.setattr(clocked, "datetime", Day(day))
        return local.train(replace(config, steps=steps), out=out, resume=resume, display=Silent())[1]

    monkeypatch.setattr(RunningEpisode, "score", graded)
    whole = sit(1, 4, tmp_path / "whole")
    parted = sit(1, 2, tmp_path / "parted")
    monkeypatch.setattr(Tokenizer, "render_text", watched)
    sit(2, 4, None, parted)
    assert weights(parted) == weights(whole)
    asked = [prompt for prompt in prompts[1:] if "+" in prompt]
    assert asked and all(prompt.startswith("Today is 01 May.\n") for prompt in asked)
    assert weights(sit(2, 4, tmp_path / "other")) != weights(whole)

    prompts.clear()
    monkeypatch.setattr(clocked, "datetime", Day(3))
    local.evaluate_model(replace(config, model=ModelConfig(str(parted))))
    assert prompts[-1].startswith("Today is 01 May.\n")
    local.evaluate_model(config)
    assert prompts[-1].startswith("Today is 03 May.\n")


def test_where_the_date_is_kept(tmp_path: Path) -> None:
    """A damaged plan.json gives a resumed run today's date in silence."""
    assert started(tmp_path) is None
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"threads": 2}))  # of a version that kept no date
    assert started(tmp_path) is None
    now = datetime.now()
    plan.write_text(json.dumps({"started": now.isoformat()}))
    assert started(tmp_path) == now
    for wrong in ('{"started": 5}', '{"started": "yesterday"}', "{", '["started"]'):
        plan.write_text(wrong)
        with pytest.raises(RunFolderError, match=r"plan\.json is damaged"):
            started(tmp_path)
