"""tandem: post-training of language models where the engine and the learner share one forward pass.

The names below load their module on first use, so that `import tandem` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AlgoConfig": "tandem.algo.config",
    "Completion": "tandem.types",
    "ConfigError": "tandem.errors",
    "Decoder": "tandem.models.decoder",
    "Engine": "tandem.engine.engine",
    "EngineConfig": "tandem.engine.config",
    "Environment": "tandem.program.environment",
    "Group": "tandem.types",
    "LearnerConfig": "tandem.train.config",
    "Message": "tandem.types",
    "ModelConfig": "tandem.models.config",
    "Prompt": "tandem.types",
    "Request": "tandem.types",
    "RolloutConfig": "tandem.rollout.config",
    "RunConfig": "tandem.run.config",
    "Sampling": "tandem.types",
    "TandemError": "tandem.errors",
    "TaskConfig": "tandem.program.config",
    "Trajectory": "tandem.types",
    "WeightVersion": "tandem.types",
    "evaluate_model": "tandem.run.local",
    "load": "tandem.run.model",
    "open_checkpoint": "tandem.models.checkpoint",
    "override": "tandem.config",
    "train_recipe": "tandem.cli.train",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tandem' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
