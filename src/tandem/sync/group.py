"""Weights to processes on any machine, broadcast by torch.distributed.

A store, which each process polls, carries what is told of a version and who is ready, since gloo's irecv never says
that it is completed. The group carries the bytes: gloo broadcasts neither float8 nor int16, and compares no sizes, so
these are told before. Both ends have a deadline for every phase: a version is told of, all meet, the bytes go out, all
check them. After a phase that failed the group is of no use: make both ends anew, under another `name`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tandem.errors import DeliveryError
from tandem.kernels.changes import Changes
from tandem.sync.receive import Weights
from tandem.sync.transport import Base, Held, Notice, layout_of, packed_bytes, split_changes
from tandem.types import WeightVersion

POLL_S = 0.005
PEER = "weights by broadcast"


class _End:
    """What both ends do. Rank 0 sends."""

    def __init__(self, store: dist.Store, rank: int, ranks: int, *, deadline_s: float, name: str, host: str) -> None:
        self.rank, self.ranks, self.deadline_s = rank, ranks, deadline_s
        self.store = dist.PrefixStore(f"tandem-weights/{name}", store)
        self.turn = 0
        self._broken = ""
        gloo: Any = dist.ProcessGroupGloo  # its stub has no broadcast, and no devices
        with self.phase("making the group", "the others"):
            options = gloo._Options()
            options._timeout = timedelta(seconds=deadline_s)
            options._devices = [gloo.create_device(hostname=host) if host else gloo.create_default_device()]
            self.group = gloo(dist.PrefixStore("group", self.store), rank, ranks, options)

    @contextmanager
    def phase(self, what: str, peer: str) -> Iterator[None]:
        """What torch raises here, by the peer and the phase."""
        if self._broken:
            raise DeliveryError(f"{PEER}: {self._broken} earlier. Make both ends anew, under another name.")
        try:
            yield
        except (RuntimeError, ValueError) as error:
            self._broken = f"{what} failed with {peer}"
            raise DeliveryError(
                f"{PEER}, version {self.turn}, {what}, with {peer}: {str(error).splitlines()[0]} "
                f"(the deadline is {self.deadline_s:g} s). Look whether {peer} still runs; then make both ends anew."
            ) from error

    def wait(self, key: str) -> str:
        self.store.wait([key], timedelta(seconds=self.deadline_s))
        return str(self.store.get(key).decode())

    def broadcast(self, tensors: Mapping[str, Tensor]) -> None:
        """In the order of their names, which need not be that of the other end's."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        for name in sorted(tensors):
            if tensors[name].numel():
                self.group.broadcast([tensors[name].detach().reshape(-1).view(torch.uint8)], options).wait()


