"""What a run is given of its sources: their rows in an order of its own, some tasks held out, from any place on.

All rows are read once at the start, so that what is wrong, too long, double or held out is known before the first step;
then each is read again when its turn comes. An epoch's order is noise of (run seed, epoch, source); of several sources
the next row is of the one that is furthest behind its share. So what comes next is a function of the seed and of how
many rows each source has given, which a checkpoint has.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import numpy as np

from tandem.columns import Array
from tandem.corpus.config import CorpusConfig
from tandem.corpus.lengths import MARKED, fitted
from tandem.corpus.reader import Reader, hashed, tasks_of
from tandem.errors import ConfigError, CorpusError, RunFolderError
from tandem.numerics.random import Stream as Use
from tandem.numerics.random import derive_seed, words
from tandem.types import Group

SHOWN = 3  # refused rows that are told in full
TOLD_EVERY_S = 10.0  # of the first look at all rows


class Source:
    """A reader's rows that are trained, and how many of them were taken."""

    def __init__(self, reader: Reader, numbers: Sequence[int], tokens: Sequence[int], seed: int) -> None:
        self.reader = reader
        self.numbers = np.array(numbers, np.int64)  # of the rows, in the file's order
        self.tokens = np.array(tokens, np.int64)  # of each
        self.seed = seed
        self.taken = self.settled = 0
        self._order: tuple[int, Array] = (-1, np.empty(0, np.int64))  # of one epoch

    @property
    def epochs(self) -> float:
        """How often all of it was taken."""
        return self.taken / len(self.numbers)

    def next(self) -> tuple[int, int, int]:
        """The next row: epoch, its number, its tokens. It is taken with `advance`."""
        epoch, place = divmod(self.taken, len(self.numbers))
        if self._order[0] != epoch:
            seed = derive_seed(self.seed, epoch, f"corpus/{self.reader.name}", 0)
            self._order = epoch, shuffled(len(self.numbers), seed)
        index = int(self._order[1][place])
        return epoch, int(self.numbers[index]), int(self.tokens[index])


def shuffled(count: int, seed: int) -> Array:
    """The numbers below `count` in an order that is noise of `seed`."""
    halves = words(seed, 0, np.arange(2 * count), Use.SHUFFLE).astype(np.uint64).reshape(-1, 2)
    return np.argsort(halves[:, 0] << np.uint64(32) | halves[:, 1], kind="stable")


