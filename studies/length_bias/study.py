"""Which groups an asynchronous run learns from, where long answers are the hard ones."""

from __future__ import annotations

from tandem.study.study import Arm, Study


def study() -> Study:
    """Each order beside strict first in, first out, which loses nothing and prefers nobody."""
    return Study(
        name="length_bias",
        question="Where difficulty goes with length, what does the order in which an asynchronous run learns from its "
        "groups cost on long answers, and do inverse-propensity weights give it back?",
        recipe="tiny_totals",
        common={
            "objective": "policy_gradient",
            "model.source": "runs/totals",
            "rollout.prompts_per_step": "16",
            "rollout.samples_per_prompt": "8",
            "learner.lr": "1e-4",
            "learner.schedule": "constant",
            "learner.weight_decay": "0",
            "learner.warmup_steps": "4",
            "evaluation.every": "0",
            "evaluation.prompts": "256",
            "asynchrony.mode": "full",
            "asynchrony.lag": "2",
            "asynchrony.by_load": "false",  # as where engines have processors of their own: (lag + 1) P groups run
        },
        arms=(
            Arm("fifo", "first in, first out"),
            Arm("window", "window of 14", {"asynchrony.order": "window", "asynchrony.window": "14"}),
            Arm("completion", "as they end", {"asynchrony.order": "completion"}),
            Arm("drop", "dropped beyond the lag", {"asynchrony.order": "drop"}, steps=33),
            Arm(
                "drop_weighted",
                "the same, weighed",
                {"asynchrony.order": "drop", "algo.fairness.weights": "inverse"},
                steps=33,
            ),
        ),
        baseline="fifo",
        compare=(
            ("window", "fifo"),
            ("completion", "fifo"),
            ("drop", "fifo"),
            ("drop_weighted", "fifo"),
            ("drop_weighted", "drop"),
        ),
        steps=40,
        seeds=(0, 1, 2, 3, 4),
        shows_not="One small model whose answers are long because they are written out step by step; thinking that "
        "is long by choice may behave otherwise. Held-out accuracy is of the long half alone (27 to 52 "
        "digits). Steps were set by what the arms sample a step, so that runs take as many seconds. "
        "Completion order loses no group but those in flight at the end, so all its weights are 1 and "
        "weighing it is the same run; the weights are shown where groups are lost, on drop.",
        reading="Of the long half 23 % are right before; after as many seconds 57 % in strict order, 61 % in a "
        "window, 70 % as groups end, 48 % where groups beyond the lag are dropped. None of these is shown"
        " to differ from strict order: seeds of one arm differ by 0.3 to 0.6. Dropping loses 3.8 groups a"
        " step, and long ones: of the longest tenth one in four is kept, so a learned answer has 129 "
        "tokens where all have 157. On two seeds it ends 0.2 and 0.4 below strict order, on three up to "
        "0.09 above. Weights of inverse propensity do not give it back: on every seed they end lower than"
        " dropping alone, by 0.055 [0.012, 0.099], the one difference that is shown. They make up for who"
        " is lost, with 86 % of the samples' worth, not for what is: the drawn tokens are spent, and "
        "steps are fewer. Whoever wants the long ones takes an order that loses none.",
    )
