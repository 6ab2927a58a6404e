"""The ledger of a run for people: tables, two waterfalls, and its goodput (docs/ledger.md)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tandem.errors import RunFolderError
from tandem.plan.roofline import Cost, Machine, machine_name, measure
from tandem.report import plots
from tandem.report.metrics import Row, read_metrics

PAGE, ROOFLINE = "ledger.html", "roofline.json"
KIND_COLOURS = {"useful": plots.GREEN, "lost": plots.VERMILLION, "idle": plots.ORANGE}
WORK = ("prefill", "decode", "learner")


@dataclass(frozen=True, slots=True)
class Line:
    """A part of a total."""

    name: str
    amount: float
    share: float
    kind: str  # of seconds: useful, lost, idle
    meaning: str


@dataclass(frozen=True, slots=True)
class Goodput:
    """Time at the roofline of useful work, times its ESS, over the wall."""

    share: float
    useful_s: dict[str, float]  # at the roofline, by work, times ESS
    machine: Machine
    wall_s: float


def read_ledger(folder: Path) -> dict[str, Any]:
    """ledger.json; RunFolderError where it is absent or of the first format, which had no count but its own."""
    path = folder / "ledger.json"
    if not path.is_file():
        raise RunFolderError(f"{path} does not exist: it is written as a run ends. Resume the run, or wait for it.")
    ledger: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if ledger.get("format") != 2:
        raise RunFolderError(
            f"{path} has the format of a version before, whose total was the sum of its fates. `tandem report "
            f"{folder}` shows it as it is."
        )
    return ledger


def token_lines(ledger: Mapping[str, Any]) -> list[Line]:
    """Fates that any token met; what was trained comes last."""
    tokens = {fate: number for fate, number in ledger["tokens"].items() if fate != "total" and number}
    total, meanings = ledger["tokens"]["total"], ledger["fates"]
    order = sorted(tokens, key=lambda fate: (fate == "trained", -tokens[fate]))
    return [
        Line(fate, tokens[fate], tokens[fate] / total if total else 0.0, "", meanings.get(fate, "")) for fate in order
    ]


def second_lines(ledger: Mapping[str, Any], worker: str) -> list[Line]:
    """Phases of a worker: idle, lost, then useful, the longest first of each."""
    seconds = {phase: value for phase, value in ledger["seconds"][worker].items() if phase != "wall" and value}
    wall, known = ledger["seconds"][worker]["wall"], ledger["phases"]
    kinds = {phase: known[phase]["kind"] if phase in known else "idle" for phase in seconds}
    order = sorted(seconds, key=lambda phase: (["idle", "lost", "useful"].index(kinds[phase]), -seconds[phase]))
    meanings = {phase: known[phase]["meaning"] if phase in known else "between spans" for phase in seconds}
    return [
        Line(phase, seconds[phase], seconds[phase] / wall if wall else 0.0, kinds[phase], meanings[phase])
        for phase in order
    ]


def goodput(rows: Sequence[Row], machine: Machine, wall_s: float) -> Goodput:
    """Of the steps that count: rows that a resume set aside are in no metrics.jsonl.

    >>> row = {"step": 1, "ess": 0.5, "useful": {"decode_flop": 4.0, "decode_bytes": 30.0}}
    >>> goodput([row], Machine(flop_s=2.0, bytes_s=10.0), wall_s=15.0).share
    0.1
    """
    useful = dict.fromkeys(WORK, 0.0)
    for row in rows:
        ess = row.get("ess")
        for work in WORK:
            if f"{work}_flop" in (row.get("useful") or {}):
                cost = Cost(row["useful"][f"{work}_flop"], row["useful"][f"{work}_bytes"])
                useful[work] += machine.least_s(cost) * (1.0 if ess is None else ess)
    return Goodput(sum(useful.values()) / wall_s if wall_s else 0.0, useful, machine, wall_s)


def machine_of(folder: Path, ledger: Mapping[str, Any]) -> Machine | str:
    """The rates of the run's machine, measured where this is it; else why they are not known."""
    path = folder / ROOFLINE
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        return Machine(saved["flop_s"], saved["bytes_s"])
    device = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model", {}).get("device", "cpu")
    if device != "cpu":
        return f"no goodput: the roofline of {device} is not measured here"
    if ledger["machine"] != machine_name():
        return f"no goodput: the run was on {ledger['machine']}, this is {machine_name()}; ask for it there once"
    machine = measure()
    path.write_text(json.dumps({"machine": machine_name(), **asdict(machine)}) + "\n", encoding="utf-8")
    return machine


