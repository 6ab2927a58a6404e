"""Weights to engine. Learner and engine of one process share the decoder, so publishing is naming what it now holds."""

from __future__ import annotations

from tandem.engine.engine import Engine
from tandem.models.decoder import Decoder
from tandem.numerics.digest import tensor_digest
from tandem.types import WeightVersion


def weight_version(decoder: Decoder, step: int) -> WeightVersion:
    """The version of the decoder's present weights: the number of updates and the hash of the exported tensors."""
    return WeightVersion(step, tensor_digest(decoder.export()))


def publish(decoder: Decoder, step: int, engine: Engine) -> WeightVersion:
    """Tell the engine, between its steps, which weights it serves from now on."""
    version = weight_version(decoder, step)
    engine.receive(version)
    return version
