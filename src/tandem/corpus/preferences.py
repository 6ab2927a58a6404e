"""Preferences as groups of two: readers of pairs, of ratings, and of pairs that scores make of a prompt's answers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from tandem.columns import Array, Columns
from tandem.corpus.pairs import PAIR, RATED, PairRows, RatedRows, Told, Words
from tandem.corpus.reader import Reader, refused
from tandem.corpus.sources import readers_of, rows_of
from tandem.corpus.trajectories import RunReader
from tandem.errors import ConfigError, CorpusError
from tandem.types import Group, Prompt, Trajectory

if TYPE_CHECKING:
    from tandem.algo.config import PreferenceConfig
    from tandem.corpus.config import CorpusConfig
    from tandem.program.render import Renderer

LIKED, DISLIKED, MISMATCHED = 1, 0, -1  # of the column `preferred`
READ = 16  # rows that are kept: whoever reads in order asks for the last ones again
LOOKED_AT = 100  # rows at a file's beginning that may be broken before one says what it holds


class Rated(Protocol):
    """A source by number, with what it lists and what it does not."""

    @property
    def digest(self) -> str: ...

    @property
    def left_out(self) -> Mapping[str, int]: ...

    def __len__(self) -> int: ...

    def place(self, number: int) -> str: ...


class Sides(Rated, Protocol):
    """Pairs."""

    def sides(self, number: int) -> tuple[Told, Told, float]:
        """As PairRows'."""
        ...


class Ratings(Rated, Protocol):
    """Answers that were liked or not."""

    def rated(self, number: int) -> tuple[Told, bool]: ...


class Scores(Rated, Protocol):
    """Answers with scores. Those that were asked the same are compared."""

    def told(self, number: int) -> Told: ...

    def score(self, number: int) -> float: ...

    def asked(self, number: int) -> str: ...


class RunScores:
    """What a run sampled, by its rewards. A program's group is of one prompt and one step."""

    def __init__(self, reader: RunReader) -> None:
        self.reader, self.digest, self.left_out = reader, reader.digest, reader.left_out

    def __len__(self) -> int:
        return len(self.reader)

    def place(self, number: int) -> str:
        return self.reader.place(number)

    def told(self, number: int) -> Told:
        group = self.reader.group(number)
        if len(group.trajectories) > 1:
            raise refused(
                "several sequences",
                self.place(number),
                "its context began anew (rollout.history), so it is no one sequence of tokens.",
            )
        (one,) = group.trajectories
        columns = Columns.of(tokens=one.columns["tokens"], loss_mask=one.columns["loss_mask"])
        return Told(group.prompt.messages, one.said, columns, group.prompt.tools)

    def score(self, number: int) -> float:
        return self.reader.programs[number].reward

    def asked(self, number: int) -> str:
        return self.reader.programs[number].id.rpartition("/")[0]


class Ranked:
    """Pairs of answers that were asked the same: the best with the worst, or all that differ enough.

    Answers of equal scores are no pair, nor are those that differ by less than `least_margin`. `strict`: CorpusError
    for a row without a score, which is counted else.
    """

    def __init__(
        self, scores: Scores, which: Literal["best_worst", "all"], least_margin: float, *, strict: bool = True
    ) -> None:
        self.scores, self.digest = scores, f"{scores.digest} {which} {least_margin!r}"
        self.left_out = Counter(scores.left_out)
        groups: dict[str, list[tuple[float, int]]] = {}
        for number in range(len(scores)):
            try:
                groups.setdefault(scores.asked(number), []).append((-scores.score(number), number))
            except CorpusError as error:
                if strict:
                    raise CorpusError(error.fault, f"{error} (corpus.bad=count leaves such rows out)") from error
                self.left_out[f"refused: {error.fault}"] += 1
        self.pairs: list[tuple[int, int, float]] = []  # the better, the worse, by how much
        for answers in groups.values():
            ranked = sorted(answers)
            both = itertools.combinations(ranked, 2) if which == "all" else [(ranked[0], ranked[-1])]
            found = [
                (a, b, bad - good) for (good, a), (bad, b) in both if bad - good > 0 and bad - good >= least_margin
            ]
            self.pairs += found
            self.left_out["prompts whose answers do not differ enough"] += not found

    def __len__(self) -> int:
        return len(self.pairs)

    def place(self, number: int) -> str:
        better, worse, _ = self.pairs[number]
        return f"{self.scores.place(better)} and {self.scores.place(worse)}"

    def sides(self, number: int) -> tuple[Told, Told, float]:
        better, worse, margin = self.pairs[number]
        return self.scores.told(better), self.scores.told(worse), margin


