"""An adapter folded into the model that it is of, as a model of its own."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from tandem.errors import ConfigError, ModelError, TandemWarning
from tandem.models.aside import written_aside
from tandem.models.checkpoint import open_checkpoint, save_checkpoint
from tandem.models.decoder import DTYPES, Decoder
from tandem.models.peft import merged
from tandem.run.adapted import other_base
from tandem.run.source import origin_of
from tandem.sync.publish import weight_version


def merge(source: str, out: Path, dtype: str, base: str = "") -> None:
    """Write the model that `source`, an adapter's folder or a run that trained one, makes of its base.

    `base`: a model in place of the one that the adapter names. ConfigError where there is no adapter or `out` exists.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already. Give a new folder.")
    weights, adapter = origin_of(source, base)
    if adapter is None:
        raise ConfigError(f"{source} is no adapter, nor a run that trains one: there is nothing to merge.")
    checkpoint = open_checkpoint(weights)
    told = adapter.trained_on()
    for name in [name for name, kind in DTYPES.items() if told is not None and kind == told[1]]:
        decoder = Decoder(checkpoint.spec, name).load(checkpoint.tensors())
        if said := other_base(adapter, decoder.dtype, lambda now=decoder: weight_version(now, 0).digest, weights):  # type: ignore[misc]
            warnings.warn(said, TandemWarning, stacklevel=2)
    made = adapter.onto(Decoder(checkpoint.spec, "float32"))  # which takes the numbers as they are
    kind = DTYPES[dtype]
    with written_aside(out) as aside:
        tensors = {name: tensor.to(kind) for name, tensor in merged(checkpoint, made)}
        if wrong := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
            raise ModelError(f"{wrong[0]} has numbers beyond {dtype} once {source} is merged. Choose another dtype.")
        save_checkpoint(aside, checkpoint.spec, tensors, checkpoint.load_tokenizer(), dtype)
