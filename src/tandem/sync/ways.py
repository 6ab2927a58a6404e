"""The ways that a run's weights go to engines in other processes, by name, and both ends of each.

An engine's process may end and another take its place, so a reader is made of an address that was made for it. The
learner's end then meets it, and the two may go through the last version again, whole.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from tandem.errors import DeliveryError
from tandem.sync.config import Transport
from tandem.sync.files import FileReader, FileSender
from tandem.sync.group import GroupReader, GroupSender
from tandem.sync.memory import MemoryReader, MemorySender
from tandem.sync.receive import Weights
from tandem.sync.transport import Base, Held, Reader
from tandem.types import WeightVersion


@dataclass(frozen=True, slots=True)
class Address:
    """Where a reader finds its sender; it goes over to the reader's process."""

    transport: Transport
    place: str  # of the memory; the folder; host:port of the store
    pair: str = ""  # of this reader, in a broadcast


class Way(Protocol):
    """The learner's end: a Sender (sync/transport.py) whose readers come and go."""

    def address(self, reader: str) -> Address:
        """For the reader of that name, which is about to be made: the first, or in place of one that ended."""
        ...

    def meet(self, reader: str) -> None:
        """While it is made. DeliveryError where it does not come."""
        ...

    def again(self, reader: str) -> None:
        """The last version once more, whole, while it is received."""
        ...

    def publish(self, version: WeightVersion, weights: Weights) -> None: ...

    def close(self) -> None: ...


def way_of(transport: Transport, tensors: Mapping[str, Tensor], folder: str, host: str, deadline_s: float) -> Way:
    """tensors: as every version will have them. folder: where versions are written. host: this machine, as others
    reach it."""
    if transport == "memory":
        return InMemory(tensors)
    if transport == "folder":
        return InFolder(Path(folder).expanduser().absolute())
    return ByPairs(host, deadline_s)


def reader_of(address: Address, held: Held, deadline_s: float) -> Reader:
    """The other end. DeliveryError where nobody is there."""
    if address.transport == "memory":
        return MemoryReader(address.place, held)
    if address.transport == "folder":
        return FileReader(Path(address.place), held)
    host, _, port = address.place.rpartition(":")
    store = _joined(host, int(port), deadline_s)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:  # nothing is sent: it tells by which address
        way.connect((host, int(port)))
        own: str = way.getsockname()[0]
    return GroupReader(store, 1, 2, held, deadline_s=deadline_s, name=address.pair, host=own)


def _joined(host: str, port: int, deadline_s: float) -> dist.Store:
    try:
        return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=deadline_s))
    except (RuntimeError, ValueError) as error:
        raise DeliveryError(
            f"weights by broadcast, joining the learner's store at {host}:{port}: {str(error).splitlines()[0]} (the "
            f"deadline is {deadline_s:g} s). Look whether this machine reaches that one, on any port."
        ) from error


class InMemory:
    """Shared memory: whole versions lie there, for whoever comes."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.sender = MemorySender(tensors)

    def address(self, reader: str) -> Address:
        return Address("memory", self.sender.address)

    def meet(self, reader: str) -> None: ...

    def again(self, reader: str) -> None: ...

    def publish(self, version: WeightVersion, weights: Weights) -> None:
        self.sender.publish(version, weights)

    def close(self) -> None:
        self.sender.close()


class InFolder:
    """A folder within one that all machines mount, of this run alone. It goes with the run; that of a run which was
    killed, with the next."""

    def __init__(self, folder: Path) -> None:
        for left in folder.glob("weights-*"):
            with contextlib.suppress(DeliveryError):  # of a run that goes on
                FileSender(left).close()
                shutil.rmtree(left, ignore_errors=True)
        self.folder = folder / f"weights-{secrets.token_hex(8)}"
        self.sender = FileSender(self.folder)

    def address(self, reader: str) -> Address:
        return Address("folder", str(self.folder))

    def meet(self, reader: str) -> None:
        """The last version whole, before it looks: what came since the whole one before may be damaged."""
        self.sender.again()

    def again(self, reader: str) -> None: ...

    def publish(self, version: WeightVersion, weights: Weights) -> None:
        self.sender.publish(version, weights)

    def close(self) -> None:
        self.sender.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class ByPairs:
    """A broadcast for each reader, of two ranks: one that fails takes no other with it, and is made anew alone."""

    def __init__(self, host: str, deadline_s: float) -> None:
        self.host, self.deadline_s = host, deadline_s
        try:
            self._store = dist.TCPStore(
                host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=deadline_s)
            )
        except (RuntimeError, ValueError) as error:
            raise DeliveryError(
                f"weights by broadcast, opening a store at {host}: {str(error).splitlines()[0]}. Set workers.transport "
                "to memory or folder."
            ) from error
        self._base = Base()  # of all: they have had the same versions
        self._pairs: dict[str, str] = {}
        self._senders: dict[str, GroupSender] = {}
        self._numbers = itertools.count(1)

    def address(self, reader: str) -> Address:
        self._senders.pop(reader, None)
        self._pairs[reader] = f"{reader}, {next(self._numbers)}"
        return Address("broadcast", f"{self.host}:{self._store.port}", self._pairs[reader])

    def meet(self, reader: str) -> None:
        # A store's client takes one call at a time, and this one may wait for a reader that never comes.
        store = _joined(self.host, self._store.port, self.deadline_s)
        self._senders[reader] = GroupSender(
            store, 2, deadline_s=self.deadline_s, name=self._pairs[reader], host=self.host, base=self._base
        )

    def again(self, reader: str) -> None:
        if reader in self._senders:
            self._senders[reader].again()

    def publish(self, version: WeightVersion, weights: Weights) -> None:
        """What fails with a reader is its own process's to say, which is asked."""
        notice, changes = self._base.advance(version, weights)
        for sender in self._senders.values():
            with contextlib.suppress(DeliveryError):
                sender.send(notice, changes)

    def close(self) -> None:
        for sender in self._senders.values():
            with contextlib.suppress(DeliveryError):
                sender.close()
