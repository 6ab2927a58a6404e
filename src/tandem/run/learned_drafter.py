"""What a config makes of a drafter that is trained: the objective, from a folder or new, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tandem.engine.config import DraftConfig
from tandem.errors import ConfigError
from tandem.models.checkpoint import open_checkpoint
from tandem.models.taps import layers_of
from tandem.run.drafter import kept_ids
from tandem.run.source import origin_of, resolve_source
from tandem.speculate.block import Block, BlockSpec
from tandem.speculate.config import DrafterConfig
from tandem.speculate.eagle import Eagle, EagleSpec
from tandem.speculate.files import open_drafter, read_spec, save_drafter
from tandem.speculate.mixed import Mixed, MixedSpec
from tandem.speculate.training import DrafterObjective
from tandem.speculate.vocabulary import Ranking

if TYPE_CHECKING:
    from tandem.models.decoder import Decoder
    from tandem.models.spec import ModelSpec
    from tandem.run.config import RunConfig


def drafter_of(config: RunConfig) -> DrafterObjective:
    """The objective. Reads no weight."""
    return DrafterObjective(config.drafter, lambda decoder: module_of(config, decoder), save_drafter)


def module_of(config: RunConfig, decoder: Decoder) -> Eagle | Block:
    """The drafter that training begins with."""
    asked, spec = config.drafter, _spec(config, decoder.spec)
    ids_V = _vocabulary(config, decoder.spec.vocab_size) if asked.vocabulary else None
    if asked.source:
        return open_drafter(Path(resolve_source(asked.source)), decoder, ids_V)
    if isinstance(spec, BlockSpec):
        return Block(spec, decoder.embed, decoder.head, ids_V).begin(decoder.norm)
    spec = replace(spec, vocab_size=spec.vocab_size if ids_V is None else len(ids_V))
    made = (Mixed if isinstance(spec, MixedSpec) else Eagle)(spec, decoder.embed, ids_V)  # type: ignore[arg-type]
    return made.begin(decoder.norm, decoder.head)


def _spec(config: RunConfig, target: ModelSpec) -> EagleSpec | BlockSpec:
    asked = config.drafter
    if asked.source:
        return read_spec(Path(resolve_source(asked.source)), target)
    if asked.kind == "dflash":
        return BlockSpec.of(target, asked.layers, asked.steps + 1, asked.depth)
    if asked.kind == "mixed":
        return MixedSpec.new(target, asked.mixers, asked.layers)
    return EagleSpec.of(target, asked.layers)


def _vocabulary(config: RunConfig, vocab: int) -> Tensor:
    """The tokens that a new one may say, ascending."""
    asked = config.drafter
    tokenizer = open_checkpoint(origin_of(config.model.source)[0]).load_tokenizer()
    stops = tokenizer.stop_token_ids
    if not asked.vocabulary_of:
        return torch.from_numpy(Ranking(vocab, 0, stops).most(asked.vocabulary))
    named = DraftConfig("model", model="-", vocabulary=asked.vocabulary, vocabulary_of=asked.vocabulary_of)
    return torch.tensor(sorted({*kept_ids(named, tokenizer, vocab), *stops}))


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
    if config.drafter.on_policy and config.rollout.temperature != config.drafter.temperature:
        raise ConfigError(
            f"drafter.on_policy is on and rollout.temperature {config.rollout.temperature}, by which the model draws, "
            f"and drafter.temperature {config.drafter.temperature}, by which the drafter learns. Set both alike."
        )
    asked, target = config.drafter, open_checkpoint(origin_of(config.model.source)[0]).spec
    if asked.vocabulary > target.vocab_size:
        raise ConfigError(
            f"drafter.vocabulary is {asked.vocabulary}, of {target.vocab_size} tokens. Set it lower, or to 0."
        )
    made = _spec(config, target)
    blocks = made.block if isinstance(made, BlockSpec) else 0
    if made.kind != asked.kind or 0 < blocks <= asked.steps:
        is_of = f"a dflash of blocks of {blocks}" if blocks else f"of kind {made.kind}"
        raise ConfigError(
            f"drafter.source {asked.source} is {is_of}; drafter.kind is {asked.kind} and drafter.steps {asked.steps}. "
            "Set them as it is: a block has a token more than steps."
        )
    layers_of(target, made.layers)
