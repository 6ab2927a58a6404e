"""Where published weights arrive: a receiver takes them its own way, and checks what its engine will compute with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.errors import ConfigError, DeliveryError
from tandem.kernels.eights import Eights
from tandem.kernels.fours import Fours
from tandem.kernels.quantise import dequantise
from tandem.kernels.rounding import NOT_ROUNDED, Rounding, rounding_of
from tandem.models.adapter import AdapterSet
from tandem.models.config import ModelConfig
from tandem.models.decoder import Decoder, decoder_of
from tandem.models.spec import ModelSpec
from tandem.numerics.digest import root_hash, tensor_hashes
from tandem.numerics.quantise import Quantised
from tandem.types import WeightVersion

POLICY = "policy"  # the set of weights that every version has
Filed = Callable[[str], Quantised | None] | None  # a file's codes of a matrix, by the decoder's name


def serving_decoder(spec: ModelSpec, model: ModelConfig, engine: EngineConfig) -> Decoder:
    """For an engine that has weights of its own: `Copied` rounds what comes to integers, the decoder to formats."""
    asked = rounding_of(engine.weights, engine.weight_group)
    dtype = "" if engine.dtype == "same" else engine.dtype
    own = replace(model, weights=engine.weights) if asked and not asked.bits else model
    return decoder_of(spec, own, dtype)


def integers_of(engine: EngineConfig) -> Rounding:
    """What `Copied` rounds for an engine."""
    asked = rounding_of(engine.weights, engine.weight_group)
    return asked if asked.bits else NOT_ROUNDED


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A named set of a version's weights, and the hash of each as it was published."""

    tensors: Mapping[str, torch.Tensor]
    hashes: Mapping[str, str]


class Receiver(Protocol):
    """An engine, as the publisher knows it."""

    name: str
    lag: int  # updates that what it is sent trails the newest version

    def receive(self, version: WeightVersion, sets: Mapping[str, Weights]) -> None:
        """Serve `version` from now on. DeliveryError, naming receiver and tensors, where other weights would be."""
        ...

    def sources(self) -> Mapping[int, Decoder]:
        """Version step -> a decoder that computes with its weights as the learner does, until the next `receive`."""
        ...


class Shared:
    """Engines that compute with the learner's own decoder. For a loop that updates with nothing in flight only: an
    update changes weights under what is running."""

    lag = 0

    def __init__(self, name: str, decoder: Decoder, *engines: Engine) -> None:
        self.name, self.decoder, self.engines = name, decoder, engines

    def receive(self, version: WeightVersion, sets: Mapping[str, Weights]) -> None:
        living = [engine for engine in self.engines if not engine.dead]
        assert not any(engine.has_work for engine in living), f"{self.name}: weights changed under running requests"
        check(self.name, version, policy_of(self.name, version, sets).hashes, _served(self.decoder))
        for engine in living:
            engine.receive(version)

    def sources(self) -> Mapping[int, Decoder]:
        return {engine.version.step: self.decoder for engine in self.engines if not engine.dead}


class Copied:
    """Engines with a decoder of their own, whose matrices may be rounded to integers. ConfigError where it cannot
    multiply them so.

    source: a decoder that holds what came before rounding, where the weights trail the learner's; `decoder` itself
    where nothing is rounded. codes: gives those of a file, by a matrix's name; in the first version it is served from
    them where they stand for it, in place of being rounded again.
    """

    def __init__(
        self,
        name: str,
        decoder: Decoder,
        *engines: Engine,
        rounding: Rounding = NOT_ROUNDED,
        lag: int = 0,
        source: Decoder | None = None,
        codes: Filed = None,
    ) -> None:
        assert (lag > 0) == (source is not None), (lag, source)
        self.name, self.decoder, self.engines = name, decoder, engines
        self.rounding, self.lag, self.source = rounding, lag, source
        self._codes = codes
        on_device = decoder.layers[0].mix.qkv.on_device
        if rounding.products and (not decoder.own_products or (on_device and rounding.bits == 4)):
            raise ConfigError(
                f"engine.weights is w{rounding.bits}a8, whose products are computed by tandem's own compiled kernels; "
                "this engine's are not (model.kernels, TANDEM_KERNELS, float16 on the CPU, w4a8 on a GPU, no compiler: "
                "tandem doctor). Change that, or set engine.weights to int8."
            )

    def receive(self, version: WeightVersion, sets: Mapping[str, Weights]) -> None:
        if version == self._serves:
            return
        sent = policy_of(self.name, version, sets)
        check(self.name, version, sent.hashes, sent.tensors.items())
        if self.source is not None and self.source is not self.decoder:
            for _ in _load(self.source, sent.tensors.items()):
                pass
            check(f"{self.name} (source)", version, sent.hashes, _served(self.source))
        rounded = tensor_hashes(_load(self.decoder, sent.tensors.items(), self.rounding, self._codes))
        self._codes = None
        check(self.name, version, rounded, _served(self.decoder, sent.tensors))
        for engine in self.engines:
            if not engine.dead:
                engine.receive(version)

    def sources(self) -> Mapping[int, Decoder]:
        return {} if self.source is None else {self._serves.step: self.source}

    @property
    def _serves(self) -> WeightVersion:
        return next((engine.version for engine in self.engines if not engine.dead), self.engines[0].version)