class GroupSender(_End):
    """Rank 0 of `ranks`. host: this machine, as the others reach it; "": as its own name says. base: what several
    senders of the same versions have in common."""

    def __init__(
        self,
        store: dist.Store,
        ranks: int,
        *,
        deadline_s: float,
        name: str = "0",
        host: str = "",
        base: Base | None = None,
    ) -> None:
        super().__init__(store, 0, ranks, deadline_s=deadline_s, name=name, host=host)
        self._base = base or Base()

    def publish(self, version: WeightVersion, weights: Weights) -> None:
        self.send(*self._base.advance(version, weights))

    def again(self) -> None:
        """The last version, whole."""
        if self._base.notice is not None:
            self.send(self._base.notice.whole(), {})

    def send(self, notice: Notice, changes: Mapping[str, Changes]) -> None:
        """What the base told of its last version."""
        self.turn += 1
        version = notice.version
        holding = {self._held(rank) for rank in range(1, self.ranks)}
        size = sum(each.nbytes for each in changes.values())
        if holding != {notice.base} or 2 * size > sum(tensor.nbytes for tensor in self._base.tensors.values()):
            notice = notice.whole()
        with self.phase("telling", "the store"):
            self.store.set("layout", json.dumps(layout_of(self._base.tensors)))
            self.store.set(f"told/{self.turn}", notice.text())
        for rank in range(1, self.ranks):
            with self.phase("meeting", f"rank {rank}"):
                self.wait(f"ready/{self.turn}/{rank}")
        with self.phase("sending", "the others"):
            if notice.changes is None:
                self.broadcast(self._base.tensors)
            else:
                packed = torch.zeros(sum(map(packed_bytes, notice.changes.values())), dtype=torch.uint8)
                for name, place in split_changes(notice, packed).items():
                    place.counts.copy_(changes[name].counts)
                    place.streams.copy_(changes[name].streams)
                self.broadcast({"changes": packed})
        self._hear(version)

    def _hear(self, version: WeightVersion) -> None:
        """What each rank says of what arrived."""
        said = {}
        for rank in range(1, self.ranks):
            with self.phase("checking", f"rank {rank}"):
                said[rank] = self.wait(f"done/{self.turn}/{rank}")
        for key in [f"told/{self.turn}"] + [
            f"{kind}/{self.turn}/{rank}" for kind in ("ready", "done") for rank in said
        ]:
            self.store.delete_key(key)
        if wrong := {rank: text for rank, text in said.items() if text}:
            rank, text = next(iter(wrong.items()))
            raise DeliveryError(f"{PEER}, version {version.step}, checking, rank {rank} says: {text}")

    def _held(self, rank: int) -> str:
        with self.phase("telling", "the store"):
            key = f"held/{rank}"
            return str(self.store.get(key).decode()) if self.store.check([key]) else ""

    def close(self) -> None:
        if not self._broken:
            self.store.set("closed", "yes")


class GroupReader(_End):
    """Rank 1 and on. held: what versions are brought into."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        ranks: int,
        held: Held,
        *,
        deadline_s: float,
        name: str = "0",
        host: str = "",
    ) -> None:
        assert 0 < rank < ranks, (rank, ranks)
        super().__init__(store, rank, ranks, deadline_s=deadline_s, name=name, host=host)
        self.held = held

    def receive(self, timeout_s: float) -> WeightVersion | None:
        """Every version must be taken: the sender waits for all ranks, until its deadline."""
        key, deadline = f"told/{self.turn + 1}", time.monotonic() + timeout_s
        with self.phase("waiting", "rank 0"):
            while not self.store.check([key]):
                if self.store.check(["closed"]):
                    raise RuntimeError("the learner has ended")
                if time.monotonic() >= deadline:
                    return None
                time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))
        self.turn += 1
        with self.phase("meeting", "rank 0"):
            notice = Notice.read(self.store.get(key), PEER)
            self.held.check_layout(PEER, notice.version, json.loads(self.store.get("layout")))
            self.store.set(f"ready/{self.turn}/{self.rank}", "yes")
        tensors, packed = {}, torch.empty(0, dtype=torch.uint8)
        with self.phase("receiving", "rank 0"):
            if notice.changes is None:
                tensors = self._places()
                self.broadcast(tensors)
            else:
                packed = torch.empty(sum(map(packed_bytes, notice.changes.values())), dtype=torch.uint8)
                self.broadcast({"changes": packed})
        said = ""
        try:
            if notice.changes is None:
                self.held.take(PEER, notice, tensors)
            else:
                self.held.change(PEER, notice, split_changes(notice, packed))
        except DeliveryError as error:
            self.held.version = None
            said = str(error)
            raise
        finally:
            with self.phase("checking", "rank 0"):
                self.store.set(f"held/{self.rank}", self.held.version.digest if self.held.version else "")
                self.store.set(f"done/{self.turn}/{self.rank}", said)
        return notice.version

    def _places(self) -> dict[str, Tensor]:
        """Where whole tensors arrive: shares are cut from them afterwards."""
        if self.held.shards is None:
            self.held.version = None
            return self.held.tensors
        return {name: tensor.new_empty(self.held.whole_shape(name)) for name, tensor in self.held.tensors.items()}
