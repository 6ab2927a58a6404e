"""Regression caught: figures of kept answers that are not theirs, or models compared on other prompts."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.columns import Columns
from tandem.errors import ConfigError, WorldError
from tandem.numerics.interval import clustered_interval, wilson_interval
from tandem.program.vote import vote
from tandem.report import evaluation as report
from tandem.rollout.answers import answer_rows, prompt_hash
from tandem.types import Failure, Group, Message, Prompt, StopReason, Trajectory


def sample(right: bool, answer: str | None = "7", failure: str | None = None, **more: Any) -> dict[str, Any]:
    given = {"reward": None if failure else float(right), "right": right, "vote": answer, "text": str(answer)}
    return given | {"tokens": 4, "stop": "stop_token", "failure": failure} | more


def row(number: int, *samples: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": f"t/heldout/{number}", "hash": f"{number:032x}", "answer": "7", "samples": list(samples)} | more


def evaluated(rows: Sequence[Mapping[str, Any]], **settings: str) -> dict[str, Any]:
    given = {"task.environment": "jsonl", "task.name": "chain_sum", "task.reward": "exact", **settings}
    return {"model": "m", "tasks": {"t": {"settings": given, "prompts": list(rows)}}}


def test_what_a_text_votes_for() -> None:
    """Equal numbers that are spelt otherwise split the vote; a text without a number has one."""
    number, formula = (Prompt("p", (), {"answer": text}) for text in ("1200", "\\frac{1}{2}"))
    same = ["It is 1,200.", "\\boxed{1200.0}", "1 + 2 = 3, so <answer>$1200</answer>", "#### 1200", "12e2"]
    assert [vote(number, text) for text in same] == ["1200"] * 5
    assert vote(number, "-0.0") == "0" and vote(number, "I do not know.") is None and vote(number, "") is None
    assert vote(number, "1/2") is None  # of which last_number reads none either
    assert vote(formula, "so $x$ is \\boxed{\\frac{1}{2}}.") == vote(formula, "\\boxed{\\frac{1} {2}}")
    assert vote(formula, "\\boxed{x+1}") == vote(formula, "\\boxed{ x + 1 }") != vote(formula, "\\boxed{x-1}")
    assert vote(formula, "  ") is None and vote(Prompt("p", (), {}), "42") is None


def group(prompt: Prompt, *told: tuple[str, float | Failure]) -> Group:
    trajectories = []
    for number, (text, outcome) in enumerate(told):
        said = (Message("assistant", text, sampled=True), Message("user", "so?"))
        columns = Columns.of(tokens=(1, 2, 3), loss_mask=(False, True, True), logprobs=(0.0,) * 3, versions=(0,) * 3)
        failure = outcome if isinstance(outcome, Failure) else None
        reward = 0.0 if failure else outcome
        known = {"reward": reward, "stop_reason": StopReason.LENGTH, "failure": failure, "said": said if text else ()}
        trajectories.append(Trajectory(f"p/0/{number}", prompt.id, columns, **known))
    return Group(prompt, tuple(trajectories))


def test_answers_as_they_are_kept() -> None:
    """What the environment said last is graded as the model's; a failure is a wrong answer; JSON cannot hold a row."""
    prompt = Prompt("t/heldout/0", (Message("user", "3 + 4?"),), {"answer": "7", "more": object()})
    (found,) = answer_rows(
        [group(prompt, ("It is 7.", 1.0), ("", Failure("deadline", "late")), ("6", 0.25))], lambda ids: str(ids)
    )
    assert json.loads(json.dumps(found)) == found and found["answer"] == "7"
    assert [one["right"] for one in found["samples"]] == [True, False, False]
    assert [one["reward"] for one in found["samples"]] == [1.0, None, 0.25]
    assert [one["vote"] for one in found["samples"]] == ["7", "3", "6"]  # of "[2, 3]": what was decoded
    assert [one["failure"] for one in found["samples"]] == [None, "deadline: late", None]
    assert [one["text"] for one in found["samples"]] == ["It is 7.", "[2, 3]", "6"]
    assert {one["tokens"] for one in found["samples"]} == {2} and found["samples"][0]["stop"] == "length"


def test_a_prompts_hash_is_of_all_that_is_asked() -> None:
    """Two prompts of one id with another system message, tool or gold answer pass for one."""
    user = Message("user", "3 + 4?")
    asked = [
        Prompt("p", (user,), {"answer": "7"}),
        Prompt("p", (Message("system", "Be brief."), user), {"answer": "7"}),
        Prompt("p", (user,), {"answer": "8"}),
        Prompt("p", (user,), {"answer": "7"}, tools=({"name": "add"},)),
    ]
    assert len({prompt_hash(prompt) for prompt in asked}) == 4
    assert prompt_hash(asked[0]) == prompt_hash(Prompt("q", (user,), {"line": 3, "answer": "7"}))


