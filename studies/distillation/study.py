"""A six-layer student: distilled, with hidden states and without, on its own samples, and beside SFT.

Needs a teacher and its student, and a run whose programs are the texts, all made once:

    tandem train tiny_arithmetic --set steps=1000 --set evaluation.every=0 --out runs/sums-teacher \
        --set model.source=new:width=256,layers=12,heads=4,kv_heads=2,ff_width=768,max_position=256
    tandem convert prune runs/sums-teacher --out runs/sums-student --size layers=6
    tandem train tiny_arithmetic --set steps=800 --out runs/sums
    tandem train tiny_arithmetic --set objective=policy_gradient --set model.source=runs/sums --set steps=60 \
        --set rollout.prompts_per_step=32 --set rollout.samples_per_prompt=8 --set learner.lr=1e-4 \
        --set learner.warmup_steps=4 --set evaluation.every=0 --out runs/sums-rl
"""

from __future__ import annotations

from tandem.study.study import Arm, Study

WRITTEN = {"corpus.sources": "runs/sums-rl", "corpus.rows": "8000", "corpus.tokens_per_step": "3200"}
TAUGHT = {"objective": "distil", "distil.teacher": "runs/sums-teacher"}
TEXTS = {**WRITTEN, **TAUGHT, "distil.text_weight": "0.5"}


def study() -> Study:
    """Each way to ask the teacher beside the texts alone. Seeds are other texts, in the same order for all arms."""
    return Study(
        name="distillation",
        question="A teacher of twelve layers was trained on sums with their worked steps, and every second of its "
        "layers was taken out. The texts at hand are what another model wrote when it was asked, of which two in three "
        "are wrong. Does the student of six learn more from as many tokens where it is told the teacher's "
        "distributions, its hidden states too, or is corrected on samples of its own, than from the texts alone?",
        recipe="tiny_arithmetic",
        common={
            "model.source": "runs/sums-student",
            "learner.lr": "5e-4",
            "learner.warmup_steps": "10",
            "evaluation.prompts": "256",
            "evaluation.every": "60",
        },
        arms=(
            Arm("sft", "SFT", WRITTEN),
            Arm("logits", "logits", TEXTS),
            Arm("hidden", "logits, hidden states", {**TEXTS, "distil.hidden": "layers"}),
            Arm(
                "on_policy",
                "on policy",
                {
                    **TAUGHT,
                    "distil.on_policy": "true",
                    "distil.divergence": "jensen_shannon",
                    "rollout.prompts_per_step": "65",  # for as many tokens as the texts have
                },
            ),
        ),
        baseline="sft",
        compare=(("logits", "sft"), ("hidden", "sft"), ("on_policy", "sft"), ("hidden", "logits")),
        steps=120,
        seeds=(1, 2, 3),
        seeded=("task.seed",),
        reading="Yes, where texts are wrong. SFT ends at 27.6 %; with the teacher's distributions beside the same "
        "texts it is 33.1 (+0.055 [0.001, 0.109]), with its hidden states too 34.9 (+0.073 [0.043, 0.103]), higher on "
        "each of three seeds. On the student's own answers it is 32.6 (+0.049 [-0.106, 0.205]): higher on two seeds of "
        "three, not shown. The teacher is right on half of what it is asked, the texts on a third. Where the texts are "
        "right, say one thing and come new in every step there is nothing to add: of 250 such steps SFT ended at 48.0 "
        "%, distributions at 46.9, hidden states too at 48.8, on policy at 44.5, and of 512 right texts read fifteen "
        "times SFT at 33.7, distributions at 31.9 (-0.018 [-0.052, 0.016]).",
        shows_not="One teacher of ten million parameters, one student of half its layers and one task with short "
        "answers. Equal are steps and trained tokens, on policy within a hundredth: there answers are the student's "
        "own, and questions come new in every step. A step of distillation takes longer by the teacher's forward pass, "
        "and on policy by the sampling too.",
    )