def policy_of(receiver: str, version: WeightVersion, sets: Mapping[str, Weights]) -> Weights:
    """The one set that a receiver of the policy alone is sent. DeliveryError for others."""
    if set(sets) != {POLICY}:
        raise DeliveryError(
            f"after update {version.step} {receiver} was sent the weights {', '.join(sorted(sets)) or 'of nothing'}; "
            f"it serves {POLICY} alone. Nothing was sampled from them."
        )
    return sets[POLICY]


def _served(decoder: Decoder, sent: Mapping[str, torch.Tensor] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """What the forward pass reads: packed matrices and codes, and the rows of the embedding as they are looked up.

    Each is to be hashed before the next is taken: those that are recovered share memory. Of a matrix that is rounded
    where it is multiplied it is the value, or what was sent where that is not kept, if products read that value
    rounded, and what they read if not.
    """
    sizes = [weight.value.nbytes for _, weight in decoder.published() if weight.packed is not None]
    room = torch.empty(max(sizes, default=0), dtype=torch.uint8)
    for name, weight in decoder.published():
        if weight is decoder.embed and (weight.packed is not None or weight.codes is not None):
            yield "embed (rows)", weight.value
        value = weight.value if sent is None or not weight.value.is_meta else sent.get(name, weight.value)
        rounds = weight.rounding or isinstance(weight.codes, Eights | Fours)
        yield name, value if rounds and not value.is_meta and weight.follows(value) else weight.served(room)


def check(
    receiver: str, version: WeightVersion, published: Mapping[str, str], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """DeliveryError, naming the weights, unless `tensors` are what was published."""
    expected = dict(published)
    found = tensor_hashes(tensors)
    if "embed (rows)" in found:
        expected["embed (rows)"] = expected["embed"]
    wrong = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if wrong:
        raise DeliveryError(
            f"after update {version.step} {receiver} serves other weights than were published, in {len(wrong)} of "
            f"{len(expected)} tensors: {', '.join(wrong[:4])}. Nothing was sampled from them. "
            "Resume from the last checkpoint; if it happens again, test this machine's memory."
        )


def serve_adapter(receiver: str, engine: Engine, adapter: AdapterSet, step: int) -> WeightVersion:
    """Between two steps: an engine serves this adapter of its decoder to requests that give its name; those that run
    with an earlier one of that name go on with this one. DeliveryError where its products would read anything else."""
    assert isinstance(engine.runner, DecoderRunner) and adapter.name, (type(engine.runner), adapter.name)
    hashes = tensor_hashes((name, weight.value) for name, weight in adapter.served())
    version = WeightVersion(step, root_hash(hashes), adapter.name)
    check(receiver, version, hashes, ((name, weight.served()) for name, weight in adapter.served()))
    engine.receive_adapter(version)
    engine.runner.adapters[adapter.name] = adapter
    return version


def drop_adapter(engine: Engine, name: str) -> None:
    """Between two steps: an engine serves an adapter no more. ConfigError where requests run with it."""
    assert isinstance(engine.runner, DecoderRunner), type(engine.runner)
    engine.drop_adapter(name)
    del engine.runner.adapters[name]


def _load(
    decoder: Decoder,
    tensors: Iterable[tuple[str, torch.Tensor]],
    rounding: Rounding = NOT_ROUNDED,
    codes: Filed = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Bring each tensor in, matrices of layers rounded to integers; embedding, head and norms keep their precision, and
    so do adapters. Passes on, to be hashed on the sender's side, what `_served` then gives."""
    weights = dict(decoder.published())
    for name, sent in tensors:
        weight = weights[name]
        rounds = bool(rounding.bits) and decoder.adapter is None and sent.ndim == 2 and name not in ("embed", "head")
        if rounds and rounding.products:
            weight.multiply_in_codes(sent, rounding.bits, codes(name) if codes is not None else None)
            yield name, sent
            continue
        own = rounding.codes(sent) if rounds else None
        value = sent.to(weight.value.dtype) if own is None else dequantise(own, decoder.dtype)
        if own is None or not weight.hold(own):
            weight.value.copy_(value)
            weight.repack()
        yield name, value
