"""Weights to other processes of this machine, through memory that they share.

The sender makes an anonymous file (memfd) and hands its address out, /proc/PID/fd/N. It has no name that a dead run
could leave behind, goes with the last process that has it open, and is not limited by what is mounted at /dev/shm (64
MB in a container unless told otherwise). It is sealed: it can't shrink under a reader, and readers can't write.

Two slots take versions in turn, each with what is told of the version and all of its weights: to look for what changed
takes longer than to copy them (45 ms against 19 of SmolLM2's 269 MB, both on two cores). The sender waits for nobody:
`BEGUN` is set before a slot is written and `WHOLE` after it, and a reader whose slot was begun again meanwhile starts
over. Readers write nothing at all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

from tandem.errors import DeliveryError
from tandem.sync.receive import Weights
from tandem.sync.transport import Held, Notice
from tandem.types import WeightVersion

MAGIC = 0x7461_6E64_656D_0002  # "tandem", layout 2
KIND, BEGUN, WHOLE, CLOSED = range(4)  # words of the first page: the magic, versions begun and whole, whether it ended
CONTROL_BYTES = 64
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
F_SEAL_FUTURE_WRITE = 16  # not in fcntl of Python 3.11
POLL_S = 0.002


def _up(size: int, to: int = 64) -> int:
    return -(-size // to) * to


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things lie."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]  # of each tensor in an image
    notice_bytes: int
    image_bytes: int
    first: int  # byte of slot 0

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> _Layout:
        offsets, at = [], 0
        for tensor in tensors.values():
            offsets.append(at)
            at = _up(at + tensor.nbytes)
        dtypes = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
        shapes = tuple(tuple(tensor.shape) for tensor in tensors.values())
        # A name in a notice has 32 digits.
        notice_bytes = _up(1024 + sum(len(json.dumps(name)) + 100 for name in tensors), mmap.PAGESIZE)
        fields = (tuple(tensors), dtypes, shapes, tuple(offsets), notice_bytes, _up(at, mmap.PAGESIZE))
        told = len(_Layout(*fields, first=0).text())
        return _Layout(*fields, first=_up(CONTROL_BYTES + 64 + told, mmap.PAGESIZE))

    def text(self) -> bytes:
        return json.dumps([getattr(self, name) for name in _Layout.__slots__]).encode()

    @staticmethod
    def read(text: bytes) -> _Layout:
        names, dtypes, shapes, offsets, *sizes = json.loads(text)
        return _Layout(tuple(names), tuple(dtypes), tuple(map(tuple, shapes)), tuple(offsets), *sizes)

    @property
    def slot_bytes(self) -> int:
        return self.notice_bytes + self.image_bytes

    @property
    def total_bytes(self) -> int:
        return self.first + 2 * self.slot_bytes


class _Slot:
    """One version's place. `memory`: all of the file, as bytes."""

    def __init__(self, memory: Tensor, layout: _Layout, index: int) -> None:
        start = layout.first + index * layout.slot_bytes
        self._notice = memory[start : start + layout.notice_bytes]
        start += layout.notice_bytes
        self.image = {
            name: memory[start + offset :][: _nbytes(dtype, shape)].view(getattr(torch, dtype)).view(shape)
            for name, dtype, shape, offset in zip(
                layout.names, layout.dtypes, layout.shapes, layout.offsets, strict=True
            )
        }

    def tell(self, notice: Notice) -> None:
        _write_text(self._notice, notice.text().encode())

    def told(self) -> bytes | None:
        return _read_text(self._notice)


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * int(getattr(torch, dtype).itemsize)


def _write_text(memory: Tensor, text: bytes) -> None:
    """With its length and checksum."""
    whole = len(text).to_bytes(8, "little") + xxhash.xxh3_128(text).digest() + text
    assert len(whole) <= len(memory), (len(whole), len(memory))
    memory.numpy()[: len(whole)] = np.frombuffer(whole, np.uint8)


def _read_text(memory: Tensor) -> bytes | None:
    """None where it is damaged, or written just now."""
    raw = memory.numpy()
    length = int.from_bytes(raw[:8].tobytes(), "little")
    text = raw[24 : 24 + length].tobytes()
    return text if len(text) == length and xxhash.xxh3_128(text).digest() == raw[8:24].tobytes() else None


