"""Turns to a trajectory: flattened exactly as sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tandem.columns import COLUMNS, Columns
from tandem.types import Failure, Trajectory, Turn


def flatten(
    program_id: str,
    prompt_id: str,
    prompt_tokens: Sequence[int],
    turns: Sequence[Turn],
    outcome: float | Failure,
    segment: int = 0,
    counts: Mapping[str, int] | None = None,
    first_turn: int = 0,
) -> Trajectory:
    """One trajectory of T = prompt + completions + observations tokens, in the order they entered the context.

    Only completion tokens are in the loss mask; each keeps what its completion knows of it. `outcome` is the total
    reward, or why there is none. `first_turn` is the number of the first turn within its program: tokens of a program
    of several turns know their turn.

    >>> from tandem.types import Completion, StopReason
    >>> said = Completion("r", Columns.of(tokens=(7, 2), logprobs=(-0.3, -0.1), versions=(4, 4)), StopReason.STOP_TOKEN)
    >>> flatten("p/0/0", "p", (1,), (Turn(said, (9,)),), 1.0).columns["versions"].tolist()
    [-1, 4, 4, -1]
    """
    parts = [Columns.of(tokens=prompt_tokens)]
    several = first_turn + len(turns) > 1
    for number, turn in enumerate(turns, start=first_turn):
        said = turn.completion.columns
        assert "logprobs" in said and "versions" in said, f"{turn.completion.request_id} has {', '.join(said.arrays)}"
        known = said.having(loss_mask=np.ones(len(said), bool), **_of_turn(turn, number if several else None))
        parts += [known, Columns.of(tokens=turn.observation_tokens)]
    nothing = Columns.of(tokens=(), loss_mask=(), logprobs=(), versions=())
    return Trajectory(
        program_id,
        prompt_id,
        Columns.concat([nothing, *parts]),
        reward=0.0 if isinstance(outcome, Failure) else outcome,
        stop_reason=turns[-1].completion.stop_reason if turns else None,
        failure=outcome if isinstance(outcome, Failure) else None,
        seconds=sum(turn.completion.finished_s - turn.completion.submitted_s for turn in turns),
        counts={"observations": sum(bool(turn.observation_tokens) for turn in turns)} if counts is None else counts,
        segment=segment,
    )


def _of_turn(turn: Turn, number: int | None) -> dict[str, np.ndarray]:
    """Columns of its tokens that only programs of several turns, or with rewards or states of steps, have."""
    count = len(turn.completion.columns)
    of_turn: dict[str, np.ndarray] = {} if number is None else {"turns": np.full(count, number, np.int32)}
    for name, value, absent in (("step_rewards", turn.reward, 0.0), ("states", turn.state, "")):
        if value != absent and count:
            of_turn[name] = np.full(count, absent, COLUMNS[name].dtype)
            of_turn[name][-1] = value
    return of_turn
