"""A drafter of one layer on the target's hidden states (EAGLE-3, arXiv 2503.01840).

Slot j holds what is made of the target's feature of position j - 1 and the embedding of token j, so it depends on
tokens[: j + 1] alone, as the target's keys do: a page of both has one name. (The published layout has the same pairs a
position earlier, where a page's last one depends on the token behind it.) It predicts token j + 1; what it gives before
its last norm takes the place of the feature where the target has not been yet. The feature of position -1 is 0, which
leaves slot 0 in sight: publishers' drafters see one key more here than where they were trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tandem.kernels.linear import linear
from tandem.kernels.norm import rms_norm
from tandem.kernels.weight import Weight
from tandem.models.layer import DenseFeed, Part, Zeros, views
from tandem.models.parts import Slot, Stored, dense_slots
from tandem.models.rope import rope_tables
from tandem.models.spec import ModelSpec
from tandem.models.view import Heads, View
from tandem.speculate.steps import Steps, StepView
from tandem.speculate.trained import Trained, check_embedding
from tandem.types import Microbatch

LAYER = "midlayer."  # of tensors' names, in vLLM's layout


@dataclass(frozen=True, slots=True)
class EagleSpec:
    """Of what a drafter is made."""

    kind: ClassVar = "eagle3"

    model: ModelSpec  # its one layer; width and vocabulary are the target's
    layers: tuple[int, ...]  # of the target, from 0, behind which its features are taken
    vocab_size: int  # of its head
    norm_first: bool = False  # the layer's residual is the feature behind its norm (vLLM: norm_before_residual)

    @staticmethod
    def of(target: ModelSpec, layers: tuple[int, ...] = (), vocab_size: int = 0) -> EagleSpec:
        """A new one for a target: heads and width as there, features behind layers 1, L / 2 - 1 and L - 4.

        >>> spec = ModelSpec("llama", vocab_size=9, width=8, ff_width=16, layers=30, heads=2, kv_heads=1, head_size=4)
        >>> EagleSpec.of(spec).layers
        (1, 14, 26)
        """
        count = target.layers
        layers = layers or tuple(sorted({max(0, min(at, count - 2)) for at in (1, count // 2 - 1, count - 4)}))
        own = replace(target, architecture="llama", layers=1, attention=target.attention[:1], tied_embeddings=False)
        own = replace(own, attention_bias=False, qk_norm=False, query_temperature=None, rotated_norm=False)
        return EagleSpec(own, layers, vocab_size or target.vocab_size)

    @property
    def kept_layers(self) -> int:
        """That have keys and values."""
        return self.model.layers

    @property
    def state_numbers(self) -> tuple[int, ...]:
        """Of each layer that has a state in place of them."""
        return ()

    def all_slots(self) -> Iterator[Slot]:
        """Its weights."""
        for part in self.slots():
            yield from part

    def slots(self) -> tuple[tuple[Slot, ...], tuple[Slot, ...], tuple[Slot, ...]]:
        """Its weights: of attention, of the feed-forward, and those around the layer."""
        own, width = self.model, self.model.width

        def vector(name: str, tensor: str) -> Slot:
            return Slot(name, (Stored(tensor, "", width),))

        queries, keys = own.heads * own.head_size, own.kv_heads * own.head_size
        qkv = tuple(
            Stored(f"{LAYER}self_attn.{x}_proj.weight", "", rows)
            for x, rows in (("q", queries), ("k", keys), ("v", keys))
        )
        mix = (
            vector("token_norm", f"{LAYER}input_layernorm.weight"),
            vector("feature_norm", f"{LAYER}hidden_norm.weight"),
            Slot("qkv", qkv, 2 * width),
            Slot("out", (Stored(f"{LAYER}self_attn.o_proj.weight", "", width),), queries),
        )
        feed = tuple(
            replace(slot, stored=tuple(replace(one, name=LAYER + one.name.split(".", 3)[3]) for one in slot.stored))
            for slot in dense_slots(own, 0)
        )
        outer = (
            Slot("fuse", (Stored("fc.weight", "", width),), len(self.layers) * width),
            vector("norm", "norm.weight"),
            Slot("head", (Stored("lm_head.weight", "", self.vocab_size),), width),
        )
        return mix, feed, outer


class _Outer(Part):
    fuse: Weight
    norm: Weight
    head: Weight


class _Mix(Part):
    token_norm: Weight
    feature_norm: Weight
    qkv: Weight
    out: Weight


class Eagle(Trained):
    """Its weights and its pass. The embedding is the target's own."""

    kind, title, seed = "eagle3", "EAGLE-3", 0x6561676C

    def __init__(self, spec: EagleSpec, embed: Weight, ids_V: Tensor | None = None) -> None:
        """ids_V: of the target's tokens those that its head knows, int64, ascending; None: all. ModelError where the
        target's embedding is of another width or vocabulary."""
        own = spec.model
        check_embedding(own, embed)
        assert (ids_V is None and spec.vocab_size == own.vocab_size) or len(ids_V) == spec.vocab_size  # type: ignore[arg-type]
        self.spec, self.embed, self.ids_V = spec, embed, ids_V
        self.dtype = embed.value.dtype
        self._make(lambda *shape: torch.zeros(shape, dtype=self.dtype))
        self.tables = rope_tables(own, own.max_position)

    def _make(self, zeros: Zeros) -> None:
        """Its parts, of zeros."""
        own, (mix, feed, outer) = self.spec.model, self.spec.slots()
        self._parts = (
            _Outer(outer, own.norm_eps, zeros),
            _Mix(mix, own.norm_eps, zeros),
            DenseFeed(feed, own.norm_eps, zeros),
        )
        self.outer, self.mix, self.feed = self._parts
        self.heads = Heads(own.heads, own.kv_heads, own.head_size, own.reaches[0])

    @property
    def head(self) -> Weight:
        return self.outer.head

    @property
    def layers(self) -> tuple[int, ...]:
        """Of the target, whose states it reads."""
        return self.spec.layers

    def _slots(self) -> Iterator[tuple[Slot, Weight]]:
        for part in self._parts:
            yield from part.weights()

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Each once, in the order of `optimiser-*.safetensors`."""
        for slot, weight in self._slots():
            yield f"drafter.{slot.name}", weight

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors by vLLM's names, sharing memory with this."""
        for slot, weight in self._slots():
            yield from views(slot, weight)

    def begin(self, norm: Weight, head: Weight) -> Eagle:
        """As a new one: what the last of its features says by the target's own norm and head, and small random numbers
        beside; the head is learned from there."""
        self._draw(("out", "down", "fuse", "join"))
        width = self.spec.model.width
        self.outer.fuse.value[:, -width:] += torch.eye(width, dtype=self.dtype)
        self.outer.norm.value.copy_(norm.value)
        value = head.served_value()
        self.head.value.copy_(value if self.ids_V is None else value[self.ids_V])
        self.repack()
        return self

    def fused(self, tapped_TLM: Tensor) -> Tensor:
        """Features [T, M] of the target's states behind `spec.layers`."""
        return linear(leaf(tapped_TLM.flatten(1)), self.outer.fuse)

    def step(self, feature_TM: Tensor, tokens_T: Tensor, view: View) -> Tensor:
        """[T, M] before the last norm: the row of token j, with the feature of position j - 1, predicts token j + 1."""
        mix = self.mix
        token_TM = rms_norm(leaf(self.embed.value[tokens_T]), mix.token_norm, mix.eps)
        normed_TM = rms_norm(feature_TM, mix.feature_norm, mix.eps)
        residual_TM = normed_TM if self.spec.norm_first else feature_TM
        qkv_TW = linear(torch.cat([token_TM, normed_TM], 1), mix.qkv)
        attended_TW = view.attend(0, qkv_TW, self.heads, self.tables)
        return self.feed.forward(linear(attended_TW, mix.out, None, residual_TM.contiguous()))

    def read(self, state_TM: Tensor) -> Tensor:
        """What the head reads of what `step` gave."""
        return rms_norm(state_TM, self.outer.norm, self.outer.eps)

    def steps(self, microbatch: Microbatch, count: int) -> Steps:
        """Of a pack (steps.py)."""
        return Steps.of(microbatch, count)

    def step_view(self) -> StepView:
        """Where the rows of training's steps find what is kept of those before them."""
        return StepView(self.heads, self.dtype)

    def unroll(self, steps: Steps, tapped_TLM: Tensor, tokens_T: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each step what the head reads of the predictions that it makes, [n, M], and which those are, [n]."""
        view, state_nM = self.step_view(), self.fused(tapped_TLM)
        for number, step in enumerate(steps.each):
            view.begin(step)
            feature_nM = state_nM[step.before_n]
            if number == 0:
                feature_nM = feature_nM.masked_fill(step.first_n[:, None], 0.0)
            state_nM = self.step(feature_nM, tokens_T[step.rows_n], view)
            yield self.read(state_nM[step.places_N]), step.own_N


def leaf(rows_TM: Tensor) -> Tensor:
    """Where gradients are wanted, what a graph begins with; nothing is behind it."""
    return rows_TM.detach().requires_grad_() if torch.is_grad_enabled() else rows_TM