class MemorySender:
    """tensors: of the names, shapes and dtypes that every version will have. Takes twice their bytes at once."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._layout = layout = _Layout.of(tensors)
        self._descriptor = os.memfd_create("tandem-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Writing to memory that nobody set aside ends the process by a signal where there is none left.
            os.posix_fallocate(self._descriptor, 0, layout.total_bytes)
            # Populated: else the first version pays for the faults: 366 ms of SmolLM2's 269 MB, a later one 19.
            mapped = mmap.mmap(self._descriptor, layout.total_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            os.close(self._descriptor)
            raise DeliveryError(
                f"shared memory, setting it aside: two copies of the weights take {layout.total_bytes / 1e6:,.0f} MB: "
                f"{os.strerror(error.errno or 0)}. Give this machine, its container or `ulimit -f` more, or send "
                "weights by file."
            ) from error
        with contextlib.suppress(OSError):  # before Linux 5.1 readers are only asked not to write
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, SEALS)
        self.memory = torch.frombuffer(mapped, dtype=torch.uint8)
        self._control = np.frombuffer(mapped, np.uint64, CONTROL_BYTES // 8)
        self.slots = [_Slot(self.memory, layout, index) for index in (0, 1)]
        _write_text(self.memory[CONTROL_BYTES : layout.first], layout.text())
        self._control[KIND] = MAGIC

    @property
    def address(self) -> str:
        """By which other processes of this user read, while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def publish(self, version: WeightVersion, weights: Weights) -> None:
        turn = int(self._control[WHOLE]) + 1
        self._control[BEGUN] = turn
        slot = self.slots[turn % 2]
        for name, tensor in weights.tensors.items():
            slot.image[name].copy_(tensor)
        slot.tell(Notice(version, weights.hashes))
        self._control[WHOLE] = turn

    def close(self) -> None:
        """Readers that wait are told. The memory goes when the last of them lets it go."""
        if self._descriptor >= 0:
            self._control[CLOSED] = 1
            os.close(self._descriptor)
            self._descriptor = -1


class MemoryReader:
    """address: a sender's. held: what versions are brought into."""

    def __init__(self, address: str, held: Held) -> None:
        self.held = held
        self._address, self._peer = address, f"shared memory {address}"
        mapped, self._link = self._open()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that torch could write to what can't be written
            self._memory = torch.frombuffer(mapped, dtype=torch.uint8)
        self._control = np.frombuffer(mapped, np.uint64, CONTROL_BYTES // 8)
        try:
            text = _read_text(self._memory[CONTROL_BYTES:])
            if int(self._control[KIND]) != MAGIC or text is None:
                raise ValueError("its first page is another program's")
            layout = _Layout.read(text)
            if layout.total_bytes != len(self._memory):
                raise ValueError(f"it has {len(self._memory):,} bytes where {layout.total_bytes:,} are told of")
            self._slots = [_Slot(self._memory, layout, index) for index in (0, 1)]
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise DeliveryError(f"{self._peer}, opening it: it is no sender's: {error}. Check the address.") from error
        self._turn = 0  # of the version held

    def _open(self) -> tuple[mmap.mmap, str]:
        try:
            descriptor = os.open(self._address, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DeliveryError(
                f"{self._peer}, opening it: {error.strerror}. The learner has ended, or runs as another user or in "
                "another container. Start this engine beside it, or set workers.transport to folder or broadcast."
            ) from error
        try:
            # Were it to shrink, reading it would end the process by a signal.
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS != SEALS:
                raise OSError(errno.EINVAL, "it is not sealed against shrinking")
            return mmap.mmap(descriptor, 0, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ), os.readlink(
                self._address
            )
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or error
            raise DeliveryError(f"{self._peer}, opening it: it is no sender's: {said}. Check the address.") from error
        finally:
            os.close(descriptor)

    def receive(self, timeout_s: float) -> WeightVersion | None:
        deadline = time.monotonic() + timeout_s
        while True:
            turn = int(self._control[WHOLE])
            if turn != self._turn:
                if (version := self._take(turn)) is not None:
                    self._turn = turn
                    return version
            elif self._ended():
                raise DeliveryError(
                    f"{self._peer}, waiting for a version after {self._turn}: the learner's process has ended. This "
                    "receiver still holds the last version whole. Start again with the new learner's address."
                )
            if time.monotonic() >= deadline:
                return None
            time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))

    def _ended(self) -> bool:
        try:
            return bool(self._control[CLOSED]) or os.readlink(self._address) != self._link
        except OSError:
            return True

    def _take(self, turn: int) -> WeightVersion | None:
        """None where the slot was written meanwhile."""
        slot = self._slots[turn % 2]
        text = slot.told()
        if text is None:
            if self._overtaken(turn):
                return None
            raise DeliveryError(f"{self._peer}: what it says of version {turn} is damaged. Test this machine's memory.")
        notice = Notice.read(text, self._peer)
        try:
            self.held.take(self._peer, notice, slot.image)
        except DeliveryError:
            if self._overtaken(turn):
                return None
            raise
        if self._overtaken(turn):
            self.held.version = None
            return None
        return notice.version

    def _overtaken(self, turn: int) -> bool:
        return int(self._control[BEGUN]) >= turn + 2
