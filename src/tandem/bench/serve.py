"""`bench serve`: what the HTTP path costs over the engine alone, and `tandem serve` beside a peer's server under load.

Parts: `start`, from the command to the first answer; `overhead`, the same 64 seeded streams through the server and on
the engine alone, in turn; `load`, ShareGPT-like lengths, all at once (saturation) and as Poisson arrivals at half of
the peer's saturation; `sweep`, 1 to 64 streams. One server is alive at a time, the peer's and tandem's in turn, round
after round; the peer goes first, since its saturation sets the arrivals of both. (Of `overhead` the engine alone waits
in its own process, without work, while the server is asked, and the other way round.)

Every side is asked by the same client (client.py), in a process of its own on the same processors: its processor time
is given beside each figure. Calls are seeded in `overhead` alone. A call that is lost or refused ends the bench.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tandem.bench import load
from tandem.bench.alone import alone
from tandem.bench.child import Program, Server, own, serving
from tandem.bench.client import Ask, Plan, Result
from tandem.errors import WorldError

PARTS = ("start", "overhead", "load", "sweep")
STREAMS, PROMPT, NEW = 64, 50, 128  # of `overhead`: calls at once, tokens in, tokens out
PAIRS = 5  # of `overhead`
CALLS, ARRIVALS = 192, 160  # of `load`: at once, and at a rate
SWEEP = (1, 2, 4, 8, 16, 32, 64)  # streams
SWEEP_NEW, SWEEP_LEAST = 64, 4  # tokens out; calls at least
DEADLINE_S = 600.0  # for a plan
WANTED = {"overhead": 0.10, "saturation": 2.2, "first token": 1.0, "start": 20.0}

Note = Callable[[str], None]


@dataclass(slots=True)
class Side:
    """A server's figures, round after round."""

    program: Program
    starts_s: list[float] = field(default_factory=list)
    cpu_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # of the server, by work
    ran: dict[str, list[Result]] = field(default_factory=lambda: defaultdict(list))  # by work

    def run(self, server: Server, work: str, asks: Sequence[Ask], streams: int = 0) -> Result:
        before_s = server.cpu_s()
        result = ask(server, asks, streams)
        self.cpu_s[work].append(server.cpu_s() - before_s)
        self.ran[work].append(result)
        return result

    def keep(self, rounds: int) -> None:
        """Forgets what came of later rounds."""
        del self.starts_s[rounds:]
        for times in self.cpu_s.values():
            del times[rounds:]
        for results in self.ran.values():
            del results[rounds:]

    def told(self, work: str) -> dict[str, Any]:
        """A row's figures of a work."""
        return {**load.summary(self.ran[work]), "server_cpu_s": statistics.median(self.cpu_s[work])}


def ask(server: Server, asks: Sequence[Ask], streams: int = 0, *, ids: bool = False) -> Result:
    """WorldError where not all are answered."""
    result = server.ask(Plan(server.url, server.model, list(asks), streams, ids, DEADLINE_S))
    try:
        load.account(result, len(asks))
    except WorldError as error:
        raise WorldError(f"{server.name}: {error}") from error
    return result


def warm_up(server: Server) -> None:
    """As many streams as are measured, short ones."""
    ask(server, load.uniform(STREAMS, PROMPT, 8, 0xB005))


def measure(peer: Program | None, rounds: int, parts: Sequence[str], note: Note) -> dict[str, Any]:
    """All parts that are asked for. `note` is told what goes on."""
    result: dict[str, Any] = {"bench": "serve", "rounds": rounds, "wanted": WANTED, "failure": None}
    sides = [Side(program) for program in ([peer] if peer else []) + [own()]]
    if set(parts) - {"overhead"}:
        note("a first start, so that kernels are built")
        with serving(own()):
            pass
    if "overhead" in parts:
        result["overhead"] = overhead(note)
    if set(parts) == {"overhead"}:
        return result
    call_s, whole = math.nan, 0  # of the arrivals; rounds that came to their end
    try:
        for number in range(rounds):
            for side in sides:
                note(f"round {number + 1} of {rounds}: {side.program.name} starts")
                call_s = _asked(side, number, call_s, parts, note)
            whole += 1
    except WorldError as error:
        if not whole:
            raise
        result["failure"], result["rounds"] = str(error), whole
    for side in sides:
        side.keep(whole)
    _tell(result, sides, parts, call_s)
    return result


def _asked(side: Side, number: int, call_s: float, parts: Sequence[str], note: Note) -> float:
    """A side's turn of a round. Gives the calls a second of the arrivals."""
    with serving(side.program) as server:
        side.starts_s.append(server.start_s)
        note(f"its first answer came after {server.start_s:.1f} s")
        if "sweep" in parts or "load" in parts:
            warm_up(server)
        if "sweep" in parts:
            _sweep(side, server, number, note)
        if "load" in parts:
            call_s = _load(side, server, number, call_s, note)
    return call_s


