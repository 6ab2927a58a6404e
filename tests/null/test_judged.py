"""Regression caught: a reward model that reads one answer at a time, or answers that are lost asked for together."""

from __future__ import annotations

import json
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tandem.program import worker
from tandem.program.config import TaskConfig
from tandem.program.pool import EnvironmentPool
from tandem.program.prompts import make_prompts
from tandem.types import Failure, Message, Prompt


class Judged:
    """A reward model that pays an answer its length."""

    asked: list[int] = []  # answers of each call

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def load(self) -> None: ...

    def __call__(self, prompt: Prompt, text: str) -> float:
        return self.rewards([(prompt, text)])[0]

    def rewards(self, answers: list[tuple[Prompt, str]]) -> list[float]:
        self.asked.append(len(answers))
        if any(text == "too long" for _, text in answers):
            raise ValueError("it is too long")
        return [float(len(text)) for _, text in answers]


class Near:
    """A task in this process, whose first reward waits until `gate` is open; rewards asked for together are never there
    in time where `hangs`."""

    def __init__(self, config: TaskConfig, gate: threading.Event, hangs: bool) -> None:
        self.started = self.concurrent = False
        self.reason = ""
        self.gate, self.hangs = gate, hangs
        self.calls = worker.Calls(make_prompts(config), config)
        self.answers: list[Any] = [(0, "value", False, 0.0)]

    def send(self, call: Any) -> None:
        number, method, arguments, _ = call
        assert self.gate.wait(20)
        if not (self.hangs and method == "scores"):
            made = worker._answer(lambda: worker.driven(getattr(self.calls, method)(*arguments)))
            self.answers.append((number, *made, 0.0))

    def receive(self, deadline_s: float) -> Any:
        return self.answers.pop(0) if self.answers else None

    def alive(self) -> bool:
        return True

    def ended(self) -> str:
        return ""

    def end(self) -> None: ...

    def kill(self) -> None: ...

    def join(self, deadline_s: float) -> None: ...


@pytest.mark.parametrize("hangs", [False, True])
def test_a_reward_model_is_asked_for_what_waits(hangs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward model reads one answer after another while others wait; one that is too long fails them all; answers of
    a call that hung are lost, or are asked for together again and again."""
    monkeypatch.setattr(worker, "JUDGE_CLASS", f"{__name__}:Judged")
    monkeypatch.setattr(Judged, "asked", [])
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}"}) + "\n" for n in range(3)))
    gate = threading.Event()
    config = TaskConfig(environment="jsonl", path=str(path), reward="model:x", heldout_size=0, workers=1)
    with closing(EnvironmentPool(config, born=lambda config: Near(config, gate, hangs))) as pool:
        texts = [*("x" * n for n in range(1, 40)), "too long"]
        waiting = []
        for number, text in enumerate(texts):
            episode = pool.episode(pool.prompt(number % 3))
            episode.said.append(Message("assistant", text, sampled=True))
            waiting.append(episode.score())
        gate.set()
        found = [future.result(20) for future in waiting]
    assert found[:-1] == [float(len(text)) for text in texts[:-1]]
    assert isinstance(found[-1], Failure) and found[-1] == Failure("reward", "raised ValueError: it is too long")
    assert Judged.asked == ([1] * 40 if hangs else [1, 32, 7, *[1] * 7])
