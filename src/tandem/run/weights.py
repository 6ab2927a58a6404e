"""Other weights for a server's engine: from a folder, or from what is sent in parts; checked before it serves them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.errors import ModelError
from tandem.kernels.large import release_memory
from tandem.models.adapter import AdapterSet
from tandem.models.checkpoint import open_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.peft import read_adapter
from tandem.numerics.digest import root_hash, tensor_hashes
from tandem.run.adapted import for_engine
from tandem.run.source import resolve_source
from tandem.server.verbs import Ready
from tandem.sync.receive import POLICY, Copied, Weights, drop_adapter, integers_of, serve_adapter
from tandem.types import WeightVersion


class ServedWeights:
    """What server/verbs.py asks for. Tensors have the names of Transformers' checkpoints, as tandem's own have."""

    def __init__(self, source: str) -> None:
        """source: of the weights that are served first."""
        self._source = source
        self._parts: dict[str, torch.Tensor] = {}

    def begin(self) -> None:
        """What was sent before is dropped."""
        self._parts = {}

    def take(self, sent: bytes) -> dict[str, str]:
        """A part: a safetensors file with some of the tensors. Name -> hash of each. ModelError: it is none."""
        try:
            tensors = load(sent)
        except (SafetensorError, ValueError, KeyError) as error:
            raise ModelError(f"what was sent is no safetensors file: {error}.") from error
        twice = sorted(self._parts.keys() & tensors.keys())
        if twice:
            raise ModelError(f"{len(twice)} tensors were sent before, {twice[0]} first. Start the update again.")
        self._parts |= tensors
        return tensor_hashes(tensors)

    def ready(self, engine: Engine, folder: str) -> Ready:
        """All tensors of a folder, or of what was sent where it is empty, as the engine's model has them.

        ModelError where one is missing, unknown or misshapen, or adapters are served. Takes memory for the model once
        more until it serves.
        """
        serves = _alone(engine)
        if folder:
            checkpoint = open_checkpoint(resolve_source(folder))
            if checkpoint.spec != serves.spec:
                raise ModelError(f"{folder} is of another model than the one that is served. Give its own weights.")
            tensors = dict(checkpoint.tensors())
        else:
            tensors, self._parts = self._parts, {}
        held = Decoder(serves.spec, "bfloat16" if serves.dtype == torch.bfloat16 else "float32", "cpu").load(
            tensors.items()
        )
        values = {name: weight.value.to(serves.dtype) for name, weight in held.weights()}
        hashes = tensor_hashes(values)
        return Ready(Path(folder).name or "parts", root_hash(hashes), Weights(values, hashes))

    def serve(self, engine: Engine, ready: Ready, step: int) -> WeightVersion:
        """Between two steps: the engine computes with them from now on. DeliveryError where it would with others."""
        config, version, self._source = engine.scheduler.config, WeightVersion(step, ready.digest), ready.source
        receiver = Copied("the server's engine", _decoder(engine), engine, rounding=integers_of(config))
        receiver.receive(version, {POLICY: ready.weights})
        return version

    def adapter(self, engine: Engine, name: str, folder: str) -> AdapterSet:
        """Of a folder, for the engine's weights. ModelError where it is none of theirs. Any thread."""
        return for_engine(read_adapter(resolve_source(folder)), engine, name, self._source)

    def serve_adapter(self, engine: Engine, made: AdapterSet) -> WeightVersion:
        """Between two steps: requests may name it from now on."""
        return serve_adapter("the server's engine", engine, made, 0)

    def drop_adapter(self, engine: Engine, name: str) -> None:
        """Between two steps. ConfigError where it is not served, or requests run with it."""
        drop_adapter(engine, name)

    def check_discard(self, engine: Engine) -> None:
        """ModelError where weights that are dropped could not be brought again, or their memory not be given back."""
        if _alone(engine).device.type != "cpu":
            raise ModelError("sleep at level 2 gives memory of the host back, and this engine's weights are on a GPU.")

    def discard(self, engine: Engine) -> None:
        """Between two steps: what the weights lie in is the system's, until `serve` brings others."""
        weights = [weight for _, weight in _decoder(engine).weights()]
        forms = [one.packed if one.codes is None else one.codes.packed for one in weights]
        release_memory([form for form in forms if form is not None])
        for one in weights:
            if not one.value.is_meta:
                release_memory([one.value])  # each for itself: between two of them lies what the allocator wrote

    def checksums(self, engine: Engine) -> Mapping[str, str]:
        """Of what the engine's products read, between two steps."""
        return tensor_hashes((name, weight.served()) for name, weight in _decoder(engine).weights())


def _alone(engine: Engine) -> Decoder:
    """Its decoder. ModelError where adapters are served on it."""
    serves = _decoder(engine)
    if engine.adapters or serves.adapter is not None:
        raise ModelError(
            "adapters are served on these weights, of which they are. Unload them first (/v1/unload_lora_adapter), "
            "or start the server on a model that is no adapter."
        )
    return serves


def _decoder(engine: Engine) -> Decoder:
    assert isinstance(engine.runner, DecoderRunner), type(engine.runner)
    return engine.runner.decoder
