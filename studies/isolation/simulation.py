"""What a tenant gets of an engine beside others: latency beside a flood, shares over windows, cached prefixes."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tandem.engine.costs import StepCost
from tandem.engine.share import Terms
from tandem.sim.tenants import Loads
from tandem.study.simulated import Found, Simulation
from tandem.types import Request, Sampling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COST = StepCost(base_s=12e-3, prefill_token_s=1.1e-4, context_token_s=2e-8, decode_token_s=6e-4)  # docs/configs.md's
FEW, FLOOD, PLACES, SECONDS, WARM_UP_S = 2, 200, 128, 60.0, 10.0
WEIGHTS = {"a": 4.0, "b": 2.0, "c": 1.0, "d": 1.0}
WINDOWS_S = (1.0, 2.0, 5.0, 10.0, 20.0)
PROGRAMS, CONTEXT, ROOM = 24, 512, 16  # of one tenant, tokens of each, and how many of them the cache holds beside one
SLACKS_S = (0.0, 0.02, 0.05, 0.2)


def simulation() -> Simulation:
    return Simulation(
        "isolation",
        "What does a tenant get of an engine beside others, whatever they ask for?",
        run,
        page,
        draw,
    )


def run() -> Found:
    return {"latency": latency(), "windows": windows(), "locality": locality()}


def latency() -> list[dict[str, Any]]:
    """Seconds of the small tenant's requests, and the flood's tokens a second."""
    rows = []
    flights = {"few": FEW, "flood": FLOOD}
    for name, order, asked, slow in (
        ("alone, on half an engine", "shares", {"few": FEW}, 2.0),
        ("the flood alone, on half an engine", "shares", {"flood": FLOOD}, 2.0),
        ("by arrival", "arrival", flights, 1.0),
        ("least served program first", "fair", flights, 1.0),
        ("shares", "shares", flights, 1.0),
    ):
        load = Loads(asked, cost=COST, order=order, slow=slow, max_sequences=PLACES, one_program=order == "fair")
        load.run(WARM_UP_S)
        load.took.clear()
        load.tokens.clear()
        load.run(SECONDS)
        row: dict[str, Any] = {"name": name}
        if "few" in asked:
            row |= {"median_s": load.median_s("few"), "p99_s": load.quantile_s("few", 0.99)}
        rows.append(row | {f"{tenant}_tok_s": load.tokens[tenant] / SECONDS for tenant in asked})
    return rows


def windows() -> list[dict[str, float]]:
    """Of four tenants that all want more: how far any is from its share in any window of so long, of its share."""
    load = Loads(dict.fromkeys(WEIGHTS, 60), {name: Terms(one) for name, one in WEIGHTS.items()}, COST)
    seen: list[tuple[float, dict[str, float]]] = []
    load.after = lambda: seen.append((load.now, {name: load.had(name) for name in WEIGHTS}))
    load.run(WARM_UP_S + SECONDS)
    seen = [one for one in seen if one[0] >= WARM_UP_S]
    rows = []
    for window in WINDOWS_S:
        worst, marks = 0.0, [seen[0]]
        for at, had in seen:
            if at - marks[-1][0] >= window:
                marks.append((at, had))
        for (_, before), (_, after) in pairwise(marks):
            total = sum(after.values()) - sum(before.values())
            for name, weight in WEIGHTS.items():
                due = weight / sum(WEIGHTS.values())
                worst = max(worst, abs((after[name] - before[name]) / total / due - 1))
        rows.append({"window_s": window, "off": worst})
    return rows


def locality() -> list[dict[str, float]]:
    """Programs of one tenant that ask again and again with their context, of which not all fit the cache."""
    rows = []
    for slack in SLACKS_S:
        pages = (ROOM + 1) * (CONTEXT // 32 + 2)
        load = Loads({}, {"t": Terms()}, COST, slack_s=slack, pages=pages, max_sequences=1)
        asked, new, known = 0, 0, 0
        served = dict.fromkeys(range(PROGRAMS), 0)

        def ask(program: int, load: Loads = load) -> None:
            nonlocal asked
            asked += 1
            tokens = tuple(range(CONTEXT * program, CONTEXT * (program + 1)))
            request = Request(f"{program}#{asked}", str(program), tokens, Sampling(max_new_tokens=8), 0, "t")
            load.engine.submit(request, load.now)

        for program in range(PROGRAMS):
            ask(program)
        while load.now < WARM_UP_S + SECONDS:
            seconds, completions = load.engine.step(load.now)
            load.now += seconds
            for completion in completions:
                program = int(completion.request_id.partition("#")[0])
                ask(program)
                if load.now >= WARM_UP_S:
                    served[program] += 1
                    known, new = known + completion.cached_tokens, new + CONTEXT
        rows.append({
            "slack_s": slack,
            "cached": known / new,
            "answers_s": sum(served.values()) / SECONDS,
            "least": min(served.values()) / (sum(served.values()) / PROGRAMS),
        })  # fmt: skip
    return rows


PAGE = """# What a tenant gets of an engine beside others

