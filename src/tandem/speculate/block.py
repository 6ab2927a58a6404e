"""A drafter of a block at a time on the target's hidden states (DFlash, arXiv 2602.06036).

The last token that is known and as many masks as there are drafts run once; each mask's place says what stands there.
Within a block all see all. What came before lies in every layer as extra keys and values, made of the target's states
alone; embedding and head are the target's. Slot j holds what is made of the states of position j - 1, as eagle.py's
does, and those of position -1 are 0: a key and a value of 0, which is always in sight. A block's own slots follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tandem.kernels.linear import linear
from tandem.kernels.norm import rms_norm
from tandem.kernels.paths import Paths
from tandem.kernels.weight import Weight
from tandem.models.layer import Layer, Part
from tandem.models.parts import Slot, Stored
from tandem.models.rope import rope_tables
from tandem.models.spec import LayerAttention, ModelSpec
from tandem.models.view import Heads, Tables, View
from tandem.speculate.eagle import leaf
from tandem.speculate.steps import Step, StepView, chains, follows, steps_of
from tandem.speculate.trained import Stacked, check_embedding
from tandem.types import Microbatch


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """Of what a drafter is made."""

    kind: ClassVar = "dflash"

    model: ModelSpec  # its layers; width and vocabulary are the target's
    layers: tuple[int, ...]  # of the target, from 0, behind which its states are taken
    block: int  # tokens of a block: the known one, and masks
    mask_token: int

    @staticmethod
    def of(target: ModelSpec, layers: tuple[int, ...] = (), block: int = 6, depth: int = 1) -> BlockSpec:
        """A new one for a target: heads and width as there, states behind five layers at equal distances.

        >>> spec = ModelSpec("llama", vocab_size=9, width=8, ff_width=16, layers=36, heads=2, kv_heads=1, head_size=4)
        >>> BlockSpec.of(spec).layers
        (1, 9, 17, 25, 33)
        """
        last = max(target.layers - 4, 0)
        layers = layers or tuple(sorted({min(1 + round(i * last / 4), target.layers - 2) for i in range(5)}))
        own = replace(target, architecture="qwen3", layers=depth, attention=(LayerAttention(),), qk_norm=True)
        own = replace(own, attention_bias=False, query_temperature=None, rotated_norm=False, tied_embeddings=True)
        mask = next((x for x in (target.pad_token_id, target.bos_token_id, *target.eos_token_ids) if x is not None), 0)
        return BlockSpec(own, layers, block, mask)

    @property
    def kept_layers(self) -> int:
        """That have keys and values."""
        return self.model.layers

    @property
    def state_numbers(self) -> tuple[int, ...]:
        """Of each layer that has a state in place of them."""
        return ()

    def slots(self) -> tuple[Slot, ...]:
        """Those beside its layers'."""
        width = self.model.width
        return (
            Slot("fuse", (Stored("fc.weight", "", width),), len(self.layers) * width),
            Slot("hidden_norm", (Stored("hidden_norm.weight", "", width),)),
            Slot("norm", (Stored("norm.weight", "", width),)),
        )


class _Outer(Part):
    fuse: Weight
    hidden_norm: Weight
    norm: Weight


class Blocks(NamedTuple):
    """The rows of all blocks of a pack: A blocks of B."""

    first: Step  # the pack's own rows, whose states are the context
    second: Step  # of the blocks, a segment a row
    own_AB: Tensor  # int64: the prediction that a row makes; -1: none
    rows_A: Tensor  # int64: of the pack, whose tokens the blocks begin with
    begins_N: Tensor  # bool: predictions that begin a block, and as many in a row, of one text, as it makes


class _Views:
    """A StepView a layer."""

    def __init__(self, count: int, heads: Heads, dtype: torch.dtype) -> None:
        self._views = [StepView(heads, dtype) for _ in range(count)]
        self.positions_T = torch.empty(0, dtype=torch.int64)

    def begin(self, step: Step) -> None:
        self.positions_T = step.positions_n
        for view in self._views:
            view.begin(step)

    def attend(self, layer: int, qkv_TW: Tensor, heads: Heads, tables: Tables) -> Tensor:
        return self._views[layer].attend(0, qkv_TW, heads, tables)


