"""What the same bits on both sides cost in time, and bring in reward."""

from __future__ import annotations

from tandem.study.study import Arm, Study

NAIVE = {"algo.correction.form": "decoupled", "algo.correction.weight": "none"}


def study() -> Study:
    """The exact kernels beside the library's products, and beside noise of the size of a usual mismatch.

    Noise of 0.01 gives a mean |d log p| of 0.02 and a k3 near 5e-4, as two programs in bf16 have that were not made to
    agree.
    """
    library, noise = {"model.kernels": "library"}, {"engine.noise": "0.01"}
    return Study(
        name="exactness_price",
        question="What do kernels that give engine and learner the same bits cost in time, and is reward any different "
        "without them?",
        recipe="smollm2_arithmetic_cpu",
        common={
            "rollout.prompts_per_step": "8",
            "rollout.samples_per_prompt": "8",
            "rollout.max_new_tokens": "16",
            "learner.lr": "4e-5",
            "evaluation.prompts": "64",
        },
        arms=(
            Arm("exact", "exact"),
            Arm("library_naive", "library, naive", {**library, **NAIVE}),
            Arm("noise_naive", "noise 0.01, naive", {**noise, **NAIVE}),
            Arm("noise_token_tis", "noise 0.01, token TIS", {**noise, **NAIVE, "algo.correction.weight": "token_tis"}),
        ),
        baseline="exact",
        steps=40,
        shows_not="The library's product runs only where it was timed faster than the exact one. On a processor where "
        "that is seldom, both kinds of run may agree to the bit (k3 is then 0), and that is all it shows. One "
        "dense model of 135 million parameters in bf16, short answers, one processor, one version of the library.",
        reading="Exactness costs nothing measurable on this processor and bought nothing measurable on this task. The "
        "exact kernels are the fastest that were found for nearly every forward product, so the library mode "
        "chose them too, and where it did call the library's bf16 product that gave the same bits: k3 is 0 in all "
        "its steps. Its runs differ from the exact ones by the weight gradients alone. Noise of the size that two "
        "programs in bf16 usually have (k3 2e-4) changed reward in neither direction; the one interval that "
        "leaves 0 out is a noisy arm above the exact one, of six intervals of which 0.3 would by chance. What "
        "exactness buys here is not reward: it is that a difference is known to be a fault. The price by "
        "operation and by step: docs/performance.md.",
    )
