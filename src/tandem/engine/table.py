"""What a step by shares (engine/deal.py) asks of whoever deals out its rows (engine/hand.py)."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tandem.engine.batch import Sequence


class Start(Enum):
    """What became of a request that was to start."""

    BEGUN = "it runs"
    WAITS = "it had better wait, for a prefix or its program's turn"
    LATER = "its room is that of rows which run in this step already"
    FULL = "there is no room for it"


class Table(Protocol):
    """What a scheduler does with what is dealt."""

    tokens: int  # that the step has room for, beside the rows that draw
    allows: Callable[[Sequence], bool]  # whether it may start at all: its program is not paused

    def draw(self, sequence: Sequence) -> None:
        """Its row runs."""

    def chunk(self, sequence: Sequence, tokens: int) -> int:
        """So many more tokens of its prompt run, or as many as there is room for; how many."""

    def start(self, sequence: Sequence) -> Start:
        """It starts, if it can."""

    def place(self, sequence: Sequence) -> int:
        """How far it has run when the step has."""

    def cached(self, sequence: Sequence) -> int:
        """Blocks that a request that waits would find."""
