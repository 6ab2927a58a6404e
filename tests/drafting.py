"""Drafters of tests: what they are told to draft."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tandem.engine.batch import Sequence
from tandem.engine.config import DraftConfig, Verify
from tandem.engine.draft import Drafter

if TYPE_CHECKING:
    from torch import Tensor


Drafts = Callable[[list[Sequence], list[int]], list[list[int]]]
Paths = Callable[[list[Sequence], list[int], list[int]], list[list[list[int]]]]
Probabilities = Callable[[list[Sequence]], "list[Tensor | None]"]


class Told(Drafter):
    """drafts, branches, probabilities: as `Drafter.draft` and so on."""

    def __init__(
        self, drafts: Drafts, branches: Paths | None = None, probabilities: Probabilities | None = None
    ) -> None:
        self.draft = drafts  # type: ignore[method-assign]
        if branches is not None:
            self.branches = branches  # type: ignore[method-assign]
        if probabilities is not None:
            self.probabilities = probabilities  # type: ignore[method-assign]


def at_most(tokens: int, branches: int = 1, verify: Verify = "match") -> DraftConfig:
    """A config that drafts so many tokens a step whatever they cost, or none."""
    return DraftConfig("lookup", tokens, "fixed", verify=verify, branches=branches) if tokens else DraftConfig()
