"""How many drafts a step gets, on machines whose times are made up, of drafts that stand at a rate."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tandem.engine import lengths
from tandem.engine.lengths import LEAST, PLAIN, Chances, Lengths, Times

MOST = 8
Machine = Callable[[int, int], float]  # (sequences, rows) -> seconds
MACHINES: dict[str, Machine] = {
    "memory": lambda sequences, rows: 6.0 + 0.06 * rows,  # a step waits for its weights
    "compute": lambda sequences, rows: 0.5 + 1.0 * rows,  # a row takes as long as any other
    "knee": lambda sequences, rows: max(6.0, 0.2 * rows) + 0.02 * sequences,  # a GPU's, at 30 rows
}


class Run:
    """Steps of sequences that draw 200 tokens each; a draft stands at a rate, of every other text at another."""

    def __init__(self, machine: Machine, rates: tuple[float, ...], draft_s: float = 0.1, noise: float = 0.0) -> None:
        self.machine, self.rates, self.draft_s, self.noise = machine, rates, draft_s, noise
        self.rng = random.Random(0)
        self.lengths = Lengths(MOST)
        self.seconds, self.tokens, self.names = 0.0, 0, 0
        self.drafts: list[list[int]] = []  # of each step

    def go(self, count: int, steps: int, length: int = 200) -> float:
        """Tokens a second of so many steps."""
        seconds, tokens, live = 0.0, 0, dict[int, int]()
        for _ in range(steps):
            while len(live) < count:
                live[self.names] = length
                self.names += 1
            asked, spent_s = [0] * count, 0.0
            if self.lengths.on:
                asked = self.lengths.ask(list(live), [min(MOST, left - 1) for left in live.values()], count)
                if any(asked):
                    spent_s = self.draft_s
                    self.lengths.drafted(asked, asked, spent_s)
            rows = count + sum(asked)
            took_s = self.machine(count, rows) * self.rng.uniform(1 - self.noise, 1 + self.noise)
            stood = [self._stood(name, many) for name, many in zip(live, asked, strict=True)]
            drafted = [(n, d, a) for n, d, a in zip(live, asked, stood, strict=True) if d]
            if drafted:
                self.lengths.stood(*map(list, zip(*drafted, strict=True)))  # type: ignore[arg-type]
            for name, right in zip(list(live), stood, strict=True):
                live[name] -= right + 1
                tokens += right + 1
            self.lengths.took(count, rows, took_s, True)
            for name in [name for name, left in live.items() if left <= 0]:
                del live[name]
                self.lengths.forget(name)
            seconds += took_s + spent_s
            self.drafts.append(asked)
        return tokens / seconds

    def _stood(self, name: int, many: int) -> int:
        rate, right = self.rates[name % len(self.rates)], 0
        while right < many and self.rng.random() < rate:
            right += 1
        return right


def best_fixed(machine: Machine, rate: float, count: int, draft_s: float) -> float:
    """Tokens a second of the best of all fixed lengths."""
    found = [count / machine(count, count)]
    for many in range(1, MOST + 1):
        tokens = count * sum(rate**i for i in range(many + 1))
        found.append(tokens / (machine(count, count * (1 + many)) + draft_s))
    return max(found)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_drafts_never_cost_and_pay_where_they_can(machine: str, rate: float, count: int) -> None:
    """Drafts that don't pay are run on, tries of them take more than they may, or some that pay are not run."""
    run = Run(MACHINES[machine], (rate,), noise=0.05)
    rate_then = run.go(count, 400 if count < 40 else 200)
    plain = count / MACHINES[machine](count, count)
    assert rate_then > 0.97 * plain
    assert rate_then > 0.88 * best_fixed(MACHINES[machine], rate, count, run.draft_s)


def test_rows_that_were_never_timed_are_tried_step_by_step() -> None:
    """On a machine where rows are dear a first guess at their times fills a step with drafts."""
    run = Run(lambda sequences, rows: 1.0 + 0.1 * max(0, rows - 2) ** 2, (0.95,))
    run.go(1, 40, length=10_000)
    tries = [sum(asked) for asked in run.drafts]
    longest = [max(tries[: i + 1]) for i in range(len(tries))]
    assert next(many for many in tries if many) == 1
    assert all(later + 1 <= 2 * (sooner + 1) for sooner, later in pairwise(longest)) and longest[-1] > 2


def test_drafts_go_to_those_whose_drafts_stand() -> None:
    """All sequences get as many drafts, whatever becomes of them."""
    run = Run(MACHINES["memory"], (0.0, 0.9))
    run.go(64, 20, length=10_000)
    run.go(64, 60, length=10_000)
    wrong, right = (sum(sum(asked[one::2]) for asked in run.drafts[-60:]) for one in (0, 1))
    assert right > 60 * 32 and wrong < 0.1 * right


def test_a_drafter_that_takes_long_is_asked_where_it_pays() -> None:
    """A drafter's own seconds are left out: it is asked for drafts whose tokens take longer than without."""
    dear, cheap = (Run(MACHINES["memory"], (0.6,), draft_s=seconds) for seconds in (8.0, 2.0))
    plain = 1 / MACHINES["memory"](1, 1)
    assert 0.97 * plain < dear.go(1, 600) < 1.1 * plain
    assert sum(any(asked) for asked in dear.drafts) < 60 and cheap.go(1, 400) > 1.5 * plain


def test_drafting_wakes_when_drafts_begin_to_stand() -> None:
    """What did not pay once is never tried again, where texts go on and on."""
    run = Run(MACHINES["memory"], (0.0,))
    run.go(16, 400, length=10_000)
    assert 0 < sum(any(asked) for asked in run.drafts[-300:]) < 90
    run.rates = (0.9,)
    run.go(16, 400, length=10_000)
    assert sum(map(sum, run.drafts[-100:])) > 100 * 16 * 2


