"""What becomes of programs that share an engine's memory: plain functions of what is seen, predicted, set and the time.

No clock, no chance, no state: asked the same, they answer the same, so a record of questions is a test of the answers.
Formulas with their sources: docs/programs.md. A program is *acting* between a turn and its next request; *paused* when
its pages may go and its next request waits until it is restored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from tandem.engine.config import Policy

Phase = Literal["reasoning", "acting", "paused"]
GATED: tuple[Policy, ...] = ("thunder", "oracle")  # pause programs, and let them start when there is room
KEEPING: tuple[Policy, ...] = ("ttl", "continuum", "thunder", "oracle")  # keep pages of acting programs
LEVELS = tuple(round(0.05 * n, 2) for n in range(1, 20))  # of the quantiles that stand for a distribution
EXACT = 16  # programs among which the cheapest set to pause is found exactly


class Seen(Struct, frozen=True, array_like=True):
    """A program as a policy sees it."""

    id: str
    phase: Phase
    pages: int  # that its keys and values take or will, beside those that it shares
    reload_s: float  # to compute them again
    first_s: float  # it came
    since_s: float  # it has been acting, or has asked in vain
    asks: bool = False  # paused, with a request
    turns: int = 0
    due_s: float | None = None  # when its next request comes, where that is known


class Room(Struct, frozen=True):
    """Whether all fit."""

    policy: Policy
    now_s: float
    capacity: int  # pages
    seen: tuple[Seen, ...]
    half_life_s: float
    patience_s: float


class Balance(Struct, frozen=True):
    """Acting programs to pause now, reasoning ones as their turn ends, and paused ones to restore, in order."""

    used: float  # pages, as the policy counts, before
    pause: tuple[str, ...] = ()
    mark: tuple[str, ...] = ()
    restore: tuple[str, ...] = ()


class TurnEnd(Struct, frozen=True):
    """A turn ended, and a tool runs: for how long are the pages kept?"""

    policy: Policy
    ttl_s: float
    tool_s: tuple[float, ...]  # quantiles at LEVELS; none known: ()
    queue_s: float  # that a program waits which lost its pages, over the turns that are left
    reload_s: float
    share: float  # of all pages
    last: float  # probability that no request follows
    due_s: float | None = None  # in so many seconds, where that is known


class Keep(Struct, frozen=True):
    """For how long, and what the alternatives were worth."""

    keep_s: float  # infinite: until memory is short
    worth: tuple[tuple[float, float], ...] = ()  # (seconds, what keeping for them would bring)


class ParkCost(Struct, frozen=True):
    """Whether a paused program's pages go to a file."""

    bytes: int
    free_bytes: int
    write_s: float  # a byte
    read_s: float
    reload_s: float  # to compute them again


def park(cost: ParkCost) -> bool:
    """Where writing and reading take less than computing again, and there is room (InferCept's swap and discard).

    >>> park(ParkCost(10**6, 10**9, 1e-9, 1e-9, 0.1)), park(ParkCost(10**6, 10**9, 1e-7, 1e-9, 0.1))
    (True, False)
    """
    return cost.bytes <= cost.free_bytes and cost.bytes * (cost.write_s + cost.read_s) < cost.reload_s


def decay(seconds: float, half_life_s: float) -> float:
    """What an acting program counts: 2^-t, the only form for tools without memory.

    >>> decay(0.0, 1.0), decay(2.0, 1.0)
    (1.0, 0.25)
    """
    return 2.0 ** -(max(0.0, seconds) / half_life_s)


def continuum_ttl(tool_s: Sequence[float], saved_s: float, levels: Sequence[float] = LEVELS) -> Keep:
    """The tau that maximises P(tool <= tau) * saved_s - tau, of 0 and the quantiles: between two of them P stays.

    saved_s: what a hit saves, the waiting and the computing again.

    >>> continuum_ttl((1.0, 2.0, 30.0), 10.0, (0.3, 0.6, 1.0)).keep_s
    2.0
    """
    worth = ((0.0, 0.0), *((tau, level * saved_s - tau) for tau, level in zip(tool_s, levels, strict=False)))
    best = max(worth, key=lambda one: (one[1], -one[0]))
    return Keep(best[0], worth)


def keep(turn: TurnEnd) -> Keep:
    """Seconds for which the pages of a program stay out of eviction as its tool runs."""
    if turn.policy not in KEEPING:
        return Keep(0.0)
    if turn.policy == "ttl":
        return Keep(turn.ttl_s)
    if turn.policy == "continuum":
        return continuum_ttl(turn.tool_s, (1.0 - turn.last) * (turn.queue_s + turn.reload_s))
    if turn.policy == "oracle" and turn.due_s is not None:
        held_s = turn.due_s * turn.share
        return Keep(math.inf if held_s < turn.reload_s else 0.0, ((turn.due_s, turn.reload_s - held_s),))
    return Keep(math.inf)


def rank(policy: Policy, first_s: float, service_s: float, kept: bool) -> tuple[int, float]:
    """Sorts waiting requests: by what their programs had, or by when these came, behind those whose pages are kept."""
    if policy == "plas":
        return 0, service_s
    return int(not kept), first_s


