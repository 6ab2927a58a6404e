"""What a config makes of a drafter that is trained: the objective, from a folder or new, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tandem.errors import ConfigError
from tandem.models.taps import layers_of
from tandem.run.source import resolve_source
from tandem.speculate.config import DrafterConfig
from tandem.speculate.eagle import Eagle, EagleSpec
from tandem.speculate.files import open_eagle, save_eagle
from tandem.speculate.training import DrafterObjective

if TYPE_CHECKING:
    from tandem.models.decoder import Decoder
    from tandem.run.config import RunConfig


def drafter_of(config: RunConfig) -> DrafterObjective:
    """The objective. Reads no weight."""
    return DrafterObjective(config.drafter, lambda decoder: module_of(config.drafter, decoder), save_eagle)


def module_of(config: DrafterConfig, decoder: Decoder) -> Eagle:
    """The drafter that training begins with."""
    if config.source:
        made = open_eagle(Path(resolve_source(config.source)), decoder)
    else:
        ids_V = read_vocabulary(Path(config.vocabulary), decoder.spec.vocab_size) if config.vocabulary else None
        spec = EagleSpec.of(decoder.spec, config.layers, 0 if ids_V is None else len(ids_V))
        made = Eagle(spec, decoder.embed, ids_V).begin(decoder.norm, decoder.head)
    layers_of(decoder, made.layers)
    return made


def read_vocabulary(path: Path, vocab: int) -> torch.Tensor:
    """Token ids of a file: a list in JSON. ConfigError where it is none, or names a token that the model lacks."""
    try:
        ids = sorted({int(one) for one in json.loads(path.read_text(encoding="utf-8"))})
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"drafter.vocabulary {path} is no list of token ids: {error}.") from error
    if not ids or ids[0] < 0 or ids[-1] >= vocab:
        raise ConfigError(f"drafter.vocabulary {path} names ids outside 0 to {vocab - 1}, or none.")
    return torch.tensor(ids)


def check_drafter(config: RunConfig) -> None:
    """Refuse what a drafter is not trained with. Raises ConfigError."""
    if config.objective != "drafter":
        if config.drafter != DrafterConfig():
            raise ConfigError(
                f"drafter is configured, but objective is {config.objective!r}. Set objective to drafter, or leave "
                "drafter.* out."
            )
        return
    refused = {
        "model.device": (config.model.device, "cpu"),
        "adapter": (config.adapter.on, False),
        "workers.learner": (config.workers.learner, "here"),
        "learner.gradients": (config.learner.gradients, "same"),
    }
    for name, (value, wanted) in refused.items():
        if value != wanted:
            raise ConfigError(f"objective is drafter and {name} is {value}: a drafter is trained with {wanted} alone.")
