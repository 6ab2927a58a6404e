"""GRPO that trains an adapter, beside GRPO that trains all weights."""

from __future__ import annotations

from tandem.study.study import Arm, Study

LORA = {"adapter.rank": "16", "learner.lr": "3e-4"}


def study() -> Study:
    """The demo as it is, and with a LoRA adapter of all linear layers."""
    return Study(
        name="lora",
        question="Does GRPO with a LoRA adapter of rank 16 reach the reward of GRPO that trains all weights, step by "
        "step?",
        recipe="smollm2_arithmetic_cpu",
        arms=(
            Arm("full", "all weights"),
            Arm("lora", "LoRA, rank 16", LORA),
        ),
        baseline="full",
        steps=80,
        shows_not="One small model, one easy task, one rank and one rate, fifteen times that of all weights, "
        "which was the first one tried. Where there is more to learn than an adapter holds, the two part.",
    )