def counted(room: Room, one: Seen) -> float:
    """Pages that a program which is not paused counts for."""
    if one.phase == "reasoning":
        return float(one.pages)
    acting_s = room.now_s - one.since_s
    if room.policy == "oracle" and one.due_s is not None:
        return float(one.pages) if (one.due_s - room.now_s) * one.pages < one.reload_s * room.capacity else 0.0
    return one.pages * decay(acting_s, room.half_life_s)


def cover(sizes: Sequence[float], costs: Sequence[float], need: float) -> tuple[int, ...]:
    """Which to take for the least cost so that their sizes are `need` or more; all where they are not enough.

    Up to EXACT of them exactly: partial sets that another beats in size and cost are dropped. Beyond, the smallest
    first, and then whatever of them turns out not to be needed is left, the dearest first.

    >>> cover((6, 5, 5), (36, 25, 25), 6)  # the smallest first would take 5 and 5, for 50
    (0,)
    """
    if need <= 0:
        return ()
    if len(sizes) > EXACT:
        return _smallest_first(sizes, costs, need)
    front: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]  # (cost, size up to need, taken), both rising
    for which, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
        more = [(paid + cost, min(need, got + size), (*taken, which)) for paid, got, taken in front]
        front = _undominated(sorted([*front, *more]))
    reached = [one for one in front if one[1] >= need]
    return reached[0][2] if reached else tuple(range(len(sizes)))


def _undominated(sets: list[tuple[float, float, tuple[int, ...]]]) -> list[tuple[float, float, tuple[int, ...]]]:
    kept: list[tuple[float, float, tuple[int, ...]]] = []
    for one in sets:
        if not kept or one[1] > kept[-1][1]:
            kept.append(one)
    return kept


def _smallest_first(sizes: Sequence[float], costs: Sequence[float], need: float) -> tuple[int, ...]:
    taken, got = list[int](), 0.0
    for which in sorted(range(len(sizes)), key=lambda i: (sizes[i], i)):
        if got >= need:
            break
        taken.append(which)
        got += sizes[which]
    for which in sorted(taken, key=lambda i: (-costs[i], i)):
        if got - sizes[which] >= need:
            taken.remove(which)
            got -= sizes[which]
    return tuple(sorted(taken))


def balance(room: Room) -> Balance:
    """Who pauses where programs count for more than there is, and else who may go on.

    Paused are acting programs first, of them the set that is cheapest to compute again; then, as their turns end,
    reasoning ones, the smallest first, all but the first to come. Restored are those that asked too long ago, whatever
    there is; then those that had turns, then others, each the smallest first, as far as they fit; one at least where
    no other goes on.
    """
    here = [one for one in room.seen if one.phase != "paused"]
    counts = {one.id: counted(room, one) for one in here}
    used = sum(counts.values())
    over = used - room.capacity
    acting = [one for one in here if one.phase == "acting"]
    chosen = cover([counts[one.id] for one in acting], [one.reload_s for one in acting], over)
    pause = [acting[i] for i in chosen]
    over -= sum(counts[one.id] for one in pause)
    free = -over
    mark: list[Seen] = []
    if over > 0:
        reasoning = sorted((one for one in here if one.phase == "reasoning"), key=lambda one: (one.pages, -one.first_s))
        first = min(reasoning, key=lambda one: (one.first_s, one.id), default=None)
        for one in reasoning:
            if over > 0 and one is not first:
                mark.append(one)
                over -= one.pages
    paused, marked = (tuple(one.id for one in part) for part in (pause, mark))
    gone = {one.id for one in pause}
    left = [one for one in here if one.id not in gone]
    return Balance(used, paused, marked, tuple(_restored(room, left, free)))


def _restored(room: Room, here: list[Seen], free: float) -> list[str]:
    """Paused programs that ask, as far as `free` pages go."""
    late = {one.id for one in room.seen if one.asks and room.now_s - one.since_s >= room.patience_s}
    restored = list[str]()
    busy = any(one.phase == "reasoning" for one in here)
    for one in restore_order(room):
        if one.pages <= free or one.id in late or not (busy or restored):
            restored.append(one.id)
            free -= one.pages
    return restored


def restore_order(room: Room) -> list[Seen]:
    """Paused programs that ask, the first to be restored first."""

    def key(one: Seen) -> tuple[bool, bool, float, float]:
        late = room.now_s - one.since_s >= room.patience_s
        return not late, one.turns == 0, one.since_s if late else one.pages, one.first_s

    return sorted((one for one in room.seen if one.phase == "paused" and one.asks), key=key)


def yield_order(policy: Policy, acting: Sequence[Seen], now_s: float, half_life_s: float) -> list[Seen]:
    """Whose kept pages go first where somebody who runs needs pages.

    oracle: whose request comes last (Belady). ttl, continuum: who came last. thunder: whose pages are worth least, by
    what computing them again takes for each, and how much an acting program counts.
    """

    def worth(one: Seen) -> float:
        if policy == "oracle":
            return -(one.due_s if one.due_s is not None else math.inf)
        if policy in ("ttl", "continuum"):
            return -one.first_s
        return decay(now_s - one.since_s, half_life_s) * one.reload_s / max(1, one.pages)

    return sorted(acting, key=lambda one: (worth(one), -one.first_s, one.id))


def carried_out(name: str, share: float) -> bool:
    """Whether decisions hold for a program, where they do for a share of all: by a hash of its name, the same anywhere.

    >>> sum(carried_out(f"p{n}", 0.25) for n in range(4000))
    986
    """
    from hashlib import blake2b

    return int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "big") < share * 2**32
