"""Weights to engine: held back by `lag` updates, rounded where the engine asks for it, and checked on arrival.

Without a departure, learner and engine share one decoder and nothing is copied. Either way each weight is hashed twice:
as the learner published it, and as the engine's matrix products will read it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tandem.engine.engine import Engine
from tandem.errors import CheckpointError, DeliveryError
from tandem.kernels.quantise import dequantise, quantise
from tandem.models.decoder import Decoder
from tandem.numerics.digest import root_hash, tensor_hashes
from tandem.numerics.quantise import Quantised
from tandem.types import WeightVersion

BITS = {"int8": 8, "int4": 4}


def weight_version(decoder: Decoder, step: int) -> WeightVersion:
    """The version of the decoder's present weights: the number of updates and the hash of the tensors."""
    return WeightVersion(step, root_hash(_published(decoder)))


def _published(decoder: Decoder) -> dict[str, str]:
    # A decoder that only serves codes of a file has no other value of them.
    return tensor_hashes(
        (name, weight.served() if weight.value.is_meta else weight.value) for name, weight in decoder.weights()
    )


def _served(decoder: Decoder) -> Iterator[tuple[str, torch.Tensor]]:
    """What the forward pass reads: packed matrices and codes, and the rows of the embedding as they are looked up."""
    for name, weight in decoder.weights():
        if weight is decoder.embed and (weight.packed is not None or weight.codes is not None):
            yield "embed (rows)", weight.value
        yield name, weight.served()


def verify(decoder: Decoder, published: Mapping[str, str], version: WeightVersion) -> None:
    """DeliveryError, naming the weights, unless `decoder` computes with what was published."""
    expected = dict(published)
    found = tensor_hashes(_served(decoder))
    if "embed (rows)" in found:
        expected["embed (rows)"] = expected["embed"]
    wrong = [name for name in expected if found.get(name) != expected[name]]
    if wrong:
        raise DeliveryError(
            f"after update {version.step} the engine serves other weights than were published, in {len(wrong)} of "
            f"{len(expected)} tensors: {', '.join(wrong[:4])}. Nothing was sampled from them. "
            "Resume from the last checkpoint; if it happens again, test this machine's memory."
        )


@dataclass(frozen=True, slots=True)
class _Snapshot:
    version: WeightVersion
    tensors: dict[str, torch.Tensor]


class Publisher:
    """Brings the learner's weights to the engines.

    learner: where the weights change. serving: what the engine's runner computes with; the same object where there is
    neither lag nor rounding. source: a decoder that holds what the engine was given before rounding and computes as
    the learner does, where lag > 0; else None, since it would be the learner itself. exact_engine: runs on the
    learner's decoder itself; may be `engine`.
    """

    def __init__(
        self,
        learner: Decoder,
        serving: Decoder,
        source: Decoder | None,
        engine: Engine,
        exact_engine: Engine,
        lag: int,
    ) -> None:
        assert (lag > 0) == (source is not None) and (lag == 0 or serving is not learner), (lag, source)
        self.learner = learner
        self.serving = serving
        self.source = source
        self.engine = engine
        self.exact_engine = exact_engine
        self.config = engine.scheduler.config
        self.lag = lag
        self._held: deque[_Snapshot] = deque()  # oldest first; what the engine serves is the first

    def publish(self, step: int) -> WeightVersion:
        """Tell the engine, between its steps, which weights it serves from now on; returns the learner's own version.

        DeliveryError where the engine would compute with something else.
        """
        published = _published(self.learner)
        version = WeightVersion(step, root_hash(published))
        verify(self.learner, published, version)
        self.exact_engine.receive(version)
        if self.serving is self.learner:
            self.engine.receive(version)
            return version
        tensors = {name: weight.value for name, weight in self.learner.weights()}
        due = version
        if self.lag:
            self._held.append(_Snapshot(version, {name: tensor.clone() for name, tensor in tensors.items()}))
            while len(self._held) > self.lag + 1:
                self._held.popleft()
            due, tensors = self._held[0].version, self._held[0].tensors
        if due != self.engine.version:
            self._deliver(due, tensors)
        return version

    def _deliver(self, version: WeightVersion, tensors: Mapping[str, torch.Tensor]) -> None:
        if self.source is not None and self.source is not self.serving:
            verify(self.source, tensor_hashes(_receive(self.source, tensors.items())), version)
        rounded = tensor_hashes(_receive(self.serving, self._rounded(tensors)))
        verify(self.serving, rounded, version)
        self.engine.receive(version)

    def _rounded(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor | Quantised]]:
        """Each weight as the engine's config asks for it; embedding, head and norms keep their precision."""
        bits = BITS.get(self.config.weights)
        for name, tensor in tensors.items():
            if bits and tensor.ndim == 2 and name not in ("embed", "head"):
                yield name, quantise(tensor, bits, self.config.weight_group)
            else:
                yield name, tensor.to(self.serving.dtype)

    def save(self, directory: Path) -> None:
        """Into a checkpoint: the earlier weights that the engine has yet to serve."""
        for snapshot in list(self._held)[:-1]:
            path = directory / f"stale-{snapshot.version.step:06d}-{snapshot.version.digest}.safetensors"
            save_file(snapshot.tensors, path)

    def load(self, directory: Path) -> None:
        """From a checkpoint; `publish` of its own step must follow. CheckpointError where it is damaged."""
        self._held.clear()
        if not self.lag:
            return
        for path in sorted(directory.glob("stale-*.safetensors")):
            match = re.fullmatch(r"stale-(\d+)-([0-9a-f]+)", path.stem)
            try:
                tensors = load_file(path)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}.") from error
            if match is None or root_hash(tensor_hashes(tensors)) != match[2]:
                raise CheckpointError(f"{path} does not hold the weights that its name says; remove this checkpoint.")
            self._held.append(_Snapshot(WeightVersion(int(match[1]), match[2]), tensors))


def _receive(
    decoder: Decoder, tensors: Iterable[tuple[str, torch.Tensor | Quantised]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Bring each tensor in and pack it, or hold its codes; passes its value on, to be hashed on the sender's side."""
    weights = dict(decoder.weights())
    for name, sent in tensors:
        weight = weights[name]
        value = dequantise(sent, decoder.dtype) if isinstance(sent, Quantised) else sent
        if not (isinstance(sent, Quantised) and weight.hold(sent)):
            weight.value.copy_(value)
            weight.repack()
        yield name, value
