"""What several tests make of the nouns, and a microbatch read row by row in plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

from hypothesis import strategies as st

from tandem.columns import Columns
from tandem.rollout.trajectory import flatten
from tandem.types import Completion, Microbatch, Request, Sample, StopReason, Trajectory, Turn

SCORED = ("reference_logprobs", "proximal_logprobs", "source_logprobs")  # columns that a forward pass fills in

Held = TypeVar("Held", Sample, Trajectory)


def ended(value: Any) -> Future[Any]:
    """A future that has."""
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def having(noun: Held, **values: Sequence[Any]) -> Held:
    """The same with other columns, or others in place of them."""
    return replace(noun, columns=noun.columns.having(**values))


def without(noun: Held, *names: str) -> Held:
    return replace(noun, columns=noun.columns.without(*names))


def column(noun: Held, name: str) -> list[Any]:
    """As plain values."""
    return noun.columns[name].tolist()


def trained(noun: Held) -> list[int]:
    """Positions in the loss mask."""
    return [position for position, mask in enumerate(column(noun, "loss_mask")) if mask]


def sample_of(request: Request, completion: Completion, advantages: Sequence[float]) -> Sample:
    """What the learner takes of a generation, with the engine's log-probs; `advantages` are the generated tokens'."""
    before, count = (0.0,) * len(request.tokens), len(completion.tokens)
    columns = Columns.of(
        tokens=request.tokens + completion.tokens,
        loss_mask=(False,) * len(before) + (True,) * count,
        advantages=(*before, *advantages),
        logprobs=before + completion.logprobs,
    )
    return Sample(request.id, request.program_id, columns)


def paths_of(microbatch: Microbatch) -> list[list[int]]:
    """Of each row: the rows that it attends to, in order of position, itself last."""
    paths: list[list[int]] = []
    bounds = list(pairwise(microbatch.segments_S.tolist()))
    for (start, stop), first, parent in zip(
        bounds, microbatch.first_S.tolist(), microbatch.parent_S.tolist(), strict=True
    ):
        before = paths[bounds[parent][1] - 1][:first] if parent >= 0 else []
        for row in range(start, stop):
            paths.append([*before, *range(start, row + 1)])
    return paths


def owners_of(microbatch: Microbatch) -> list[str]:
    """Of each prediction: the sample that it is of."""
    counts = zip(microbatch.sample_ids, microbatch.sample_tokens.tolist(), strict=True)
    return [name for name, count in counts for _ in range(count)]


@dataclass(frozen=True)
class DrawnTurn:
    sampled: int  # tokens
    observed: int
    reward: float
    state: str


@dataclass(frozen=True)
class Drawn:
    """A program as it was played: turns by segment, and the score of the whole."""

    segments: tuple[list[DrawnTurn], ...]
    score: float


@st.composite
def drawn_programs(draw: st.DrawFn) -> Drawn:
    """Several segments of several turns, some of which sampled nothing; rewards and states of steps, or none."""
    turns = st.builds(
        DrawnTurn,
        st.sampled_from([1, 2, 3, 0]),
        st.integers(0, 3),
        st.sampled_from([0.0, 0.0, 0.5, -0.25]),
        st.sampled_from(["", "here", "there"]),
    )
    segments = draw(st.lists(st.lists(turns, min_size=1, max_size=3), min_size=1, max_size=3))
    return Drawn(tuple(segments), draw(st.sampled_from([0.0, 1.0, 0.3])))


SAMPLED, OBSERVED, ASKED = 100, 200, 300  # below these: tokens of completions, of observations, of prompts


def program_of(drawn: Drawn, number: int, prompt: str) -> list[Trajectory]:
    """Its segments as rollouts flatten them; a token's id tells who wrote it."""
    found, first = [], 0
    for s, segment in enumerate(drawn.segments):
        turns = []
        for t, turn in enumerate(segment):
            tokens = [(7 * number + 3 * t + k) % SAMPLED for k in range(turn.sampled)]
            columns = Columns.of(tokens=tokens, logprobs=[-1.0] * len(tokens), versions=[0] * len(tokens))
            said = Completion(f"{number}/{s}/{t}", columns, StopReason.STOP_TOKEN)
            observed = tuple(SAMPLED + (11 * t + k) % (OBSERVED - SAMPLED) for k in range(turn.observed))
            turns.append(Turn(said, observed, turn.reward, turn.state))
        asked = (OBSERVED, OBSERVED + 1 + s)
        found.append(flatten(f"{prompt}/0/{number}", prompt, asked, turns, drawn.score, s, first_turn=first))
        first += len(segment)
    return found


Forest = tuple[list[int], list[int], list[int], list[list[int]]]


@st.composite
def forests(draw: st.DrawFn) -> Forest:
    """Trees of segments: boundaries, first positions, parents, and every path written out.

    A segment goes on from any position of any one before it in its tree; a plain sample is a tree of one.
    """
    row_start, first, parents, tables = [0], list[int](), list[int](), list[list[int]]()
    for _ in range(draw(st.integers(1, 3))):
        root = len(tables)
        for own in [draw(st.integers(1, 90)), *draw(st.lists(st.integers(1, 40), max_size=4))]:
            parent = draw(st.integers(root, len(tables) - 1)) if len(tables) > root else -1
            before = tables[parent][: draw(st.integers(1, len(tables[parent])))] if parent >= 0 else []
            tables.append([*before, *range(row_start[-1], row_start[-1] + own)])
            first.append(len(before))
            parents.append(parent)
            row_start.append(row_start[-1] + own)
    return row_start, first, parents, tables
