"""Turns to a trajectory: flattened exactly as sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tandem.columns import Columns
from tandem.types import Failure, Group, Trajectory, Turn


def flatten(
    program_id: str,
    prompt_id: str,
    prompt_tokens: Sequence[int],
    turns: Sequence[Turn],
    outcome: float | Failure,
    segment: int = 0,
    counts: Mapping[str, int] | None = None,
) -> Trajectory:
    """One trajectory of T = prompt + completions + observations tokens, in the order they entered the context.

    Only completion tokens are in the loss mask; each keeps what its completion knows of it. `outcome` is the total
    reward, or why there is none.

    >>> from tandem.types import Completion, StopReason
    >>> said = Completion("r", Columns.of(tokens=(7, 2), logprobs=(-0.3, -0.1), versions=(4, 4)), StopReason.STOP_TOKEN)
    >>> flatten("p/0/0", "p", (1,), (Turn(said, (9,)),), 1.0).columns["versions"].tolist()
    [-1, 4, 4, -1]
    """
    parts = [Columns.of(tokens=prompt_tokens)]
    for turn in turns:
        said = turn.completion.columns
        assert "logprobs" in said and "versions" in said, f"{turn.completion.request_id} has {', '.join(said.arrays)}"
        parts += [said.having(loss_mask=np.ones(len(said), bool)), Columns.of(tokens=turn.observation_tokens)]
    nothing = Columns.of(tokens=(), loss_mask=(), logprobs=(), versions=())
    return Trajectory(
        program_id,
        prompt_id,
        Columns.concat([nothing, *parts]),
        reward=0.0 if isinstance(outcome, Failure) else outcome,
        stop_reason=turns[-1].completion.stop_reason if turns else None,
        failure=outcome if isinstance(outcome, Failure) else None,
        seconds=sum(turn.completion.finished_s - turn.completion.submitted_s for turn in turns),
        counts={"tool_calls": sum(bool(turn.observation_tokens) for turn in turns)} if counts is None else counts,
        segment=segment,
    )


def trajectory_rows(groups: Iterable[Group], decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
    """A row a trajectory for `write_trajectories`; `decode` turns token ids into text.

    `text` is everything after the prompt, observations included; `context` what a segment after the first begins with.
    """
    rows = []
    for group in groups:
        for trajectory in group.trajectories:
            row: dict[str, Any] = {
                "program_id": trajectory.program_id,
                "segment": trajectory.segment,
                "prompt_id": trajectory.prompt_id,
                "prompt": [message.row() for message in group.prompt.messages],
                **({"cause": trajectory.cause, "context": decode(_context(trajectory))} if trajectory.segment else {}),
                "answer": group.prompt.record.get("answer"),
                "text": decode(trajectory.columns["tokens"][_first_sampled(trajectory) :].tolist()),
                "reward": None if trajectory.failure else trajectory.reward,
                "sampled_tokens": trajectory.num_sampled,
                "stop_reason": trajectory.stop_reason.value if trajectory.stop_reason else None,
                "failure": None,
            }
            if trajectory.failure:
                row["failure"] = {"where": trajectory.failure.where, "reason": trajectory.failure.reason}
            rows.append(row)
    return rows


def _context(trajectory: Trajectory) -> list[int]:
    return trajectory.columns["tokens"][: _first_sampled(trajectory)].tolist()


def _first_sampled(trajectory: Trajectory) -> int:
    mask = trajectory.columns["loss_mask"]
    return int(mask.argmax()) if mask.any() else len(mask)
