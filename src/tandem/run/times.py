"""Where the times of an engine's steps are kept: a file for each machine, model, form of its weights and threads."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tandem import env
from tandem.engine.config import EngineConfig
from tandem.kernels.build.load import matrix_unit
from tandem.models.codes import described
from tandem.models.decoder import Decoder
from tandem.plan.roofline import machine_name


def times_file(decoder: Decoder, config: EngineConfig) -> Path:
    """In the cache folder; it need not exist."""
    forms = decoder.dtype, decoder.kept, described(decoder), config.weights, config.weight_group, config.kv_dtype
    made = machine_name(), str(decoder.device), matrix_unit(), decoder.spec, *forms, config.kv_window, config.logits
    return env.cache_dir() / "steps" / f"{hashlib.sha256(repr(made).encode()).hexdigest()[:16]}.json"
