"""What a step takes where rollouts and learning take turns or overlap: the step-time algebra, for the page of a study.

Where each stage has processors of its own (https://jiahuanglin.xyz/all_lessons/ml_system_design, "RL framework
architectures"; R rollout, V reward, ref reference, T training, S synchronisation):

    in turns        R + V + ref + T + S
    apart           max(R + V, ref + T) + S
    asynchronous    max(R + V, ref + T, S)

Here all stages compute on the same cores, so what they compute adds up, and only waiting can be overlapped. With C the
seconds that a step computes, whatever the mode, E of them in the engine, and W(n) what the longest of n waits takes:

    sync            C + W(PG)                           a step ends with its slowest program
    one_off         max(C, E + W(PG) + S)               batch k + 1 is sampled while k is learned; updates wait for it
    full            max(C, (C + W) / (lag + 1))         Little: (lag + 1) P groups open, each for a step and its wait

with W = W(PG) in fifo order, where a step's batch waits for its slowest program, and W = W(G) by completion. At lag 0
full is sync. C, E and S are measured in the arm that takes turns and waits for nothing; nothing else is.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tandem.report import plots
from tandem.report.units import decimal, percent

Result = Mapping[str, Any]
ENGINE = ("rollout", "reward", "environment")  # phases of a worker that makes samples, while none waits


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a study's page that is its own."""

    text: str
    pictures: Mapping[str, Callable[[], Figure]]  # by file name


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds that a step computes.

    >>> Work(3.0, 2.0, 0.5).engine_s
    2.0
    """

    whole_s: float
    engine_s: float
    publish_s: float


def predicted_s(work: Work, mode: str, lag: int, wait_s: float) -> float:
    """Seconds of a step; wait_s of the longest wait that it hangs on.

    >>> work = Work(3.0, 2.0, 0.5)
    >>> [predicted_s(work, "sync", 0, 6.0), predicted_s(work, "one_off", 1, 6.0), predicted_s(work, "full", 2, 6.0)]
    [9.0, 8.5, 3.0]
    >>> predicted_s(work, "full", 0, 6.0) == predicted_s(work, "sync", 0, 6.0)
    True
    """
    if mode == "sync":
        return work.whole_s + wait_s
    if mode == "one_off":
        return max(work.whole_s, work.engine_s + wait_s + work.publish_s)
    return max(work.whole_s, (work.whole_s + wait_s) / (lag + 1))


@dataclass(frozen=True, slots=True)
class Timed:
    """An arm's steps, as they should be and as they were."""

    label: str
    predicted_s: float
    measured_s: float
    goodput: tuple[float, float] | None  # likewise


