"""Which words of a tensor changed: found, coded and written into another copy of it.

A tensor is its 16-bit words in order: an element of bf16, half of one of fp32. In blocks of 65,536 the changes of each
are the shortest of three streams, which their number tells: places and values, a bit a word and values, all the values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tandem.kernels.address import address
from tandem.kernels.build.load import function

BLOCK = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """What turns one tensor into another."""

    counts: Tensor  # int32: changed words of each block
    streams: Tensor  # int16: one block's after the other's

    @property
    def changed(self) -> int:
        """Words."""
        return int(self.counts.sum())

    @property
    def nbytes(self) -> int:
        return self.counts.nbytes + self.streams.nbytes


def words_of(tensor: Tensor) -> Tensor:
    """Its 16-bit words, sharing memory. It is contiguous, beside the CPU and of an even number of bytes."""
    assert tensor.is_contiguous() and tensor.is_cpu and tensor.nbytes % 2 == 0, (tensor.shape, tensor.dtype)
    return tensor.detach().reshape(-1).view(torch.int16)


def num_blocks(words: int) -> int:
    return -(-words // BLOCK)


def lengths(counts: np.ndarray, words: int) -> list[int]:
    """Words of each block's stream.

    >>> lengths(np.array([0, 3, 9000, 40]), 3 * BLOCK + 40)
    [0, 6, 13096, 40]
    """
    sizes = [min(BLOCK, words - block * BLOCK) for block in range(num_blocks(words))]
    return [
        0 if not count else min(2 * count, -(-size // 16) + count, size)
        for count, size in zip(counts.tolist(), sizes, strict=True)
    ]


def is_sound(changes: Changes, words: int) -> bool:
    """Whether they can be of a tensor of so many words: what `apply_changes` takes for granted."""
    if len(changes.counts) != num_blocks(words):
        return False
    if (run := function("changes", "sound_changes", "ipip")) is not None:
        found = ctypes.c_int32()
        counts_B = address(changes.counts, torch.int32, num_blocks(words))
        run(words, counts_B, len(changes.streams), ctypes.addressof(found))
        return bool(found.value)
    counts = changes.counts.numpy()
    sizes = np.minimum(BLOCK, words - BLOCK * np.arange(num_blocks(words)))
    if (counts < 0).any() or (counts > sizes).any():
        return False
    return sum(lengths(counts, words)) == len(changes.streams)


def code_changes(now: Tensor, base: Tensor, room: Tensor) -> Changes:
    """What turns the words `base` into `now`. `room`, of as many words, is written and has the streams' memory."""
    words = len(now)
    counts, total = torch.empty(num_blocks(words), dtype=torch.int32), torch.empty(1, dtype=torch.int64)
    run = function("changes", "code_changes", "ppippp")
    if run is None:
        return code_changes_reference(now, base)
    assert room.dtype == torch.int16 and len(room) >= words and room.is_contiguous() and room.is_cpu, room.shape
    sides = address(now, torch.int16, words), address(base, torch.int16, words)
    run(*sides, words, counts.data_ptr(), room.data_ptr(), total.data_ptr())
    return Changes(counts, room[: int(total)])


def code_changes_reference(now: Tensor, base: Tensor) -> Changes:
    counts: list[int] = []
    streams: list[np.ndarray] = []
    for first in range(0, len(now), BLOCK):
        block = now.numpy()[first : first + BLOCK]
        differs = block != base.numpy()[first : first + BLOCK]
        (places,) = differs.nonzero()
        values, size = block[places], len(block)
        mask = np.packbits(np.pad(differs, (0, -size % 16)), bitorder="little").view(np.int16)
        ways = ((places.astype(np.uint16).view(np.int16), values), (mask, values), (block,))
        counts.append(len(places))
        streams += min(ways, key=lambda way: sum(map(len, way))) if len(places) else ()
    together = np.concatenate(streams) if streams else np.empty(0, np.int16)
    return Changes(torch.tensor(counts, dtype=torch.int32), torch.from_numpy(together))


def apply_changes(base: Tensor, changes: Changes) -> None:
    """Turn the words `base` into what the changes were coded from. They are sound (`is_sound`)."""
    assert is_sound(changes, len(base)), (len(base), len(changes.counts), len(changes.streams))
    run = function("changes", "apply_changes", "pipp")
    if run is None:
        for places, values in changed_words(changes, len(base)):
            base.numpy()[places] = values
        return
    words, streams = len(base), changes.streams
    counts = address(changes.counts, torch.int32, num_blocks(words))
    run(address(base, torch.int16, words), words, counts, address(streams, torch.int16, len(streams)))


def changed_words(changes: Changes, words: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places and new values, block by block, of a tensor of so many words."""
    counts, at = changes.counts.numpy(), 0
    for block, length in enumerate(lengths(counts, words)):
        stream, count = changes.streams.numpy()[at : at + length], int(counts[block])
        size = min(BLOCK, words - block * BLOCK)
        at += length
        if not count:
            continue
        if length == 2 * count:
            places = stream[:count].view(np.uint16).astype(np.int64)
        elif length == -(-size // 16) + count:
            (places,) = np.unpackbits(stream[:-count].view(np.uint8), bitorder="little").nonzero()
        else:
            places = np.arange(size)
        yield block * BLOCK + places, stream[-len(places) :]
