"""A model of random weights learns to say digits to a tool that takes its time, on two CPU cores."""

from __future__ import annotations

from tandem.engine.config import EngineConfig
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.rollout.config import RolloutConfig
from tandem.run.config import EvaluationConfig, RunConfig
from tandem.train.config import LearnerConfig


def tiny_digits() -> RunConfig:
    """GRPO over two turns, between which the environment waits 0.2 to 5 s; 8 prompts x 8 programs a step."""
    return RunConfig(
        name="tiny_digits",
        steps=16,
        model=ModelConfig("new:width=128,layers=4,heads=4,kv_heads=2,ff_width=384,max_position=128"),
        task=TaskConfig("tandem.bench.slow_tools:SlowDigits", heldout_size=64),
        rollout=RolloutConfig(prompts_per_step=8, samples_per_prompt=8, max_new_tokens=12, max_turns=2),
        engine=EngineConfig(kv_memory_bytes=64 << 20),
        learner=LearnerConfig(lr=2e-3, beta2=0.99),
        evaluation=EvaluationConfig(prompts=64),
    )
