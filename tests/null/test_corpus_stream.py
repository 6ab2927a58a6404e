"""What a run is given of its sources: an order, a split, shares, and the same after a resume."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tandem.columns import Columns
from tandem.corpus.config import CorpusConfig
from tandem.corpus.reader import refused, tasks_of
from tandem.corpus.sources import readers_of
from tandem.corpus.stream import CorpusStream
from tandem.errors import ConfigError, CorpusError, RunFolderError
from tandem.models.scratch import new_tokenizer
from tandem.numerics.random import derive_seed, words
from tandem.program.render import Renderer
from tandem.types import Group, Message, Prompt, Trajectory


class Rows:
    """Rows of one question each: (what is asked, tokens, task), or why one cannot be read."""

    left_out: dict[str, int] = {}

    def __init__(self, name: str, rows: Sequence[Any], digest: str = "0") -> None:
        self.name, self.rows, self.digest = name, rows, digest

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, number: int) -> str:
        return f"{self.name} line {number + 1}"

    def group(self, number: int) -> Group:
        if isinstance(self.rows[number], str):
            raise refused(self.rows[number], self.place(number), "it is broken.")
        asked, count, *task = self.rows[number]
        prompt = Prompt(f"{self.name}/{number}", (Message("user", asked),), {"task": task[0]} if task else {})
        columns = Columns.of(
            tokens=[number + 100 * ord(self.name), *range(count - 1)], loss_mask=[False] + [True] * (count - 1)
        )
        return Group(prompt, (Trajectory(prompt.id, prompt.id, columns),))


def stream(readers: Sequence[Rows], seed: int = 0, excluded: frozenset[int] = frozenset(), **config: Any):
    names = tuple(reader.name for reader in readers)
    return CorpusStream(readers, CorpusConfig(names, **config), config.get("max_tokens") or 100, seed, excluded)


def ids(groups: Sequence[Group]) -> list[str]:
    return [group.prompt.id for group in groups]


def source(name: str, count: int, tokens: int = 4) -> Rows:
    return Rows(name, [(f"{name} {number}?", tokens) for number in range(count)])


def test_an_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    """A row that never comes, or comes twice an epoch; an order that hangs on the batch, or on no seed."""
    rows = source("a", 20)
    whole, other = stream([rows]), stream([rows], seed=1)
    first, second = ids(whole.take(20)), ids(whole.take(20))
    assert sorted(first) == sorted(second) == sorted(f"a/{n}" for n in range(20))
    assert first != second != sorted(second) and first != ids(other.take(20))
    small = stream([rows])
    assert [name for _ in range(8) for name in ids(small.take(5))] == [*first, *second]
    assert small.epochs() == {"a": 2.0}
    both = stream([rows]).take(40)
    names = [one.program_id for group in both for one in group.trajectories]
    assert len(set(names)) == 40 and len({group.prompt.id for group in both}) == 20


def test_a_resume_goes_on_to_the_row() -> None:
    """Rows of a step that no update has seen left out or given twice after a resume in the middle of an epoch."""
    readers = [source("a", 7), source("b", 5)]
    whole = stream(readers, weights=(2.0, 1.0))
    seen = ids(whole.take(9))
    whole.settle()
    state = json.loads(json.dumps(whole.state()))
    lost = ids(whole.take(4))
    again = stream(readers, weights=(2.0, 1.0))
    again.restore(state)
    assert ids(again.take(4)) == lost and ids(again.take(6)) == ids(whole.take(6))
    assert len(seen) == 9
    changed = stream([readers[0], Rows("b", readers[1].rows, digest="1")], weights=(2.0, 1.0))
    with pytest.raises(RunFolderError, match="the source b is not what it was when the run began"):
        changed.restore(state)


def test_sources_come_by_their_weights() -> None:
    """A small source that is read once where it was asked for as often as a large one, or by chance more or less."""
    readers = [source("a", 30), source("b", 3)]
    for weights, share in (((), 30 / 33), ((1.0, 1.0), 0.5), ((1.0, 4.0), 0.2)):
        drawn = stream(readers, weights=weights)
        counts = Counter[str]()
        for taken in range(1, 67):
            counts.update(name.split("/")[0] for name in ids(drawn.take(1)))
            assert abs(counts["a"] - share * taken) <= 1.0, (weights, taken)


def test_no_task_is_on_both_sides() -> None:
    """A held-out question trained on under another white space, system message or source; a task by its name."""
    rows = [(f"What is {n} + 1?", 4) for n in range(12)]
    twice = [(f"What  is {n} + 1?\n", 5) for n in range(12)]
    named = [(f"Fix {n}", 6, f"repo {n // 3}") for n in range(12)]
    held = stream([Rows("a", rows), Rows("b", twice), Rows("c", named)], heldout_tasks=8)
    outside = [group.prompt for group in held.heldout]
    inside = [group.prompt for group in held.take(200)]
    assert not {key for p in outside for key in tasks_of(p)} & {key for p in inside for key in tasks_of(p)}
    tasks = {p.record.get("task", " ".join(p.messages[0].content.split())) for p in outside}
    assert len(tasks) == 8 and any(task.startswith("repo") for task in tasks)
    totals = held.totals()
    assert totals["heldout_rows"] == len(outside) == len(set(ids(held.heldout)))
    assert totals["trained_rows"] + len(outside) == totals["rows"] == 36
    other = stream([Rows("a", rows), Rows("b", twice), Rows("c", named)], seed=5, heldout_tasks=8)
    assert ids(other.heldout) == ids(held.heldout)  # seeds are compared on the same tasks
    with pytest.raises(ConfigError, match="corpus.heldout_tasks is 16, and corpus.sources have 16 tasks"):
        stream([Rows("a", rows), Rows("b", twice), Rows("c", named)], heldout_tasks=16)


def test_what_joins_tasks_joins_them_all() -> None:
    """Two tasks that a third row shows to be one, on both sides."""
    rows = [("x?", 4, "one"), ("y?", 5, "two"), ("x?", 6, "two"), *((f"{n}?", 7) for n in range(9))]
    for size in range(1, 9):
        held = set(ids(stream([Rows("a", rows)], heldout_tasks=size).heldout))
        assert len(held & {"a/0", "a/1", "a/2"}) in (0, 3), size


def test_what_the_evaluation_asks_is_not_trained() -> None:
    """Held-out accuracy on questions that the corpus has the answers to."""
    asked = Prompt("t", (Message("system", "Be brief."), Message("user", "a 3?")))
    found = stream([source("a", 5)], excluded=tasks_of(asked))
    assert sorted(ids(found.take(4))) == ["a/0", "a/1", "a/2", "a/4"] and found.totals()["evaluated_rows"] == 1


def test_rows_that_are_left_out_are_counted() -> None:
    """A row that goes away without a count, or ends a run that was to go on; duplicates learned twice."""
    rows = [("0?", 4), "not JSON", ("1?", 9), ("2?", 4), "not JSON", ("3?", 4), "an empty text"]
    readers = [Rows("a", rows)]
    with pytest.raises(CorpusError, match=r"a line 2: it is broken\. \(corpus\.bad=count leaves such rows out\)"):
        stream(readers)
    readers[0].left_out = {"not graded": 3}
    found = stream(readers, bad="count", long="drop", max_tokens=5)
    assert found.totals() == {
        "not graded": 3, "rows": 7, "refused: not JSON": 2, "refused: an empty text": 1, "long_rows": 1,
        "trained_rows": 3,
    }  # fmt: skip
    first, *errors = found.account()
    assert first.startswith("a: 3 not graded, 7 rows, 2 refused: not JSON, 1 too long, left out")
    assert errors == [f"    a line {n}: it is broken." for n in (2, 5, 7)]

    class Same(Rows):
        def group(self, number: int) -> Group:
            return super().group(number // 2)

    twins = [(f"{number}?", 4) for number in range(6)]
    assert stream([Same("a", twins)]).totals()["duplicates"] == 3
    assert stream([Same("a", twins)], duplicates="keep").totals()["trained_rows"] == 6
    with pytest.raises(CorpusError, match="a: no row is left to train on. a: 2 rows, 2 too long, left out"):
        stream([source("a", 2, tokens=20)], long="drop", max_tokens=5)


def test_how_far_the_first_look_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes of silence over a large file, or a line a row."""
    clock = iter(range(0, 1000, 3))  # seconds: a row takes three
    monkeypatch.setattr("tandem.corpus.stream.time.monotonic", lambda: float(next(clock)))
    told: list[str] = []
    CorpusStream([source("a", 10)], CorpusConfig(("a",)), 100, 0, told=told.append)
    assert told == ["reading a: 3 of 10 rows, about 28 s to go", "reading a: 7 of 10 rows, about 10 s to go"]


