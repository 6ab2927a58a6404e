"""Who drafts, by its name in configs."""

from __future__ import annotations

from tandem.engine.config import DraftConfig
from tandem.engine.draft import Drafter, PromptLookup
from tandem.engine.suffix import SuffixLookup
from tandem.engine.synthetic import Synthetic


def drafter_of(config: DraftConfig) -> Drafter:
    """By `engine.draft.by`.

    >>> drafter_of(DraftConfig("lookup")).draft([], [])
    []
    """
    made = {
        "none": Drafter,
        "lookup": PromptLookup,
        "suffix": lambda: SuffixLookup(config.history),
        "synthetic": lambda: Synthetic(config.acceptance, config.history),
    }
    return made[config.by]()
