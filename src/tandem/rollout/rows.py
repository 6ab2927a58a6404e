"""Trajectories as lines of `trajectories/step-N.jsonl`; docs/configs.md lists the keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from tandem.columns import Array, Columns
from tandem.rollout.pieces import Pieces
from tandem.types import Group, Message, Sample, Trajectory

DECIMALS = 3  # of a log-prob
SIDES = {1: "chosen", 0: "rejected", -1: "of another prompt"}  # by the column `preferred`


def trajectory_rows(
    groups: Iterable[Group],
    pieces: Pieces,
    keep_tokens: bool = True,
    facts: Callable[[str], dict[str, Any]] = lambda prompt_id: {},
) -> Iterator[dict[str, Any]]:
    """A row a trajectory for `write_trajectories`; `tokens` of a row is what is known of each, where they are kept.
    `facts` has further keys by prompt id.

    `text` is everything after the prompt, observations included; `context` what the model read before, which a first
    segment's row has with its tokens only: without them the prompt's messages say it.
    """
    for group in groups:
        contexts: dict[bytes, tuple[str, list[int]]] = {}  # siblings read the same
        for trajectory in group.trajectories:
            tokens = trajectory.columns["tokens"]
            first = _first_sampled(trajectory)
            before, ids = tokens[:first], tokens[first:].tolist()
            read = keep_tokens or trajectory.segment > 0
            if read and before.tobytes() not in contexts:
                context = pieces.decode(before.tolist())
                contexts[before.tobytes()] = context, pieces.lengths(before.tolist(), context) if keep_tokens else []
            context, lengths = contexts.get(before.tobytes(), ("", []))
            text = pieces.decode(ids)
            row: dict[str, Any] = {
                "program_id": trajectory.program_id,
                "segment": trajectory.segment,
                "prompt_id": trajectory.prompt_id,
                "prompt": [message.row() for message in group.prompt.messages],
                **({"cause": trajectory.cause} if trajectory.segment else {}),
                **({"context": context} if read else {}),
                "answer": group.prompt.record.get("answer"),
                "text": text,
                "reward": None if trajectory.failure else trajectory.reward,
                "sampled_tokens": trajectory.num_sampled,
                "stop_reason": trajectory.stop_reason.value if trajectory.stop_reason else None,
                "failure": None,
                **facts(trajectory.prompt_id),
            }
            if "preferred" in trajectory.columns:
                row["side"] = SIDES[int(trajectory.columns["preferred"][0])]
            if trajectory.failure:
                row["failure"] = {"where": trajectory.failure.where, "reason": trajectory.failure.reason}
            if any(trajectory.counts.values()):
                row["counts"] = dict(trajectory.counts)
            if trajectory.said:
                row["said"] = _said(trajectory)
            if keep_tokens:
                row["tokens"] = _kept(trajectory, [*lengths, *pieces.lengths(ids, text)])
            yield row


def credits(ids: Iterable[str], samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """What the rows of these trajectories get once the learner has its batch; nothing where one was not in it."""
    given = {sample.id: sample.columns for sample in samples if "advantages" in sample.columns}
    return [{"advantages": _credit(given[name])} if name in given else {} for name in ids]


def _credit(columns: Columns) -> list[Any]:
    return _runs(columns["advantages"][columns["loss_mask"]].round(DECIMALS))


def _kept(trajectory: Trajectory, lengths: list[int]) -> dict[str, Any]:
    columns = trajectory.columns
    mask = columns["loss_mask"]
    runs = _runs(mask)
    kept: dict[str, Any] = {
        "ids": columns["tokens"].tolist(),
        "chars": lengths,
        "sampled": [*([0] if runs[:1] == [True] else []), *runs[1::2]],
    }
    if "logprobs" in columns:
        kept["logprobs"] = (columns["logprobs"][mask].round(DECIMALS) + 0.0).tolist()  # -0.0 is 0.0
    if "versions" in columns:
        kept["versions"] = _runs(columns["versions"][mask])
    return kept


def _runs(values: Array) -> list[Any]:
    """[value, how many, next value, how many, ...]

    >>> _runs(np.array([7, 7, 9]))
    [7, 2, 9, 1]
    """
    if not len(values):
        return []
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    counts = np.diff(np.append(starts, len(values)))
    return [part for run in zip(values[starts].tolist(), counts.tolist(), strict=True) for part in run]


def _said(trajectory: Trajectory) -> list[dict[str, Any]]:
    """Who spoke, and what the model's turns earned by themselves."""
    spoken = [_without_content(message) for message in trajectory.said]
    if (earned := trajectory.columns.get("step_rewards")) is not None:
        numbers = trajectory.columns.get("turns")
        numbers = np.where(trajectory.columns["loss_mask"], 0, -1) if numbers is None else numbers
        ends = np.flatnonzero(
            (numbers >= 0) & (numbers != np.append(numbers[1:], -1))
        )  # its reward is at its last token
        turns = [row for row, message in zip(spoken, trajectory.said, strict=True) if message.sampled]
        for row, reward in zip(turns, earned[ends], strict=False):
            row |= {"reward": float(reward)} if reward else {}
    return spoken


def _without_content(message: Message) -> dict[str, Any]:
    """Who spoke, the calls of tools, and what was wrong with them; what was said is in the text."""
    spoken = {name: value for name, value in message.row().items() if name != "content"}
    if message.role == "assistant" and not message.sampled:
        spoken["sampled"] = False
    return spoken | ({"faults": list(message.faults)} if message.faults else {})


def _first_sampled(trajectory: Trajectory) -> int:
    mask = trajectory.columns["loss_mask"]
    return int(mask.argmax()) if mask.any() else len(mask)