class Block(Stacked):
    """Its weights and its pass."""

    kind, title, seed = "dflash", "DFlash", 0x626C6F63

    def __init__(self, spec: BlockSpec, embed: Weight, head: Weight, ids_V: Tensor | None = None) -> None:
        """embed, head: the target's. ids_V: of its tokens those that are drafted, int64, ascending; None: all.
        ModelError where the target is of another width or vocabulary."""
        own = spec.model
        check_embedding(own, embed)
        self.spec, self.embed, self.ids_V, self.dtype = spec, embed, ids_V, embed.value.dtype
        self.head = head if ids_V is None else Weight(head.served_value()[ids_V], matrix=True)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=self.dtype)

        self.heads = Heads(own.heads, own.kv_heads, own.head_size)
        self.outer = _Outer(spec.slots(), own.norm_eps, zeros)
        self.stack = [Layer(own, index, self.heads, zeros) for index in range(own.layers)]
        self.tables = rope_tables(own, own.max_position + spec.block)

    @property
    def layers(self) -> tuple[int, ...]:
        """Of the target, whose states it reads."""
        return self.spec.layers

    def begin(self, norm: Weight) -> Block:
        """As a new one: random but for the last norm, which is the target's."""
        self._draw(("out", "down"))
        self.outer.norm.value.copy_(norm.value)
        self.repack()
        return self

    def fused(self, tapped_TLM: Tensor) -> Tensor:
        """Context [T, M] of the target's states behind `spec.layers`."""
        return rms_norm(linear(leaf(tapped_TLM.flatten(1)), self.outer.fuse), self.outer.hidden_norm, self.outer.eps)

    def context(self, index: int, context_TM: Tensor) -> Tensor:
        """Queries, keys and values of a layer, of which the keys and values are the context's; before rotation."""
        return self.stack[index].mix.projected(context_TM)

    def run(self, tokens_A: Tensor, view: View) -> Tensor:
        """[A, B, M], what the head reads of blocks that begin with these tokens. The view knows the context."""
        tokens_AB = torch.full((len(tokens_A), self.spec.block), self.spec.mask_token)
        tokens_AB[:, 0] = tokens_A
        hidden_TM = leaf(self.embed.value[tokens_AB.flatten()])
        for layer in self.stack:
            hidden_TM = layer.forward(hidden_TM, view, self.tables)
        return rms_norm(hidden_TM, self.outer.norm, self.outer.eps).view(*tokens_AB.shape, -1)

    def steps(self, microbatch: Microbatch, count: int) -> Blocks:
        """Blocks that begin at every second draft's place of each text."""
        assert count < self.spec.block, (count, self.spec.block)
        (first,) = steps_of(microbatch, 1)
        return blocks_of(microbatch, first, self.spec.block, count, max(1, count // 2))

    def unroll(self, steps: Blocks, tapped_TLM: Tensor, tokens_T: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each place behind a block's first what the head reads of it, [n, M], and which prediction that is, [n]."""
        view, first = _Views(len(self.stack), self.heads, self.dtype), steps.first
        view.begin(first)
        context_TM = self.fused(tapped_TLM)[first.before_n].masked_fill(first.first_n[:, None], 0.0)
        for index in range(len(self.stack)):
            view.attend(index, self.context(index, context_TM), self.heads, self.tables)
        view.begin(steps.second)
        read_ABM = self.run(tokens_T[steps.rows_A], view)
        for place in range(1, steps.own_AB.shape[1]):
            made_A = steps.own_AB[:, place] >= 0
            if bool(made_A.any()):
                yield read_ABM[made_A, place], steps.own_AB[made_A, place]


def blocks_of(microbatch: Microbatch, first: Step, block: int, count: int, stride: int) -> Blocks:
    """A block at every `stride`-th prediction of a sample; of its places `count` make predictions."""
    rows_N, each_S = microbatch.rows_N.astype(np.int64), microbatch.sample_tokens
    within_N = np.arange(len(rows_N)) - np.repeat(np.cumsum(each_S) - each_S, each_S)
    follows_N, rows = follows(microbatch, first), len(first.rows_n)
    chosen_A = np.flatnonzero(within_N % stride == 0)
    own_AB = np.full((len(chosen_A), count + 1), -1, dtype=np.int64)
    own_AB[:, 1] = chosen_A
    for place in range(2, count + 1):
        at_A = chosen_A + place - 1
        on_A = (own_AB[:, place - 1] >= 0) & (at_A < len(rows_N)) & follows_N[np.minimum(at_A, len(rows_N) - 1)]
        own_AB[on_A, place] = at_A[on_A]
    begins_N = chains(follows_N, count) & (within_N % stride == 0)
    rows_A = rows_N[chosen_A]
    position_A = first.positions_n.numpy()[rows_A]
    segment_A = np.searchsorted(first.paths.row_start_S.numpy(), rows_A, side="right") - 1
    path_AP = first.paths.table_SP.numpy()[segment_A]
    table_AP = np.zeros((len(rows_A), path_AP.shape[1] + block), dtype=np.int32)
    table_AP[:, : path_AP.shape[1]] = np.where(np.arange(path_AP.shape[1]) <= position_A[:, None], path_AP, 0)
    places_AB = position_A[:, None] + 1 + np.arange(block)
    slots_AB = rows + np.arange(len(rows_A) * block, dtype=np.int32).reshape(-1, block)
    np.put_along_axis(table_AP, places_AB, slots_AB, 1)
    total = len(rows_A) * block
    last_n = np.repeat(position_A + block, block).astype(np.int32)
    paths = Paths(
        torch.arange(total + 1, dtype=torch.int32),
        torch.from_numpy(last_n),
        torch.from_numpy(np.repeat(table_AP, block, axis=0)),
        1,
        torch.tensor([0, total], dtype=torch.int32),
    )
    none = torch.zeros(total, dtype=torch.int64)
    second = Step(paths, none, torch.from_numpy(places_AB.flatten()), none, none.bool(), none, none)
    return Blocks(first, second, *(torch.from_numpy(x) for x in (own_AB, rows_A, begins_N)))
