"""`tandem simulate`: recorded programs through the real scheduler, policies side by side; what a record is good for."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tandem.cli.options import Assignments

if TYPE_CHECKING:
    from tandem.engine.costs import StepCost
    from tandem.sim.programs import Outcome, SimulateConfig
    from tandem.sim.traces import Trace

EVERY = ("off", "fcfs", "plas", "ttl", "continuum", "thunder", "oracle")


def simulate(
    trace: Annotated[
        Path,
        typer.Argument(
            metavar="TRACE",
            help="A record of engine.programs.record, a profile (stage_timings.NAME.jsonl), a CSV of TraceLab's, "
            "or Mooncake's requests, of which only the ideal prefix hits are told.",
        ),
    ],
    policy: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"Again for another. Default: all of {', '.join(EVERY)}.")
    ] = None,
    kv_tokens: Annotated[int, typer.Option(min=0, help="Tokens of keys and values that fit; 0: all programs'.")] = 0,
    at_once: Annotated[int, typer.Option(min=0, help="Programs under way at a time; 0: as the file says.")] = 0,
    settings: Assignments = None,
    gates: Annotated[bool, typer.Option("--gates", help="Judge a record's predictions instead.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Replay recorded programs under each policy; with --gates, say whether predictions are good enough to act on."""
    from tandem.sim.traces import ideal_hits, is_mooncake, load

    if gates:
        return _gates(trace, json)
    if is_mooncake(trace):
        hits, tokens = ideal_hits(trace)
        said: dict[str, Any] = {"ideal_hits": hits, "prompt_tokens": tokens, "share": hits / tokens}
        print(
            jsonlib.dumps(said) if json else f"{hits:,} of {tokens:,} prompt tokens could be found: {said['share']:.1%}"
        )
        return 0
    names = _policies(policy or list(EVERY))
    loaded = load(trace)
    outcomes, config = _replayed(loaded, names, kv_tokens, at_once, settings or [])
    if json:
        rows = [asdict(outcome) for outcome in outcomes]
        print(jsonlib.dumps({"measured_s": loaded.makespan_s, "cost": asdict(config.cost), "rows": rows}, indent=1))
    else:
        _show(loaded, outcomes, config.cost)
    return 0


def _policies(names: list[str]) -> list[str]:
    from tandem.errors import ConfigError

    for name in names:
        if name not in EVERY:
            raise ConfigError(f"--policy {name}: no policy has that name. Allowed: {', '.join(EVERY)}.")
    return names


def _replayed(
    trace: Trace, policies: list[str], kv_tokens: int, at_once: int, settings: list[str]
) -> tuple[list[Outcome], SimulateConfig]:
    from dataclasses import replace

    from tandem.cli.recipes import parse_settings
    from tandem.config import override
    from tandem.engine.config import EngineConfig
    from tandem.engine.costs import StepCost
    from tandem.errors import CapacityError, ConfigError
    from tandem.sim.programs import SimulateConfig, capacity, compare

    if not trace.programs:
        raise ConfigError("the trace holds no program from its first turn on.")
    start = SimulateConfig(EngineConfig(page_tokens=64), trace.cost or StepCost())
    config = override(start, parse_settings(settings))
    size, lanes = config.engine.page_tokens, at_once or trace.at_once
    least = capacity(trace.programs, size)
    pages = kv_tokens // size if kv_tokens else least * (lanes or len(trace.programs))
    if pages < least:
        raise CapacityError(
            f"--kv-tokens {kv_tokens} holds {pages} pages of {size} tokens, and the largest program takes {least}: "
            f"give {least * size} or more."
        )
    cost = config.cost.priced(pages * size)
    return compare(trace.programs, policies, config.engine, pages, cost, lanes), replace(config, cost=cost)


def _show(trace: Trace, outcomes: list[Outcome], cost: StepCost) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(trace.programs)} programs, {outcomes[0].turns} turns")
    for column in ("policy", "makespan", "turns/min", "tokens run", "found again", "program", "turn p50", "turn p99"):
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for one in outcomes:
        times = (f"{value:,.1f} s" for value in (one.mean_s, one.turn_p50_s, one.turn_p99_s))
        rates = (f"{one.makespan_s:,.0f} s", f"{one.turns_min:,.1f}", f"{one.run_tokens:,}", f"{one.found:.1%}")
        table.add_row(one.policy, *rates, *times)
    Console().print(table)
    print(
        f"a step: {1e3 * cost.base_s:.3g} ms, and {1e6 * cost.prefill_token_s:.3g} us a row of a prompt, "
        f"{1e6 * cost.decode_token_s:.3g} us a row that draws, {1e9 * cost.context_token_s:.3g} ns a token it reads"
    )
    if trace.makespan_s:
        first = outcomes[0]
        print(f"measured: {trace.makespan_s:,.0f} s; {first.policy} is {first.makespan_s / trace.makespan_s:.3f} of it")


def _gates(path: Path, json: bool) -> int:
    """1 where a gate is shut, or a decision of the record does not come out again."""
    from tandem.engine.record import read, repeated
    from tandem.sim.gates import judge

    count, other = repeated(read(path))
    gates = judge(read(path))
    if json:
        print(jsonlib.dumps({"decisions": count, "other": len(other), "gates": [asdict(gate) for gate in gates]}))
    else:
        print(f"{count} decisions asked again: {f'{len(other)} come out otherwise' if other else 'all the same'}")
        for gate in gates:
            said = f" ({gate.more})" if gate.more else ""
            print(f"{'open' if gate.passed else 'SHUT'}  {gate.what}: {gate.value:.4g}, limit {gate.limit:.4g}{said}")
    return 0 if not other and all(gate.passed for gate in gates) else 1
