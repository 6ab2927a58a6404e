"""What a scheduler does with drafts: adds them to what it planned, and hears which of them stood."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tandem.engine.config import DraftConfig
from tandem.engine.draft import Drafter
from tandem.engine.drafters import drafter_of
from tandem.errors import TandemWarning

if TYPE_CHECKING:
    from tandem.engine.batch import Sequence, Work


class Drafting:
    """A drafter in an engine. One that raises is heard of no more (`off`), and the engine goes on without drafts."""

    def __init__(self, config: DraftConfig, drafter: Drafter | None = None) -> None:
        """drafter: in place of the one that the config names."""
        self.config = config
        self.drafter = drafter or drafter_of(config)
        self.off = ""  # why nothing is drafted any more

    @property
    def on(self) -> bool:
        """Whether steps may have drafts."""
        return self.config.most > 0 and not self.off

    def add(self, decodes: list[Work], live: Mapping[str, Sequence], budget: int) -> int:
        """Adds drafts to works of one token, as far as pages and a budget of tokens allow; returns the tokens left."""
        sequences = [live[work.request.id] for work in decodes]
        most = [max(0, min(self.config.most, s.limit - len(s.tokens) - 1)) for s in sequences]
        for work, sequence, drafts in zip(decodes, sequences, self._drafts(sequences, most), strict=True):
            pages, known = sequence.pages, len(sequence.tokens)
            assert pages is not None
            drafts = drafts[: min(budget, pages.room_for_drafts(known))]
            pages.cover(known + len(drafts))
            work.tokens += drafts
            work.draws += len(drafts)
            budget -= len(drafts)
        return budget

    def _drafts(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        try:
            drafts = self.drafter.draft(sequences, most)
            assert len(drafts) == len(sequences), f"{len(drafts)} lists of drafts for {len(sequences)} sequences"
            return drafts
        except Exception as error:  # noqa: BLE001 - recorded boundary: drafts are guesses, and the run needs none
            self._turn_off(error)
            return [[] for _ in sequences]

    def ended(self, sequence: Sequence) -> None:
        """A sequence ended."""
        if self.on:
            try:
                self.drafter.ended(sequence)
            except Exception as error:  # noqa: BLE001 - recorded boundary: as above
                self._turn_off(error)

    def _turn_off(self, error: Exception) -> None:
        self.off = f"{type(error).__name__}: {error}"
        said = f"the drafter raised and is switched off, texts stay the same: {self.off}"
        warnings.warn(TandemWarning(said), stacklevel=2)
