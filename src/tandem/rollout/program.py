"""One program while it runs: its contexts, token for token, and the environment that it plays in."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import numpy as np

from tandem.columns import Columns
from tandem.program.episode import Observed
from tandem.rollout.trajectory import flatten
from tandem.types import Completion, Constraint, Failure, Message, Prompt, Trajectory, Turn


class Playing(Protocol):
    """What rollouts need of an episode: program/pool.py has the one that runs elsewhere."""

    said: list[Message]  # since the prompt; `observe` adds what it observes
    until_s: float  # none of its calls goes past it

    @property
    def counts(self) -> Mapping[str, int]: ...  # of what happened so far

    def recall(self, said: Sequence[Message], counts: Mapping[str, int], earned: float, /) -> None: ...  # and go on

    def observe(self, last: bool = False, /) -> Future[Observed | Failure]: ...

    def prepare(self) -> None: ...

    def score(self, unheard: int = 0, /) -> Future[float | Failure]: ...

    def teardown(self) -> None: ...


class Episodes(Protocol):
    """What rollouts need of an EnvironmentPool. `until_s` is on time.monotonic's clock."""

    def episode(self, prompt: Prompt, until_s: float, /) -> Playing: ...


@dataclass(slots=True)
class Segment:
    """A context that only grows, and its turns."""

    start: tuple[int, ...]
    seed: int
    messages: Sequence[Message]  # that `start` renders
    begun: int = 0  # of what was said since the prompt: before it
    cause: str = ""  # see Trajectory
    turns: list[Turn] = field(default_factory=list)

    @property
    def context(self) -> tuple[int, ...]:
        """The tokens of the next request: all of it, token for token."""
        parts = ((*turn.completion.tokens, *turn.observation_tokens) for turn in self.turns)
        return (*self.start, *(token for part in parts for token in part))

    @property
    def starts(self) -> list[int]:
        """Where in its context each turn begins."""
        lengths = (len(turn.completion.columns) + len(turn.observation_tokens) for turn in self.turns[:-1])
        return [*accumulate(lengths, initial=len(self.start))]


def drawn(segments: Sequence[Segment], carried: Completion | None) -> list[Columns]:
    """All that was sampled, with that of a turn that has not ended."""
    said = [turn.completion.columns for segment in segments for turn in segment.turns]
    return [columns for columns in (*said, *([carried.columns] if carried is not None else [])) if len(columns)]


@dataclass(slots=True, eq=False)
class Program:
    """One program while it runs."""

    id: str
    place: int  # of its prompt
    prompt: Prompt
    episode: Playing
    segments: list[Segment]
    requests: int = 0
    sampled: int = 0  # tokens, in all turns that have ended
    drawn: int = 0  # in the one that has not, where somebody counts
    carried: Completion | None = None  # what was drawn of the turn before its request was withdrawn, to go on later
    unheard: int = 0  # messages since its last turn that no turn answers, where there is none
    last: str = ""  # the limit for which no turn follows
    limits: dict[str, int] = field(default_factory=dict)  # that ended it, as counts
    outcome: float | Failure | None = None  # None while it runs
    observed: list[Observed] = field(default_factory=list)  # that its environment said, in order
    ran: bool = False  # its prompt, before it began anew

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(version, tokens that it drew), in the order of drawing; the versions' order too."""
        counts = Counter[int]()
        for columns in drawn(self.segments, self.carried):
            for version, count in zip(*np.unique(columns["versions"], return_counts=True), strict=True):
                counts[int(version)] += int(count)
        return sorted(counts.items())

    @property
    def drawn_tokens(self) -> int:
        """Tokens of all its turns, of the one that has not ended too."""
        return sum(map(len, drawn(self.segments, self.carried)))

    @property
    def request_id(self) -> str:
        """Of its last request."""
        again = f"+{len(self.carried.columns)}" if self.carried is not None else ""
        return f"{self.id}/{self.requests - 1}{again}"

    @property
    def group(self) -> str:
        """Of it and its siblings."""
        return self.id.rpartition("/")[0]

    def count(self, new: Columns) -> None:
        self.drawn += len(new)

    @property
    def constraint(self) -> Constraint | None:
        """Of its present turn: whoever asks for a turn names it."""
        return self.observed[-1].constraint if self.observed else self.prompt.constraint

    @property
    def turns(self) -> list[Turn]:
        return self.segments[-1].turns

    @property
    def trajectories(self) -> list[Trajectory]:
        assert self.outcome is not None, self.id
        observations = sum(bool(turn.observation_tokens) for segment in self.segments for turn in segment.turns)
        seen = {"tool_calls": 0} if self.prompt.tools else {"observations": observations}
        counts = Counter({**seen, **self.episode.counts, **self.limits})
        if unreadable := sum(len(message.faults) for message in self.episode.said if message.sampled):
            counts["unreadable_calls"] = unreadable
        counts.update(f"split_{segment.cause}" for segment in self.segments if segment.cause not in ("", "fold"))
        found, first_turn = list[Trajectory](), 0
        ends = [*(segment.begun for segment in self.segments[1:]), None]
        for number, (segment, end) in enumerate(zip(self.segments, ends, strict=True)):
            known = (segment.start, segment.turns, self.outcome, number, {} if number else counts, first_turn)
            flat = flatten(self.id, self.prompt.id, *known)
            said = tuple(self.episode.said[segment.begun : end])
            found.append(dataclasses.replace(flat, cause=segment.cause, said=said))
            first_turn += len(segment.turns)
        return found


