"""Keys and values of paused programs in files until they are restored, where that is cheaper than computing them again.

On a host the pool is its memory, so a folder on a disk is what lies below; one in memory (a tmpfs) parks there. Rates
are measured as it begins and with every file. A page comes back under its old name and counts as what it was only where
its sum (kernels/page_sum.py) is the one that it had; else it is computed again, as if it had not been parked.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tandem.engine.policies import ParkCost
from tandem.engine.prefix import NULL, PrefixIndex
from tandem.errors import ConfigError, TandemWarning

TRIAL_BYTES = 8 << 20
WEIGHT = 0.2  # of the latest file in a rate


class PageMemory(Protocol):
    """A runner whose pages can be read and written (engine/runner.py)."""

    @property
    def page_bytes(self) -> int: ...

    def read_pages(self, pages: Sequence[int]) -> tuple[np.ndarray, list[int]]: ...

    def write_pages(self, pages: Sequence[int], rows: np.ndarray) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Parked:
    """A program's pages in a file."""

    path: str
    names: tuple[tuple[int, bytes], ...]  # (group, block) of each page, in order
    sums: tuple[int, ...]
    row_bytes: int


class Parking:
    """Files of one engine, in a folder of their own below `folder`, which goes with it."""

    def __init__(
        self, folder: str, most_bytes: int, memory: PageMemory, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.memory, self.most_bytes, self.clock = memory, most_bytes, clock
        self.bytes = 0
        self.counts = {"parked": 0, "unparked": 0, "damaged": 0}
        self._parked: dict[str, Parked] = {}
        self._number = 0
        try:
            os.makedirs(folder, exist_ok=True)
            self._folder = tempfile.mkdtemp(prefix="parked-", dir=folder)
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            rows = np.zeros((1, TRIAL_BYTES), dtype=np.uint8)
            self.write_s = self.read_s = 0.0  # a byte
            path = os.path.join(self._folder, "trial")
            self.write_s = self._timed(lambda: rows.tofile(path)) / TRIAL_BYTES
            self.read_s = self._timed(lambda: np.fromfile(path, dtype=np.uint8)) / TRIAL_BYTES
            os.remove(path)
        except OSError as error:
            raise ConfigError(
                f"engine.programs.park is {folder!r}, where no file of {TRIAL_BYTES >> 20} MiB can be written: "
                f"{error.strerror}. Choose another folder."
            ) from None

    def _timed(self, act: Callable[[], object]) -> float:
        began_s = self.clock()
        act()
        return max(self.clock() - began_s, 1e-9)

    def __contains__(self, name: str) -> bool:
        return name in self._parked

    def cost(self, num_pages: int, reload_s: float) -> ParkCost:
        """What a policy is asked."""
        total = num_pages * self.memory.page_bytes
        return ParkCost(total, self.most_bytes - self.bytes, self.write_s, self.read_s, reload_s)

    def park(self, name: str, index: PrefixIndex, pages: Sequence[int]) -> None:
        """Writes what held pages hold. Where it cannot be written, they are computed again."""
        self.drop(name)
        rows, sums = self.memory.read_pages(pages)
        self._number += 1
        path = os.path.join(self._folder, f"{self._number}")
        try:
            spent_s = self._timed(lambda: rows.tofile(path))
        except OSError as error:
            warnings.warn(TandemWarning(f"a program could not be parked: {error.strerror}"), stacklevel=2)
            self.most_bytes = 0
            return
        self.write_s += WEIGHT * (spent_s / rows.nbytes - self.write_s)
        self._parked[name] = Parked(path, tuple(index.names(pages)), tuple(sums), rows.shape[1])
        self.bytes += rows.nbytes
        self.counts["parked"] += 1

    def unpark(self, name: str, index: PrefixIndex) -> tuple[list[int], list[int]]:
        """(pages of a program that hold again what they held, each held once more; those of them that got their name
        back). As far as there are free ones, and in order, so that they are of use."""
        parked = self._parked[name]
        there = [index.pages(key)[group] for group, key in parked.names]
        missing = [place for place, page in enumerate(there) if page == NULL]
        index.pin([page for page in there if page != NULL])
        taken: list[int] = []
        while len(taken) < len(missing) and index.pool.num_available:
            page = index.take()
            assert page is not None
            taken.append(page)
        good = self._read(parked, missing[: len(taken)], taken)
        fresh = []
        for place, page, same in zip(missing, taken, good, strict=False):
            if same and index.insert(parked.names[place][1], parked.names[place][0], page, prompt=False):
                there[place] = page
                fresh.append(page)
            else:
                index.release(page)
        self.drop(name)
        self.counts["unparked"] += 1
        return [page for page in there if page != NULL], fresh

    def _read(self, parked: Parked, places: Sequence[int], pages: Sequence[int]) -> list[bool]:
        """Puts what lay at places of a file onto pages; whether each is what it was."""
        if not pages:
            return []
        count = len(parked.names)
        try:
            began_s = self.clock()
            rows = np.fromfile(parked.path, dtype=np.uint8).reshape(count, parked.row_bytes)
            self.read_s += WEIGHT * (max(self.clock() - began_s, 1e-9) / rows.nbytes - self.read_s)
        except (OSError, ValueError):
            self.counts["damaged"] += len(pages)
            return [False] * len(pages)
        sums = self.memory.write_pages(pages, rows[list(places)])
        good = [found == parked.sums[place] for found, place in zip(sums, places, strict=True)]
        self.counts["damaged"] += good.count(False)
        return good

    def drop(self, name: str) -> None:
        """What a program parked is wanted no more."""
        parked = self._parked.pop(name, None)
        if parked is not None:
            self.bytes -= len(parked.names) * parked.row_bytes
            try:
                os.remove(parked.path)
            except OSError:
                return  # somebody was there before

    def clear(self) -> None:
        for name in list(self._parked):
            self.drop(name)
