"""`tandem bench`: speed, always as a ratio to a peer or to the machine's limit."""

from __future__ import annotations

import json as jsonlib
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


class Work(str, Enum):
    ENGINE = "engine"
    LEARNER = "learner"
    TREE = "tree"
    STEP = "step"
    DISTIL = "distil"
    AGENTS = "agents"
    SFT = "sft"
    DPO = "dpo"
    PARITY = "parity"
    PROFILE = "profile"
    SWEEP = "sweep"
    GPU = "gpu"
    SANDBOX = "sandbox"
    PUBLISH = "publish"
    AHEAD = "ahead"
    SCHEDULE = "schedule"
    ISOLATION = "isolation"
    PROGRAMS = "programs"
    STRUCTURED = "structured"
    SERVE = "serve"
    SOAK = "soak"
    LORA = "lora"
    QUANTISE = "quantise"
    NUMERICS = "numerics"


class Part(str, Enum):
    START = "start"
    OVERHEAD = "overhead"
    LOAD = "load"
    SWEEP = "sweep"


PEERED = tuple(map(Work, "engine learner tree step agents sft dpo parity serve quantise numerics".split()))
DRAWN = (Work.SWEEP, Work.SERVE)  # have a picture
ALONE = tuple(work for work in Work if work not in PEERED)  # have no peers
WORKS_HELP = (
    "What to measure; tree: the learner on turns that share their context, beside copies; distil: a step of it beside "
    "SFT and the teacher's forward pass; agents: programs with slow "
    "tools; sft: chats as long as GSM8K's, packed, with the peak of memory; dpo: pairs as long; "
    "parity: the price of exactness; profile: where the time goes, by operation; "
    "sweep: decoding over the number of sequences and over the context; "
    "gpu: random Llamas on a CUDA device; sandbox: starts, commands, what a thousand leave behind; "
    "publish: weights to another process, whole and what a step changed; "
    "ahead: sampling while learning beside the loop in steps, its journal's cost, a kill; "
    "schedule: what a decision by shares takes; isolation: two tenants of one engine, and what each gets; "
    "programs: agents that share too little memory, by policy (takes ten minutes); "
    "structured: answers of a given form beside the same without; "
    "serve: the server over the engine alone, and beside a peer's server (takes twelve minutes with one); "
    "lora: training an adapter beside training all weights, and decoding over eight of them; "
    "quantise: CPU seconds of rounding to the nearest and by GPTQ; "
    "numerics: decoding, prompts, long contexts and an update in 8 bits beside bf16; "
    "soak: the server at mixed load with faults; every call is accounted for, and memory stays."
)
PEER_HELP = (
    "A command that does the same work and prints its figures as JSON lines; of serve, one that serves the same model "
    "to OpenAI's clients on port {port}. With one, numerics is tandem in 8 bits, its bf16 and the peers, in turn."
)


