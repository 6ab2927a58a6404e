"""How versions of weights leave the learner's process and arrive in others: whole, or as what changed since the last.

Three ways have these two ends: shared memory (memory.py), a folder (files.py), torch.distributed (group.py). What
arrives lies in `Held` and is hashed there, against the hashes that the learner published.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import xxhash
from torch import Tensor

from tandem.errors import DeliveryError, WorkerError
from tandem.kernels.changes import Changes, apply_changes, code_changes, is_sound, words_of
from tandem.models.decoder import Decoder
from tandem.numerics.digest import root_hash, tensor_hash, tensor_hashes
from tandem.sync.receive import Weights, policy_of
from tandem.sync.reshard import Shard
from tandem.types import WeightVersion

T = TypeVar("T")


class Sender(Protocol):
    """The learner's end."""

    def publish(self, version: WeightVersion, weights: Weights) -> None:
        """Make a version known. DeliveryError, naming the peer and the phase, where it could not be."""
        ...

    def close(self) -> None: ...


class Reader(Protocol):
    """An engine's end."""

    held: Held

    def receive(self, timeout_s: float) -> WeightVersion | None:
        """Bring `held` to the newest version; None where none came in time. DeliveryError where it arrives damaged, or
        the sender is gone."""
        ...


class Peer(Protocol):
    """A receiver in another process."""

    dead: bool  # no weights reach it any more

    def taking(self, version: WeightVersion) -> Callable[[], None]:
        """Have it take a version that is about to be sent. What comes back waits until it serves it, or raises."""
        ...


class Remote:
    """Receivers in other processes, as the publisher knows them."""

    lag = 0

    def __init__(self, name: str, sender: Sender, *peers: Peer) -> None:
        self.name, self.sender, self.peers = name, sender, peers

    def receive(self, version: WeightVersion, sets: Mapping[str, Weights]) -> None:
        """As Receiver's."""
        self.exchange(version, lambda: self.sender.publish(version, policy_of(self.name, version, sets)))

    def exchange(self, version: WeightVersion, send: Callable[[], None]) -> None:
        """Have the peers take what `send` sends. WorkerError where none is left that serves the version."""
        failed: list[WorkerError] = []
        living = [peer for peer in self.peers if not peer.dead]
        takings = list(_each([partial(peer.taking, version) for peer in living], failed))
        send()
        for _ in _each(takings, failed):
            pass
        if failed and len(failed) == len(living):
            raise failed[0]

    def sources(self) -> Mapping[int, Decoder]:
        return {}


def _each(calls: Iterable[Callable[[], T]], failed: list[WorkerError]) -> Iterator[T]:
    """What calls give; those of workers that failed are left out."""
    for call in calls:
        try:
            yield call()
        except WorkerError as error:
            failed.append(error)


@dataclass(frozen=True, slots=True)
class Sent:
    """The changes of one tensor, as they travel."""

    blocks: int
    words: int
    checksum: str

    @property
    def nbytes(self) -> int:
        return 4 * self.blocks + 2 * self.words


