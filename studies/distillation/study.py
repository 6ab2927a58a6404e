"""A six-layer student: distilled, with hidden states and without, on its own samples, and beside SFT.

Needs two models, made once (docs/distillation.md):

    tandem train smollm2_arithmetic_cpu --set objective=next_token --out runs/teacher
    tandem convert prune runs/teacher --out runs/student --size layers=6
"""

from __future__ import annotations

from tandem.study.study import Arm, Study

DISTILS = {"objective": "distil", "distil.teacher": "runs/teacher", "distil.text_weight": "0.5"}


def study() -> Study:
    """Each way to ask the teacher beside the texts alone."""
    return Study(
        name="distillation",
        question="Does a six-layer student of a thirty-layer teacher learn more from as many tokens where it is told "
        "the teacher's distributions, its hidden states too, or is corrected on samples of its own?",
        recipe="smollm2_distil_cpu",
        common={
            "model.source": "runs/student",
            "rollout.prompts_per_step": "32",
            "rollout.samples_per_prompt": "1",
            "rollout.max_new_tokens": "24",
            "evaluation.prompts": "128",
            "evaluation.every": "100",
        },
        arms=(
            Arm("sft", "SFT", {"objective": "next_token", "distil.teacher": "", "distil.text_weight": "0"}),
            Arm("logits", "logits", DISTILS),
            Arm("hidden", "logits, hidden states", {**DISTILS, "distil.hidden": "layers"}),
            Arm(
                "on_policy",
                "on policy",
                {
                    "objective": "distil",
                    "distil.teacher": "runs/teacher",
                    "distil.text_weight": "0",
                    "distil.on_policy": "true",
                    "distil.divergence": "jensen_shannon",
                },
            ),
        ),
        baseline="sft",
        compare=(("logits", "sft"), ("hidden", "sft"), ("on_policy", "sft"), ("hidden", "logits")),
        steps=400,
        shows_not="One teacher of 135 million parameters, one student of a fifth of its layers and one task, whose "
        "texts are short and right: where texts are long, or wrong, a teacher may say more or less beside them. Equal "
        "are steps and texts a step; a step of distillation takes longer by the teacher's forward pass, and on policy "
        "by the sampling too. An answer of the student's own may be shorter or longer than the task's.",
    )