def test_a_step_of_so_many_tokens() -> None:
    """A step beyond its tokens, one that is empty, or rows that are passed over because they did not fit."""
    rows = Rows("a", [(f"{n}?", 3 + n) for n in range(12)])
    drawn, plain = stream([rows], tokens_per_step=20), stream([rows])
    taken = [drawn.take(0) for _ in range(12)]
    sizes = [[len(group.trajectories[0].columns) for group in groups] for groups in taken]
    assert all(0 < sum(step) <= 20 for step in sizes) and any(len(step) > 1 for step in sizes)
    assert all(sum(step) + after[0] > 20 for step, after in zip(sizes, sizes[1:], strict=False))
    flat = [name for groups in taken for name in ids(groups)]
    assert flat == ids(plain.take(len(flat)))
    assert len(stream([rows], tokens_per_step=2).take(0)) == 1


def test_as_many_of_each_source() -> None:
    """Sources compared on other numbers of rows than were asked for, or the same rows for every seed."""
    found, other = (stream([source("a", 30), source("b", 8)], seed=seed, rows=8) for seed in (0, 1))
    assert found.totals()["trained_rows"] == 16 and found.totals()["not drawn"] == 22
    chosen = {name for name in ids(found.take(16)) if name.startswith("a")}
    assert len(chosen) == 8 and chosen != {name for name in ids(other.take(16)) if name.startswith("a")}


