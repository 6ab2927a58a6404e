"""Tiles of the matrix product by device, and which of them a product takes. Measured on no GPU yet.

All of a device's tiles take the depth in order and add each step's products to one accumulator an element. On compute
capability 9.0 all are of 64 rows a warp group, so that all compile to the same kind of instruction (wgmma, 16 deep),
whose width is not known to change an element's bits. `linear.agreed` runs them against each other before the first
product; where one has other bits, the last alone is used. Nothing is chosen by timing, here or in other kernels: the
fastest may differ between two processes, which is harmless only for choices that cannot change a bit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows, columns and depth a program takes at a time.

    >>> Tile(64, 64, 64, warps=4, stages=4).rows
    64
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


PLAIN = (Tile(64, 64, 64, 4, 4),)  # 64 KiB of shared memory in 2-byte types, 128 in fp32
# From the widest, which reads an operand the fewest times: 128 x 256 reads 48 KiB for 4.2 MFLOP, 147 KiB in three
# stages, and holds 128 accumulators a thread. The narrow ones are for decoding, whose few rows leave a program for each
# column block: at most two programs a multiprocessor, 48 to 96 KiB in flight in each.
HOPPER = (
    Tile(128, 256, 64, 8, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 32, 64, 4, 6),
    Tile(64, 64, 64, 4, 5),
)
TILES = {(9, 0): HOPPER}


@functools.cache
def _device(index: int) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()


def multiprocessors(device: torch.device) -> int:
    """1 under the interpreter."""
    return _device(_index(device))[1] if device.type == "cuda" else 1


def tiles_of(device: torch.device, dtype: torch.dtype) -> tuple[Tile, ...]:
    """The tiles that products of `dtype` may take; fp32 has one, for its operands take twice the shared memory."""
    if device.type != "cuda" or dtype == torch.float32:
        return PLAIN
    return TILES.get(_device(_index(device))[0], PLAIN)


def choose(tiles: tuple[Tile, ...], rows: int, columns: int, multiprocessors: int) -> Tile:
    """The widest tile, no taller than the rows need, that gives three of four multiprocessors a program; else the one
    that gives the most programs.

    >>> [choose(HOPPER, rows, 4096, 132).columns for rows in (16384, 256, 64)]
    [256, 128, 32]
    """
    fitting = [tile for tile in tiles if tile.rows <= max(64, triton.next_power_of_2(rows))]

    def programs(tile: Tile) -> int:
        return triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)

    ordered = sorted(fitting, key=lambda tile: -tile.rows * tile.columns)
    return next((tile for tile in ordered if 4 * programs(tile) >= 3 * multiprocessors), ordered[-1])
