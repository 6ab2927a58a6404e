"""Figures of `tandem bench` as tables."""

from __future__ import annotations

from typing import Any


def show_serve(result: dict[str, Any]) -> None:
    from tandem.report.serving import tables

    print("\n\n".join(tables(result).values()))


def show_soak(result: dict[str, Any]) -> None:
    from tandem.report.serving import soaked

    print(soaked(result))


def show(result: dict[str, Any]) -> None:
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


def show_profile(result: dict[str, Any]) -> None:
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


def show_sandbox(result: dict[str, Any]) -> None:
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


def show_publish(result: dict[str, Any]) -> None:
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


def show_ahead(result: dict[str, Any]) -> None:
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


def show_structured(result: dict[str, Any]) -> None:
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


def show_lora(result: dict[str, Any]) -> None:
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


def show_quantise(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        print(f"{row['work']}: {row['cpu_s']:.1f} s of CPU, median of {result['rounds']} rounds")


def show_numerics(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("work", "bf16", "kind", "its time", "bf16 over it", "wanted", title="tandem bench numerics: medians")
    for row in result["rows"]:
        wanted = f"{row['wanted']:.2f} x" if row["wanted"] else ""
        for kind, ratio in row["ratio"].items():
            base, own = (f"{1e3 * row['seconds'][name]:,.1f} ms" for name in ("bf16", kind))
            table.add_row(row["work"], base, kind, own, f"{ratio:.2f} x", wanted)
    Console().print(table)


def show_programs(result: dict[str, Any]) -> None:
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


def show_sweep(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="tandem bench sweep: decode steps")
    for column in ("sequences", "context", "ms a step", "tok/s", "limit", "share of the limit"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        rates = (f"{row['tok_s']:,.0f}", f"{row['limit_tok_s']:,.0f}", _share(row))
        table.add_row(f"{row['sequences']}", f"{row['context']:,}", f"{1e3 * row['step_s']:,.2f}", *rates)
    Console().print(table)


def show_schedule(result: dict[str, Any]) -> None:
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


def show_isolation(result: dict[str, Any]) -> None:
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


def show_speculate(result: dict[str, Any]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(title="tandem bench speculate: ms a step", box=SIMPLE)
    drafts = sorted({row["drafts"] for row in result["table"]})
    for column in ("sequences", "plain", *(f"{count} drafts each" for count in drafts if count), "pays at"):
        table.add_column(column, justify="right")
    for sequences in dict.fromkeys(row["sequences"] for row in result["table"]):
        found = [row for row in result["table"] if row["sequences"] == sequences]
        share = f"{found[1]['a_draft']:.1%}"
        table.add_row(str(sequences), *(f"{1e3 * row['step_s']:.2f}" for row in found), share)
    Console().print(table)
    print("pays at: the share of first drafts that must stand")
    table = Table(
        title=f"at most {result['most']} drafts, medians of {result['rounds']} rounds", box=SIMPLE, pad_edge=False
    )
    for column in ("work", "drafter", "tok/s", "with", "ratio", "wanted", "a step", "1st", "4th"):
        table.add_column(column, justify="left" if column in ("work", "drafter") else "right", no_wrap=True)
    for row in result["rows"]:
        rates = (
            f"{row['plain_tok_s']:,.0f}",
            f"{row['tok_s']:,.0f}",
            f"{row['ratio']:.2f}",
            f"{row['wanted']:.2f}",
        )
        at = [f"{100 * one['low']:.0f}-{100 * one['high']:.0f}" for one in row["at"]]
        shares = [at[place] if place < len(at) else "" for place in (0, 3)]
        table.add_row(
            f"{row['work']} {row['sequences']}", row["drafter"], *rates, f"{row['tokens_a_step']:.2f}", *shares
        )
    Console().print(table)
    print(
        "tok/s: without drafts, and with; a step: tokens of a sequence; 1st, 4th: % of drafts at that place that stand"
    )


SHOWN = {
    "profile": show_profile,
    "sweep": show_sweep,
    "sandbox": show_sandbox,
    "publish": show_publish,
    "ahead": show_ahead,
    "schedule": show_schedule,
    "isolation": show_isolation,
    "programs": show_programs,
    "structured": show_structured,
    "serve": show_serve,
    "soak": show_soak,
    "lora": show_lora,
    "quantise": show_quantise,
    "numerics": show_numerics,
    "speculate": show_speculate,
}