@dataclass(frozen=True, slots=True)
class Notice:
    """What is told of a version beside its bytes."""

    version: WeightVersion
    hashes: Mapping[str, str]  # of each tensor, as the learner published it
    base: str = ""  # digest of the version that `changes` start from; "" where every tensor is sent whole
    changes: Mapping[str, Sent] | None = None  # of the tensors that changed

    def text(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def read(text: str | bytes, peer: str) -> Notice:
        """DeliveryError where it is not one."""
        try:
            read: dict[str, Any] = json.loads(text)
            changes = read["changes"]
            sent = None if changes is None else {name: Sent(**of) for name, of in changes.items()}
            notice = Notice(WeightVersion(**read["version"]), read["hashes"], read["base"], sent)
            if notice.version.digest != root_hash(notice.hashes):
                raise ValueError("its hashes are not those of its digest")
        except (ValueError, TypeError, KeyError) as error:
            raise DeliveryError(f"{peer}: what it says of a version cannot be read ({error}).") from error
        return notice

    def whole(self) -> Notice:
        return replace(self, base="", changes=None)


def changed_tensors(
    weights: Weights, base: Mapping[str, Tensor], hashes: Mapping[str, str], room: Tensor
) -> Iterator[tuple[str, Changes]]:
    """Of each tensor that is another than in `base`, whose hashes are given. Changes live until the next is taken."""
    for name, tensor in weights.tensors.items():
        if hashes[name] != weights.hashes[name]:
            yield name, code_changes(words_of(tensor.detach().cpu().contiguous()), words_of(base[name]), room)


def room_for(tensors: Mapping[str, Tensor]) -> Tensor:
    """For the changes of any of them."""
    return torch.empty(max(tensor.nbytes for tensor in tensors.values()) // 2, dtype=torch.int16)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, list[object]]:
    """Name -> dtype and shape."""
    return {name: [_dtype(tensor), list(tensor.shape)] for name, tensor in tensors.items()}


def sent(changes: Changes) -> Sent:
    """The checksum is XXH3's of both parts, 128 bits; how long each is stands beside it."""
    state = xxhash.xxh3_128(changes.counts.numpy().data)
    state.update(changes.streams.numpy().data)
    return Sent(len(changes.counts), len(changes.streams), state.hexdigest())


class Base:
    """What a sender whose receivers keep nothing for it remembers: the last version, to tell what changed since."""

    def __init__(self) -> None:
        self.notice: Notice | None = None
        self.tensors: dict[str, Tensor] = {}

    def advance(self, version: WeightVersion, weights: Weights) -> tuple[Notice, dict[str, Changes]]:
        """To a version; what is told of it, and what changed. The first one is told as whole."""
        if self.notice is None:
            self.tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.tensors.items()}
            self.notice = Notice(version, weights.hashes)
            return self.notice, {}
        room, changed = room_for(self.tensors), {}
        for name, found in changed_tensors(weights, self.tensors, self.notice.hashes, room):
            changed[name] = Changes(found.counts, found.streams.clone())
            apply_changes(words_of(self.tensors[name]), found)
        told = {name: sent(changes) for name, changes in changed.items()}
        self.notice = Notice(version, weights.hashes, self.notice.version.digest, told)
        return self.notice, changed


class Held:
    """The weights that a receiver has, whole or a rank's shares: tensors beside the CPU, written where they lie."""

    def __init__(self, tensors: Mapping[str, Tensor], shards: Mapping[str, Shard] | None = None) -> None:
        assert shards is None or set(shards) == set(tensors), "a share of every tensor, or of none"
        self.tensors, self.shards = dict(tensors), shards
        self.version: WeightVersion | None = None  # None: of no version, or of none whole
        self.hashes: dict[str, str] = {}  # of what lies here, as it was checked

    @property
    def weights(self) -> Weights:
        """For a receiver in this process. Whole weights only: a rank's shares were never hashed by the learner."""
        assert self.shards is None and self.version is not None, self.version
        return Weights(self.tensors, self.hashes)

    def take(self, peer: str, notice: Notice, tensors: Mapping[str, Tensor]) -> None:
        """Copy a whole version in. DeliveryError, and of no version, where a tensor is not what was published."""
        self.check_layout(peer, notice.version, layout_of(tensors))
        self.version = None
        if self.shards is not None:
            self._check(peer, notice, tensor_hashes(tensors))
        for name, tensor in tensors.items():
            shard = None if self.shards is None else self.shards[name]
            self.tensors[name].copy_(tensor if shard is None else shard.cut(tensor))
        self.hashes = tensor_hashes(self.tensors)
        if self.shards is None:
            self._check(peer, notice, self.hashes)
        self.version = notice.version

    def change(self, peer: str, notice: Notice, changes: Mapping[str, Changes]) -> None:
        """Write what changed since the version held. DeliveryError where the changes are damaged, and nothing is
        written, or the result is not what was published, and of no version."""
        assert notice.changes is not None and self.version is not None and self.version.digest == notice.base, notice
        damaged = [
            name
            for name, told in notice.changes.items()
            if name not in changes or sent(changes[name]) != told or not is_sound(changes[name], self._words(name))
        ]
        if damaged:
            raise _wrong(peer, notice.version, "its changes arrived damaged", damaged, len(notice.changes))
        if self.shards is not None:
            # The learner hashes no shares: each is what it was when it was last written, and is changed by what was
            # checked.
            self._check(peer, notice, tensor_hashes(self.tensors), self.hashes)
        self.version = None
        for name, each in changes.items():
            if self.shards is None:
                apply_changes(words_of(self.tensors[name]), each)
            else:
                self.shards[name].change(self.tensors[name], each)
            self.hashes[name] = tensor_hash(self.tensors[name])
        if self.shards is None:
            self._check(peer, notice, self.hashes)
        self.version = notice.version

    def _words(self, name: str) -> int:
        return math.prod(self.whole_shape(name)) * self.tensors[name].element_size() // 2

    def whole_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape) if self.shards is None else self.shards[name].slot.shape

    def check_layout(self, peer: str, version: WeightVersion, sent: Mapping[str, Sequence[object]]) -> None:
        """DeliveryError where a version has tensors of other names, dtypes or shapes than this receiver."""
        ours = {name: [_dtype(tensor), list(self.whole_shape(name))] for name, tensor in self.tensors.items()}
        if odd := sorted(name for name in {**ours, **sent} if ours.get(name) != sent.get(name)):
            raise DeliveryError(
                f"{peer}: version {version.step}: {odd[0]} is {sent.get(odd[0], 'not sent')}, and this receiver has "
                f"{ours.get(odd[0], 'none')}; so with {len(odd)} of {len(ours)} tensors. Start it with the learner's "
                "model and model.dtype."
            )

    def _check(
        self, peer: str, notice: Notice, found: Mapping[str, str], published: Mapping[str, str] | None = None
    ) -> None:
        published = notice.hashes if published is None else published
        if odd := [name for name, value in found.items() if value != published[name]]:
            self.version = None
            raise _wrong(peer, notice.version, "its tensors are not what was published", odd, len(found))


def _wrong(peer: str, version: WeightVersion, what: str, names: list[str], total: int) -> DeliveryError:
    return DeliveryError(
        f"{peer}: version {version.step} ({version.digest[:8]}): {what}, in {len(names)} of {total} tensors: "
        f"{', '.join(names[:4])}. Nothing was sampled from them. The next version taken whole mends this; if it "
        "happens again, test the memory, disk or network between them."
    )


def split_changes(notice: Notice, packed: Tensor) -> dict[str, Changes]:
    """Of `packed`, bytes that hold the changes of each tensor in the notice's order; they share its memory."""
    changes, at = {}, 0
    for name, told in (notice.changes or {}).items():
        counts = packed[at : at + 4 * told.blocks].view(torch.int32)
        at += -(-4 * told.blocks // 8) * 8
        streams = packed[at : at + 2 * told.words].view(torch.int16)
        at += -(-2 * told.words // 8) * 8
        changes[name] = Changes(counts, streams)
    return changes


def packed_bytes(told: Sent) -> int:
    """Of a tensor's changes where `split_changes` looks for them."""
    return -(-4 * told.blocks // 8) * 8 + -(-2 * told.words // 8) * 8
