"""Who drafts, by its name in configs."""

from __future__ import annotations

from tandem.engine.config import DraftConfig
from tandem.engine.draft import Drafter, PromptLookup
from tandem.engine.suffix import SuffixLookup


def drafter_of(config: DraftConfig) -> Drafter:
    """By `engine.draft.by`.

    >>> drafter_of(DraftConfig("lookup")).draft([], [])
    []
    """
    return {"none": Drafter, "lookup": PromptLookup, "suffix": lambda: SuffixLookup(config.history)}[config.by]()
