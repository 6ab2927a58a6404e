"""What a run's own programs teach the model that it began with."""

from __future__ import annotations

from tandem.study.study import Arm, Study

RUN = "runs/sums-rl"


def study() -> Study:
    """The base model on as many programs of the run: those that were right, any of them, and the right ones weighed."""
    return Study(
        name="sft_from_run",
        question="A model of 4.8 M parameters whose answers to sums are right now and then was trained by GRPO, which "
        "doubled how often. Does supervised learning on what that run sampled and got right lift the base model, and "
        "more than as many of its programs drawn at random?",
        recipe="tiny_arithmetic",
        common={
            "model.source": "runs/sums",
            "corpus.sources": RUN,
            "corpus.rows": "4000",
            "corpus.tokens_per_step": "4096",
            "learner.lr": "1e-4",
            "learner.schedule": "constant",
            "learner.weight_decay": "0",
            "learner.warmup_steps": "4",
            "evaluation.prompts": "256",
            "evaluation.samples": "4",
            "evaluation.temperature": "1",
            "evaluation.every": "50",
        },
        arms=(
            Arm("random", "drawn at random"),
            Arm("right", "right ones", {"corpus.reward_at_least": "1"}),
            Arm("weighed", "by exp(A / 0.5)", {"supervised.weights": "advantage", "supervised.beta": "0.5"}),
        ),
        baseline="random",
        steps=150,
        compare=(("right", "random"), ("weighed", "random"), ("right", "weighed")),
        shows_not="One run of GRPO gave all programs, and seeds differ in which of them are drawn and in their order "
        "alone. The right ones are of easier sums than all are. Each program comes about seven times; a larger model "
        "would rather be given more of them once.",
    )
