"""What a run's own programs teach the model that it began with."""

from __future__ import annotations

from tandem.study.study import Arm, Study

RUN = "runs/sums-rl"


def study() -> Study:
    """The base model on as many programs of the run: those that were right, any of them, and the right ones weighed."""
    return Study(
        name="sft_from_run",
        question="A model of 4.8 M parameters that is right on a ninth of sums was trained by GRPO. Does supervised "
        "learning on what that run sampled and got right lift the base model, and more than as many of its programs "
        "drawn at random?",
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
            "evaluation.every": "25",
        },
        arms=(
            Arm("random", "drawn at random"),
            Arm("right", "right ones", {"corpus.reward_at_least": "1"}),
            Arm("weighed", "by exp(A / 0.5)", {"supervised.weights": "advantage", "supervised.beta": "0.5"}),
        ),
        baseline="random",
        steps=150,
        compare=(("right", "random"), ("weighed", "random"), ("right", "weighed")),
        reading="Right ones teach more than as many drawn at random: 12.8 against 8.6 %, by 0.042 [0.021, 0.062] and "
        "on each of three seeds. Programs drawn at random make the base model worse, from 11.3 %: nine in ten of "
        "them are wrong. That the right ones lift it is not shown: by 0.020, 0.000 and 0.023 of 256 prompts. The run "
        "that gave them had hardly learned more than its base (a reward of 0.13 after 60 steps of GRPO), so most of "
        "what was right in it the base could do. Weights of exp(A / 0.5) over all programs do not stand in for the "
        "choice: advantages of -0.1 and 0.9 weigh 0.8 and 6, and nine wrong ones outweigh one right one.",
        shows_not="One run of GRPO gave all programs, and seeds differ in which of them are drawn and in their order "
        "alone. The right ones are of easier sums than all are. Each program comes about seven times; a larger model "
        "would rather be given more of them once.",
    )