def bench(
    work: Annotated[Work, typer.Argument(metavar="WORK", help=WORKS_HELP)],
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="CMD", help=PEER_HELP),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of tandem and every peer; medians count.")] = 3,
    out: Annotated[Path | None, typer.Option(metavar="PNG", help="Where a sweep's picture is written.")] = None,
    part: Annotated[list[Part] | None, typer.Option(help="Of serve: what of it is measured. All of it.")] = None,
    page: Annotated[
        Path | None, typer.Option(metavar="MD", help="Of serve: a page that its tables are written into.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="Of soak: for how long. 3600.")] = None,
) -> int:
    """Measure the engine, the learner or a whole step beside its peers, or see what the time is spent on."""
    from tandem.errors import ConfigError, WorldError

    if peer and work in ALONE:
        peered = ", ".join(other.value for other in PEERED)
        raise ConfigError(f"--peer is given to `bench {work.value}`, which has no peers. Use one of {peered}.")
    if out is not None:
        _check_picture(work, out)
    _check_flags(work, part, page, seconds)
    if out is not None and part and Part.SWEEP not in part:
        raise ConfigError("--out draws the sweep of `bench serve`, which --part leaves out. Add --part sweep.")
    if work is Work.SERVE:
        result = _serve(peer or [], rounds, part or list(Part))
    elif work is Work.SOAK:
        from tandem.bench.soak import soak

        result = soak(seconds or 3600.0, _note)
    else:
        result = _run(work, peer or [], rounds)
    if json:
        print(jsonlib.dumps(result, indent=1))
    else:
        shown = {
            Work.PROFILE: _show_profile,
            Work.SWEEP: _show_sweep,
            Work.SANDBOX: _show_sandbox,
            Work.PUBLISH: _show_publish,
            Work.AHEAD: _show_ahead,
            Work.SCHEDULE: _show_schedule,
            Work.ISOLATION: _show_isolation,
            Work.PROGRAMS: _show_programs,
            Work.STRUCTURED: _show_structured,
            Work.SERVE: _show_serve,
            Work.SOAK: _show_soak,
            Work.LORA: _show_lora,
            Work.QUANTISE: _show if peer else _show_quantise,
            Work.NUMERICS: _show if peer else _show_numerics,
        }
        shown.get(work, _show)(result)
        if limits := result.get("limits"):
            rates = limits["matrix FLOP/s"] / 1e12, limits["memory bytes/s"] / 1e9
            print(f"limits: {rates[0]:.2f} TFLOP/s bf16, {rates[1]:.1f} GB/s read")
    if result.get("failure"):
        raise WorldError(result["failure"])
    if page is not None:
        from tandem.report.serving import written

        _write("--page", page, written(page.read_text(encoding="utf-8"), result).encode())
    if out is not None:
        from tandem.report.serving import serving_png
        from tandem.report.throughput import throughput_png

        _write("--out", out, serving_png(result) if work is Work.SERVE else throughput_png(result["rows"]))
    return 0


def _write(flag: str, path: Path, what: bytes) -> None:
    from tandem.errors import WorldError

    try:
        path.write_bytes(what)
    except OSError as error:
        raise WorldError(f"{flag} {path} could not be written: {error.strerror}.") from error


def _note(said: str) -> None:
    """On the way; what was found comes at the end."""
    print(said, file=sys.stderr, flush=True)


def _check_flags(work: Work, part: list[Part] | None, page: Path | None, seconds: float | None) -> None:
    """ConfigError for a flag of another work, and for a page without its marks."""
    from tandem.errors import ConfigError

    for flag, given, owner in (
        ("--part", part, Work.SERVE),
        ("--page", page, Work.SERVE),
        ("--seconds", seconds, Work.SOAK),
    ):
        if given and work is not owner:
            raise ConfigError(f"{flag} is given to `bench {work.value}`. It is one of `bench {owner.value}`.")
    if page is not None:
        from tandem.report.serving import written

        try:
            written(page.read_text(encoding="utf-8"), {})
        except (OSError, ValueError) as error:
            raise ConfigError(f"--page {page} can't take the tables: {error}. Give docs/serving.md.") from error


def _serve(peers: list[str], rounds: int, parts: list[Part]) -> dict[str, Any]:
    from tandem.bench.child import peer_program
    from tandem.bench.serve import measure
    from tandem.errors import ConfigError
    from tandem.run.served import check_installed

    check_installed()
    if len(peers) > 1:
        raise ConfigError(f"--peer is given {len(peers)} times. Of `bench serve`, one server is a peer.")
    peer = peer_program(peers[0]) if peers else None
    return measure(peer, rounds, [part.value for part in parts], _note)


def _show_serve(result: dict[str, Any]) -> None:
    from tandem.report.serving import tables

    print("\n\n".join(tables(result).values()))


def _show_soak(result: dict[str, Any]) -> None:
    from tandem.report.serving import soaked

    print(soaked(result))


def _check_picture(work: Work, out: Path) -> None:
    """ConfigError where no picture can be written there, as far as that shows before the measurement."""
    from tandem.errors import ConfigError

    if work not in DRAWN:
        drawn = ", ".join(other.value for other in DRAWN)
        raise ConfigError(f"--out is given to `bench {work.value}`, which draws no picture. Use one of {drawn}.")
    if os.path.isdir(out):
        raise ConfigError(f"--out {out} is a folder. Give a file in it, such as {out / 'sweep.png'}.")
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out} does not end in .png, and the picture is a PNG. Name it {out.stem}.png.")
    if not os.path.isdir(out.parent):
        raise ConfigError(f"--out {out}: there is no folder {out.parent}. Make it first, or choose another.")
    if not os.access(out if os.path.exists(out) else out.parent, os.W_OK):
        raise ConfigError(f"--out {out} may not be written. Choose another place.")