The real scheduler on a logical clock; a step takes what the profile of [docs/configs.md](../../docs/configs.md#a-tree-of-tenants)
says. Exact, and the same on any machine: `tandem study isolation` writes this page. What shares promise is in
[docs/fairness.md](../../docs/fairness.md#tenants).

![Latency beside a flood, and shares over windows](figure.png)

## {few} requests in flight beside {flood}

Both tenants weigh 1 and ask again as soon as they are answered: 20 tokens of prompt, 64 drawn. {places} run at once.

| | seconds a request, median | p99 | its tokens a second | the flood's |
|---|---|---|---|---|
{latency}

`engine.order=fair` gives the program that was served least the next place, but its rows run in steps as long as those
of all.

## Shares over windows

Four tenants of weights {weights} with 60 requests in flight each: how far any of them is from its share, in the worst
window.

| window, s | off by, of the share |
|---|---|
{windows}

## Cached prefixes

{programs} programs of one tenant ask again and again, each with its own context of {context} tokens; the cache holds {room} of
them. `slack_s` is how far ahead of another a program may be and go first for its prefix. What is found costs nothing, so
who finds has more answers for the same service.

| slack, s | of contexts, found | answers a second | the least answered program's, of the mean |
|---|---|---|---|
{locality}
"""  # noqa: E501


def page(found: Found) -> str:
    latency = [
        [row["name"], *[f"{row[key]:{form}}" if key in row else "" for key, form in COLUMNS.items()]]
        for row in found["latency"]
    ]
    windows = [[f"{row['window_s']:g}", f"{row['off']:.2%}"] for row in found["windows"]]
    locality = [
        [f"{row['slack_s']:g}", f"{row['cached']:.0%}", f"{row['answers_s']:.2f}", f"{row['least']:.0%}"]
        for row in found["locality"]
    ]
    tables = {"latency": latency, "windows": windows, "locality": locality}
    return PAGE.format(
        few=FEW,
        flood=FLOOD,
        places=PLACES,
        weights=", ".join(f"{one:g}" for one in WEIGHTS.values()),
        programs=PROGRAMS,
        context=CONTEXT,
        room=ROOM,
        **{name: "\n".join(f"| {' | '.join(row)} |" for row in rows) for name, rows in tables.items()},
    )


COLUMNS = {"median_s": ".2f", "p99_s": ".2f", "few_tok_s": ".0f", "flood_tok_s": ".0f"}


def draw(found: Found) -> Figure:
    from matplotlib.figure import Figure

    from tandem.report.plots import GREY, SERIES

    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [row for row in found["latency"] if "median_s" in row]
    places = range(len(rows))
    left.barh(places, [row["p99_s"] for row in rows], color=GREY, height=0.6, label="p99")
    left.barh(places, [row["median_s"] for row in rows], color=SERIES[0], height=0.35, label="median")
    left.set_yticks(places, [row["name"] for row in rows])
    left.invert_yaxis()
    left.set_xlabel("seconds a request, of two in flight")
    left.legend(frameon=False)
    windows = found["windows"]
    right.plot([row["window_s"] for row in windows], [100 * row["off"] for row in windows], "o-", color=SERIES[0])
    right.axhline(5.0, color=GREY, linewidth=1.0)
    right.set_xscale("log")
    right.set_ylim(bottom=0)
    right.set_xlabel("window, seconds")
    right.set_ylabel("off the share by, %")
    return figure
