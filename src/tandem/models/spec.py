"""What a decoder is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tandem.errors import ModelError
from tandem.types import Reach

ROPE_KINDS = ("linear", "llama3", "yarn")
# No published model comes near; a file that says more would fill the memory before its tensors are looked at.
MOST_LAYERS, MOST_POSITIONS = 4096, 2**24


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What the queries of a layer see, and whether queries and keys are rotated by position.

    >>> LayerAttention(Reach(chunk=16)).rotary
    True
    """

    reach: Reach = Reach()
    rotary: bool = True  # False: no position embedding (NoPE)


@dataclass(frozen=True, slots=True)
class QueryTemperature:
    """Queries grow with the logarithm of their position, so that attention over many keys stays sharp (2501.19399).

    >>> [round(QueryTemperature().factor(position), 4) for position in (0, 8190, 8191, 100_000)]
    [1.0, 1.0, 1.0693, 1.2565]
    """

    scale: float = 0.1
    floor: int = 8192  # tokens in a row that share a factor

    def __post_init__(self) -> None:
        if self.floor <= 0:
            raise ModelError(f"floor_scale of the query temperature is {self.floor}; it must be positive.")

    def factor(self, position: int) -> float:
        """What the query at `position` is multiplied by."""
        return 1 + self.scale * math.log1p((position + 1) // self.floor)


def period(layers: tuple[LayerAttention, ...]) -> tuple[LayerAttention, ...]:
    """The shortest start of `layers` that gives them when repeated."""
    return next(
        layers[:count]
        for count in range(1, len(layers) + 1)
        if all(layer == layers[index % count] for index, layer in enumerate(layers))
    )


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    linear: arXiv:2306.15595. yarn: arXiv:2309.00071. llama3: the Llama 3.1 release. The fields are those of
    Transformers' `modeling_rope_utils`; a kind ignores the fields that it does not name.

    >>> RopeScaling("linear", factor=2.0).factor
    2.0
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position: int = 0  # tokens, of pre-training (llama3, yarn)
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: rotations above which a dimension is left alone
    beta_slow: float = 1.0  # yarn: rotations below which a dimension is interpolated
    attention_factor: float | None = None  # yarn: scale of cos and sin; None derives it from factor and mscale
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ModelError(
                f"rotary scaling {self.kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}. "
                "Remove rope_scaling from config.json to use the model within its trained context."
            )
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise ModelError(f"rotary scaling factor is {self.factor}; it must be a positive number.")
        if self.kind != "linear" and self.original_max_position <= 0:
            raise ModelError(f"rotary scaling {self.kind} needs original_max_position_embeddings, a positive integer.")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer: pre-norm, RMSNorm, rotary, gated SiLU feed-forward, grouped-query attention.

    >>> ModelSpec("llama", vocab_size=32, width=8, ff_width=16, layers=1, heads=2, kv_heads=1, head_size=4).head_size
    4
    """

    architecture: str  # a key of families.FAMILIES
    vocab_size: int  # V
    width: int  # M
    ff_width: int  # F
    layers: int
    heads: int  # H
    kv_heads: int  # K
    head_size: int  # D
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied_embeddings: bool = False
    attention_bias: bool = False  # of the q, k and v projections (Qwen2); the output projection has none
    qk_norm: bool = False  # RMSNorm over each head of q and k before rotation (Qwen3)
    max_position: int = 2048  # tokens
    attention: tuple[LayerAttention, ...] = (LayerAttention(),)  # of the layers in turn, repeated; kept as one period
    query_temperature: QueryTemperature | None = None  # of the layers without rotation
    rotated_norm: bool = False  # each rotated head of q and k is divided by its root mean square (Llama 4)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "ff_width", "layers", "heads", "kv_heads", "head_size", "max_position"):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise ModelError(f"the model's {name} is {value!r}; it must be a positive integer.")
        if self.heads % self.kv_heads:
            raise ModelError(f"{self.heads} query heads do not divide into {self.kv_heads} key-value heads.")
        if self.head_size % 2:
            raise ModelError(f"head size {self.head_size} is odd; rotary embedding needs an even one.")
        if not 0 < len(self.attention) <= self.layers:
            raise ModelError(f"the attention of {len(self.attention)} layers is given for {self.layers} layers.")
        for reach in {layer.reach for layer in self.attention}:
            for name, size in (("window", reach.window), ("chunk", reach.chunk)):
                if size is not None and size <= 0:
                    raise ModelError(f"the attention {name} is {size}; it must be positive, or null for none.")
        object.__setattr__(self, "attention", period(self.attention))

    @property
    def layer_attention(self) -> tuple[LayerAttention, ...]:
        """Of each layer."""
        repeats = -(-self.layers // len(self.attention))
        return (self.attention * repeats)[: self.layers]

    @property
    def reaches(self) -> tuple[Reach, ...]:
        """What the queries of each layer see."""
        return tuple(layer.reach for layer in self.layer_attention)


def llama3_frequency_factors(spec: ModelSpec, scaling: RopeScaling) -> list[float]:
    """D/2 divisors of the rotary frequencies under the llama3 scaling, as llama.cpp stores them in `rope_freqs.weight`.

    Wavelengths shorter than original/high keep their frequency, longer than original/low are divided by `factor`,
    and those between are blended (Transformers' `_compute_llama3_parameters`).
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    factors = []
    for index in range(spec.head_size // 2):
        wavelength = 2 * math.pi * spec.rope_theta ** (2 * index / spec.head_size)
        smooth = min(max((scaling.original_max_position / wavelength - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return factors
