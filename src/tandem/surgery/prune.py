"""A smaller student of a teacher's weights: layers dropped, and what is left narrowed, evenly or by importance.

What is kept is kept as it is, in its order, so that the student begins as the teacher's shadow and distillation mends
it. By importance, over texts that are run once through the teacher:

    layers      1 - cos(state before, state behind), mean over tokens: Block Influence, ShortGPT, arXiv 2403.03853
    heads       norm of what a query head gives, mean over tokens; of a key head, the sum over its queries
    ff_width    size of a neuron's activation, mean over tokens
    width       size of a channel behind both norms of each layer, mean over tokens, summed over layers

the last three as Minitron, arXiv 2407.14679, section 2.2. Heads and neurons are chosen in each layer by itself, key
heads with their queries; channels are the same in all layers, since the residual stream is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tandem.errors import ConfigError
from tandem.kernels.linear import linear
from tandem.kernels.norm import rms_norm
from tandem.kernels.swiglu import swiglu
from tandem.models.decoder import Decoder
from tandem.models.spec import ModelSpec
from tandem.models.view import Heads, PackView, Tables

PIECE_TOKENS, PIECES = 512, 64  # of texts that are measured: 32,768 tokens at most


@dataclass(frozen=True, slots=True)
class Size:
    """What the student is to have; None: what the teacher has.

    >>> Size(layers=6).of(ModelSpec("llama", 32, 8, 16, layers=12, heads=2, kv_heads=1, head_size=4)).layers
    6
    """

    layers: int | None = None
    heads: int | None = None  # query heads
    kv_heads: int | None = None
    ff_width: int | None = None
    width: int | None = None  # channels of the residual stream

    def of(self, spec: ModelSpec) -> ModelSpec:
        """The student's spec, its layers' attention not chosen yet. ConfigError where the teacher has less."""
        wanted = {name: getattr(self, name) for name in ("layers", "heads", "kv_heads", "ff_width", "width")}
        for name, value in wanted.items():
            if value is not None and not 1 <= value <= getattr(spec, name):
                raise ConfigError(f"{name} is {value}, and the model has {getattr(spec, name)}: give 1 to that.")
        group = spec.heads // spec.kv_heads
        kv_heads = self.kv_heads or spec.kv_heads
        heads = self.heads or (kv_heads * group if self.kv_heads else spec.heads)
        if heads % kv_heads or heads // kv_heads > group:
            raise ConfigError(
                f"{heads} heads do not go to {kv_heads} key-value heads of at most {group} each. Give kv_heads too: a "
                "divisor of heads, each of which has its own queries."
            )
        width = self.width or spec.width
        if width % 2:
            raise ConfigError(f"width is {width}; give an even one.")
        layers = self.layers or spec.layers
        return replace(
            spec,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            width=width,
            ff_width=self.ff_width or spec.ff_width,
            attention=spec.layer_attention[:layers],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Importance:
    """How much each part does, in fp64; larger is more."""

    layers_L: torch.Tensor
    heads_LH: torch.Tensor
    neurons_LF: torch.Tensor
    channels_M: torch.Tensor


@dataclass(frozen=True, slots=True)
class Kept:
    """Which parts stay, in ascending order; of the teacher's layers, by their index, heads and neurons."""

    layers: tuple[int, ...]
    kv_heads: Mapping[int, tuple[int, ...]]
    heads: Mapping[int, tuple[int, ...]]
    neurons: Mapping[int, tuple[int, ...]]
    channels: tuple[int, ...]


