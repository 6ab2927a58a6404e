"""The main finding of async_gain once more, of SmolLM2 and a calculator that takes its time."""

from __future__ import annotations

from functools import partial

from tandem.bench.slow_tools import longest_wait_s
from tandem.study.step_time import StepTimes
from tandem.study.study import Arm, Study

SIZES = 8, 8  # groups of a step, programs of each
LAG = 2
CALLS = 1  # of most programs
FULL = {"asynchrony.mode": "full", "asynchrony.lag": str(LAG)}


def study() -> Study:
    """In steps and full, with tools that sleep; in steps without, of which both are predicted."""
    return Study(
        name="async_gain_smollm2",
        question="Is a step of SmolLM2 as much shorter where it samples while it learns, and does a sample teach as "
        "much?",
        recipe="smollm2_calculator_cpu",
        common={
            "task.environment": "tandem.bench.slow_tools:SlowCalculator",
            "task.heldout_size": "64",
            "rollout.prompts_per_step": str(SIZES[0]),
            "rollout.samples_per_prompt": str(SIZES[1]),
            "evaluation.prompts": "64",
            "learner.lr": "4e-5",
            "checkpoint.minutes": "0",
        },
        arms=(
            Arm("sync_waits", "in steps", {"task.parameters": "waits=true"}, panel="tools 0.2 to 5 s"),
            Arm("full_waits", f"full, lag {LAG}", {"task.parameters": "waits=true", **FULL}, panel="tools 0.2 to 5 s"),
            Arm("sync_none", "in steps", {"task.parameters": "waits=false"}, panel="no waits"),
        ),
        baseline="sync_waits",
        compare=(("full_waits", "sync_waits"),),
        steps=12,
        reading="No shorter: 12.6 s in steps, 12.7 s sampling while it learns, for which the algebra says 8.5. Of "
        "174 and 167 s of a run the tools are waited for 31 and 5 s, but the learner takes 80 s in place of"
        " 62: it scores what older weights drew, and of later batches more has a gradient (70 against 57 "
        "%). And the engine, 35 s a run where nothing waits, takes 58 s in both, since programs that wait "
        "leave small batches; the algebra has it at 35. What an asynchronous run hides is what two cores "
        "have idle, and with 64 programs of SmolLM2 they have little. The tiny model of async_gain, whose "
        "steps are mostly waits, is 2.4 times as fast. A reward while training is of weights up to two "
        "updates old, so its curve lies to the right (lower by 0.20 [0.03, 0.38]); held-out accuracy after "
        "as many steps, 96 against 99 %, is not shown to differ.",
        shows_not="Twelve steps of one model and one task, and three seeds: a loss of quality by old weights that "
        "takes longer to show is not excluded. Programs call the tool once, twice or not at all, and are predicted as "
        "if once.",
        section=StepTimes(
            "sync_none", partial(longest_wait_s, waits=CALLS), ("sync_waits", "full_waits"), SIZES, skipped=LAG + 1
        ),
    )
