"""Several runs -> one page: their final figures, their curves over each other, and the settings that differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.report import metrics, plots, units
from tandem.report.html import flattened, inlined, page_template
from tandem.report.kept import read_object, write_file
from tandem.report.live import held_out
from tandem.report.metrics import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRIPS = (
    ("The answers", plots.ANSWERS),
    ("The updates", plots.UPDATE),
    ("The critic", plots.CRITIC),
    ("The preferences", plots.PREFERENCE),
    ("The teacher", plots.TEACHER),
    ("Drift and limits", plots.LIMITS),
)
Lines = list[tuple[str, list[str]]]  # (what, one text a run)


@dataclass(frozen=True, slots=True)
class Compared:
    """Runs side by side, in the order given."""

    folders: tuple[Path, ...]
    names: tuple[str, ...]  # all different
    rows: tuple[Sequence[Row], ...]
    summaries: tuple[Mapping[str, Any], ...]
    figures: Lines
    settings: Lines  # those that differ

    def record(self) -> dict[str, Any]:
        """For JSON."""
        differing = {name: dict(zip(self.names, texts, strict=True)) for name, texts in self.settings}
        return {"runs": dict(zip(self.names, self.summaries, strict=True)), "settings": differing}


def compare(folders: Sequence[Path]) -> Compared:
    """The runs in `folders`. RunFolderError where one holds no metrics or a damaged config."""
    rows = tuple(metrics.read_metrics(folder) for folder in folders)
    configs = [read_object(folder / "config.json") for folder in folders]
    summaries = tuple(metrics.summary(of_run) for of_run in rows)
    flat = [dict(flattened(config)) for config in configs]
    known = dict.fromkeys(name for config in flat for name in config)
    differing = [(name, [config.get(name, units.BLANK) for config in flat]) for name in known]
    return Compared(
        folders=tuple(folders),
        names=_names(folders, configs),
        rows=rows,
        summaries=summaries,
        figures=lines(summaries),
        settings=[(name, values) for name, values in differing if len(set(values)) > 1],
    )


def lines(summaries: Sequence[Mapping[str, Any]]) -> Lines:
    """The figures of metrics.summary, a text a run; without those that none of the runs has."""
    texts = [_texts(figures) for figures in summaries]
    found = [(name, [of_run[name] for of_run in texts]) for name in texts[0]]
    return [(name, values) for name, values in found if set(values) != {units.BLANK}]


def _texts(figures: Mapping[str, Any]) -> dict[str, str]:
    sampled = figures["measure"] == "reward"
    before, after = figures["evaluation_before"], figures["evaluation_after"]
    rate = f"{units.count(figures['tokens'])}, {units.count(figures['tokens_per_s'])} a rollout second"
    return {
        "steps": units.count(figures["steps"]),
        "reward": _ends(figures, "reward", "five-step means"),
        "loss": _ends(figures, "loss", f"{figures['loss_unit']}, five-step means"),
        "held out, before": held_out(before) if before else units.BLANK,
        "held out, after": held_out(after) if after else units.BLANK,
        "sampled tokens": rate if sampled else units.BLANK,
        "trained tokens": units.BLANK if sampled else units.count(figures["trained_tokens"]),
        "failed trajectories": units.count(figures["failed"]) if sampled else units.BLANK,
        "time": units.duration(figures["wall_s"]),
        "by phase": ", ".join(f"{phase} {units.percent(share)}" for phase, share in figures["shares"].items()),
        "peak memory": units.gigabytes(figures["peak_memory_bytes"]),
        "weights": str(figures["weights"] or units.BLANK),
    }


def _ends(figures: Mapping[str, Any], name: str, what: str) -> str:
    if figures[f"{name}_last"] is None:
        none = name == figures["measure"] == "reward" and figures["steps"]
        return "none could be graded" if none else units.BLANK
    first, last = (units.decimal(figures[f"{name}_{end}"]) for end in ("first", "last"))
    return f"{first} -> {last} ({what})"


def write_page(compared: Compared, path: Path, scaling: Mapping[str, Any] | None = None) -> None:
    """Write one HTML file that opens offline, with the section `scaling` of scaling_page where it is given.

    WorldError where it cannot be written.
    """
    curves = list(zip(compared.names, compared.rows, strict=True))
    draws: list[tuple[str, Callable[[], Figure]]] = [
        ("Reward and held-out accuracy", partial(plots.reward_curves_figure, curves, "Reward of each run")),
        ("Loss", partial(plots.loss_curves_figure, curves, "Loss of each run")),
    ]
    draws += [(title, partial(plots.strips_figure, title, strips, curves)) for title, strips in STRIPS]
    page = page_template("compare.html.jinja").render(
        name=f"{len(compared.names)} runs",
        folders=[str(folder) for folder in compared.folders],
        runs=compared.names,
        figures=compared.figures,
        settings=compared.settings,
        pictures=[inlined(f"{title}, by step", *plots.both(draw)) for title, draw in draws if plots.shows(draw())],
        scaling=scaling,
        beside="",
    )
    write_file(path, page, "Choose another place with --out.")


def _names(folders: Sequence[Path], configs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The runs' names; of those that share one, the folders', and the whole paths where those are alike too."""
    spellings = (
        [str(config.get("name") or folder.resolve().name) for folder, config in zip(folders, configs, strict=True)],
        [folder.resolve().name for folder in folders],
        [str(folder) for folder in folders],
        [f"{folder} ({place})" for place, folder in enumerate(folders, start=1)],
    )
    chosen = list(spellings[0])
    for spelling in spellings[1:]:
        repeated = Counter(chosen)
        chosen = [other if repeated[name] > 1 else name for name, other in zip(chosen, spelling, strict=True)]
    return tuple(chosen)
