"""Drafters of tests: what they are told to draft."""

from __future__ import annotations

from collections.abc import Callable

from tandem.engine.batch import Sequence
from tandem.engine.config import DraftConfig
from tandem.engine.draft import Drafter


class Told(Drafter):
    """drafts: as `Drafter.draft`."""

    def __init__(self, drafts: Callable[[list[Sequence], list[int]], list[list[int]]]) -> None:
        self.draft = drafts  # type: ignore[method-assign]


def at_most(tokens: int) -> DraftConfig:
    """A config that drafts so many tokens a step whatever they cost, or none."""
    return DraftConfig("lookup", tokens, lengths="fixed") if tokens else DraftConfig()
