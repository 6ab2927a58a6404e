"""A rank's share of each weight: cut from a whole one, and changed by what changed in the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.kernels.changes import Changes, changed_words, words_of
from tandem.models.decoder import Decoder
from tandem.models.parts import Slot


@dataclass(frozen=True, slots=True)
class Shard:
    """Of one weight, whose slot says what ranks divide.

    >>> from tandem.models.parts import Stored
    >>> pair = Slot("gate_up", (Stored("gate", "", 2), Stored("up", "", 2)), 1, "rows")
    >>> Shard(pair, rank=1, ranks=2).cut(torch.tensor([[0], [1], [10], [11]])).tolist()
    [[1], [11]]
    """

    slot: Slot
    rank: int
    ranks: int

    def cut(self, whole: Tensor) -> Tensor:
        """The rank's share, in memory of its own."""
        stored = whole.split([one.rows for one in self.slot.stored])
        return torch.cat([self.slot.cut(rows, self.rank, self.ranks) for rows in stored])

    def change(self, share: Tensor, changes: Changes) -> None:
        """Write into `share` what lies in it of the changes of the whole weight."""
        rows, columns = self.slot.rows, self.slot.columns or 1
        wide = columns * share.element_size() // 2  # words of a row
        of_row = torch.full((rows,), -1)
        of_row[self.cut(torch.arange(rows)[:, None]).flatten() if self.slot.split == "rows" else slice(None)] = (
            torch.arange(len(share))
        )
        first, last = 0, wide
        if self.slot.split == "columns":
            (held,) = self.slot.cut(torch.arange(wide)[None], self.rank, self.ranks)
            first, last = int(held[0]), int(held[-1]) + 1
        local, row_of = words_of(share).view(len(share), last - first).numpy(), of_row.numpy()
        for places, values in changed_words(changes, rows * wide):
            row, column = row_of[places // wide], places % wide
            ours = (row >= 0) & (column >= first) & (column < last)
            local[row[ours], column[ours] - first] = values[ours]


def shards(decoder: Decoder, rank: int, ranks: int) -> Mapping[str, Shard]:
    """Of each of a whole decoder's weights, by its name there. ModelError where the ranks do not divide one."""
    slots = {id(weight): slot for slot, weight in decoder.slots()}
    for slot in slots.values():
        slot.shard(ranks)
    return {name: Shard(slots[id(weight)], rank, ranks) for name, weight in decoder.weights()}
