"""One program while it runs: its contexts, token for token, and the environment that it plays in."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from tandem.columns import Columns
from tandem.program.episode import Observed
from tandem.rollout.trajectory import flatten
from tandem.types import Completion, Failure, Message, Prompt, Trajectory, Turn


class Playing(Protocol):
    """What rollouts need of an episode: program/pool.py has the one that runs elsewhere."""

    said: list[Message]  # since the prompt; `observe` adds what it observes

    @property
    def counts(self) -> Mapping[str, int]: ...  # of what happened so far

    def observe(self, last: bool = False, /) -> Future[Observed | Failure]: ...

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
    def turns(self) -> list[Turn]:
        return self.segments[-1].turns

    @property
    def trajectories(self) -> list[Trajectory]:
        assert self.outcome is not None, self.id
        observations = sum(bool(turn.observation_tokens) for segment in self.segments for turn in segment.turns)
        seen = {"tool_calls": 0} if self.prompt.tools else {"observations": observations}
        counts = Counter({**seen, **self.episode.counts, **self.limits})
        if unreadable := sum(len(message.faults) for message in self.episode.said):
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
