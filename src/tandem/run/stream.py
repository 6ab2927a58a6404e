"""A run's training prompts, in the order of the task, and how far they have come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tandem.program.pool import EnvironmentPool
from tandem.types import Prompt


class PromptStream:
    """What was taken since the last `settle` is given again after a resume: no update has seen it."""

    def __init__(self, pool: EnvironmentPool) -> None:
        self.pool = pool
        self.cursor = self.settled = 0  # index of the next prompt; of the next after a resume
        self._seen: dict[int, Prompt] = {}  # by index, of those that `ahead` gave and may give again

    def take(self, count: int) -> Sequence[Prompt]:
        """The next prompts."""
        prompts = self.pool.batch(self.cursor, count)
        self.cursor += count
        return prompts

    def ahead(self, count: int) -> list[Prompt]:
        """The next prompts, none of which is taken."""
        wanted = range(self.cursor, self.cursor + count)
        kept = {index: prompt for index, prompt in self._seen.items() if index in wanted}
        new = next((index for index in wanted if index not in kept), wanted.stop)
        kept |= zip(range(new, wanted.stop), self.pool.batch(new, wanted.stop - new), strict=True)
        self._seen = kept
        return [kept[index] for index in wanted]

    def skip(self, cursor: int) -> None:
        """All before `cursor` were taken, by an earlier sitting."""
        self.cursor = max(self.cursor, cursor)

    def settle(self) -> None:
        """What was taken so far has met its fate."""
        self.settled = self.cursor

    def state(self) -> dict[str, Any]:
        return {"cursor": self.settled}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.cursor = self.settled = int(state["cursor"])