class RatedSides:
    """The sides of pairs, each rated: the chosen one was liked, the rejected one was not."""

    def __init__(self, pairs: Sides) -> None:
        self.pairs, self.digest, self.left_out = pairs, pairs.digest, pairs.left_out
        self._sides = lru_cache(maxsize=READ)(pairs.sides)

    def __len__(self) -> int:
        return 2 * len(self.pairs)

    def place(self, number: int) -> str:
        return f"{self.pairs.place(number // 2)}, {PAIR[1 + number % 2]}"

    def rated(self, number: int) -> tuple[Told, bool]:
        chosen, rejected, _ = self._sides(number // 2)
        return (rejected, False) if number % 2 else (chosen, True)


class RatedScores:
    """Answers of which those with a score of at least so much were liked."""

    def __init__(self, scores: Scores, liked_at_least: float) -> None:
        self.scores, self.least = scores, liked_at_least
        self.digest, self.left_out = f"{scores.digest} {liked_at_least!r}", scores.left_out

    def __len__(self) -> int:
        return len(self.scores)

    def place(self, number: int) -> str:
        return self.scores.place(number)

    def rated(self, number: int) -> tuple[Told, bool]:
        return self.scores.told(number), self.scores.score(number) >= self.least


class PairReader:
    """Groups of the chosen answer and the rejected one. `most_rows`: of a microbatch, which has to have both."""

    def __init__(self, name: str, pairs: Sides, most_rows: int, share_prefix: bool = True) -> None:
        self.name, self.pairs, self.digest, self.left_out = name, pairs, pairs.digest, pairs.left_out
        self.most_rows, self.share_prefix = most_rows, share_prefix

    def __len__(self) -> int:
        return len(self.pairs)

    def place(self, number: int) -> str:
        return self.pairs.place(number)

    def group(self, number: int) -> Group:
        place, (chosen, rejected, margin) = self.place(number), self.pairs.sides(number)
        if np.array_equal(chosen.columns["tokens"], rejected.columns["tokens"]):
            raise refused("equal sides", place, "the chosen and the rejected answer are the same. Remove the row.")
        rows = rows_of_pair(chosen.columns, rejected.columns, self.share_prefix)
        if rows > self.most_rows:
            raise refused(
                "too long for a microbatch",
                place,
                f"its answers take {rows:,} rows, and both have to be in one microbatch, which has {self.most_rows:,}. "
                f"Raise learner.microbatch_tokens to {rows:,}, or leave such rows out.",
            )
        return _group(f"{self.name}/{number}", chosen, ((LIKED, chosen), (DISLIKED, rejected)), margin)


class RatingReader:
    """Groups of a rated answer, and of another rating's answer to the same prompt, of which KTO's KL is estimated.

    That is the last one before it, in the source's order and around its beginning, whose prompt is another. (TRL takes
    the one before within the rows that it maps at once, whatever its prompt.)
    """

    def __init__(self, name: str, ratings: Ratings) -> None:
        self.name, self.ratings, self.digest, self.left_out = name, ratings, ratings.digest, ratings.left_out
        self._rated = lru_cache(maxsize=READ)(ratings.rated)

    def __len__(self) -> int:
        return len(self.ratings)

    def place(self, number: int) -> str:
        return self.ratings.place(number)

    def group(self, number: int) -> Group:
        rated, liked = self._rated(number)
        crossed = self._crossed(number, rated)
        sides = ((LIKED if liked else DISLIKED, rated), (MISMATCHED, crossed))
        return _group(f"{self.name}/{number}", rated, sides)

    def _crossed(self, number: int, rated: Told) -> Told:
        """The prompt of one with the answer of another."""
        prompt = _prompt_tokens(rated.columns)
        for back in range(1, len(self)):
            try:
                other, _ = self._rated((number - back) % len(self))
            except CorpusError:  # which is told where its own turn comes
                continue
            theirs = _prompt_tokens(other.columns)
            if not np.array_equal(theirs, prompt):
                answer = other.columns.slice(len(theirs))
                columns = Columns.concat([Columns.of(tokens=prompt, loss_mask=np.zeros(len(prompt), bool)), answer])
                return Told(rated.prompt, other.said, columns, rated.tools)
        raise ConfigError(
            f"{self.place(number)}: all ratings of {self.name} are of one prompt, and KTO pairs each answer with "
            "another prompt. Give ratings of several, or learn from pairs."
        )


def preferences_of(
    config: CorpusConfig,
    preference: PreferenceConfig,
    renderer: Renderer,
    *,
    most_rows: int,
    share_prefix: bool = True,
) -> list[Reader]:
    """A reader a source, of what a preference loss learns from. CorpusError for a source that has none."""

    def make(name: str, source: str) -> Reader:
        found = _source(name, source, config, preference, renderer)
        if isinstance(found, PairRows | Ranked):
            return PairReader(name, found, most_rows, share_prefix)
        return RatingReader(name, found)

    return readers_of(config, renderer, make)


def _source(
    name: str, source: str, config: CorpusConfig, preference: PreferenceConfig, renderer: Renderer
) -> PairRows | Ranked | Ratings:
    """A run's folder by its rewards, a file by what its rows have."""
    path, rates, least = Path(source).expanduser(), preference.loss == "kto", preference.liked_at_least
    scores: Scores
    if (path / "trajectories").is_dir():
        scores = RunScores(RunReader(name, path, config, renderer))
    else:
        for setting, off in (("turns", "all"), ("reward_at_least", None)):
            if (value := getattr(config, setting)) != off:
                raise ConfigError(
                    f"corpus.{setting} is {value}, and preferences of a file, {source}, do not read it: it is of a "
                    f"run's programs. Leave corpus.{setting} out."
                )
        rows, words = rows_of(source, config), Words(renderer)
        pairs = PairRows(rows, config, words)
        fields = _fields(pairs)
        if "chosen" in fields:
            return RatedSides(pairs) if rates else pairs
        scores = rated = RatedRows(rows, config, words)
        if rates and "label" in fields:
            return rated
    if not rates:
        return Ranked(scores, preference.ranked, preference.least_margin, strict=config.bad == "stop")
    if least is None:
        raise ConfigError(
            f"{source} has scores, and kto learns from answers that were liked or not. Set preference.liked_at_least "
            "to the least score of those that were, or choose a loss of pairs."
        )
    return RatedScores(scores, least)


def _fields(rows: PairRows) -> Mapping[str, Any]:
    """The first row that is one. CorpusError where it is no preference's."""
    for number in range(min(len(rows), LOOKED_AT)):
        try:
            row = rows.row(number)
        except CorpusError:
            continue
        if "chosen" in row or ("completion" in row and ("label" in row or "score" in row)):
            return row
        raise refused(
            "no preference",
            rows.place(number),
            f"it has {', '.join(row) or 'nothing'}. A pair has {', '.join(PAIR)}, a rated answer "
            f"{', '.join(RATED[:2])} and {' or '.join(RATED[2:])}. Where a file calls one otherwise: --set "
            "corpus.fields=chosen=NAME",
        )
    return rows.row(0)


def rows_of_pair(chosen: Columns, rejected: Columns, share_prefix: bool) -> int:
    """Rows of the pack that two answers take.

    >>> mask = [False, True, True]
    >>> one, other = (Columns.of(tokens=tokens, loss_mask=mask) for tokens in ((1, 2, 3), (1, 4, 3)))
    >>> rows_of_pair(one, other, True), rows_of_pair(one, other, False)
    (3, 4)
    """
    one, other = (columns["tokens"][: np.flatnonzero(columns["loss_mask"])[-1]] for columns in (chosen, rejected))
    limit = min(len(one), len(other))
    apart = one[:limit] != other[:limit]
    alike = int(apart.argmax()) if apart.any() else limit
    return len(one) + len(other) - (alike if share_prefix else 0)


def _group(name: str, asked: Told, sides: Sequence[tuple[int, Told]], margin: float = 0.0) -> Group:
    prompt = Prompt(name, asked.prompt, {} if asked.task is None else {"task": asked.task}, tuple(asked.tools))
    trajectories = []
    for sibling, (side, told) in enumerate(sides):
        columns = told.columns.having(preferred=np.full(len(told.columns), side, np.int32))
        if margin:
            columns = columns.having(margins=np.full(len(columns), margin))
        trajectories.append(Trajectory(f"{name}/{sibling}", name, columns, said=told.said))
    return Group(prompt, tuple(trajectories))


def _prompt_tokens(columns: Columns) -> Array:
    return columns["tokens"][: int(columns["loss_mask"].argmax())]