def test_other_texts_are_tried_at_once() -> None:
    """A drafter that slept through one batch of texts sleeps through the next, which it knows by heart."""
    run = Run(MACHINES["memory"], (0.0,))
    run.go(16, 200, length=10_000)
    while run.lengths.on:
        run.go(16, 1)
    for name in range(run.names):
        run.lengths.forget(name)
    assert run.lengths.on
    run.rates = (0.9,)
    run.go(16, 12)
    assert sum(map(sum, run.drafts[-4:])) > 4 * 16


def test_steps_without_drafts_stay_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where drafts pay, steps without are timed no more: that rows became dear is taken for a machine that is slow."""
    monkeypatch.setattr(lengths, "PLAIN", 16)
    row_s = [0.1]
    run = Run(lambda sequences, rows: 10 + row_s[0] * rows, (0.3,))
    run.go(1, 60, length=10_000)
    assert sum(map(sum, run.drafts[-20:])) > 12
    for _ in range(100):
        row_s[0] *= 1.06
        run.go(1, 1, length=10_000)
    run.go(1, 200, length=10_000)
    assert run.go(1, 200, length=10_000) > 0.97 / run.machine(1, 1)


def test_a_wrong_table_is_found_out(tmp_path: Path) -> None:
    """Times of a machine that was another then are believed for ever."""
    kept, run = tmp_path / "times.json", Run(MACHINES["compute"], (0.6,))
    flat = Lengths(MOST, kept)
    for rows in (1, 2, 3, 5, 9):
        flat.steps.add(1, rows, 1.0 + 1e-6 * rows)
    flat.keep()
    run.lengths = Lengths(MOST, kept)
    assert run.lengths.steps.table().keys() == flat.steps.table().keys()
    assert sum(run.lengths.ask([0], [MOST], 1)) == MOST
    run.go(1, 5 * PLAIN)
    assert run.go(1, 600) > 0.97 / MACHINES["compute"](1, 1)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"form": 1, "steps": {"1": [1, 2]}}', '{"form": 0, "steps": {}}'])
def test_a_file_that_is_none_is_as_no_file(tmp_path: Path, text: str) -> None:
    """A damaged file of times, or one of another form, ends the engine that finds it."""
    file = tmp_path / "times.json"
    file.write_text(text)
    assert not Lengths(MOST, file).steps.table()


def test_times_are_kept_whole(tmp_path: Path) -> None:
    """A file of times that another engine can't read, or a folder that can't be written ends the run."""
    first = Lengths(MOST, tmp_path / "a" / "times.json")
    for _ in range(LEAST):
        first.took(3, 3, 2.0, True)
    first.took(3, 12, 9.0, False)
    assert first.keep() == tmp_path / "a" / "times.json"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["times.json"]
    again = Lengths(MOST, tmp_path / "a" / "times.json")
    assert again.steps.at(2, np.array([3])).tolist() == [2.0] and again.steps.known(2) == LEAST
    (tmp_path / "file").write_text("")
    assert Lengths(MOST, tmp_path / "file" / "times.json").keep() is None


def test_times_lie_on_a_curve_by_hand() -> None:
    """A time is read between the wrong neighbours, a faster step of more rows is believed, or one slow step counts."""
    times = Times()
    assert times.at(1, np.array([1, 9])).tolist() == [0, 0]
    for seconds in (6.0, 60.0, 6.0, 6.0, 60.0):
        times.add(1, 1, seconds)
    times.add(1, 4, 7.0)
    times.add(1, 8, 5.0)
    times.add(2, 8, 99.0)
    assert times.at(1, np.array([0, 1, 2, 3, 4, 6, 8, 100])).tolist() == pytest.approx(
        [6, 6, 6 + 1 / 3, 6 + 2 / 3, 7, 7, 7, 7]
    )


def test_chances_by_hand() -> None:
    """A draft after one that was wrong counts as wrong, or a sequence's own counts are another's."""
    chances = Chances(3)
    chances.stood([7, 9], [3, 3], [1, 3])
    # Position 0 stood twice of twice, 1 once of twice, 2 once of once; each of all begins as the one before it, twice.
    first, second, third = shares = chances.shares()
    assert shares == pytest.approx([(2 + 2 * 0.5) / 4, (1 + 2 * first) / 4, (1 + 2 * second) / 3])
    own_SK = chances.all_stand(chances.rows([9, 7, 8]))
    wanted = [
        [(1 + 2 * first) / 3, (1 + 2 * second) / 3, (1 + 2 * third) / 3],
        [(1 + 2 * first) / 3, (0 + 2 * second) / 3, third],
        [first, second, third],
    ]
    assert own_SK == pytest.approx(np.cumprod(wanted, axis=1))
    chances.forget(9)
    assert len(chances) == 2
    assert chances.all_stand(chances.rows([10]))[0] == pytest.approx(np.cumprod(shares))


def test_decisions_are_a_function_of_what_was_seen() -> None:
    """Lengths hang on a clock or a generator of their own: a run cannot be told again."""
    runs = [Run(MACHINES["knee"], (0.7, 0.2), noise=0.1) for _ in range(2)]
    for run in runs:
        run.go(9, 150)
    assert runs[0].drafts == runs[1].drafts and any(map(any, runs[0].drafts))
    assert json.dumps(runs[0].lengths.steps.kept()) == json.dumps(runs[1].lengths.steps.kept())
