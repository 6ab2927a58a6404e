"""A run's adapter: read or drawn, put on the decoder that learns, taken off for the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from tandem.errors import ConfigError
from tandem.models.adapter import AdapterSet, Base
from tandem.models.peft import check_family, read_adapter
from tandem.sync.publish import weight_version
from tandem.train.score import with_logprobs

if TYPE_CHECKING:
    from tandem.algo.pack import PromptTotal
    from tandem.models.config import AdapterConfig
    from tandem.models.decoder import Decoder
    from tandem.models.peft import AdapterFolder
    from tandem.run.config import RunConfig
    from tandem.types import Sample

NAME = "policy"  # of the adapter that a run trains


def settled(config: AdapterConfig) -> AdapterConfig:
    """With what its source decides. ConfigError where both say something, ModelError where the source is no adapter."""
    if not config.source:
        return config
    found = read_adapter(config.source).config
    plain = type(config)()
    names = {field.name for field in dataclasses.fields(found)} - {"source"}
    given = [name for name in sorted(names) if getattr(config, name) != getattr(plain, name)]
    if given:
        raise ConfigError(
            f"adapter.source is {config.source}, whose adapter_config.json decides adapter.{given[0]}. Leave "
            "one of them out."
        )
    return found


def trained_on(decoder: Decoder, run: RunConfig, source: str) -> AdapterSet:
    """The adapter that a run begins with, for the decoder that learns. `source`: of its weights."""
    config = run.adapter
    if config.source:
        made = read_adapter(config.source).onto(decoder, NAME)
    else:
        check_family(decoder.spec.architecture)
        made = AdapterSet(decoder, config, NAME).draw(run.seed)
    made.base = Base(source, weight_version(decoder, 0).digest)
    return made


def check_source(run: RunConfig | None, worn: AdapterFolder | None) -> None:
    """ConfigError where a run is to train what is an adapter's folder."""
    if run is not None and worn is not None:
        raise ConfigError(
            f"model.source {run.model.source} is an adapter of {worn.base}. To train it further set model.source to "
            f"{worn.base} and adapter.source to {worn.folder}; to train all weights, merge them first (tandem convert "
            "merge)."
        )


def without(decoder: Decoder, source: str) -> Callable[..., tuple[Sample, ...]]:
    """What fills in `reference_logprobs` by the decoder with the adapter that the run began with, or none."""
    first = read_adapter(source).onto(decoder) if source else None

    def score(
        samples: Sequence[Sample], prompts: Sequence[PromptTotal], budget_tokens: int, temperature: float
    ) -> tuple[Sample, ...]:
        with decoder.wearing(first):
            scored = partial(with_logprobs, "reference_logprobs", decoder)
            return scored(samples, prompts, budget_tokens, temperature)

    return score