def test_the_order_is_the_noise_of_the_counter(tmp_path: Path) -> None:
    """An order drawn from elsewhere than the counter: a resumed run, or another version, that reads on otherwise."""
    path = tmp_path / "a.jsonl"
    turns = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": str(n)}] for n in range(6)]
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    config = CorpusConfig((str(path),))
    found = CorpusStream(readers_of(config, Renderer(new_tokenizer())), config, 200, 7)
    wanted = []
    for epoch in (0, 1):
        noise = words(derive_seed(7, epoch, "corpus/a", 0), 0, range(12), 8).tolist()
        wanted += sorted(range(6), key=lambda place: (noise[2 * place], noise[2 * place + 1]))
    assert ids(found.take(12)) == [f"a/{place}" for place in wanted]


def test_a_source_of_which_nothing_is_left_says_why() -> None:
    """Another source's account in the error; no word on what keeps rows that are double of another's."""
    first, second = source("a", 3), source("b", 4)
    second.rows = first.rows
    second.group = first.group  # type: ignore[method-assign]
    with pytest.raises(
        CorpusError, match=r"^b: no row is left[^\n]* b: 3 rows, 3 double(?s:.*)corpus\.duplicates=keep"
    ) as caught:
        stream([first, second])
    assert "a: " not in str(caught.value)


def test_what_cannot_be_weighed_is_named() -> None:
    """A row whose reward no weight can be made of, told by an id that is in no file."""

    def tried(group: Group) -> None:
        if group.prompt.id == "a/1":
            raise ConfigError("the reward is -1.")

    with pytest.raises(ConfigError, match=r"^a line 2: the reward is -1\.$"):
        CorpusStream([source("a", 3)], CorpusConfig(("a",)), 100, 0, tried=tried)
