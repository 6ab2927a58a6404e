"""A model of 4.8 M parameters learns sums of up to 15 digits from their worked steps, from scratch, on two cores."""

from __future__ import annotations

from tandem.engine.config import EngineConfig
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.rollout.config import RolloutConfig
from tandem.run.config import EvaluationConfig, RunConfig
from tandem.train.config import LearnerConfig


def tiny_chains() -> RunConfig:
    """Next-token training of a new model on worked sums of 8 to 512 bytes: where the study length_bias begins."""
    return RunConfig(
        name="tiny_chains",
        steps=500,
        objective="next_token",
        model=ModelConfig("new:width=256,layers=6,heads=4,kv_heads=2,ff_width=768,max_position=768"),
        task=TaskConfig(environment="tandem.studies.length_bias.chains:Chains", heldout_size=256),
        rollout=RolloutConfig(prompts_per_step=32, samples_per_prompt=1, max_new_tokens=512),
        engine=EngineConfig(kv_memory_bytes=256 << 20),
        learner=LearnerConfig(
            lr=1e-3,
            warmup_steps=50,
            schedule="cosine",
            final_share=0.1,
            beta2=0.99,
            weight_decay=0.1,
            microbatch_tokens=8192,
        ),
        evaluation=EvaluationConfig(prompts=128, every=100),
    )
