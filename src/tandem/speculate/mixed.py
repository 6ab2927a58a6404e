"""A drafter on the target's hidden states whose layers mix attention with recurrences (recurrent.py).

As eagle.py's, slot j holds what is made of the target's feature of position j - 1 and the embedding of token j, and
what it gives before its last norm takes the place of the feature where the target has not been yet. The two are joined
once, onto the feature; then come layers as a decoder's, of which each has attention, a GRU or linear attention. The
state behind token j is made of the tokens up to j, as keys are: a page's name is that of the state at its end too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tandem.errors import ModelError
from tandem.kernels.linear import linear
from tandem.kernels.norm import rms_norm
from tandem.kernels.weight import Weight
from tandem.models.layer import Layer, Part, Zeros
from tandem.models.parts import Slot, Stored, attention_slots, dense_slots
from tandem.models.spec import LayerAttention, ModelSpec
from tandem.models.view import Heads
from tandem.speculate.config import Mixer
from tandem.speculate.eagle import Eagle, EagleSpec, leaf
from tandem.speculate.recurrent import (
    MIXERS,
    MixedStepView,
    RecurrentLayer,
    RecurrentView,
    recurrent_slots,
    rule_of,
)
from tandem.speculate.trained import Stacked


@dataclass(frozen=True, slots=True)
class MixedSpec(EagleSpec):
    """Of what a drafter is made."""

    kind: ClassVar = "mixed"
    mixers: tuple[Mixer, ...] = ("attention", "gru")  # of its layers

    def __post_init__(self) -> None:
        unknown = [one for one in self.mixers if one not in MIXERS]
        if unknown or len(self.mixers) != self.model.layers:
            raise ModelError(
                f"a drafter of {self.model.layers} layers has the mixers {', '.join(self.mixers) or 'none'}. Allowed: "
                f"one a layer, of {', '.join(MIXERS)}."
            )

    @staticmethod
    def new(
        target: ModelSpec, mixers: tuple[Mixer, ...], layers: tuple[int, ...] = (), vocab_size: int = 0
    ) -> MixedSpec:
        """A new one for a target: heads, width and features as a new `EagleSpec` has them."""
        like = EagleSpec.of(target, layers, vocab_size)
        own = replace(like.model, layers=len(mixers), attention=(LayerAttention(),))
        return MixedSpec(own, like.layers, like.vocab_size, mixers=mixers)

    @property
    def kept_layers(self) -> int:
        return self.mixers.count("attention")

    @property
    def state_numbers(self) -> tuple[int, ...]:
        """Of each recurrent layer's state, in fp32."""
        return tuple(rule_of(self.model, one).numbers for one in self.mixers if one != "attention")

    def all_slots(self) -> Iterator[Slot]:
        own = self.model
        yield from self.outer_slots()
        for index, mixer in enumerate(self.mixers):
            yield from attention_slots(own, index) if mixer == "attention" else recurrent_slots(own, index, mixer)
            yield from dense_slots(own, index)

    def outer_slots(self) -> tuple[Slot, ...]:
        """Those beside its layers'."""
        width = self.model.width
        return (
            Slot("fuse", (Stored("fc.weight", "", width),), len(self.layers) * width),
            Slot("token_norm", (Stored("token_norm.weight", "", width),)),
            Slot("feature_norm", (Stored("hidden_norm.weight", "", width),)),
            Slot("join", (Stored("join.weight", "", width),), 2 * width),
            Slot("norm", (Stored("norm.weight", "", width),)),
            Slot("head", (Stored("lm_head.weight", "", self.vocab_size),), width),
        )


class _Outer(Part):
    fuse: Weight
    token_norm: Weight
    feature_norm: Weight
    join: Weight
    norm: Weight
    head: Weight


class Mixed(Stacked, Eagle):
    """Its weights and its pass. The embedding is the target's own."""

    kind = title = "mixed"
    spec: MixedSpec

    def _make(self, zeros: Zeros) -> None:
        spec, own = self.spec, self.spec.model
        self.heads = Heads(own.heads, own.kv_heads, own.head_size)
        self.outer = _Outer(spec.outer_slots(), own.norm_eps, zeros)  # type: ignore[assignment]
        self.stack: list[Layer | RecurrentLayer] = []
        attentions = recurrences = 0
        for index, mixer in enumerate(spec.mixers):
            if mixer == "attention":
                layer = Layer(own, index, self.heads, zeros)
                layer.mix.index, attentions = attentions, attentions + 1  # of its pages
                self.stack.append(layer)
            else:
                self.stack.append(RecurrentLayer(own, index, recurrences, mixer, zeros))
                recurrences += 1

    def begin(self, norm: Weight, head: Weight) -> Mixed:
        super().begin(norm, head)
        for layer in self.stack:
            if isinstance(layer, RecurrentLayer):
                layer.mix.begin()
        return self

    def step(self, feature_TM: Tensor, tokens_T: Tensor, view: RecurrentView) -> Tensor:  # type: ignore[override]
        outer: _Outer = self.outer  # type: ignore[assignment]
        token_TM = rms_norm(leaf(self.embed.value[tokens_T]), outer.token_norm, outer.eps)
        normed_TM = rms_norm(feature_TM, outer.feature_norm, outer.eps)
        hidden_TM = linear(torch.cat([token_TM, normed_TM], 1), outer.join, None, feature_TM.contiguous())
        for layer in self.stack:
            hidden_TM = layer.forward(hidden_TM, view, self.tables)
        return hidden_TM

    def step_view(self) -> MixedStepView:  # type: ignore[override]
        return MixedStepView(self.spec.kept_layers, self.heads, self.dtype)
