"""The two parts of a layer: `mix`, which looks at other positions, and `feed`, which looks at its own.

A part has its weights, the names of their tensors in a checkpoint (parts.py) and its half of the forward pass, the
residual and the norm before it included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from tandem.kernels.linear import linear
from tandem.kernels.norm import rms_norm
from tandem.kernels.swiglu import swiglu_down
from tandem.kernels.weight import Weight
from tandem.models.parts import Slot, attention_slots, dense_slots
from tandem.models.spec import ModelSpec
from tandem.models.view import Heads, Tables, View

Zeros = Callable[..., torch.Tensor]  # of a shape


def views(slot: Slot, weight: Weight) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that lie in a weight: Hugging Face name and view."""
    start = 0
    for one in slot.stored:
        yield one.name, weight.value.narrow(0, start, one.rows)
        start += one.rows


class Part:
    """An attribute a slot: its weight."""

    def __init__(self, slots: Sequence[Slot], eps: float, zeros: Zeros) -> None:
        self.slots, self.eps = slots, eps
        for slot in slots:
            setattr(self, slot.name, Weight(zeros(*slot.shape), matrix=slot.columns is not None, zero=True))

    def weights(self) -> Iterator[tuple[Slot, Weight]]:
        """In the order of the forward pass."""
        for slot in self.slots:
            yield slot, getattr(self, slot.name)


class Attention(Part):
    """Grouped-query attention; the q, k and v projections are one matrix."""

    norm: Weight
    qkv: Weight
    qkv_bias: Weight | None = None
    q_norm: Weight | None = None
    k_norm: Weight | None = None
    out: Weight

    def __init__(self, spec: ModelSpec, index: int, heads: Heads, zeros: Zeros) -> None:
        super().__init__(attention_slots(spec, index), spec.norm_eps, zeros)
        self.index, self.heads = index, heads

    def forward(self, hidden_TM: torch.Tensor, view: View, tables: Tables) -> torch.Tensor:
        """Hidden states behind it."""
        attended_TW = view.attend(self.index, self.project(hidden_TM), self.heads, tables)
        return linear(attended_TW, self.out, None, hidden_TM)

    def project(self, hidden_TM: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values of hidden states, before rotation: [T, (H + 2 K) D]."""
        return self.projected(rms_norm(hidden_TM, self.norm, self.eps))

    def projected(self, normed_TM: torch.Tensor) -> torch.Tensor:
        """The same of what is normed already, or is not to be."""
        qkv_TW = linear(normed_TM, self.qkv, self.qkv_bias)
        if self.q_norm is None or self.k_norm is None:
            return qkv_TW
        rows, size = qkv_TW.shape[0], self.heads.size
        query, key, value = self.heads.cut(qkv_TW)
        normed = [
            rms_norm(x.reshape(-1, size), weight, self.eps).view(rows, -1)
            for x, weight in ((query, self.q_norm), (key, self.k_norm))
        ]
        return torch.cat([*normed, value.reshape(rows, -1)], 1)


class DenseFeed(Part):
    """SwiGLU; gate and up are one matrix."""

    feed_norm: Weight
    gate_up: Weight
    down: Weight

    def forward(self, hidden_TM: torch.Tensor) -> torch.Tensor:
        """Hidden states behind it."""
        gate_up_TF = linear(rms_norm(hidden_TM, self.feed_norm, self.eps), self.gate_up)
        return swiglu_down(gate_up_TF, self.down, hidden_TM)


class Layer:
    """A layer of a decoder."""

    def __init__(self, spec: ModelSpec, index: int, heads: Heads, zeros: Zeros) -> None:
        self.index = index
        self.mix = Attention(spec, index, heads, zeros)
        self.feed = DenseFeed(dense_slots(spec, index), spec.norm_eps, zeros)

    def weights(self) -> Iterator[tuple[Slot, Weight]]:
        """Of both parts, in the order of the forward pass."""
        yield from self.mix.weights()
        yield from self.feed.weights()

    def forward(self, hidden_TM: torch.Tensor, view: View, tables: Tables) -> torch.Tensor:
        """Hidden states behind it."""
        return self.feed.forward(self.mix.forward(hidden_TM, view, tables))
