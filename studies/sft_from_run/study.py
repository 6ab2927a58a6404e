"""What a run's own programs teach the model that it began with."""

from __future__ import annotations

from tandem.study.study import Arm, Study

RUN = "runs/sums-rl"


def study() -> Study:
    """The base model on as many programs of the run: those that were right, any of them, and the right ones weighed."""
    return Study(
        name="sft_from_run",
        question="A model of 4.8 M parameters that is right on a third of sums was trained by GRPO, which raised how "
        "often. Does supervised learning on what that run sampled and got right lift the base model, and "
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
        reading="Right ones teach more than as many drawn at random: 37.4 against 27.6 %, by 0.098 [0.070, 0.127] and "
        "on each of three seeds. Programs drawn at random make the base model worse, from 36.1 %: two in three of "
        "them are wrong. That the right ones lift it is not shown: by 0.040, -0.012 and 0.013. Weights of "
        "exp(A / 0.5) over all programs do not stand in for the choice, 0.070 [0.056, 0.085] below it: advantages of "
        "-0.4 and 0.6 weigh 0.4 and 3, and two wrong ones together still count a quarter of a right one. With a base "
        "that is right on a ninth of sums, and a run that had hardly learned more, all was the same: 0.042 "
        "[0.021, 0.062] above random, no lift shown.",
        shows_not="One run of GRPO gave all programs, and seeds differ in which of them are drawn and in their order "
        "alone. The right ones are of easier sums than all are. Each program comes about three times; a larger model "
        "would rather be given more of them once.",
    )
