"""Where the rows of a step lie, for attention on a processor and on a GPU alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tandem.columns import Array
from tandem.kernels.address import address
from tandem.types import Reach

EVERYTHING = Reach()


@dataclass(frozen=True, slots=True)
class Paths:
    """Where queries sit and where their keys lie. All tensors int32, contiguous.

    >>> Paths.build([0, 3], [0], [[0, 1, 2]], page_tokens=1).num_rows
    3
    """

    row_start_S: torch.Tensor  # [S + 1] boundaries of the segments in the packed rows
    first_position_S: torch.Tensor  # [S] absolute position of each segment's first row
    table_SP: torch.Tensor  # [S, P] page holding positions [p * page_tokens, (p + 1) * page_tokens)
    page_tokens: int
    component_start: torch.Tensor | None = None  # runs of segments that share slots; only the backward pass reads it

    def __post_init__(self) -> None:
        """AssertionError where the rows of a segment go beyond its table; beside the CPU."""
        segments, blocks = self.table_SP.shape
        starts_S, first_S = self.row_start_S, self.first_position_S
        if starts_S.is_cpu:
            address(starts_S, torch.int32, segments + 1), address(first_S, torch.int32, segments)
            address(self.table_SP, torch.int32, segments, blocks)
            starts, first = starts_S.numpy(), first_S.numpy()
            count, room = starts[1:] - starts[:-1], blocks * self.page_tokens
            fine = starts[0] == 0 and (count >= 0).all() and (first >= 0).all() and (first + count <= room).all()
            assert fine, f"rows {starts.tolist()} at positions {first.tolist()} in tables of {room} positions"

    @property
    def num_rows(self) -> int:
        return int(self.row_start_S[-1])

    def to(self, device: torch.device) -> Paths:
        """A copy whose tensors lie on `device`; itself where they do."""
        if self.table_SP.device == device:
            return self
        component = None if self.component_start is None else self.component_start.to(device)
        row_start_S, first_S = self.row_start_S.to(device), self.first_position_S.to(device)
        return Paths(row_start_S, first_S, self.table_SP.to(device), self.page_tokens, component)

    @classmethod
    def of_segments(cls, bounds_S: Array, first_S: Array, parent_S: Array) -> Paths:
        """Slots are rows, a page a token: the path of a segment is its parent's up to `first_S`, then its own rows.

        Segments that share rows form a component and must be neighbours.
        """
        lengths_S = first_S + np.diff(bounds_S)
        table_SP = np.zeros((len(first_S), max(1, int(lengths_S.max(initial=0)))), dtype=np.int32)
        starts: list[int] = []
        for s, (first, parent, length) in enumerate(zip(first_S, parent_S, lengths_S, strict=True)):
            if first == 0:
                starts.append(s)
            else:
                fits = starts and starts[-1] <= parent < s and first <= lengths_S[parent]
                assert fits, (
                    f"segment {s} sees {first} positions of segment {parent}, which has fewer or is no neighbour"
                )
            table_SP[s, :first] = table_SP[parent, :first]
            table_SP[s, first:length] = np.arange(bounds_S[s], bounds_S[s + 1])
        bounds, first = (torch.from_numpy(np.asarray(x, dtype=np.int32)) for x in (bounds_S, first_S))
        component = torch.tensor([*starts, len(first_S)], dtype=torch.int32)
        return cls(bounds, first, torch.from_numpy(table_SP), 1, component)

    @classmethod
    def build(
        cls,
        row_start: list[int] | tuple[int, ...],
        first_position: list[int],
        tables: list[list[int]] | tuple[tuple[int, ...], ...],
        page_tokens: int,
    ) -> Paths:
        """From lists. Segments whose tables begin with the same page form a component and must be neighbours."""
        width = max((len(table) for table in tables), default=0)
        table_SP = torch.zeros(len(tables), max(width, 1), dtype=torch.int32)
        for s, table in enumerate(tables):
            table_SP[s, : len(table)] = torch.tensor(table, dtype=torch.int32)
        starts = [s for s in range(len(tables)) if s == 0 or tables[s][0] != tables[s - 1][0]]
        return cls(
            torch.tensor(row_start, dtype=torch.int32),
            torch.tensor(first_position, dtype=torch.int32),
            table_SP,
            page_tokens,
            torch.tensor([*starts, len(tables)], dtype=torch.int32),
        )
