"""A model of 1.9 M parameters learns running totals of up to 52 digits from their steps, from scratch, on two cores."""

from __future__ import annotations

from tandem.engine.config import EngineConfig
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.rollout.config import RolloutConfig
from tandem.run.config import EvaluationConfig, RunConfig
from tandem.train.config import LearnerConfig


def tiny_totals() -> RunConfig:
    """Next-token training of a new model on totals of 9 to 350 bytes: where the study length_bias begins."""
    return RunConfig(
        name="tiny_totals",
        steps=1000,
        objective="next_token",
        model=ModelConfig("new:width=192,layers=4,heads=4,kv_heads=2,ff_width=512,max_position=768"),
        task=TaskConfig(environment="tandem.studies.length_bias.totals:Totals", heldout_size=256),
        rollout=RolloutConfig(prompts_per_step=16, samples_per_prompt=1, max_new_tokens=512),
        engine=EngineConfig(kv_memory_bytes=256 << 20),
        learner=LearnerConfig(
            lr=1e-3,
            warmup_steps=50,
            schedule="constant",
            beta2=0.99,
            weight_decay=0.1,
            microbatch_tokens=8192,
        ),
        evaluation=EvaluationConfig(prompts=128, every=100),
    )