def test_figures_by_hand() -> None:
    """Figures of three prompts, four samples each, of which one could not be graded."""
    rows = [
        row(0, sample(True), sample(True), sample(True), sample(False, "8")),
        row(1, sample(True), sample(False, "8"), sample(False, "8"), sample(False, None)),
        row(2, sample(False, "8"), sample(False, "8"), sample(True), sample(False, None, "reward: late")),
    ]
    found = report.figures(rows)
    assert (found["prompts"], found["samples"], found["failed"]) == (3, 4, 1)
    assert found["failures"] == ["1 x reward: late"] and found["accuracy"] == 5 / 11
    assert (found["low"], found["high"]) == clustered_interval([3, 1, 1], [4, 4, 3])
    assert found["reward"] == 5 / 11 and found["length"] == 4.0 and found["cut"] == 0.0
    # pass@2: 1 - C(1, 2)/C(4, 2) = 1, 1 - C(3, 2)/C(4, 2) = 1/2, 1 - C(2, 2)/C(3, 2) = 2/3.
    assert found["pass_at"]["2"][0] == pytest.approx((1 + 1 / 2 + 2 / 3) / 3)
    assert found["pass_at"]["4"][0] == 1.0  # of the two prompts that have four
    # maj@2: 7 7 (3) and half of 7 8 (3) of 6; half of 7 8 (2) and 7 none (1) of 6; half of 7 8 (2) of 3.
    assert found["majority_at"]["2"][0] == pytest.approx((4.5 / 6 + 2 / 6 + 1 / 3) / 3)
    assert found["majority_at"]["4"][0] == pytest.approx((1 + 0) / 2)
    assert all(
        low <= value <= high for value, low, high in [*found["pass_at"].values(), *found["majority_at"].values()]
    )
    lines = report.table({"t": found})
    assert lines[1].split() == ["t", "3", "x", "4", "accuracy", "45.5", "%", *lines[1].split()[-2:]]
    assert any(line.split()[:2] == ["maj@2", "47.2"] for line in lines) and "1 x reward: late" in lines[-1]


def test_figures_of_one_sample_are_what_they_were() -> None:
    """Greedy accuracy whose interval is another than Wilson's, or that has a pass@1 beside it."""
    found = report.figures([row(n, sample(n < 5)) for n in range(12)])
    assert (found["low"], found["high"]) == wilson_interval(5, 12) and found["pass_at"] == found["majority_at"] == {}
    none = report.figures([row(0, sample(False, None, "reward: no"))])
    assert (none["prompts"], none["accuracy"], none["reward"], none["low"], none["high"]) == (0, 0.0, None, 0.0, 1.0)
    assert report.table({"t": none})[1].split()[:4] == ["t", "0", "x", "0"]
    unknown = report.figures([row(0, sample(True), sample(False), answer=None)])
    assert unknown["pass_at"]["2"][0] == 1.0 and unknown["majority_at"] == {}


def test_two_models_on_the_same_prompts() -> None:
    """A difference of the wrong sign or of unpaired prompts; a p-value of all prompts, not of those that differ."""
    first = evaluated([row(n, sample(n % 4 == 0)) for n in range(40)])
    second = evaluated([row(n, sample(n % 4 == 0 or n % 4 == 1 or n == 2)) for n in reversed(range(40))])
    second["tasks"]["t"]["prompts"][5]["samples"] = [sample(False, None, "reward: late")]
    found = report.compare(first, second)["t"]
    dropped = second["tasks"]["t"]["prompts"][5]["id"]
    gained = sum(n % 4 == 1 or n == 2 for n in range(40) if f"t/heldout/{n}" != dropped)
    assert (found["prompts"], found["left_out"]) == (39, 1)
    assert found["mcnemar"] == {"first_only": 0, "second_only": gained, "p": 2 / 2**gained}
    assert found["p"] == found["p_adjusted"] == found["mcnemar"]["p"] and found["differing"] == {}
    moved = found["measures"]["accuracy"]
    assert moved["difference"] == pytest.approx(gained / 39) == pytest.approx(moved["second"] - moved["first"])
    assert 0 < moved["low"] < moved["difference"] < moved["high"] and moved["p"] < 0.01
    back = report.compare(second, first)["t"]
    assert (
        back["measures"]["accuracy"]["difference"] == -moved["difference"] and back["mcnemar"]["first_only"] == gained
    )
    same = report.compare(first, first)["t"]
    assert same["measures"]["accuracy"]["p"] == same["p"] == 1.0 and same["mcnemar"]["second_only"] == 0
    lines = report.compared_lines({"t": found})
    assert f"+{100 * gained / 39:.1f} [" in lines[1] and f"{gained} prompts right here alone, 0 there" in lines[-2]
    assert "1 prompts left out" in lines[-1]


