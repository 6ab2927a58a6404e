"""What makes the policy that samples another one than the learner's: declared by the config, in words, before a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tandem import env
from tandem.errors import ConfigError
from tandem.kernels.build.load import lacking
from tandem.numerics.names import PAGES, kv_parts
from tandem.types import Reach

if TYPE_CHECKING:
    from tandem.engine.config import EngineConfig
    from tandem.models.config import ModelConfig
    from tandem.models.spec import ModelSpec
    from tandem.run.config import RunConfig

Line = Literal["staleness", "mismatch", "sampling"]  # of the error budget, algo/drift.py


@dataclass(frozen=True, slots=True)
class Departure:
    """One declared difference.

    >>> Departure("engine.weights=int4", "rollouts in int4 weights", "mismatch").line
    'mismatch'
    """

    setting: str  # what declared it
    what: str  # in words
    line: Line  # of the error budget: where it is measured


def of_engine(model: ModelConfig, engine: EngineConfig) -> tuple[Departure, ...]:
    """What a model and an engine alone declare."""
    found = []

    def declare(setting: str, what: str) -> None:
        found.append(Departure(setting, what, "mismatch"))

    if engine.weights != "same":
        weights, _, rows = engine.weights.partition("+")
        what = f"rollouts in {weights} weights" + (f", by rows in {rows}" if rows else "")
        if weights in ("int8", "int4"):
            what += f", groups of {engine.weight_group}"
        if weights == "w8a8":
            what = "rollouts whose products are of weights and activations in 8 bits"
        if weights == "w4a8":
            what = "rollouts whose products are of weights in 4 bits and activations in 8"
        declare(f"engine.weights={engine.weights}", what)
    if engine.dtype not in ("same", model.dtype):
        declare(f"engine.dtype={engine.dtype}", f"the engine computes in {engine.dtype}, the learner in {model.dtype}")
    if engine.kv_dtype != "same":
        what = "keys and values in" if engine.kv_dtype in PAGES else "keys and values rounded to"
        declare(f"engine.kv_dtype={engine.kv_dtype}", f"{what} {engine.kv_dtype}")
    if engine.logits != "same":
        declare(f"engine.logits={engine.logits}", f"the engine rounds logits to {engine.logits}")
    if engine.kv_window:
        what = f"the engine sees {engine.kv_window} latest positions and {engine.kv_sinks} sinks"
        declare(f"engine.kv_window={engine.kv_window}", what)
    if engine.noise:
        declare(f"engine.noise={engine.noise:g}", f"noise of {engine.noise:g} on the final hidden state")
    if model.kernels == "library":
        declare("model.kernels=library", "the library's matrix products, whose bits depend on the batch")
    elif env.kernels() == "reference":
        declare("TANDEM_KERNELS=reference", "reference kernels, whose bits depend on the batch")
    elif lacking():
        declare("no C++ compiler", "reference kernels, whose bits depend on the batch")
    elif model.dtype == "float16":
        declare(
            "model.dtype=float16", "reference kernels, whose bits depend on the batch; float16 has no compiled ones"
        )
    return tuple(found)


def departures(config: RunConfig) -> tuple[Departure, ...]:
    """All that a config declares; empty: the run is exact."""
    found = list(of_engine(config.model, config.engine))
    if servers := config.remote.servers:
        what = f"{len(servers)} servers of {config.remote.dialect} sample, with log-probs of their own arithmetic"
        found.append(Departure(f"remote.servers={','.join(servers)}", what, "mismatch"))
    if config.sync.lag:
        what = f"the engine's weights are {config.sync.lag} updates old"
        found.append(Departure(f"sync.lag={config.sync.lag}", what, "staleness"))
    if lag := config.asynchrony.most_lag:
        what = f"tokens are drawn up to {lag} updates before they are learned"
        found.append(Departure(f"asynchrony.mode={config.asynchrony.mode}", what, "staleness"))
    if config.asynchrony.at_update == "keep":
        found.append(Departure("asynchrony.at_update=keep", "keys and values of older weights stay", "mismatch"))
    rollout = config.rollout
    for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
        value = getattr(rollout, name)
        if value != off:
            what = f"tokens drawn under {name} {value:g}; the learner replays the kept set"
            found.append(Departure(f"rollout.{name}={value:g}", what, "sampling"))
    return tuple(found)


def is_exact(config: RunConfig) -> bool:
    """Whether learner and behaviour log-probs must agree to the last bit. A replayed kept set does not spoil it."""
    return all(departure.line == "sampling" for departure in departures(config))


def declaration(config: RunConfig) -> str:
    """The run's first line."""
    found = departures(config)
    sampling = "; ".join(f"{d.what} ({d.setting})" for d in found if d.line == "sampling")
    rounded = _of_both(config) + _of_gradients(config)
    if is_exact(config):
        return f"exact: engine and learner compute the same bits{rounded}" + (f"; {sampling}" if sampling else "")
    declared = "; ".join(f"{d.what} ({d.setting})" for d in found)
    correction = config.algo.correction
    parts = [correction.form, *([correction.weight] if correction.weight != "none" else []), *correction.reject]
    when = ", held back until an alarm" if config.alarms.action == "correct" else ""
    return f"departs from exact: {declared}{rounded}. Correction: {' + '.join(parts)}{when}"


