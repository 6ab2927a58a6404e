"""A run's adapter: read or drawn, put on the decoder that learns, taken off for the reference."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.engine.runner import DecoderRunner
from tandem.errors import ConfigError, ModelError, TandemWarning
from tandem.models.adapter import AdapterSet, Base
from tandem.models.peft import check_family, read_adapter
from tandem.numerics.digest import root_hash, tensor_hashes
from tandem.run.folder import latest_checkpoint
from tandem.run.learned import OBJECTIVES
from tandem.run.source import Same, resolve_source
from tandem.sync.publish import weight_version
from tandem.train.score import with_logprobs

if TYPE_CHECKING:
    import torch

    from tandem.algo.pack import PromptTotal
    from tandem.engine.engine import Engine
    from tandem.models.config import AdapterConfig
    from tandem.models.decoder import Decoder
    from tandem.models.peft import AdapterFolder
    from tandem.run.config import RunConfig
    from tandem.train.checkpoint import Part
    from tandem.types import Sample

NAME = "policy"  # of the adapter that a run trains


def begun_with(source: str) -> AdapterFolder:
    """The adapter of `adapter.source`: a folder in PEFT's format, or a run, whose newest checkpoint is meant."""
    return read_adapter(resolve_source(source))


def _refers(run: RunConfig) -> bool:
    """Whether the adapter that it began with is its reference, as long as it runs."""
    return bool(run.adapter.source) and "reference_logprobs" in OBJECTIVES[run.objective](run).columns


def saved_adapter(run: RunConfig) -> dict[str, Part]:
    """What a checkpoint has of the adapter that the run began with."""
    if not _refers(run):
        return {}
    found = begun_with(run.adapter.source)
    digest = root_hash(dict(tensor_hashes(found.weights()[0])) | {"adapter": repr(found.config)})
    return {"adapter": Same(f"adapter.source {run.adapter.source}", digest, "adapter.source")}


def resumed(run: RunConfig, folder: Path) -> RunConfig:
    """Of a run that goes on: from its own adapter, where nothing asks for the one that it began with."""
    if not run.adapter.source or _refers(run) or latest_checkpoint(folder) is None:
        return run
    return dataclasses.replace(run, adapter=dataclasses.replace(run.adapter, source=str(folder)))


def settled(config: AdapterConfig) -> AdapterConfig:
    """With what its source decides. ConfigError where both say something, ModelError where the source is no adapter."""
    if not config.source:
        return config
    found = begun_with(config.source).config
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
        made = begun_with(config.source).onto(decoder, NAME)
    else:
        check_family(decoder.spec.architecture)
        made = AdapterSet(decoder, config, NAME).draw(run.seed)
    made.base = Base(source, weight_version(decoder, 0).digest)
    return made


def other_base(found: AdapterFolder, dtype: torch.dtype, digest: Callable[[], str], source: str) -> str:
    """How an adapter that knows its base is of another one than `source`, whose weights in `dtype`, without an adapter,
    hash to `digest()`; nothing where it is of this one. Where its weights were of another dtype, or its file says
    no hash, nothing is known but the base's name: another one than the source's is warned of."""
    told = found.trained_on()
    if told is not None and told[1] == dtype:
        if (now := digest()) == told[0]:
            return ""
        return (
            f"the adapter {found.folder} was trained on weights that hash to {told[0][:12]}, and those of {source} "
            f"hash to {now[:12]}: its answers are not those of its training. Give the model that it was trained on."
        )
    named, here = (Path(one).expanduser().resolve() for one in (found.base, source))
    if found.base and named.name.lower() != here.name.lower():
        warnings.warn(
            f"the adapter {found.folder} is of {found.base} (base_model_name_or_path), and goes on {source}. Its "
            "tensors fit; whether these are the weights that it was trained on is not known.",
            TandemWarning,
            stacklevel=3,
        )
    return ""


def check_base(found: AdapterFolder, decoder: Decoder, source: str) -> None:
    """ModelError where an adapter that knows its base goes on another; else as `other_base`. `decoder`: with the
    weights of `source`, and without an adapter."""
    if said := other_base(found, decoder.dtype, lambda: weight_version(decoder, 0).digest, source):
        raise ModelError(said)


def for_engine(found: AdapterFolder, engine: Engine, name: str, source: str) -> AdapterSet:
    """An adapter to be served on an engine's weights, those of `source`. ModelError where it is none of theirs: its
    tensors have other shapes, or it was trained on other weights."""
    assert isinstance(engine.runner, DecoderRunner), type(engine.runner)
    decoder = engine.runner.decoder
    made = found.onto(decoder, name)
    if decoder.adapter is None and engine.scheduler.config.dtype == "same":  # the version is of the base, as published
        if said := other_base(found, decoder.dtype, lambda: engine.version.digest, source):
            raise ModelError(said)
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
    first = begun_with(source).onto(decoder) if source else None

    def score(
        samples: Sequence[Sample], prompts: Sequence[PromptTotal], budget_tokens: int, temperature: float
    ) -> tuple[Sample, ...]:
        with decoder.wearing(first):
            scored = partial(with_logprobs, "reference_logprobs", decoder)
            return scored(samples, prompts, budget_tokens, temperature)

    return score
