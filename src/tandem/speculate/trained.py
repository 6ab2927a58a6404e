"""What drafters on the target's hidden states share as weights: read, written, begun and repacked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from tandem.errors import ModelError
from tandem.kernels.weight import Weight
from tandem.models.layer import views
from tandem.models.parts import Slot
from tandem.models.spec import ModelSpec
from tandem.numerics.random import Stream, normal, word_rows

SMALL = 0.1  # deviation of what is added to a residual, to that of other matrices


class Trained:
    """A drafter's weights."""

    title: ClassVar[str]  # in messages
    seed: ClassVar[int]  # of the weights that a new one begins with

    def _slots(self) -> Iterator[tuple[Slot, Weight]]:
        raise NotImplementedError

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Each once, in the order of `optimiser-*.safetensors`."""
        raise NotImplementedError

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors by their names in a file, sharing memory with this."""
        raise NotImplementedError

    def repack(self) -> None:
        """After values changed: derive what products read."""
        for _, weight in self.weights():
            weight.repack()

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> Self:
        """Copy every tensor in. ModelError for one that is missing, unknown or misshapen."""
        wanted = dict(self.export())
        for name, tensor in tensors:
            target = wanted.pop(name, None)
            if target is None:
                raise ModelError(f"tensor {name} is unknown to a drafter of {self.title}, or came twice.")
            if target.shape != tensor.shape:
                raise ModelError(f"tensor {name} has shape {[*tensor.shape]}; the drafter needs {[*target.shape]}.")
            target.copy_(tensor)
        if wanted:
            raise ModelError(f"the drafter lacks {len(wanted)} tensors, {next(iter(wanted))} first.")
        self.repack()
        return self

    def _draw(self, small: tuple[str, ...]) -> None:
        """Vectors of ones, matrices normal by the fan-in; `small`: slots whose deviation is SMALL of that."""
        for number, (slot, weight) in enumerate(self._slots()):
            if slot.columns is None:
                weight.value.fill_(1.0)
                continue
            count, deviation = weight.value.numel(), 1.0 / math.sqrt(slot.columns)
            if slot.name in small:
                deviation *= SMALL
            drawn = normal(word_rows([self.seed], [number], count + count % 2, Stream.INITIAL)[0])[:count]
            weight.value.copy_(torch.from_numpy((drawn * deviation).astype(np.float32)).view(weight.value.shape))


class Stacked(Trained):
    """One of layers like the target's, and what lies before and behind them."""

    outer: Any  # a Part
    stack: Sequence[Any]  # layers, each with its `index`

    def _slots(self) -> Iterator[tuple[Slot, Weight]]:
        yield from self.outer.weights()
        for layer in self.stack:
            yield from layer.weights()

    def weights(self) -> Iterator[tuple[str, Weight]]:
        for slot, weight in self.outer.weights():
            yield f"drafter.{slot.name}", weight
        for layer in self.stack:
            for slot, weight in layer.weights():
                yield f"drafter.{layer.index}.{slot.name}", weight

    def export(self) -> Iterator[tuple[str, Tensor]]:
        for slot, weight in self._slots():
            yield from ((name.removeprefix("model."), tensor) for name, tensor in views(slot, weight))


def check_embedding(own: ModelSpec, embed: Weight) -> None:
    """ModelError where the target is of another width or vocabulary than a drafter's."""
    if embed.value.shape != (own.vocab_size, own.width):
        raise ModelError(
            f"the drafter is of a model of {own.vocab_size} tokens and width {own.width}, and this one has "
            f"{embed.value.shape[0]} and {embed.value.shape[1]}. Choose the drafter that was trained for it."
        )