def waterfall_figure(title: str, unit: str, lines: Sequence[Line], scale: float) -> Figure:
    """Bars that begin where the one above ends: the whole, then what went where."""
    figure = Figure(figsize=(6.0, 1.2 + 0.3 * (len(lines) + 1)))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    total = sum(line.amount for line in lines)
    left = total
    axes.barh(0, total / scale, color=plots.GREY, height=0.7)
    axes.text(total / scale, 0, f" {total / scale:,.4g}", va="center", fontsize=8.5)
    for place, line in enumerate(lines, start=1):
        colour = KIND_COLOURS.get(line.kind) or (plots.GREEN if line.name == "trained" else plots.ORANGE)
        axes.barh(place, line.amount / scale, left=(left - line.amount) / scale, color=colour, height=0.7)
        axes.text(left / scale, place, f" {100 * line.share:.1f} %", va="center", fontsize=8.5)
        left -= line.amount
    axes.set_yticks(range(len(lines) + 1), ["all", *(line.name.replace("_", " ") for line in lines)])
    axes.invert_yaxis()
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.12 * total / scale if total else 1.0)
    axes.set_xlabel(unit)
    axes.set_title(title)
    return figure


def figures(ledger: Mapping[str, Any]) -> dict[str, Callable[[], Figure]]:
    """File name -> what draws it."""
    tokens = token_lines(ledger)
    wanted: dict[str, Callable[[], Figure]] = {}
    if tokens:
        wanted["ledger_tokens"] = partial(waterfall_figure, "What became of each sampled token", "tokens", tokens, 1.0)
    for worker in ledger["seconds"]:
        name = "ledger_seconds" if len(ledger["seconds"]) == 1 else f"ledger_seconds_{worker.replace(' ', '_')}"
        title = f"What became of each second of {worker}"
        wanted[name] = partial(waterfall_figure, title, "seconds", second_lines(ledger, worker), 1.0)
    return wanted


def write_ledger_page(folder: Path) -> dict[str, Any]:
    """ledger.html and its pictures beside it; returns tables and goodput, or why there is none, as plain values."""
    from tandem.report.html import inlined, page_template

    ledger = read_ledger(folder)
    machine = machine_of(folder, ledger)
    wall_s = max((phases["wall"] for phases in ledger["seconds"].values()), default=0.0)
    found = goodput(read_metrics(folder), machine, wall_s) if isinstance(machine, Machine) else None
    pictures = []
    for name, draw in figures(ledger).items():
        light = plots.png(draw)
        (folder / f"{name}.png").write_bytes(light)
        pictures.append(inlined(name.replace("_", " "), light, plots.png(draw, dark=True)))
    tables = {"tokens": token_lines(ledger)} | {w: second_lines(ledger, w) for w in ledger["seconds"]}
    name = folder.resolve().name
    page = page_template("ledger.html.jinja").render(
        name=f"Ledger of {name}", beside="; the pictures lie beside it as PNG", folder=name, figures=pictures,
        tables=tables, ledger=ledger, goodput=found, why="" if isinstance(machine, Machine) else machine,
    )  # fmt: skip
    (folder / PAGE).write_text(page, encoding="utf-8")
    return {
        **{title: [asdict(line) for line in lines] for title, lines in tables.items()},
        "engine": ledger["engine"],
        "audit": ledger["audit"],
        "trained_share": ledger["trained_share"],
        "goodput": asdict(found) if found else machine,
        "page": str(folder / PAGE),
    }