class StepTimes:
    """The section of a study whose arms differ in asynchrony and in waits.

    basis: the arm that takes turns and waits for nothing. longest_s(n): W(n), the mean of the longest of n programs'
    waits. waits: the arms that have any. skipped: steps in which queues fill.
    """

    def __init__(
        self,
        basis: str,
        longest_s: Callable[[int], float],
        waits: tuple[str, ...],
        sizes: tuple[int, int],
        skipped: int,
    ) -> None:
        self.basis = basis
        self.longest_s = longest_s
        self.waits = waits
        self.sizes = sizes  # P, G
        self.skipped = skipped

    def __call__(self, result: Result) -> Section:
        timed = self.timed(result)
        if not timed:
            return Section(f"The arm `{self.basis}` has no run yet, and all is predicted from it.", {})
        return Section("\n\n".join(self._text(result, timed)), {"step_time.png": partial(figure, timed)})

    def timed(self, result: Result) -> list[Timed]:
        """Of the arms that ran; empty where the basis did not."""
        own = self._steps(result, self.basis)
        if own is None:
            return []
        work = self.work(result)
        found = []
        for arm in result["arms"]:
            steps = self._steps(result, arm["name"])
            if steps is None:
                continue
            expected_s = self.predicted(arm, work)
            goodput = None
            if steps[1] and own[1]:
                goodput = own[1] * own[0] / expected_s, steps[1]
            label = ", ".join(filter(None, (arm["panel"], arm["label"])))
            found.append(Timed(label, expected_s, steps[0], goodput))
        return found

    def predicted(self, arm: Mapping[str, Any], work: Work) -> float:
        settings = arm["overrides"]
        mode, lag = settings.get("asynchrony.mode", "sync"), int(settings.get("asynchrony.lag", 1))
        early = settings.get("asynchrony.order") in ("completion", "drop")
        programs = self.sizes[1] * (1 if early and mode == "full" else self.sizes[0])
        return predicted_s(work, mode, lag, self.longest_s(programs) if arm["name"] in self.waits else 0.0)

    def work(self, result: Result) -> Work:
        """What the basis measured: means over its runs' steps behind the first."""
        phases = [run["phases"]["main"] for run in _finished(result, self.basis)]
        engine_s = statistics.fmean(sum(one.get(name, 0.0) for name in ENGINE) for one in phases)
        publish_s = statistics.fmean(one.get("publish", 0.0) for one in phases)
        steps = self._steps(result, self.basis)
        assert steps is not None
        return Work(steps[0], engine_s, publish_s)

    def _steps(self, result: Result, arm: str) -> tuple[float, float] | None:
        """Mean seconds of an arm's steps, and their goodput (0 where it is not known)."""
        seconds, useful = 0.0, 0.0
        runs = _finished(result, arm)
        for run in runs:
            first = self.skipped // result["series_stride"]
            seconds += sum(run["series"]["seconds"][first:])
            useful += sum(run["series"].get("useful_s", [])[first:])
        count = sum(len(run["series"]["seconds"]) - self.skipped // result["series_stride"] for run in runs)
        return (seconds / count, useful / seconds) if count > 0 else None

    def _text(self, result: Result, timed: list[Timed]) -> list[str]:
        work = self.work(result)
        groups, samples = self.sizes
        columns = ("arm", "s a step: predicted", "measured", "ratio", "samples/s", "goodput: predicted", "measured")
        rows = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
        for one in timed:
            share = [percent(value, 2) if value else "-" for value in one.goodput or (None, None)]
            cells = (
                one.label,
                decimal(one.predicted_s, 2),
                decimal(one.measured_s, 2),
                f"{one.measured_s / one.predicted_s:.2f}",
                decimal(groups * samples / one.measured_s, 1),
                *share,
            )
            rows.append(f"| {' | '.join(cells)} |")
        whole, some = self.longest_s(groups * samples), self.longest_s(samples)
        said = (
            f"The [algebra](../../src/tandem/study/step_time.py) has three numbers of `{self.basis}` (C "
            f"{work.whole_s:.2f} s a step, of which the engine {work.engine_s:.2f} and publication "
            f"{work.publish_s:.3f}) and what the longest of {groups * samples} waits ({whole:.2f} s) and of {samples} "
            f"({some:.2f} s) takes; no other arm was looked at. Ratio: measured over predicted. Steps count from step "
            f"{self.skipped + 1} on, when the queue is full."
        )
        picture = "![Seconds a step and goodput of each arm, predicted and measured](step_time.png)"
        return ["## Step time and goodput, predicted and measured", picture, said, "\n".join(rows)]


def _finished(result: Result, arm: str) -> list[Mapping[str, Any]]:
    return [run for run in result["runs"] if run["arm"] == arm and run["status"] == "finished" and run.get("phases")]


def figure(timed: list[Timed]) -> Figure:
    """Predicted and measured beside each other, an arm a row."""
    drawn = Figure(figsize=(9.6, 1.2 + 0.42 * len(timed)))
    FigureCanvasAgg(drawn)
    known = all(one.goodput for one in timed)
    panels = drawn.subplots(1, 2 if known else 1, squeeze=False, sharey=True)[0]
    places = range(len(timed))
    goodput = [one.goodput or (0.0, 0.0) for one in timed]
    sides = [([one.predicted_s for one in timed], [one.measured_s for one in timed])]
    sides += [([100 * expected for expected, _ in goodput], [100 * found for _, found in goodput])]
    looks = ((-0.19, "predicted", plots.GREY), (0.19, "measured", plots.BLUE))
    for axes, pair, label in zip(panels, sides, ("seconds a step", "goodput, %"), strict=False):
        for (shift, name, colour), values in zip(looks, pair, strict=True):
            bars = axes.barh([place + shift for place in places], values, height=0.36, color=colour, label=name)
            axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8.5)
        axes.set_xlabel(label)
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.14)
    panels[0].set_yticks(places, [one.label for one in timed])
    panels[0].invert_yaxis()
    plots.draw_legend(panels[0])
    return drawn
