"""Who drafts, by its name in configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tandem.engine.config import By, DraftConfig
from tandem.engine.draft import Drafter, PromptLookup
from tandem.engine.suffix import SuffixLookup
from tandem.engine.synthetic import Synthetic
from tandem.errors import ConfigError

if TYPE_CHECKING:
    from tandem.engine.batch import Sequence


class Weightless(Drafter):
    """In place of a drafter with weights, where there is no runner to have it: raises as it is first asked."""

    def draft(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        raise ConfigError("what drafts here has weights, and this engine's runner was given none (Runner.drafter).")


def drafter_of(config: DraftConfig) -> Drafter:
    """By `engine.draft.by`.

    >>> drafter_of(DraftConfig("lookup")).draft([], [])
    []
    """
    made: dict[By, Callable[[], Drafter]] = {
        "none": Drafter,
        "lookup": PromptLookup,
        "suffix": lambda: SuffixLookup(config.history),
        "synthetic": lambda: Synthetic(config.acceptance, config.history),
    }
    return made.get(config.by, Weightless)()
