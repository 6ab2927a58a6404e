"""Sampling spent on groups that differ, stage by stage, at equal seconds."""

from __future__ import annotations

from tandem.study.study import Arm, Study

FILTERED = {"algo.filter_zero_variance": "true"}
FILLED = FILTERED | {"rollout.redraws": "2"}
CHOSEN = FILTERED | {"select.window": "256", "select.fresh": "32"}
STOPPED = FILTERED | {"select.first_samples": "4", "select.error": "0.2", "rollout.samples_per_prompt": "16"}
ALL = CHOSEN | STOPPED | {"rollout.prompts_per_step": "8"}


def study() -> Study:
    """The demo as it is, with each stage alone, and with choice and stop together."""
    return Study(
        name="what_a_token_buys",
        question="In the demo 72 % of the sampled tokens are of groups whose rewards are all equal, and teach nothing. "
        "At equal seconds, does spending them on groups that differ raise the reward, and which stage does?",
        recipe="smollm2_arithmetic_cpu",
        arms=(
            Arm("plain", "as it is"),
            Arm("filled", "batch filled", FILLED, steps=90),
            Arm("chosen", "prompts chosen", CHOSEN, steps=130),
            Arm("stopped", "groups stopped early", STOPPED, steps=120),
            Arm("all", "chosen and stopped", ALL, steps=150),
            Arm("all_fast", "the same, twice the rate", ALL | {"learner.lr": "4e-5"}, steps=150),
        ),
        baseline="plain",
        steps=150,
        shows_not="One small model and one task whose difficulty shows in the prompt's digits, which is what the "
        "choice goes by: where prompts don't show how hard they are, only those asked before are known. Steps were set "
        "so that runs take as many seconds on two cores; another machine has another exchange rate.",
    )
