"""The programs whose requests an engine runs: what each does, what it holds meanwhile, and who may go on.

A program *reasons* while a request of it is live, *acts* from the end of its last one until the next comes, and is
*paused* while it has no place: its pages may go, and its next request waits until it is restored. It is *done* when
somebody says so (a hint of no turns left, `done`) or when it has acted for engine.programs.done_s.

As a turn ends, the pages of an acting program that have a name are held once more, *kept*, so that nobody evicts them;
until a policy lets them go, its next request has started, the weights change, or somebody who runs needs a page: what
runs is never preempted for what is only kept. With engine.programs.mode "shadow" all is decided and recorded, and
nothing done; with "advisory" pages that would be kept are only the last that the cache forgets.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from msgspec import structs

from tandem.engine.batch import MIXED
from tandem.engine.config import EngineConfig, Mode
from tandem.engine.guard import Guard
from tandem.engine.park import Parking
from tandem.engine.policies import (
    GATED,
    KEEPING,
    Phase,
    Room,
    Seen,
    TurnEnd,
    balance,
    carried_out,
    counted,
    keep,
    park,
    rank,
    restore_order,
    yield_order,
)
from tandem.engine.predict import Predictor
from tandem.engine.prefix import PrefixIndex
from tandem.engine.record import Record
from tandem.errors import TandemWarning
from tandem.types import Hints, StopReason

if TYPE_CHECKING:
    from tandem.engine.batch import Sequence, Stats

PATIENCE = 4096  # batches, after which a waiting request goes before all that came later (engine/order.py)
NONE = Hints()
MOST = 1 << 14  # programs that are followed: beyond, the first to come of those that have no request is done
SEPARATOR = "\x1f"  # between a tenant and a program's name
READY = 2  # programs next to be restored whose tools are made ready


@dataclass(slots=True, eq=False)
class Program:
    """One program of one tenant."""

    name: str
    first_s: float
    since_s: float  # it acts, or has asked in vain
    out: bool  # decisions are carried out for it
    phase: Phase = "reasoning"
    placed: bool = False  # its requests may start
    marked: bool = False  # to be paused as its turn ends
    over: bool = False  # done, but for what is live
    turns: int = 0
    live: set[int] = field(default_factory=set)  # arrivals of its requests
    tokens: int = 0  # of its context, with what a request that is live is likely to add
    ran: int = 0  # of its context, as its last turn ended
    shared: int = 0  # of these, that it found as it first started
    pages: int = 1  # that it takes beside what it shares
    kept: list[int] = field(default_factory=list)  # pages
    until_s: float = math.inf  # that they are kept
    paid_s: float = 0.0  # for keeping them, up to then
    lost: str = ""  # why what its last turn ran may be gone
    ended_s: float = 0.0  # its last turn
    tool: str = ""
    turns_left: int | None = None
    tool_s: float | None = None
    service_s: float = 0.0
    ready: bool = False  # its tools were made ready since it was paused
    seen: Seen | None = None  # as policies see it, since its last event


class Programs:
    """Called by a scheduler at each event of a request, and before each plan. Deterministic: time is an argument.

    reload_s: what it takes to compute so many tokens of keys and values. restoring: told the names of programs that are
    next to be restored, so that their tools can be made ready meanwhile.
    """

    def __init__(self, config: EngineConfig, index: PrefixIndex, stats: Stats) -> None:
        self.config = config.programs
        self.mode: Mode = self.config.mode
        self.policy = self.config.policy
        self.gated = self.policy in GATED
        self.index = index
        self.by_name: dict[str, Program] = {}
        self.predictor = Predictor()
        self.restoring: Callable[[str], None] | None = None
        self.reload_s = self._reload_s
        self.charge: Callable[[str, str, int, float], None] | None = None  # (tenant, program, tokens, s) kept
        self.record: Record | None = None
        self.counts = {"kept": 0, "hit": 0, "expired": 0, "yielded": 0, "paused": 0, "restored": 0}
        self._stats = stats
        self._keepers: dict[str, Program] = {}  # keep pages
        self._first: list[Sequence] = []  # started, and no token drawn
        self._queue_s = 0.0  # that programs waited which had lost their pages, lately
        self.now = 0.0
        self._tick_s = -math.inf
        self._changed = False
        self.parking: Parking | None = None
        self._guard = Guard(self.config)
        self._named: list[int] = []  # pages that came back from where they were parked, for the next batch
        if self.config.record:
            self.record = Record(self.config.record, self.config, index.pool.num_pages, index.pool.page_tokens)

    # What a request does

    def submitted(self, sequence: Sequence, now: float) -> None:
        request, name = sequence.request, self.name(sequence.request.tenant, sequence.request.program_id)
        program, hints = self.by_name.get(name), request.hints or NONE
        if program is None:
            if len(self.by_name) >= MOST and (idle := next((p for p in self.by_name.values() if not p.live), None)):
                self._remove(idle, now, "many")
            out = carried_out(name, self.config.share_of(request.tenant))
            program = self.by_name[name] = Program(name, now, now, out)
            program.placed = not self.gated
        elif not program.live:
            tool_s, growth = now - program.ended_s, len(request.tokens) - program.ran
            self.predictor.came_back(program.tool, tool_s, growth)
            self.predictor.turned(program.turns, last=False)
            told = {"tool": program.tool, "arguments": hints.arguments, "growth": growth}
            self._write("back", now, program, tool_s=round(tool_s, 6), **told)
        program.live.add(sequence.arrival)
        program.seen = None
        program.tool, program.tool_s, program.turns_left = "+".join(hints.tools), hints.tool_s, hints.turns_left
        output = self.predictor.predict(request.tenant, "", program.turns).output
        self._size(program, min(len(sequence.tokens) + int(output[1] if output else 0), sequence.limit))
        program.phase = "reasoning" if program.placed else "paused"
        if not program.placed:
            program.since_s = now
            self._changed = True

    def started(self, sequence: Sequence, now: float) -> None:
        """It holds its pages itself now."""
        program = self._of(sequence)
        program.placed, program.phase, program.ready, program.seen = True, "reasoning", False, None
        if sequence.num_drawn or sequence.reached:
            return  # it was preempted
        self._first.append(sequence)
        if not program.turns:
            program.shared = sequence.cached_tokens
        elif not program.kept:
            self._queue_s += 0.1 * (now - sequence.submitted_s - self._queue_s)
        self.counts["hit"] += bool(program.kept)
        self._free(program)

    def ended(self, sequence: Sequence, reason: StopReason, now: float) -> None:
        """It stops for good; its pages are still held, and those that may be found have their names."""
        program = self._of(sequence)
        program.live.discard(sequence.arrival)
        program.seen = None
        if sequence in self._first:
            self._first.remove(sequence)
            self._told(sequence, now)
        program.turns, program.ended_s = program.turns + 1, now
        known = min(program.ran, len(sequence.request.tokens))
        program.ran = len(sequence.tokens)
        self._size(program, program.ran)
        fresh = len(sequence.request.tokens) - sequence.cached_tokens
        program.service_s += self.reload_s(fresh) + self.reload_s(sequence.num_drawn)
        if reason is not StopReason.ABORTED:
            self.predictor.said(sequence.request.tenant, sequence.num_drawn)
        if self.record is not None:
            ours = {"turn": program.turns, "known": known, "tool": program.tool, "turns_left": program.turns_left}
            more: dict[str, Any] = {"mode": self.mode, "carried_out": self._acts(program)}
            more["lost"] = (program.lost or "cache") if sequence.cached_tokens < known else ""
            self.record.turn(program.name, sequence, reason, now, **ours, **more)
        self._changed, program.lost = True, ""
        if program.live:
            return
        program.phase, program.since_s = "acting" if program.placed else "paused", now
        if program.over or program.turns_left == 0:
            self._remove(program, now, "said")
            return
        kept_s = self._keep(program, now)
        lost = sequence.pages is None or reason in (StopReason.ABORTED, StopReason.FAILED)
        held = kept_s > 0 and not lost and not program.marked and self._hold(program, sequence, now + kept_s)
        if self.gated and program.placed and not held and (self._acts(program) or program.marked):
            self._pause(program, now)

    def _keep(self, program: Program, now: float) -> float:
        """For how long its pages are kept."""
        if self.policy not in KEEPING:
            return 0.0
        guess = self.predictor.predict("", program.tool, program.turns)
        left, reload_s = program.turns_left, self.reload_s(program.tokens - program.shared)
        likely = left if left is not None else min(100.0, max(1.0, 1 / guess.last - 1))
        asked = TurnEnd(
            self.policy,
            self.config.ttl_s,
            guess.tool_s,
            self._queue_s * likely,
            reload_s,
            program.pages / self.index.pool.num_pages,
            guess.last if left is None else 0.0,
            program.tool_s,
        )
        answer = keep(asked)
        self._write("keep", now, program, asked=asked, answer=answer, guess=guess, carried_out=self._acts(program))
        return answer.keep_s

    def _hold(self, program: Program, sequence: Sequence, until_s: float) -> bool:
        """Keeps the pages of an ending sequence; whether there are such."""
        assert sequence.pages is not None
        pages = self.index.named(sequence.pages.pages()) if sequence.root != MIXED else []
        if self.mode == "advisory" and program.out:
            self.index.prize(pages)
        if not (pages and self._acts(program)):
            return False
        self._free(program)
        self.index.pin(pages)
        self._pin(program, pages, until_s)
        self.counts["kept"] += 1
        return True

    def _pin(self, program: Program, pages: list[int], until_s: float) -> None:
        """Of pages that are held for it already."""
        if pages:
            program.kept, program.until_s, program.paid_s = pages, until_s, self.now
            self._keepers[program.name] = program

    # Before a plan

    def plan(self, now: float) -> list[int]:
        """What time and events changed: kept pages expire, programs pause and are restored; pages that got a name."""
        if self._first:
            drawn = [sequence for sequence in self._first if sequence.num_drawn]
            for sequence in drawn:
                self._first.remove(sequence)
                self._told(sequence, now)
        self.now = now
        tick = now >= self._tick_s
        if tick:
            self._tick_s = now + self.config.tick_s
            self._expire(now)
        if self.gated and (self._changed or tick):
            self._changed = False
            self._balance(now)
        named, self._named = self._named, []
        return named

    def _expire(self, now: float) -> None:
        for program in self._keepers.values():
            self._pay(program)
        for program in [one for one in self._keepers.values() if one.until_s <= now]:
            self.counts["expired"] += 1
            self._let_go(program, now, "time")
        late = [one for one in self.by_name.values() if not one.live and now - one.ended_s >= self.config.done_s]
        for program in late:
            self._remove(program, now, "time")

    def _balance(self, now: float) -> None:
        config, pool = self.config, self.index.pool
        programs = self.by_name.values()
        asking = [one for one in programs if one.phase == "paused" and one.live]
        if not asking and sum([one.pages for one in programs if one.phase != "paused"]) <= pool.num_pages:
            return
        seen = tuple([self._seen(one) for one in programs if one.phase != "paused" or one.live])
        room = Room(self.policy, now, pool.num_pages, seen, config.half_life_s, config.patience_s)
        answer = balance(room)
        for one in restore_order(room)[:READY] if self.restoring is not None else ():
            self._make_ready(self.by_name[one.id])
        if not (answer.pause or answer.mark or answer.restore):
            return
        self._write("balance", now, None, asked=room, answer=answer, carried_out=self.mode == "enforce")
        for name in answer.pause:
            self._pause(self.by_name[name], now)
        for name in answer.mark:
            self.by_name[name].marked = True
        for name in answer.restore:
            program = self.by_name[name]
            program.placed, program.phase, program.marked, program.seen = True, "reasoning", False, None
            self.counts["restored"] += 1
            if self.parking is not None and name in self.parking:
                pages, fresh = self.parking.unpark(name, self.index)
                self._named += fresh
                self._pin(program, pages, math.inf)

    def _make_ready(self, program: Program) -> None:
        if self.restoring is not None and not program.ready:
            program.ready = True
            self.restoring(program.name.rpartition(SEPARATOR)[2])

    def _pause(self, program: Program, now: float, cause: str = "pause") -> None:
        program.phase, program.placed, program.marked, program.since_s = "paused", False, False, now
        program.seen = None
        if self.parking is not None and program.kept:
            self._park(program, self.parking, now)
        self.counts["paused"] += 1
        self._let_go(program, now, cause)

    def _park(self, program: Program, parking: Parking, now: float) -> None:
        asked = parking.cost(len(program.kept), self.reload_s(program.tokens))
        answer = park(asked)
        self._write("park", now, program, asked=asked, answer=answer)
        if answer:
            parking.park(program.name, self.index, program.kept)

    # What the scheduler asks

    def allowed(self, sequence: Sequence) -> bool:
        """Whether a waiting request may start."""
        program = self._of(sequence)
        return program.placed or not self._acts(program)

    def queue(self, waiting: Iterable[Sequence], batches: int) -> Iterable[Sequence]:
        """Those that may start, in the policy's order, where engine.order leaves it to arrival."""
        if self.mode != "enforce":
            return waiting
        return sorted([sequence for sequence in waiting if self.allowed(sequence)], key=lambda s: self._key(s, batches))

    def filtered(self, queue: Iterable[Sequence]) -> Iterable[Sequence]:
        """Those that may start, as they come."""
        return queue if self.mode != "enforce" else (sequence for sequence in queue if self.allowed(sequence))

    def _key(self, sequence: Sequence, batches: int) -> tuple[bool, int, int, float, int]:
        program, late = self._of(sequence), batches - sequence.submitted_batch >= PATIENCE
        ranked = rank(self.policy, program.first_s, program.service_s, bool(program.kept)) if not late else (0, 0.0)
        return not late, -sequence.request.priority, *ranked, sequence.arrival

    def let_go(self, pages: int, asks: Sequence | None = None, alone: bool = True) -> int:
        """Lets go of kept pages until so many more are available, or none is kept; how many became available.

        For somebody who runs, or would run `alone`, of all; for others who wait, of those that count for less than
        half of what they keep, where the policy gave places by that count.
        """
        if pages <= 0 or not self._keepers or not (alone or self.gated):
            return 0
        now, life_s = self.now, self.config.half_life_s
        own = self._of(asks) if asks is not None else None
        acting = [self._seen(one) for one in self._keepers.values() if not one.live and one is not own]
        if not alone:
            room = Room(self.policy, now, self.index.pool.num_pages, (), life_s, self.config.patience_s)
            acting = [one for one in acting if counted(room, one) < one.pages / 2]
        programs = [self.by_name[one.id] for one in yield_order(self.policy, acting, now, life_s)]
        if alone:
            waiting = [one for one in self._keepers.values() if one.live and one is not own]
            programs += sorted(waiting, key=lambda one: -one.first_s)
            programs += [own] if own is not None and own.kept else []
        before = self.index.pool.num_available
        for program in programs:
            if self.index.pool.num_available - before >= pages:
                break
            self.counts["yielded"] += 1
            if self.gated and not program.live:
                self._pause(program, now, "memory")
            else:
                self._let_go(program, now, "memory")
        return self.index.pool.num_available - before

    def drop(self, cause: str) -> None:
        """What is kept goes: it is worthless under new "weights", or as the pages lost what they held, or "mode"."""
        for program in list(self._keepers.values()):
            self._let_go(program, self.now, cause)
        for program in self.by_name.values() if cause != "mode" else ():
            program.lost = cause
        if self.parking is not None:
            self.parking.clear()

    # From outside, between two steps

    def done(self, program_id: str, now: float, tenant: str = "") -> None:
        """A program asks for nothing more."""
        program = self.by_name.get(self.name(tenant, program_id))
        if program is not None:
            program.over = True
            if not program.live:
                self._remove(program, now, "said")

    def set_mode(self, mode: Mode, now: float, cause: str = "asked") -> None:
        """From now on; what only "enforce" does is undone at once. The kill switch."""
        if mode != "enforce":
            self.now = max(self.now, now)
            self.drop("mode")
            for program in self.by_name.values():
                program.placed, program.marked, program.seen = True, False, None
                program.phase = "reasoning" if program.live else "acting"
        self.mode = mode
        self._changed = True
        self._write("mode", now, None, mode=mode, cause=cause)

    @property
    def tables(self) -> list[list[int]]:
        """Pages held for programs."""
        return [program.kept for program in self._keepers.values()]

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        """AssertionError unless live requests are their programs', and pages are kept where none of them runs."""
        arrivals = {sequence.arrival for sequence in live}
        assert arrivals == {one for program in self.by_name.values() for one in program.live}, "whose requests live"
        for name, program in self._keepers.items():
            assert self.by_name.get(name) is program and program.kept, f"{name!r} keeps pages and is not known"
            assert program.placed and program.phase != "paused", f"{name!r} keeps pages in no place"
        for program in self.by_name.values():
            assert bool(program.kept) == (program.name in self._keepers), program.name
            assert program.live or program.phase != "reasoning", f"{program.name!r} reasons about nothing"
            assert not program.live or program.phase != "acting", f"{program.name!r} acts with a request"
            now, then = self.look_at(program), program.seen
            told = then is None or structs.replace(then, reload_s=now.reload_s) == now
            assert told, f"{program.name!r} is seen as it was: {then}, and is {now}"

    # Small parts

    @staticmethod
    def name(tenant: str, program_id: str) -> str:
        return f"{tenant}{SEPARATOR}{program_id}" if tenant else program_id

    def _of(self, sequence: Sequence) -> Program:
        return self.by_name[self.name(sequence.request.tenant, sequence.request.program_id)]

    def _acts(self, program: Program) -> bool:
        return program.out and self.mode == "enforce"

    def _size(self, program: Program, tokens: int) -> None:
        size, layout = self.index.pool.page_tokens, self.index.layout
        program.tokens = tokens
        shared = program.shared // size * len(layout.groups)
        program.pages = max(1, layout.most_pages(tokens, 1, size) - shared)

    def _reload_s(self, tokens: int) -> float:
        """By what prompts took so far."""
        stats = self._stats
        each = stats.prefill_s / stats.prefilled_tokens if stats.prefilled_tokens else 1e-4
        return each * max(0, tokens)

    def _seen(self, program: Program) -> Seen:
        if program.seen is None:
            program.seen = self.look_at(program)
        return program.seen

    def look_at(self, program: Program) -> Seen:
        asks = program.phase == "paused" and bool(program.live)
        due_s = program.ended_s + program.tool_s if program.tool_s is not None and not program.live else None
        reload_s = self.reload_s(program.tokens - program.shared)
        times = (program.first_s, program.since_s)
        return Seen(program.name, program.phase, program.pages, reload_s, *times, asks, program.turns, due_s)

    def _let_go(self, program: Program, now: float, cause: str) -> None:
        self._free(program)
        program.lost = cause
        self._write("let_go", now, program, cause=cause)

    def _free(self, program: Program) -> None:
        if program.kept:
            self._pay(program)
            pages, program.kept, program.until_s = program.kept, [], math.inf
            del self._keepers[program.name]
            for page in reversed(pages):
                self.index.release(page)

    def _pay(self, program: Program) -> None:
        """Its owner is charged for what it keeps, since it last was."""
        if self.charge is not None:
            tenant, _, name = program.name.rpartition(SEPARATOR)
            tokens = self.index.layout.capacity_tokens(len(program.kept), self.index.pool.page_tokens)
            self.charge(tenant, name, tokens, max(0.0, self.now - program.paid_s))
            program.paid_s = self.now

    def _remove(self, program: Program, now: float, why: str) -> None:
        self._free(program)
        if self.parking is not None:
            self.parking.drop(program.name)
        del self.by_name[program.name]
        self.predictor.turned(program.turns, last=True)
        self._changed = True
        self._write("done", now, program, why=why)

    def _told(self, sequence: Sequence, now: float) -> None:
        """Its first token is there: what a guard looks at."""
        program = self._of(sequence)
        if not self._acts(program):
            return
        known, first_s = min(program.ran, len(sequence.request.tokens)), sequence.first_s or now
        said = self._guard.told(first_s - sequence.submitted_s, min(sequence.cached_tokens, known), known)
        if said:
            warnings.warn(TandemWarning(f"programs are scheduled as before: {said}"), stacklevel=2)
            self.set_mode("shadow", now, f"guard: {said}")

    def _write(self, at: str, now: float, program: Program | None, **values: Any) -> None:
        if self.record is not None:
            named = {"program": program.name} if program is not None else {}
            self.record.write(at, now, **named, **values)