def _sweep(side: Side, server: Server, number: int, note: Note) -> None:
    for place, streams in enumerate(SWEEP):
        asks = load.uniform(max(SWEEP_LEAST, 2 * streams), PROMPT, SWEEP_NEW, number << 8 | place)
        found = side.run(server, f"sweep {streams}", asks, streams)
        note(f"{side.program.name}, {streams} streams: {load.rate(found):,.0f} tok/s")


def _load(side: Side, server: Server, number: int, call_s: float, note: Note) -> float:
    """Saturation, then arrivals at `call_s`; where it is not known yet, at half of this side's saturation. Gives it."""
    found = side.run(server, "saturation", load.sharegpt(CALLS, 2 * number))
    note(f"{side.program.name}, {CALLS} calls at once: {load.rate(found):,.0f} tok/s")
    if math.isnan(call_s):
        call_s = len(found.answers) / load.wall_s(found) / 2
    asks = load.poisson(load.sharegpt(ARRIVALS, 2 * number + 1), call_s, number)
    found = side.run(server, "arrivals", asks)
    first_s = load.percentiles([one.came_s[0] - one.due_s for one in found.answers])["p99"]
    note(f"{side.program.name}, {call_s:.2f} calls a second: {1e3 * first_s:,.0f} ms to the first token, p99")
    return call_s


def overhead(note: Note) -> dict[str, Any]:
    """The HTTP path over the engine alone: median over the pairs of the ratio of seconds within a pair."""
    pairs: list[dict[str, float]] = []
    with alone() as engine, serving(own()) as server:
        checked = load.uniform(STREAMS, PROMPT, 16, 0xC0DE, seeded=True)
        through, ran = ask(server, checked, ids=True), engine.run(checked)
        if [one.ids for one in through.answers] != ran.tokens:
            raise WorldError("the server's seeded tokens are not those of the engine alone: nothing to compare.")
        for number in range(PAIRS):
            asks = load.uniform(STREAMS, PROMPT, NEW, number, seeded=True)
            before_s = server.cpu_s()
            result = ask(server, asks)
            server_cpu_s = server.cpu_s() - before_s
            pair = {"http_s": load.wall_s(result), "alone_s": engine.run(asks).wall_s}
            pairs.append({**pair, "client_cpu_s": result.cpu_s, "server_cpu_s": server_cpu_s})
            note(f"{STREAMS} streams: {pair['http_s']:.2f} s, the engine alone {pair['alone_s']:.2f} s")
    medians = {name: statistics.median(pair[name] for pair in pairs) for name in pairs[0]}
    over = [pair["http_s"] / pair["alone_s"] - 1 for pair in pairs]
    row = {"streams": STREAMS, "prompt": PROMPT, "new": NEW, "pairs": PAIRS, **medians}
    return {**row, "overhead": statistics.median(over), "least": min(over), "most": max(over)}


def _tell(result: dict[str, Any], sides: Sequence[Side], parts: Sequence[str], call_s: float) -> None:
    """The rows of the parts, and ratios of tandem's to the peer's."""
    ours, theirs = sides[-1], sides[0] if len(sides) > 1 else None
    result["peer"] = theirs.program.name if theirs else None
    names = {side.program.name: side for side in sides}
    if "start" in parts:
        result["start"] = {name: min(side.starts_s) for name, side in names.items()}
        if theirs:
            result["start"]["ratio"] = min(theirs.starts_s) / min(ours.starts_s)
    if "load" in parts:
        rows = {name: {work: side.told(work) for work in ("saturation", "arrivals")} for name, side in names.items()}
        drawn = [ask for number in range(result["rounds"]) for ask in load.sharegpt(CALLS, 2 * number)]
        told: dict[str, Any] = {"in": str(load.SHAREGPT_IN), "out": str(load.SHAREGPT_OUT), "call_s": call_s}
        told["mean_in"] = statistics.mean(len(one.prompt) for one in drawn)
        told["mean_out"] = statistics.mean(one.new for one in drawn)
        if theirs:
            both = zip(ours.ran["saturation"], theirs.ran["saturation"], strict=True)
            told["ratio"] = statistics.median(load.rate(a) / load.rate(b) for a, b in both)
            first = {name: rows[name]["arrivals"]["ttft_s"]["p99"] for name in names}
            told["first_ratio"] = first[theirs.program.name] / first[ours.program.name]
        result["load"] = {**told, "sides": rows}
    if "sweep" in parts:
        result["sweep"] = [
            {"streams": streams, **{name: side.told(f"sweep {streams}") for name, side in names.items()}}
            for streams in SWEEP
        ]
