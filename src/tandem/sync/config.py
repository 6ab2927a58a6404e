"""How far the engine's weights may trail the learner's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tandem.config import Count, section

Transport = Literal["memory", "folder", "broadcast"]  # to engines in other processes (sync/ways.py)


@dataclass(frozen=True, slots=True)
@section("sync")
class SyncConfig:
    """Weights to engine.

    >>> SyncConfig(lag=2).lag
    2
    """

    lag: Count = 0  # updates of the learner that the engine's weights are behind; each keeps a copy of the weights