@dataclass(frozen=True, slots=True)
class Played:
    """What came of a program from outside, and which version drew how much of it: enough to have it again.

    >>> Played("p/1/0", ((0, 3), (1, 2)), (), (), 1.0).spans
    ((0, 3), (1, 2))
    """

    id: str
    spans: tuple[tuple[int, int], ...]  # (version, tokens)
    said: tuple[Message, ...]  # since the prompt, by the model and its environment
    observed: tuple[Observed, ...]  # one a turn that the environment heard
    outcome: float | Failure
    requests: int = 1
    limits: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program) -> Played:
        assert program.outcome is not None, program.id
        heard = (tuple(program.episode.said), tuple(program.observed), program.outcome)
        return cls(program.id, tuple(program.spans), *heard, program.requests, program.limits, program.episode.counts)


@dataclass(frozen=True, slots=True)
class Paused:
    """A program that runs, as it is kept: tokens so far, from which its keys and values are computed again.

    An environment with a state is not kept: its program begins anew.
    """

    id: str
    prompt: Prompt
    segments: tuple[Segment, ...]
    said: tuple[Message, ...]
    observed: tuple[Observed, ...]
    counts: Mapping[str, int]
    asked: str  # what it waits for: engine, environment, reward; "": its group's siblings
    requests: int
    sampled: int
    carried: Completion | None
    unheard: int
    last: str
    limits: dict[str, int]
    outcome: float | Failure | None
    anew: bool = False  # its environment had a state

    @classmethod
    def of(cls, program: Program, asked: str) -> Paused:
        episode = program.episode
        anew = program.outcome is None and bool(getattr(episode, "lasts", False))
        said = list(episode.said)
        while asked == "environment" and not said[-1].sampled:  # it has answered, and nobody took it
            said.pop()
        return cls(
            program.id,
            program.prompt,
            tuple(program.segments),
            tuple(said),
            tuple(program.observed),
            dict(episode.counts),
            asked,
            program.requests,
            program.sampled,
            program.carried,
            program.unheard,
            program.last,
            program.limits,
            program.outcome,
            anew,
        )

    @property
    def drawn_tokens(self) -> int:
        return sum(map(len, drawn(self.segments, self.carried)))

    def program(self, episode: Playing) -> Program:
        """Going on in a new run of its environment."""
        segments = [dataclasses.replace(segment, turns=list(segment.turns)) for segment in self.segments]
        if self.anew:
            first = dataclasses.replace(segments[0], turns=[])
            return Program(self.id, 0, self.prompt, episode, [first], ran=self.drawn_tokens > 0)
        episode.recall(self.said, self.counts, sum(one.reward for one in self.observed))
        return Program(
            self.id,
            0,
            self.prompt,
            episode,
            segments,
            requests=self.requests,
            sampled=self.sampled,
            carried=self.carried,
            unheard=self.unheard,
            last=self.last,
            limits=dict(self.limits),
            outcome=self.outcome,
            observed=list(self.observed),
        )
