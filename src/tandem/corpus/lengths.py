"""Sequences that are too long: split at turns with their context, left out, or an error. Nothing is cut in silence."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Literal

import numpy as np

from tandem.columns import Array, Columns
from tandem.corpus.reader import refused
from tandem.types import Group, Trajectory

Long = Literal["split", "drop", "stop"]
MARKED = "turns marked"  # corpus.error_turns, corpus.repeated_turns


def fitted(group: Group, limit: int, long: Long, place: str) -> tuple[Group, Counter[str]]:
    """The group with sequences of at most `limit` tokens, and what was done for it. CorpusError under "stop".

    Tokens behind the last trained one are left off: nothing is learned of them. Counted are `split_rows` and `pieces`,
    `long_turns` (that do not fit beside their prompt and the turn before: not trained), `long_rows` (left out whole),
    and of a row that stays the turns that are marked.
    """
    trimmed = [replace(one, columns=_trimmed(one.columns)) for one in group.trajectories]
    longest = max((len(one.columns) for one in trimmed), default=0)
    counts = Counter({MARKED: sum(_marked(one.columns) for one in trimmed)})
    if longest <= limit:
        return replace(group, trajectories=tuple(trimmed)), +counts
    if long == "stop":
        raise refused(
            "too long",
            place,
            f"{longest:,} tokens, and {limit:,} are allowed (corpus.max_tokens, the model's positions). Raise it, set "
            "corpus.long to split or drop, or shorten the row.",
        )
    several = len({one.program_id for one in trimmed}) > 1  # to be compared, whole
    if long == "drop" or several:
        return replace(group, trajectories=()), Counter({"long_rows": 1})
    pieces: list[Trajectory] = []
    for one in trimmed:
        if len(one.columns) <= limit:
            parts, left = [one.columns], 0
        elif group.prompt.messages:
            parts, left = at_turns(one.columns, limit)
        else:
            parts, left = windows(one.columns, limit), 0
        counts["long_turns"] += left
        for columns in parts:
            cause = "split" if columns is not parts[0] else one.cause
            pieces.append(replace(one, columns=columns, segment=len(pieces), cause=cause))
    if pieces:
        counts["split_rows"], counts["pieces"] = 1, len(pieces)
    else:
        counts["long_rows"] = 1
    return replace(group, trajectories=tuple(pieces)), +counts


def at_turns(columns: Columns, limit: int) -> tuple[list[Columns], int]:
    """Pieces of a conversation, and how many of its turns fit in none.

    Each begins with the prompt (all before the first trained token), goes on with the last whole turns before its own,
    at least one, in up to half of what the prompt leaves, untrained; then come its own turns. So each turn is trained
    once at most, after what was said just before it.
    """
    mask = columns["loss_mask"]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    starts, ends = edges[::2].tolist(), edges[1::2].tolist()
    room, turn, left = limit - starts[0], 0, 0
    pieces = []
    while turn < len(starts):
        first = max(turn - 1, 0)
        if ends[turn] - starts[first] > room:
            turn, left = turn + 1, left + 1
            continue
        while first > 0 and starts[turn] - starts[first - 1] <= min(room // 2, room - (ends[turn] - starts[turn])):
            first -= 1
        last = turn
        while last + 1 < len(starts) and ends[last + 1] - starts[first] <= room:
            last += 1
        places = np.concatenate([np.arange(starts[0]), np.arange(starts[first], ends[last])])
        piece = columns.take(places)
        pieces.append(piece.having(loss_mask=piece["loss_mask"] & (places >= starts[turn])))
        turn = last + 1
    return pieces, left


def windows(columns: Columns, limit: int) -> list[Columns]:
    """A document in pieces of at most `limit` tokens. Each begins with the last token of the one before, untrained, so
    that every token but the document's first is trained once."""
    assert limit >= 2, f"no piece of {limit} tokens has one to train"
    pieces = []
    for start in range(0, len(columns) - 1, limit - 1):
        piece = columns.slice(start, start + limit)
        mask: Array = piece["loss_mask"].copy()
        mask[0] = False
        if mask.any():
            pieces.append(piece.having(loss_mask=mask))
    return pieces


def _trimmed(columns: Columns) -> Columns:
    trained = np.flatnonzero(columns["loss_mask"])
    return columns.slice(0, int(trained[-1]) + 1) if len(trained) else columns


def _marked(columns: Columns) -> int:
    """Turns."""
    failed = columns.get("failed")
    return 0 if failed is None else int((failed[1:] & ~failed[:-1]).sum())  # what comes first is never a turn
