"""A task whose episodes strike the process that they are in, or that one's parent, once, where their prompt says so."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tandem.program.environment import Environment, Episode
from tandem.types import Message, Prompt

PHASES = ("setup", "observe", "score", "teardown")


class Run(Episode):
    def __init__(self, prompt: Prompt, folder: Path, phase: str, whom: str, fault: int) -> None:
        self.first, self.folder = prompt.id.endswith("/0"), folder
        self.phase, self.whom, self.fault = phase, whom, fault
        self.heard = 0

    def _reach(self, phase: str) -> None:
        (self.folder / f"{phase}-{os.getpid()}").touch()
        if self.first and phase == self.phase and not (self.folder / "struck").exists():
            (self.folder / "struck").touch()
            os.kill(os.getpid() if self.whom == "itself" else os.getppid(), signal.Signals(self.fault))

    def setup(self) -> None:
        self._reach("setup")

    def observe(self, turns: tuple[Message, ...]) -> list[Message]:
        self._reach("observe")
        self.heard += 1
        return [Message("tool", f"heard {self.heard}")]

    def score(self, turns: tuple[Message, ...]) -> float:
        self._reach("score")
        return float(self.heard)

    def teardown(self) -> None:
        self._reach("teardown")


class Struck(Environment):
    """fault: a signal's number, sent in a phase to the process that holds the first prompt's episode or its parent."""

    def __init__(self, folder: str, phase: str, whom: str, fault: int) -> None:
        self.given = Path(folder), phase, whom, fault

    def prompt(self, split: str, index: int) -> Prompt:
        return Prompt(str(index), (Message("user", f"{split} {index}"),), {})

    def episode(self, prompt: Prompt) -> Run:
        return Run(prompt, *self.given)


class Sums(Environment):
    """Rewards that differ within nearly every group."""

    def prompt(self, split: str, index: int) -> Prompt:
        first = 2 * index + (split == "train")
        return Prompt(f"{split} {index}", (Message("user", f"{first}+{index}=" * (1 + index % 6)),), {})

    def reward(self, prompt: Prompt, text: str) -> float:
        return float(sum(map(ord, text)) % 11)
