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
from tandem.report import plots, units
from tandem.report.kept import read_object
from tandem.report.metrics import Row, read_metrics

ROOFLINE = "roofline.json"
KIND_COLOURS = {"useful": plots.GREEN, "lost": plots.VERMILLION, "idle": plots.ORANGE}
SHOWN = 0.0005
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
    """ledger.json; RunFolderError where it is absent or damaged."""
    path = folder / "ledger.json"
    if not path.is_file():
        raise RunFolderError(f"{path} does not exist: it is written as a run ends. Resume the run, or wait for it.")
    ledger = read_object(path)
    if lacking := {"tokens", "seconds"} - ledger.keys():
        raise RunFolderError(f"{path} is damaged: it has no {min(lacking)}. Restore it, or resume the run.")
    return ledger


def token_lines(ledger: Mapping[str, Any]) -> list[Line]:
    """Fates that any token met; what was trained comes last."""
    tokens = {fate: number for fate, number in ledger["tokens"].items() if fate != "total" and number}
    total, meanings = ledger["tokens"]["total"], ledger.get("fates", {})
    order = sorted(tokens, key=lambda fate: (fate == "trained", -tokens[fate]))
    return [
        Line(fate, tokens[fate], tokens[fate] / total if total else 0.0, "", meanings.get(fate, "")) for fate in order
    ]


def second_lines(ledger: Mapping[str, Any], worker: str) -> list[Line]:
    """Phases of a worker: idle, lost, then useful, the longest first of each."""
    seconds = {phase: value for phase, value in ledger["seconds"][worker].items() if phase != "wall" and value}
    wall, known = ledger["seconds"][worker]["wall"], ledger.get("phases", {})
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


def machine_of(folder: Path, ledger: Mapping[str, Any], measures: bool) -> Machine | str:
    """The rates of the run's machine, measured now where it is this one and they were not before; else why not."""
    path = folder / ROOFLINE
    saved = read_object(path) if path.is_file() else {}
    if saved.get("flop_s") and saved.get("bytes_s"):
        return Machine(saved["flop_s"], saved["bytes_s"])
    config = folder / "config.json"
    device = read_object(config).get("model", {}).get("device")
    if device not in (None, "cpu"):
        return f"no goodput: the roofline of {device} is not measured here"
    if ledger.get("machine") != machine_name():
        was = ledger.get("machine", "a machine that it does not name")
        return f"no goodput: the run was on {was}, this is {machine_name()}; ask for it there once"
    if not measures:
        return f"no goodput yet: `tandem report {folder.resolve().name} --ledger` measures this machine's roofline"
    machine = measure()
    path.write_text(json.dumps({"machine": machine_name(), **asdict(machine)}) + "\n", encoding="utf-8")
    return machine


def waterfall_figure(title: str, unit: str, lines: Sequence[Line]) -> Figure:
    """Bars that begin where the one above ends: the whole, then what went where. What is under 0.05 % has no bar."""
    total = left = sum(line.amount for line in lines)
    shown: list[tuple[Line, float]] = []
    for line in lines:
        if abs(line.share) >= SHOWN:
            shown.append((line, left))
        left -= line.amount
    figure = Figure(figsize=(6.0, 1.2 + 0.3 * (len(shown) + 1)))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.barh(0, total, color=plots.GREY, height=0.7)
    whole = units.duration(total) if unit == "seconds" else f"{total:,}"
    axes.text(total, 0, f" {whole}", va="center", fontsize=8.5)
    for place, (line, end) in enumerate(shown, start=1):
        colour = KIND_COLOURS.get(line.kind) or (plots.GREEN if line.name == "trained" else plots.ORANGE)
        kind = line.kind if line.kind not in axes.get_legend_handles_labels()[1] else ""
        axes.barh(place, line.amount, left=end - line.amount, color=colour, height=0.7, label=kind)
        axes.text(end, place, f" {100 * line.share:.1f} %", va="center", fontsize=8.5)
    axes.set_yticks(range(len(shown) + 1), ["all", *(line.name.replace("_", " ") for line, _ in shown)])
    axes.invert_yaxis()
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.12 * total if total else 1.0)
    axes.set_xlabel(unit)
    axes.set_title(title)
    if axes.get_legend_handles_labels()[1]:
        plots.draw_legend(axes)
    return figure


def figures(ledger: Mapping[str, Any]) -> dict[str, tuple[str, Callable[[], Figure]]]:
    """File name -> title, and what draws it."""
    tokens, wanted = token_lines(ledger), dict[str, tuple[str, Callable[[], Figure]]]()
    if tokens:
        title = "What became of each sampled token"
        wanted["ledger_tokens"] = title, partial(waterfall_figure, title, "tokens", tokens)
    for worker in ledger["seconds"]:
        name = "ledger_seconds" if len(ledger["seconds"]) == 1 else f"ledger_seconds_{worker.replace(' ', '_')}"
        title = f"What became of each second of {worker}"
        wanted[name] = title, partial(waterfall_figure, title, "seconds", second_lines(ledger, worker))
    return wanted


@dataclass(frozen=True, slots=True)
class Section:
    """What pages and terminals show of a ledger."""

    tables: dict[str, list[Line]]  # "tokens", and a worker each
    ages: dict[str, dict[int, int]]  # fate -> updates since a token was drawn -> tokens
    engine: dict[str, int]
    audit: dict[str, int]
    goodput: Goodput | None
    why: str  # there is no goodput
    pictures: dict[str, tuple[str, Callable[[], Figure]]]  # file name -> title, and what draws it

    def record(self) -> dict[str, Any]:
        tables = {title: [asdict(line) for line in lines] for title, lines in self.tables.items()}
        goodput = asdict(self.goodput) if self.goodput else self.why
        return {**tables, "ages": self.ages, "engine": self.engine, "audit": self.audit, "goodput": goodput}

    def headline(self) -> str:
        """
        >>> Section({}, {}, {}, {}, Goodput(0.25, {}, Machine(4e9, 2e9), 8.0), "", {}).headline()
        "goodput 25.00 %: 2 s of useful work at this machine's roofline (4 Gflop/s, 2 GB/s) in 8 s"
        """
        if (found := self.goodput) is None:
            return self.why
        rates = f"{found.machine.flop_s / 1e9:.3g} Gflop/s, {found.machine.bytes_s / 1e9:.3g} GB/s"
        of = f"{found.share * found.wall_s:.3g} s of useful work at this machine's roofline ({rates})"
        return f"goodput {100 * found.share:.2f} %: {of} in {found.wall_s:.4g} s"


def section(folder: Path, measures: bool = False) -> Section:
    """Of the run in `folder`. measures: the machine's rates, where the run was on it and nobody asked before."""
    ledger = read_ledger(folder)
    machine, rows = machine_of(folder, ledger, measures), read_metrics(folder)
    if isinstance(machine, Machine) and not any(row.get("useful") for row in rows):
        machine = "no goodput: no row says what was useful (`useful` of a row, where a policy is trained)"
    wall_s = max((phases["wall"] for phases in ledger["seconds"].values()), default=0.0)
    found = goodput(rows, machine, wall_s) if isinstance(machine, Machine) else None
    return Section(
        {"tokens": token_lines(ledger)} | {worker: second_lines(ledger, worker) for worker in ledger["seconds"]},
        {fate: {int(age): number for age, number in of.items()} for fate, of in ledger.get("ages", {}).items()},
        ledger.get("engine", {}),
        ledger.get("audit", {}),
        found,
        "" if isinstance(machine, Machine) else machine,
        figures(ledger),
    )
