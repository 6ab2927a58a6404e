"""Where a config has its workers placed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.run.learned import OBJECTIVES
from tandem.run.workers import Backend, Local

if TYPE_CHECKING:
    from tandem.run.config import RunConfig


def backend_of(config: RunConfig) -> Backend | None:
    """Of workers.backend; None where all is in this process. ConfigError where it is not installed."""
    if config.workers.backend == "none":
        return None
    if config.workers.backend == "local":
        return Local(config.workers)
    from tandem.run.ray import Ray

    refers = "reference_logprobs" in OBJECTIVES[config.objective](config).columns
    workers = config.engine.replicas + int(refers) + int(config.workers.learner == "apart") + config.task.workers
    return Ray(config.workers, int(config.model.device == "cuda"), workers)
