"""What every data set of reasoning-gym pays for fixed replies and for its own answer, beside docs/rewards.md."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from tandem.errors import TandemWarning
from tandem.program import prompts as task_prompts
from tandem.program.config import TaskConfig
from tandem.program.pool import EnvironmentPool
from tandem.types import Prompt

DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"
REPLIES = (
    "nonsense", "0", "1", "-1", "1/2", "nan", "inf", "1e999", "None", "True", "yes", "[]", "{}", "[[0]]", '{"a": 1}',
    "a b c", "1 2 3", "x", "the answer",
)  # fmt: skip
PROMPTS = 32
SLOW = ("futoshiki", "intermediate_integration", "knight_swap", "puzzle24", "simple_integration", "sokoban",
        "zebra_puzzles")  # fmt: skip
SLOW_PROMPTS = 4  # draws of up to a second each, scores of up to 0.1 s
PAYS, CONSTANT = 0.15, 0.8  # mean score of one reply that gives a set a row of its own; that is a fault


def mean(score: Callable[[Prompt, str], float], prompts: list[Prompt], reply: str | None) -> float | str:
    """Mean score of `reply`, of each prompt's own answer for None; the first exception's name where one raises."""
    found = []
    for prompt in prompts:
        try:
            found.append(float(score(prompt, prompt.record["answer"] if reply is None else reply)))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            return type(error).__name__
    return round(sum(found) / len(found), 2)


def row(name: str) -> tuple[str, bool]:
    """A set's row of the table, empty where it pays its own answer, nothing else, and never raises; is it at fault?"""
    gym = task_prompts.ReasoningGym(TaskConfig(name=name, seed=1))
    prompts = [gym.prompt("train", draw) for draw in range(SLOW_PROMPTS if name in SLOW else PROMPTS)]
    scorer = gym.chunk("train", 0)

    def alone(prompt: Prompt, reply: str) -> float:
        return scorer.score_answer(reply, gym.entry("train", prompt.record["draw"]))

    own = mean(alone, prompts, None)
    assert isinstance(own, float) and mean(gym.reward, prompts, None) == own, f"{name}: its own answer, {own}"
    scores = {reply: mean(alone, prompts, reply) for reply in REPLIES}
    numbers = {reply: score for reply, score in scores.items() if isinstance(score, float)}
    best = max(numbers, key=lambda reply: numbers[reply])
    raising = [reply for reply in REPLIES if reply not in numbers]
    here = {reply: mean(gym.reward, prompts, reply) for reply in (best, *raising)}
    assert not any(here[reply] for reply in raising), f"{name}: {here}"
    if own == 1.0 and not raising and numbers[best] < PAYS:
        return "", False
    cells = [name, f"{own:g}", f"`{best}` {numbers[best]:g}" if numbers[best] >= PAYS else "–"]
    cells.append(f"`{raising[0]}` {scores[raising[0]]}, {len(raising)} of {len(REPLIES)}" if raising else "–")
    changed = [f"`{best}` {here[best]:g}"] if numbers[best] >= PAYS and here[best] != numbers[best] else []
    cells.append(", ".join([*changed, *(["0 for these"] if raising else [])]) or "–")
    return f"| {' | '.join(cells)} |", own < 0.9 or numbers[best] > CONSTANT or bool(raising)


def test_every_set_of_reasoning_gym(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set pays for a constant, or not for its own answer, or raises, and neither the docs nor a run's first lines
    say so; or a new version of the package scores otherwise than the table says."""
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    from reasoning_gym.factory import DATASETS

    monkeypatch.setattr(task_prompts, "CHUNK_DRAWS", PROMPTS)
    names = sorted(set(DATASETS) - {"composite"})  # it is made of other sets, which its parameters must name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of replies that hold no number
        rows = {name: row(name) for name in names}
    page = DOCS.read_text(encoding="utf-8")
    assert f"## reasoning-gym {version('reasoning_gym')}\n" in page
    table = "\n".join(line for line, _ in rows.values() if line)
    assert f"|---|---|---|---|---|\n{table}\n\n" in page, f"docs/rewards.md should have\n{table}"
    rest = [name for name in names if not rows[name][0]]
    written = re.search(r"^The other (\d+) [^:]*: ([^.]*)\.$", page, re.MULTILINE)
    assert written and written[1] == str(len(rest)) and written[2].split(", ") == rest, ", ".join(rest)
    assert {name for name, (_, fault) in rows.items() if fault} == set(task_prompts.GYM_FAULTS)


def test_run_on_a_faulty_set_says_so() -> None:
    """A run on a set that pays for a constant starts without a word."""
    with pytest.warns(TandemWarning, match="game_of_life_halting: any text gets full marks"):
        EnvironmentPool(TaskConfig(name="game_of_life_halting")).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EnvironmentPool(TaskConfig(name="game_of_life_halting", reward="exact")).close()
        EnvironmentPool(TaskConfig()).close()
