"""A six-layer student: distilled, with hidden states and without, on its own samples, and beside SFT.

Needs two models, made once (docs/distillation.md):

    tandem train tiny_arithmetic --set steps=1000 --set evaluation.every=0 --out runs/sums-teacher \
        --set model.source=new:width=256,layers=12,heads=4,kv_heads=2,ff_width=768,max_position=256
    tandem convert prune runs/sums-teacher --out runs/sums-student --size layers=6
"""

from __future__ import annotations

from tandem.study.study import Arm, Study

TAUGHT = {"objective": "distil", "distil.teacher": "runs/sums-teacher"}
TEXTS = {**TAUGHT, "distil.text_weight": "0.5"}


def study() -> Study:
    """Each way to ask the teacher beside the texts alone. Seeds are other texts, in the same order for all arms."""
    return Study(
        name="distillation",
        question="A teacher of twelve layers was trained on sums with their worked steps, and every second of its "
        "layers was taken out. Does the student of six learn more from as many tokens where it is told the teacher's "
        "distributions, its hidden states too, or is corrected on samples of its own, than from the texts alone?",
        recipe="tiny_arithmetic",
        common={
            "model.source": "runs/sums-student",
            "learner.lr": "5e-4",
            "learner.warmup_steps": "10",
            "evaluation.prompts": "256",
            "evaluation.every": "50",
        },
        arms=(
            Arm("sft", "SFT"),
            Arm("logits", "logits", TEXTS),
            Arm("hidden", "logits, hidden states", {**TEXTS, "distil.hidden": "layers"}),
            Arm(
                "on_policy",
                "on policy",
                {
                    **TAUGHT,
                    "distil.on_policy": "true",
                    "distil.divergence": "jensen_shannon",
                    "rollout.prompts_per_step": "56",  # answers are longer than the texts until they end as these do
                },
            ),
        ),
        baseline="sft",
        compare=(("logits", "sft"), ("hidden", "sft"), ("on_policy", "sft"), ("hidden", "logits")),
        steps=250,
        seeds=(1, 2, 3),
        seeded=("task.seed",),
        reading="No: where texts are right, say one thing and come new in every step, a teacher has nothing to add. "
        "SFT ends at 48.0 %; with the teacher's distributions it is 46.9 (-0.012 [-0.021, -0.002]), with its hidden "
        "states too 48.8 (+0.008 [-0.012, 0.027]: no difference shown), on the student's own answers 44.5 "
        "(-0.035 [-0.061, -0.009], of a tenth fewer tokens). The student ends as good as its teacher (50.4 %), "
        "which is wrong on half the sums that it is asked about, where the texts are right on all. Hidden states help "
        "early: after 50 steps they are ahead on each seed, by 0.06, 0.03 and 0.02.",
        shows_not="One teacher of ten million parameters, one student of half its layers and one task, whose "
        "texts are short and right: where texts are long, or wrong, a teacher may say more or less beside them. Equal "
        "are steps and texts a step, and so tokens, but on policy, where answers are the student's own, of fewer "
        "prompts: the table has how many tokens each arm was trained on. A step of distillation takes longer by the "
        "teacher's forward pass, and on policy by the sampling too.",
    )
