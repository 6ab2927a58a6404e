"""What a run's own programs teach the model that it began with. Needs the run, made once (13 minutes on two cores):

tandem train smollm2_arithmetic_cpu --out runs/demo
"""

from __future__ import annotations

from tandem.study.study import Arm, Study


def study() -> Study:
    """The base model on as many programs of the run: those that were right, and any of them."""
    return Study(
        name="sft_from_run",
        question="SmolLM2-135M was trained on two-term sums by GRPO, which raised how often it is right from 26 to "
        "72 %. Does supervised learning on what that run sampled and got right lift the base model, and more than as "
        "many of its programs drawn at random?",
        recipe="smollm2_arithmetic_cpu",
        common={
            "objective": "next_token",
            "corpus.sources": "runs/demo",
            "corpus.rows": "1500",
            "corpus.tokens_per_step": "1024",
            "learner.schedule": "constant",
            "evaluation.every": "30",
        },
        arms=(
            Arm("random", "drawn at random"),
            Arm("right", "right ones", {"corpus.reward_at_least": "1"}),
        ),
        baseline="random",
        steps=60,
        seeds=(0, 1, 2, 3, 4),
        reading="Yes: on each of five seeds the base model's 25.8 % become 66 to 74 %, as much as GRPO itself had "
        "reached, after sixty steps of some 190 trained tokens each. As many programs drawn at random, of which a "
        "quarter are right, lift it to 63 to 68 %: most of what is learned is to answer as it was asked. The right "
        "ones end higher on four seeds of five, by 0.064 [-0.003, 0.131] on the mean: at five seeds of 128 prompts "
        "that is not shown. With a base of 4.8 M parameters that already answers as asked (36 % right) the choice was "
        "shown and the lift was not: right above random by 0.098 [0.070, 0.127], above the base by 0.040, -0.012 and "
        "0.013.",
        shows_not="One run of GRPO gave all programs, and seeds differ in which of them are drawn and in their order "
        "alone. The right ones are of easier sums than all are. Doubles are left out: the run's later programs, alike "
        "and mostly right, count once, so that of those drawn at random a quarter are right where the run's were 60 %.",
    )