def test_samples_are_compared_by_prompt() -> None:
    """Eight samples of a prompt that pass for eight prompts, or for McNemar's pairs; a k that only one side has."""
    drawn = np.random.default_rng(0)
    shares = drawn.uniform(0, 1, 50)
    both = [
        evaluated([row(n, *(sample(bool(drawn.uniform() < p + up)) for _ in range(k))) for n, p in enumerate(shares)])
        for up, k in ((0.0, 8), (0.15, 4))
    ]
    found = report.compare(*both)["t"]
    assert found["mcnemar"] is None and list(found["measures"]) == [
        "accuracy", "pass@2", "pass@4", "maj@2", "maj@4", "reward"
    ]  # fmt: skip
    means = [[np.mean([s["right"] for s in one["samples"]]) for one in of["tasks"]["t"]["prompts"]] for of in both]
    accuracy = found["measures"]["accuracy"]
    apart = np.array(means[1]) - np.array(means[0])
    assert accuracy["difference"] == pytest.approx(apart.mean())
    half = 1.96 * apart.std(ddof=1) / math.sqrt(50)
    assert (accuracy["low"], accuracy["high"]) == pytest.approx((apart.mean() - half, apart.mean() + half), abs=0.012)
    assert found["p"] == accuracy["p"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda of: of["prompts"].pop(), "0 of the one and 1 of the other"),
        (lambda of: of["prompts"][1].update(id="t/heldout/9"), "1 of the one and 1 of the other"),
        (lambda of: of["prompts"][1].update(hash="0" * 31 + "f"), "prompt t/heldout/1 has other messages"),
        (lambda of: of["settings"].update({"task.reward": "last_number"}), "task.reward 'last_number' in one"),
        (
            lambda of: [r.update(samples=[sample(False, None, "late")]) for r in of["prompts"]],
            "nothing can be compared",
        ),
    ],
)
def test_other_prompts_are_refused(change: Any, said: str) -> None:
    """Models that were asked, or scored, differently get a difference and a p-value."""
    second = evaluated([row(n, sample(True)) for n in range(3)])
    first = copy.deepcopy(second)
    change(first["tasks"]["t"])
    with pytest.raises(ConfigError, match="task t") as refused:
        report.compare(first, second)
    assert said in str(refused.value)


def test_what_differs_is_said_and_tasks_are_adjusted() -> None:
    """A longer answer that was allowed to one model alone passes in silence; two tasks, two chances."""
    first, second = (evaluated([row(n, sample(n < up)) for n in range(12)]) for up in (2, 10))
    second["tasks"]["t"]["settings"]["rollout.max_new_tokens"] = "512"
    for of in (first, second):
        of["tasks"]["u"] = of["tasks"]["t"] | {"settings": {}}
    found = report.compare(first, second)
    assert found["t"]["differing"] == {"rollout.max_new_tokens": [None, "512"]} and found["u"]["differing"] == {}
    assert found["t"]["p_adjusted"] == 2 * found["t"]["p"] == 2 * 2 / 2**8
    lines = report.compared_lines(found)
    assert "t: asked otherwise: rollout.max_new_tokens None there and 512 here" in lines
    with pytest.raises(ConfigError, match="share no task: one has t, u, the other v"):
        report.compare(first, {"tasks": {"v": {}}})


def damaged() -> Iterator[tuple[Any, str]]:
    """Tasks of a file that no evaluation wrote, and what is said of them."""
    yield {"t": 3}, "is damaged: Expected `object`, got `int` - at `.*tasks"
    for rows, said in (
        ([], "length >= 1"),
        ([{"id": 3}], "Expected `str`, got `int`"),
        ([row(0)], "length >= 1"),
        ([row(0, {})], "missing required field `reward`"),
        ([row(0, sample(True, reward=None))], "did not fail has the reward None"),
        ([row(0, sample(True, reward=math.nan))], "did not fail has the reward nan"),
        ([row(0, sample(True) | {"right": "yes"})], "Expected `bool`, got `str`"),
        ([row(0, sample(True), id=["a"])], "Expected `str`, got `array`"),
        ([row(0, sample(True)), row(1, sample(True)), row(0, sample(False))], "2 rows have the id t/heldout/0"),
    ):
        yield {"t": {"settings": {}, "prompts": rows}}, said


def test_the_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    """A half-written or foreign file is compared, or ends in a traceback."""
    path = tmp_path / "new" / "a.json"
    results = evaluated([row(0, sample(True))])
    report.write_results(path, results)
    assert report.read_results(path) == {"version": 1, **results} and [p.name for p in path.parent.iterdir()] == [
        path.name
    ]
    with pytest.raises(WorldError, match="could not be written"):
        report.write_results(path / "b.json", results)
    cases = {
        "": "is no JSON",
        "[]": "holds no evaluation",
        '{"tasks": {}}': "holds no evaluation",
        json.dumps({"version": 9, **results}): "is of version 9",
        **{json.dumps({"version": 1, "tasks": tasks}): said for tasks, said in damaged()},
    }
    for text, said in cases.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            report.read_results(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        report.read_results(tmp_path / "none.json")
