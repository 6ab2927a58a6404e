"""Weights to engine: a version of them, held back where a receiver trails, to each receiver (sync/receive.py).

Each weight is hashed as the learner published it, and again by the receiver, as its matrix products will read it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tandem.errors import CheckpointError
from tandem.models.decoder import Decoder
from tandem.numerics.digest import root_hash, tensor_hashes
from tandem.sync.receive import POLICY, Receiver, Weights
from tandem.types import WeightVersion


def weight_version(decoder: Decoder, step: int) -> WeightVersion:
    """The version of the decoder's present weights: the number of updates and the hash of the tensors; of those of its
    adapter, where it wears one."""
    return WeightVersion(step, root_hash(_published(decoder)))


def published(decoder: Decoder, step: int) -> tuple[WeightVersion, Weights]:
    """The decoder's present weights, and which version they are."""
    hashes = _published(decoder)
    return WeightVersion(step, root_hash(hashes)), Weights(
        {name: weight.value for name, weight in decoder.published()}, hashes
    )


def _published(decoder: Decoder) -> dict[str, str]:
    # A decoder that only serves codes of a file has no other value of them.
    return tensor_hashes(
        (name, weight.served() if weight.value.is_meta else weight.value) for name, weight in decoder.published()
    )


@dataclass(frozen=True, slots=True)
class _Snapshot:
    version: WeightVersion
    weights: Weights


class Publisher:
    """Brings the learner's weights to the receivers, each the version that is due to it."""

    def __init__(self, learner: Decoder, receivers: Sequence[Receiver]) -> None:
        self.learner = learner
        self.receivers = tuple(receivers)
        self.version: WeightVersion | None = None  # of the learner, when it was last published
        lag = max((receiver.lag for receiver in self.receivers), default=0)
        self._held: deque[_Snapshot] = deque(maxlen=lag + 1 if lag else 0)  # oldest first, the newest version last

    def publish(self, step: int) -> WeightVersion:
        """Tell the receivers, between their engines' steps, what they serve from now on; returns the learner's version.

        DeliveryError where an engine would compute with something else.
        """
        version, newest = published(self.learner, step)
        hashes = newest.hashes
        if self._held.maxlen:
            clones = {name: tensor.clone() for name, tensor in newest.tensors.items()}
            self._held.append(_Snapshot(version, Weights(clones, hashes)))
        for receiver in self.receivers:
            due = _Snapshot(version, newest)
            if receiver.lag:
                due = self._held[max(0, len(self._held) - 1 - receiver.lag)]
            receiver.receive(due.version, {POLICY: due.weights})
        self.version = version
        return version

    def sources(self) -> Mapping[int, Decoder]:
        """Version step -> a decoder that computes with its weights as the learner does, of those still held."""
        return {step: decoder for receiver in self.receivers for step, decoder in receiver.sources().items()}

    def save(self, directory: Path) -> None:
        """Into a checkpoint: the earlier weights that a receiver has yet to serve."""
        for snapshot in list(self._held)[:-1]:
            path = directory / f"stale-{snapshot.version.step:06d}-{snapshot.version.digest}.safetensors"
            save_file(dict(snapshot.weights.tensors), path)

    def load(self, directory: Path) -> None:
        """From a checkpoint; `publish` of its own step must follow. CheckpointError where it is damaged."""
        self._held.clear()
        if not self._held.maxlen:
            return
        for path in sorted(directory.glob("stale-*.safetensors")):
            match = re.fullmatch(r"stale-(\d+)-([0-9a-f]+)", path.stem)
            try:
                tensors = load_file(path)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}.") from error
            hashes = tensor_hashes(tensors)
            if match is None or root_hash(hashes) != match[2]:
                raise CheckpointError(f"{path} does not hold the weights that its name says; remove this checkpoint.")
            self._held.append(_Snapshot(WeightVersion(int(match[1]), match[2]), Weights(tensors, hashes)))
