"""What it gains to sample while learning, with tools that take their time and without."""

from __future__ import annotations

from tandem.bench.slow_tools import longest_wait_s
from tandem.study.step_time import StepTimes
from tandem.study.study import Arm, Study

SIZES = 8, 8  # groups of a step, programs of each
LAG = 2
MODES = {
    "sync": ("in steps", {}),
    "one_off": ("one off", {"asynchrony.mode": "one_off"}),
    "full": (f"full, lag {LAG}", {"asynchrony.mode": "full", "asynchrony.lag": str(LAG)}),
}
WAITS = {"waits": "tools 0.2 to 5 s", "none": "no waits"}


def study() -> Study:
    """Three modes, each with tools that sleep and with the same tools that answer at once."""
    arms = [
        Arm(f"{mode}_{waits}", label, {"task.parameters": f"waits={str(waits != 'none').lower()}", **sets}, panel=panel)
        for waits, panel in WAITS.items()
        for mode, (label, sets) in MODES.items()
    ]
    return Study(
        name="async_gain",
        question="How long is a step, and how much of it is useful, where rollouts and learning take turns, overlap "
        "by a batch, or flow; does the step-time algebra say so before; and does a sample teach as much?",
        recipe="tiny_digits",
        common={
            "rollout.prompts_per_step": str(SIZES[0]),
            "rollout.samples_per_prompt": str(SIZES[1]),
            "checkpoint.minutes": "0",
        },
        arms=tuple(arms),
        baseline="sync_none",
        compare=tuple((f"{mode}_{waits}", f"sync_{waits}") for waits in WAITS for mode in MODES if mode != "sync"),
        steps=16,
        shows_not="A model of 0.9 million parameters and a task that any model learns: what old weights cost in "
        "quality shows here only where it is large. Two cores that engine and learner share: with processors of "
        "their own, computing would overlap too. One shape of waits, one wait a program.",
        reading="Where tools sleep, sampling while learning takes 2.2 s a step where taking turns takes 5.25: 2.4 "
        "times the samples a second, and goodput rises as much. The algebra said turns to 0.2 %, and 1.75 s for the "
        "other: it takes each wait of a step for hidden behind another step's, and a batch still waits for its own "
        "longest. One off gains nothing, as it said: a batch's longest wait is the step. Without waits nothing is "
        "gained and 0.08 s of 0.27 are lost to threads and turns: the model is so small that a pass takes a few "
        "milliseconds (SmolLM2: docs/performance.md). A sample teaches less while it is old: the reward of the last "
        "steps of this short run is 0.58 in turns, 0.42 one off, 0.32 at lag 2. Held-out accuracy is 100 % after every "
        "run, so where they end nothing is shown to differ.",
        section=StepTimes(
            "sync_none", longest_wait_s, tuple(f"{mode}_waits" for mode in MODES), SIZES, skipped=LAG + 1
        ),
    )