def _run(work: Work, peers: list[str], rounds: int) -> dict[str, Any]:
    if work is Work.PROFILE:
        from tandem.bench.profile import profile

        return profile()
    if work is Work.SWEEP:
        from tandem.bench.sweep import sweep

        return sweep()
    if work is Work.SANDBOX:
        from tandem.bench.sandbox import sandbox

        return sandbox()
    if work is Work.PUBLISH:
        from tandem.bench.publish import publish

        return publish()
    if work is Work.AHEAD:
        from tandem.bench.ahead import ahead

        return ahead()
    if work is Work.SCHEDULE:
        from tandem.bench.tenants import schedule

        return schedule()
    if work is Work.ISOLATION:
        from tandem.bench.tenants import isolation

        return isolation()
    if work is Work.STRUCTURED:
        from tandem.bench.structured import structured

        return structured()
    if work is Work.LORA:
        from tandem.bench.lora import lora

        return lora(rounds)
    if work is Work.QUANTISE and not peers:
        from tandem.bench.quantise import quantise

        return quantise(rounds)
    if work is Work.NUMERICS and not peers:
        from tandem.bench.numerics import numerics

        return numerics(rounds)
    if work is Work.PROGRAMS:
        from tandem.bench.programs import programs

        return programs(rounds=rounds)
    from tandem.bench.beside import bench as beside

    return beside(work.value, peers, rounds)


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"tandem bench {result['bench']}: medians of {result['rounds']} rounds")
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["peers"]))
    priced = any("price" in row for row in result["rows"])
    columns = ("work", "tandem", *(f"{name} (ratio)" for name in names), "share of the limit")
    for column in (*columns, "price") if priced else columns:
        table.add_column(column, justify="left" if column == "work" else "right")
    for row in result["rows"]:
        unit = row["unit"]
        cells = [_value(row["tandem"], unit)]
        for name in names:
            other = row["peers"].get(name)
            cells.append(f"{_value(other[unit], unit)} ({other['ratio']:.2f} x)" if other else "")
        price = [f"{row['price']:.3f}" if "price" in row else ""] if priced else []
        table.add_row(row["work"], *cells, _share(row), *price)
    Console().print(table)
    for row in result["rows"]:
        if "own" in row:
            print(f"{row['work']}: {row['own']['ratio']:.2f} x the rate of {row['own']['work']}")
    if priced:
        print("price: time of the exact kernels over the library's; 1.05 is 5% for the same bits")