class CorpusStream:
    """Groups without end, and those held out. `limit`: most tokens of a sequence. `excluded`: tasks (tasks_of) that are
    evaluated otherwise, none of which is trained. `told`: hears now and then how far the first look is;
    `tried`: sees each row then, and may raise.

    What was taken since the last `settle` is given again after a resume: no update has seen it.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        config: CorpusConfig,
        limit: int,
        seed: int,
        excluded: Set[int] = frozenset(),
        *,
        told: Callable[[str], None] = lambda text: None,
        tried: Callable[[Group], Any] = lambda group: None,
    ) -> None:
        self.config, self.limit = config, limit
        self._told, self._tried = told, tried
        self.counts: dict[str, Counter[str]] = {reader.name: Counter(reader.left_out) for reader in readers}
        self.refused: dict[str, list[str]] = {reader.name: [] for reader in readers}  # the first few errors
        scans = [self._scan(reader) for reader in readers]
        self._drop_duplicates(readers, scans)
        held = self._split(readers, scans, excluded)
        self.heldout = tuple(held)
        self._thin(readers, scans, seed)
        self.sources = [
            Source(reader, [row.number for row in scan], [row.tokens for row in scan], seed)
            for reader, scan in zip(readers, scans, strict=True)
        ]
        for source in self.sources:
            if not len(source.numbers):
                name = source.reader.name
                why = "\n".join(self._account_of(name))
                if self.counts[name]["duplicates"]:
                    why += "\nRows that are double of another source's are kept with corpus.duplicates=keep."
                raise CorpusError("nothing left", f"{name}: no row is left to train on. {why}")
        sizes = config.weights or tuple(float(len(source.numbers)) for source in self.sources)
        self.shares = [size / sum(sizes) for size in sizes]

    def take(self, count: int) -> list[Group]:
        """The next `count` rows; with corpus.tokens_per_step as many as have so many tokens, and one at least."""
        groups, tokens, most = list[Group](), 0, self.config.tokens_per_step
        while most or len(groups) < count:
            total = sum(source.taken for source in self.sources) + 1
            behind = [share * total - source.taken for share, source in zip(self.shares, self.sources, strict=True)]
            source = self.sources[behind.index(max(behind))]
            epoch, number, size = source.next()
            if most and groups and tokens + size > most:
                break
            groups.append(self._read(source.reader, number, epoch))
            source.taken += 1
            tokens += size
        return groups

    def every(self) -> Iterator[Group]:
        """Each row once, in the files' order, and then the held-out ones; nothing is taken."""
        for source in self.sources:
            for number in source.numbers.tolist():
                yield self._read(source.reader, number, 0)
        yield from self.heldout

    def settle(self) -> None:
        """What was taken so far has met its fate."""
        for source in self.sources:
            source.settled = source.taken

    def state(self) -> dict[str, Any]:
        return {
            "taken": {source.reader.name: source.settled for source in self.sources},
            "digests": {source.reader.name: source.reader.digest for source in self.sources},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """RunFolderError where a source is not what it was."""
        for source in self.sources:
            name = source.reader.name
            if state["digests"].get(name) != source.reader.digest:
                raise RunFolderError(
                    f"the source {name} is not what it was when the run began (its content has another hash), so the "
                    "run can't go on where it stopped. Put the file back, or start a new run from its checkpoint: "
                    "--set model.source=RUN."
                )
            source.taken = source.settled = int(state["taken"][name])

    def epochs(self) -> dict[str, float]:
        """How often each source was taken whole."""
        return {source.reader.name: source.epochs for source in self.sources}

    def steps_of_an_epoch(self, count: int) -> int:
        """Steps, of `count` rows where they are not of so many tokens, that take as many rows as there are."""
        rows = sum(len(source.numbers) for source in self.sources)
        tokens = sum(int(source.tokens.sum()) for source in self.sources)
        return math.ceil(tokens / self.config.tokens_per_step if self.config.tokens_per_step else rows / count)

    def account(self) -> list[str]:
        """A line for people on each source: what is trained, what is not and why."""
        return [line for name in self.counts for line in self._account_of(name)]

    def _account_of(self, name: str) -> list[str]:
        counts = self.counts[name].items()
        words = {1: {**WORDS, **ONE}}
        said = [f"{count:,} {words.get(count, WORDS).get(what, what)}" for what, count in counts if count]
        return [f"{name}: {', '.join(said)}", *(f"    {error}" for error in self.refused[name])]

    def totals(self) -> dict[str, int]:
        """Of all sources, for a row."""
        return {what: count for what, count in sum(self.counts.values(), Counter[str]()).items() if count}

    def _read(self, reader: Reader, number: int, epoch: int) -> Group:
        """A row as it is learned from: ids are unique among the groups of an epoch."""
        group, _ = fitted(reader.group(number), self.limit, self.config.long, reader.place(number))
        named = [replace(one, program_id=f"{one.program_id}/{epoch}") for one in group.trajectories]
        return replace(group, trajectories=tuple(named))

    def _scan(self, reader: Reader) -> list[_Row]:
        """Every row that can be learned from. CorpusError for one that cannot, where corpus.bad is stop."""
        rows, counts = [], self.counts[reader.name]
        began_s = told_s = time.monotonic()
        for number in range(len(reader)):
            counts["rows"] += 1
            if (now_s := time.monotonic()) - told_s >= TOLD_EVERY_S:
                told_s, left_s = now_s, (now_s - began_s) * (len(reader) - number) / number
                self._told(f"reading {reader.name}: {number:,} of {len(reader):,} rows, about {left_s:,.0f} s to go")
            try:
                group, done = fitted(reader.group(number), self.limit, self.config.long, reader.place(number))
            except CorpusError as error:
                if self.config.bad == "stop":
                    raise CorpusError(error.fault, f"{error} (corpus.bad=count leaves such rows out)") from error
                counts[f"refused: {error.fault}"] += 1
                if len(self.refused[reader.name]) < SHOWN:
                    self.refused[reader.name].append(str(error))
                continue
            counts.update(done)
            counts["rewritten_rows"] += any(one.cause == "template" for one in group.trajectories)
            for one in group.trajectories:
                counts.update(one.counts)
            if group.trajectories:
                try:
                    self._tried(group)
                except ConfigError as error:
                    raise ConfigError(f"{reader.place(number)}: {error}") from error
                rows.append(_Row(number, group))
        return rows

    def _drop_duplicates(self, readers: Sequence[Reader], scans: list[list[_Row]]) -> None:
        if self.config.duplicates == "keep":
            return
        seen: set[int] = set()
        for reader, (place, scan) in zip(readers, enumerate(scans), strict=True):
            scans[place] = kept = []
            for row in scan:
                if row.digest not in seen:
                    seen.add(row.digest)
                    kept.append(row)
            self.counts[reader.name]["duplicates"] += len(scan) - len(kept)

    def _thin(self, readers: Sequence[Reader], scans: list[list[_Row]], seed: int) -> None:
        """Leave corpus.rows of each."""
        most = self.config.rows
        for place, (reader, scan) in enumerate(zip(readers, scans, strict=True)):
            counts = self.counts[reader.name]
            if 0 < most < len(scan):
                order = shuffled(len(scan), derive_seed(seed, 0, f"corpus rows/{reader.name}", 0))[:most]
                scans[place] = [scan[index] for index in sorted(order.tolist())]
                counts["not drawn"] += len(scan) - most
            counts["trained_rows"] = len(scans[place])

    def _split(self, readers: Sequence[Reader], scans: list[list[_Row]], excluded: Set[int]) -> Iterator[Group]:
        """The held-out rows, which are taken out of `scans` as those of excluded tasks are."""
        task_of = _joined(row.tasks for scan in scans for row in scan)
        left_out = {task_of[key] for key in excluded if key in task_of}
        tasks = sorted({*task_of.values()} - left_out, key=lambda task: (hashed(f"held out {task}"), task))
        if self.config.heldout_tasks >= max(len(tasks), 1):
            raise ConfigError(
                f"corpus.heldout_tasks is {self.config.heldout_tasks}, and corpus.sources have {len(tasks)} tasks: "
                "none is left to train on. Lower it."
            )
        held_tasks, held = set(tasks[: self.config.heldout_tasks]), []
        for place, (reader, scan) in enumerate(zip(readers, scans, strict=True)):
            counts, kept = self.counts[reader.name], list[_Row]()
            for row in scan:
                task = task_of[min(row.tasks)]
                if task in left_out:
                    counts["evaluated_rows"] += 1
                elif task in held_tasks:
                    counts["heldout_rows"] += 1
                    held.append((reader, row.number))
                else:
                    kept.append(row)
            scans[place] = kept
        return (self._read(reader, number, 0) for reader, number in held)


class _Row:
    """What is kept of a row that was read."""

    __slots__ = ("digest", "number", "tasks", "tokens")

    def __init__(self, number: int, group: Group) -> None:
        content = hashlib.blake2b(digest_size=8)
        for one in group.trajectories:
            sides = one.columns.get("preferred")
            if sides is not None and sides[0] < 0:  # another row's answer, whatever stands beside this one
                continue
            content.update(one.columns["tokens"].tobytes())
            content.update(one.columns["loss_mask"].tobytes())
            if sides is not None:  # what one likes and another does not is no double
                content.update(sides.tobytes())
        self.number = number
        self.digest = int.from_bytes(content.digest(), "little")
        self.tasks = tasks_of(group.prompt) or frozenset({self.digest >> 1})
        self.tokens = sum(len(one.columns) for one in group.trajectories)


WORDS: Mapping[str, str] = {
    "rows": "rows",
    "trained_rows": "to train",
    "heldout_rows": "of held-out tasks",
    "evaluated_rows": "of the evaluation's prompts, left out",
    "duplicates": "double, left out",
    "think_blocks": "think blocks put in",
    "rendered": "without tokens of this model, tokenised anew",
    "rewritten_rows": "with earlier turns that the template rewrites",
    "not drawn": "not drawn (corpus.rows)",
    "long_rows": "too long, left out",
    "split_rows": "too long, split",
    "pieces": "pieces of these",
    "long_turns": "turns too long for any piece",
    MARKED: "turns marked",
}
ONE: Mapping[str, str] = {  # of a single one, where WORDS are of several
    "rows": "row",
    "think_blocks": "think block put in",
    "rewritten_rows": "with an earlier turn that the template rewrites",
    "pieces": "piece of these",
    "long_turns": "turn too long for any piece",
    MARKED: "turn marked",
}


def _joined(rows: Iterator[frozenset[int]] | Any) -> dict[int, int]:
    """Key -> the least of all keys that rows join with it."""
    parent: dict[int, int] = {}

    def root(key: int) -> int:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for keys in rows:
        for key in keys:
            parent.setdefault(key, key)
        for one, other in itertools.pairwise(sorted(keys)):
            low, high = sorted((root(one), root(other)))
            parent[high] = low
    return {key: root(key) for key in parent}