def _of_both(config: RunConfig) -> str:
    """What engine and learner round alike, which departs from nothing."""
    return "".join(
        f"; both {does} {name}"
        for does, name in (
            ("multiply in", config.model.weights),
            ("keep keys and values in", config.model.kv),
            ("round logits to", config.model.logits),
        )
        if name not in ("same", "float32")
    )


def _of_gradients(config: RunConfig) -> str:
    """What departs of gradients, and not of the policy."""
    gradients = config.learner.gradients
    return f"; gradients in {gradients} (learner.gradients)" if gradients != "same" else ""


def without_departures(engine: EngineConfig) -> EngineConfig:
    """The same limits, and the learner's own policy."""
    return dataclasses.replace(
        engine, dtype="same", weights="same", kv_dtype="same", logits="same", kv_window=0, noise=0.0
    )


def with_pages_of_spans(model: ModelConfig, engine: EngineConfig) -> EngineConfig:
    """The engine, whose pages hold what is rounded at once; where engine.page_tokens was set, as it is."""
    tokens = max(kv_parts(name)[1] for name in (model.kv, engine.kv_dtype))
    left_open = engine.page_tokens == type(engine)().page_tokens
    return dataclasses.replace(engine, page_tokens=tokens) if tokens and left_open else engine


def check_engine(spec: ModelSpec, model: ModelConfig, engine: EngineConfig) -> None:
    """Refuse, before any weight is loaded, what a model cannot do with an engine's departures. Raises ConfigError."""
    if model.weights != "same" or engine.weights != "same":
        from tandem.kernels.rounding import rounding_of

        for name in (model.weights, engine.weights):
            rounding_of(name)
    if "same" not in (model.weights, engine.weights):
        raise ConfigError(
            f"model.weights is {model.weights} and engine.weights is {engine.weights}: the policy that is trained is "
            "rounded already. Leave engine.weights out; or model.weights, for a departure that is measured."
        )
    _check_kv(model, engine)
    limited = next((reach for reach in spec.reaches if reach != Reach()), None)
    if engine.kv_window and limited:
        raise ConfigError(
            f"engine.kv_window is {engine.kv_window}, but layers of the model itself attend to {limited}: "
            "the engine would see positions that the model never saw. Set engine.kv_window to 0."
        )


def _check_kv(model: ModelConfig, engine: EngineConfig) -> None:
    if engine.logits != "same" and (model.logits != "float32" or model.device != "cpu"):
        raise ConfigError(
            f"engine.logits is {engine.logits}, with model.logits {model.logits} and model.device {model.device}: only "
            "an engine on the CPU rounds logits, where the learner does not. Leave engine.logits out, or the others."
        )
    if {model.kv, engine.kv_dtype} == {"same"}:
        return
    from tandem.kernels.rounding import kept_of

    for name in (model.kv, engine.kv_dtype):
        kept_of(name)
        span = kv_parts(name)[1]
        if span not in (0, engine.page_tokens):
            raise ConfigError(
                f"{name} rounds keys and values {span} tokens at a time, a page of the engine's, and "
                f"engine.page_tokens is {engine.page_tokens}. Leave engine.page_tokens out; behind _r the name may say "
                "another number."
            )
    if "same" not in (model.kv, engine.kv_dtype):
        raise ConfigError(
            f"model.kv is {model.kv} and engine.kv_dtype is {engine.kv_dtype}: the policy that is trained has its keys "
            "and values rounded already. Leave engine.kv_dtype out; or model.kv, for a departure that is measured."
        )
    if model.device != "cpu" and engine.kv_dtype not in ("same", "float8_e4m3", "int8"):
        raise ConfigError(
            f"engine.kv_dtype is {engine.kv_dtype} and model.device {model.device}, which has float8_e4m3 and int8 "
            "alone. Choose one of these, or set model.device to cpu."
        )