def _value(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "share" else f"{value:,.1f} {unit}"


def _share(row: dict[str, Any]) -> str:
    share = row["share_of_limit"]
    return f"{share:.0%}" if share is not None else ""


def _show_profile(result: dict[str, Any]) -> None:
    """A table a work; milliseconds and calls are of one step."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    for work in result["works"]:
        head = (
            f"{work['work']}: {1e3 * work['seconds']:,.2f} ms, {work['tok_s']:,.0f} tok/s, {_share(work)} of the limit"
        )
        stopped = f"under the profiler {1e3 * work['wall_s']:,.2f} ms, of which host {1e3 * work['host_s']:,.2f} ms"
        table = Table(title=f"{head}\n{stopped}", box=SIMPLE)
        for column in ("operation", "ms", "of all", "calls", "GFLOP/s", "GB/s", "limit"):
            table.add_column(column, justify="left" if column == "operation" else "right", no_wrap=True)
        for row in work["rows"]:
            rates = [f"{row[name] / 1e9:,.1f}" if row[name] else "" for name in ("flop_s", "bytes_s")]
            share = f"{row['seconds'] / work['wall_s']:.1%}"
            cells = (f"{1e3 * row['seconds']:,.3f}", share, f"{row['calls']:,.0f}", *rates, _share(row))
            table.add_row(row["operation"], *cells, style="dim" if row["kind"] == "host" else None)
        Console().print(table)


def _show_sandbox(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="tandem bench sandbox")
    for column in ("work", "median", "95 %", "of"):
        table.add_column(column, justify="left" if column == "work" else "right")
    for row in result["rows"]:
        cells = [f"{row['mb']:.1f} MB", ""] if "mb" in row else [f"{row[f'{k}_ms']:.1f} ms" for k in ("median", "p95")]
        table.add_row(row["work"], *cells, f"{row['count']}")
    Console().print(table)
    left = ", ".join(f"{count} {name}" for name, count in result["left"].items())
    print(f"left behind by {result['runs']:,} in {result['runs_s']:.0f} s: {left}")


def _show_publish(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"tandem bench publish: {result['weights_bytes'] / 1e6:,.0f} MB of weights")
    for column in ("work", "changed", "publish", "receive", "of"):
        table.add_column(column, justify="left" if column == "work" else "right")
    for row in result["rows"]:
        times = (f"{row[name]:.1f} ms" for name in ("publish_ms", "receive_ms"))
        table.add_row(row["work"], f"{row['changed']:.3%}", *times, f"{row['count']}")
    Console().print(table)
    print(f"publish: without the hash of what is published, {result['hash_ms']:.1f} ms; receive: with the hash of all")


def _show_ahead(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="tandem bench ahead: samples a second")
    for column in ("tools", "in steps", "while it learns", "ratio", "wanted"):
        table.add_column(column, justify="left" if column == "tools" else "right")
    for row in result["rows"]:
        rates = (f"{row['sync']:.1f}", f"{row['full']:.1f}")
        table.add_row(row["work"], *rates, f"{row['ratio']:.2f} x", f"{row['wanted']:.2f} x")
    Console().print(table)
    for run in result["runs"]:
        print(f"{run['arm']}: {run['step_s']:.2f} s a step, reward {run['reward']:.3f}")
        for worker, phases in run["phases"].items():
            longest = sorted(phases.items(), key=lambda one: -one[1])[:8]
            print(f"    {worker}: " + ", ".join(f"{phase} {spent:.2f}" for phase, spent in longest))
    books, resume = result["books"], result["resume"]
    print(f"journal and ledger: {books['share']:.2%} of the run (wanted: under {books['wanted']:.0%})")
    print(
        f"killed with {resume['programs']} programs open: the first new token {resume['first_token_s']:.1f} s after "
        f"its resume (wanted: under {resume['wanted_s']:g}); of {resume['finished']} groups that had ended "
        f"{resume['lost']} were lost, {resume['sampled_again']} sampled again, {resume['trained_twice']} trained twice"
    )


def _show_structured(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="tandem bench structured: a step")
    for column in ("form", "sequences", "without", "with", "ratio", "a mask"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for row in result["rows"]:
        figures = (f"{row['plain_s'] * 1e3:.1f} ms", f"{row['held_s'] * 1e3:.1f} ms", f"{row['ratio']:.2f} x")
        table.add_row(escape(row["form"]), str(row["sequences"]), *figures, f"{row['mask_s'] * 1e6:.0f} us")
    Console().print(table)


def _show_lora(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"tandem bench lora: training 4x1024, medians of {result['rounds']} rounds")
    for column in ("work", "tok/s", "over full", "wanted", "peak", "over full", "wanted"):
        table.add_column(column, justify="left" if column == "work" else "right")
    for row in result["rows"]:
        cells = [row["work"]]
        for name, unit in (("tok_s", ""), ("gb", " GB")):
            wanted = row[f"{name}_wanted"]
            cells += [f"{row[name]:,.2f}{unit}", f"{row[f'{name}_ratio']:.2f} x", f"{wanted:.2f} x" if wanted else ""]
        table.add_row(*cells)
    Console().print(table)
    decode = result["decode"]
    print(
        f"decode steps of 64 sequences: {decode['adapters_tok_s']:,.0f} tok/s over 8 adapters, "
        f"{decode['base_tok_s']:,.0f} on the base: {decode['ratio']:.2f} x (wanted: {decode['wanted']:.2f} x)"
    )


def _show_quantise(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        print(f"{row['work']}: {row['cpu_s']:.1f} s of CPU, median of {result['rounds']} rounds")


def _show_numerics(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("work", "bf16", "kind", "its time", "bf16 over it", "wanted", title="tandem bench numerics: medians")
    for row in result["rows"]:
        wanted = f"{row['wanted']:.2f} x" if row["wanted"] else ""
        for kind, ratio in row["ratio"].items():
            base, own = (f"{1e3 * row['seconds'][name]:,.1f} ms" for name in ("bf16", kind))
            table.add_row(row["work"], base, kind, own, f"{ratio:.2f} x", wanted)
    Console().print(table)


def _show_programs(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"tandem bench programs: of {result['tokens']:,} tokens each")
    for column in ("memory", "policy", "turns/min", "ratio", "wanted", "found again", "tokens run", "p50", "p99"):
        table.add_column(column, justify="left" if column in ("memory", "policy") else "right")
    for row in result["rows"]:
        ratio = (f"{row['ratio']:.2f} x", "" if row["policy"] == "off" else f"{row['wanted']:.2f} x")
        more = (f"{row['found']:.1%}", f"{row['run_tokens']:,.0f}", f"{row['p50_s']:.2f} s", f"{row['p99_s']:.2f} s")
        table.add_row(row["memory"], row["policy"], f"{row['turns_min']:.1f}", *ratio, *more)
    Console().print(table)


def _show_sweep(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="tandem bench sweep: decode steps")
    for column in ("sequences", "context", "ms a step", "tok/s", "limit", "share of the limit"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        rates = (f"{row['tok_s']:,.0f}", f"{row['limit_tok_s']:,.0f}", _share(row))
        table.add_row(f"{row['sequences']}", f"{row['context']:,}", f"{1e3 * row['step_s']:,.2f}", *rates)
    Console().print(table)


def _show_schedule(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"tandem bench schedule: {result['programs']:,} programs, {result['running']} running")
    for column in ("order", "plan", "of 100, the slowest", "charge", "rows a step"):
        table.add_column(column, justify="left" if column == "order" else "right")
    for row in result["rows"]:
        times = (f"{row[name]:.3f} ms" for name in ("plan_ms", "p99_ms", "charge_ms"))
        table.add_row(row["order"], *times, f"{row['rows']}")
    Console().print(table)
    print(f"wanted of plan and charge together: {result['wanted_ms']:g} ms")


def _show_isolation(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from tandem.bench.tenants import WINDOW_S

    few, crowd = (result["in_flight"][name] for name in ("few", "crowd"))
    table = Table(title=f"tandem bench isolation: {few} requests in flight beside {crowd}, of equal weight")
    for column in ("work", "few: s a request", "crowd: s a request", "few: tok/s", "crowd: tok/s"):
        table.add_column(column, justify="left" if column == "work" else "right")
    for row in result["rows"]:
        found = (row.get(name) for name in ("few_s", "crowd_s", "few_tok_s", "crowd_tok_s"))
        table.add_row(row["work"], *("" if value is None else f"{value:,.2f}" for value in found))
    Console().print(table)
    print(
        f"few: {result['slower']:.2f} x its time on half an engine (wanted: {result['wanted_slower']:g}); both with "
        f"requests that wait (in {result['backlogged']:.0%} of steps): shares off by {result['apart']:.1%} at most in "
        f"{WINDOW_S:g} s (wanted: {result['wanted_apart']:.0%})"
    )