def evenly(count: int, kept: int, *, ends: bool = False) -> tuple[int, ...]:
    """`kept` of `count` at equal distances; with the first and the last where `ends`.

    >>> evenly(30, 6, ends=True), evenly(9, 3)
    ((0, 6, 12, 17, 23, 29), (0, 3, 6))
    """
    if ends and kept > 1:
        return tuple(math.floor(index * (count - 1) / (kept - 1) + 0.5) for index in range(kept))
    return tuple(index * count // kept for index in range(kept))


def most(values: torch.Tensor, kept: int) -> tuple[int, ...]:
    """The places of the `kept` largest, ascending; of equal ones the first.

    >>> most(torch.tensor([0.5, 2.0, 0.5, 1.0]), 3)
    (0, 1, 3)
    """
    order = sorted(range(len(values)), key=lambda index: (-float(values[index]), index))
    return tuple(sorted(order[:kept]))


def choose(spec: ModelSpec, student: ModelSpec, importance: Importance | None = None) -> Kept:
    """What of a teacher goes into a student, evenly where nothing was measured."""
    group, own = spec.heads // spec.kv_heads, student.heads // student.kv_heads

    def of(values: torch.Tensor | None, count: int, kept: int, *, ends: bool = False) -> tuple[int, ...]:
        return evenly(count, kept, ends=ends) if values is None else most(values, kept)

    layers = of(None if importance is None else importance.layers_L, spec.layers, student.layers, ends=True)
    kv_heads, heads, neurons = {}, {}, {}
    by_channel = None if importance is None else importance.channels_M
    for layer in layers:
        by_group = importance.heads_LH[layer].view(spec.kv_heads, group) if importance is not None else None
        kv_heads[layer] = of(None if by_group is None else by_group.sum(1), spec.kv_heads, student.kv_heads)
        heads[layer] = tuple(
            key * group + query
            for key in kv_heads[layer]
            for query in of(None if by_group is None else by_group[key], group, own)
        )
        by_neuron = None if importance is None else importance.neurons_LF[layer]
        neurons[layer] = of(by_neuron, spec.ff_width, student.ff_width)
    return Kept(layers, kv_heads, heads, neurons, of(by_channel, spec.width, student.width))


def pruned(
    spec: ModelSpec, tensors: Iterator[tuple[str, torch.Tensor]], student: ModelSpec, kept: Kept
) -> tuple[ModelSpec, dict[str, torch.Tensor]]:
    """The student's spec and tensors, by Hugging Face name, of the teacher's."""
    number = {layer: str(index) for index, layer in enumerate(kept.layers)}
    made = {}
    for name, tensor in tensors:
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else None
        if layer is not None and layer not in number:
            continue
        rows, columns = _places(spec, parts, layer, kept)
        if rows is not None:
            tensor = tensor[rows]
        if columns is not None:
            tensor = tensor[:, columns]
        if layer is not None:
            parts[2] = number[layer]
        made[".".join(parts)] = tensor.contiguous()
    return replace(student, attention=tuple(spec.layer_attention[layer] for layer in kept.layers)), made


def _places(
    spec: ModelSpec, parts: Sequence[str], layer: int | None, kept: Kept
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Rows and columns of a tensor that stay; None: all, or a vector has none."""
    channels = torch.tensor(kept.channels)
    if layer is None:  # embedding and head [V, M], norm [M]
        return (channels, None) if parts[-2] == "norm" else (None, channels)
    kind = parts[-2]
    if kind in ("q_norm", "k_norm"):
        return None, None
    inputs = channels if parts[-1] == "weight" else None
    size = torch.arange(spec.head_size)
    heads = {"q_proj": kept.heads, "k_proj": kept.kv_heads, "v_proj": kept.kv_heads, "o_proj": kept.heads}
    if kind in heads:
        places = (torch.tensor(heads[kind][layer])[:, None] * spec.head_size + size).flatten()
        return (channels, places) if kind == "o_proj" else (places, inputs)
    neurons = torch.tensor(kept.neurons[layer])
    if kind in ("gate_proj", "up_proj"):
        return neurons, inputs
    return (channels, neurons) if kind == "down_proj" else (channels, None)


class _Seen:
    """A pack's view that tells the norm of what each head gave."""

    def __init__(self, tokens: int) -> None:
        self._view = PackView([0, tokens])
        self.positions_T = self._view.positions_T
        self.norms_H = torch.zeros(())

    def attend(self, layer: int, qkv_TW: torch.Tensor, heads: Heads, tables: Tables) -> torch.Tensor:
        attended_TW = self._view.attend(layer, qkv_TW, heads, tables)
        self.norms_H = attended_TW.double().view(-1, heads.heads, heads.size).norm(dim=-1).sum(0)
        return attended_TW


def measured(decoder: Decoder, texts: Sequence[Sequence[int]]) -> Importance:
    """Of a model over texts, each by itself from its first position on. ConfigError where there are none."""
    if not any(len(text) for text in texts):
        raise ConfigError("nothing is measured: there is no text. Give a file of some, or leave it out.")
    spec, count = decoder.spec, 0
    layers_L = torch.zeros(spec.layers, dtype=torch.float64)
    heads_LH = torch.zeros(spec.layers, spec.heads, dtype=torch.float64)
    neurons_LF = torch.zeros(spec.layers, spec.ff_width, dtype=torch.float64)
    channels_M = torch.zeros(spec.width, dtype=torch.float64)
    with torch.no_grad():
        for text in filter(len, texts):
            count += len(text)
            tokens_T, view = torch.tensor(text), _Seen(len(text))
            hidden_TM = decoder.embed.value[tokens_T]
            for index, layer in enumerate(decoder.layers):
                before_TM, eps = hidden_TM, spec.norm_eps
                mixed_TM = layer.mix.forward(hidden_TM, view, decoder.tables)
                heads_LH[index] += view.norms_H
                normed_TM = rms_norm(mixed_TM, layer.feed.feed_norm, eps)
                neurons_LF[index] += swiglu(linear(normed_TM, layer.feed.gate_up)).double().abs().sum(0)
                channels_M += rms_norm(hidden_TM, layer.mix.norm, eps).double().abs().sum(0)
                channels_M += normed_TM.double().abs().sum(0)
                hidden_TM = layer.feed.forward(mixed_TM)
                cosine_T = torch.nn.functional.cosine_similarity(before_TM.double(), hidden_TM.double(), dim=-1)
                layers_L[index] += (1.0 - cosine_T).sum()
    return Importance(layers_L / count, heads_LH / count, neurons_LF / count, channels_M / count)


def pieces(texts: Sequence[Sequence[int]], most_tokens: int) -> list[Sequence[int]]:
    """Tokens of texts in at most PIECES pieces of PIECE_TOKENS, or of the model's positions where those are fewer; none
    over two texts."""
    size = min(PIECE_TOKENS, most_tokens)
    return [text[start : start + size] for text in texts for start in range(0, len(text), size)][:PIECES]
