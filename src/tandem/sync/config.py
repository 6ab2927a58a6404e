"""How far the engine's weights may trail the learner's."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SyncConfig:
    """Weights to engine.

    >>> SyncConfig(lag=2).lag
    2
    """

    lag: int = 0  # updates of the learner that the engine's weights are behind; each keeps a copy of the weights

    def __post_init__(self) -> None:
        if self.lag < 0:
            raise ConfigError(f"sync.lag is {self.lag}; it must be 0 (always the newest weights) or more.")
