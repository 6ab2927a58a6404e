"""Tensors in a file: the system writes them out and reads them back, so they need no memory of their own."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from tandem.errors import CapacityError, ConfigError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, a limit on the size of files


class FileTensors:
    """fp32 tensors, zero at first, in one mapped file of `folder` that has no name and goes with the process.

    What is read or written is in memory until `release`. CapacityError where the disk has no room for `count` numbers
    in tensors of which there are at most `tensors`; ConfigError where no file can be made there.
    """

    def __init__(self, folder: Path, count: int, tensors: int) -> None:
        size_bytes = 4 * count + tensors * mmap.ALLOCATIONGRANULARITY
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.truncate(size_bytes)
                if hasattr(os, "posix_fallocate"):  # without it a full disk is noticed by a signal
                    os.posix_fallocate(file.fileno(), 0, size_bytes)
                self._map = mmap.mmap(file.fileno(), size_bytes)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise
            if error.errno in FULL:
                raise CapacityError(
                    f"learner.optimiser_offload is disk, but {folder} has no room for {size_bytes / 1e9:.1f} GB "
                    f"({error}). Free some, or set TANDEM_CACHE to a folder on a larger disk."
                ) from error
            raise ConfigError(
                f"learner.optimiser_offload is disk, but no file can be made in {folder} ({error}). Set TANDEM_CACHE "
                "to a folder that can be written."
            ) from error
        self._taken = 0

    def take(self, shape: Sequence[int]) -> torch.Tensor:
        """The next tensor, on pages of its own."""
        count = prod(shape)
        tensor = torch.frombuffer(self._map, dtype=torch.float32, count=count, offset=self._taken)
        self._taken += -(-4 * count // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        return tensor.view(*shape)

    def release(self) -> None:
        """Let the memory go that the tensors were read and written in. Their values stay."""
        self._map.madvise(mmap.MADV_DONTNEED)
