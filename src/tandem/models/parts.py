"""What a decoder is made of: the weights of its parts, and the tensors of a checkpoint that lie in each.

Names and shapes are spelt here and nowhere else: the decoder makes its weights from it (layer.py), checkpoints of both
formats are read and checked by it, and memory and work are counted from it. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING, Literal

from tandem.errors import ModelError
from tandem.numerics.names import code_bits, kv_parts

if TYPE_CHECKING:
    import torch

    from tandem.models.spec import ModelSpec

Split = Literal["rows", "columns"] | None
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3": 1, "int8": 1}  # bytes of a number


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint, by its names there: Hugging Face's and llama.cpp's."""

    name: str
    gguf: str
    rows: int


@dataclass(frozen=True, slots=True)
class Slot:
    """A weight of a part: the tensors that lie in it, one below the other, all of one width.

    >>> slot = Slot("down", (Stored("mlp.down_proj.weight", "ffn_down.weight", 8),), 16, "columns")
    >>> slot.shape, slot.shard(2).shape
    ((8, 16), (8, 8))
    """

    name: str  # the part's own
    stored: tuple[Stored, ...]
    columns: int | None = None  # inputs of a matrix, [out, in]; None: a vector
    split: Split = None  # what ranks of a tensor-parallel group divide, of each stored tensor alike; None: each has all

    @property
    def rows(self) -> int:
        return sum(one.rows for one in self.stored)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape(self.rows)

    @property
    def size(self) -> int:
        """Elements."""
        return self.rows * (self.columns or 1)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its tensors, by Hugging Face name."""
        return {one.name: self._shape(one.rows) for one in self.stored}

    def shard(self, ranks: int) -> Slot:
        """Of one rank of so many. ModelError where they do not divide it."""
        if self.split is None or ranks == 1:
            return self
        sizes = [self.columns or 1] if self.split == "columns" else [one.rows for one in self.stored]
        for size in sizes:
            if size % ranks:
                raise ModelError(
                    f"{self.stored[0].name} has {size} {self.split} to divide over {ranks} ranks. Choose a divisor."
                )
        if self.split == "columns":
            return replace(self, columns=sizes[0] // ranks)
        return replace(self, stored=tuple(replace(one, rows=one.rows // ranks) for one in self.stored))

    def cut(self, tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
        """The view that `rank` has of one of its stored tensors."""
        return tensor if self.split is None else tensor.chunk(ranks, 0 if self.split == "rows" else 1)[rank]

    def _shape(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.columns is None else (rows, self.columns)


def _in_layer(index: int) -> Callable[[str, str, int], Stored]:
    return lambda name, gguf, rows: Stored(f"model.layers.{index}.{name}", f"blk.{index}.{gguf}", rows)


def attention_slots(spec: ModelSpec, index: int) -> tuple[Slot, ...]:
    """Of a layer's grouped-query attention, its norm included; in the order of the forward pass."""
    stored, head, width = _in_layer(index), spec.head_size, spec.width
    sizes = {"q": spec.heads * head, "k": spec.kv_heads * head, "v": spec.kv_heads * head}

    def fused(kind: str) -> tuple[Stored, ...]:
        return tuple(stored(f"self_attn.{x}_proj.{kind}", f"attn_{x}.{kind}", rows) for x, rows in sizes.items())

    slots = [Slot("norm", (stored("input_layernorm.weight", "attn_norm.weight", width),))]
    slots.append(Slot("qkv", fused("weight"), width, "rows"))
    if spec.attention_bias:
        slots.append(Slot("qkv_bias", fused("bias"), split="rows"))
    if spec.qk_norm:
        for x in ("q", "k"):
            slots.append(Slot(f"{x}_norm", (stored(f"self_attn.{x}_norm.weight", f"attn_{x}_norm.weight", head),)))
    out = Slot("out", (stored("self_attn.o_proj.weight", "attn_output.weight", width),), sizes["q"], "columns")
    return (*slots, out)


def dense_slots(spec: ModelSpec, index: int) -> tuple[Slot, ...]:
    """Of a layer's SwiGLU feed-forward, its norm included."""
    stored, width, ff = _in_layer(index), spec.width, spec.ff_width
    gate_up = stored("mlp.gate_proj.weight", "ffn_gate.weight", ff), stored("mlp.up_proj.weight", "ffn_up.weight", ff)
    return (
        Slot("feed_norm", (stored("post_attention_layernorm.weight", "ffn_norm.weight", width),)),
        Slot("gate_up", gate_up, width, "rows"),
        Slot("down", (stored("mlp.down_proj.weight", "ffn_down.weight", width),), ff, "columns"),
    )


def outer_slots(spec: ModelSpec) -> tuple[Slot, Slot, Slot]:
    """Embedding, last norm and head; a tied model's head is its embedding, and is stored as that alone."""
    embed = Slot("embed", (Stored("model.embed_tokens.weight", "token_embd.weight", spec.vocab_size),), spec.width)
    norm = Slot("norm", (Stored("model.norm.weight", "output_norm.weight", spec.width),))
    head = Slot("head", (Stored("lm_head.weight", "output.weight", spec.vocab_size),), spec.width)
    return embed, norm, embed if spec.tied_embeddings else head


def layer_slots(spec: ModelSpec) -> Iterator[Slot]:
    """Of all layers."""
    for index in range(spec.layers):
        yield from attention_slots(spec, index)
        yield from dense_slots(spec, index)


def all_slots(spec: ModelSpec) -> Iterator[Slot]:
    """Of a decoder, each once, in the order of the forward pass."""
    embed, norm, head = outer_slots(spec)
    yield embed
    yield from layer_slots(spec)
    yield norm
    if head is not embed:
        yield head


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Hugging Face checkpoint of `spec`, in the order of the forward pass.

    Other names are translated (families/). Projections are [out, in]. A tied model has no `lm_head.weight`.
    """
    return {name: shape for slot in all_slots(spec) for name, shape in slot.shapes().items()}


def kept_bytes(spec: ModelSpec, dtype: str, wide: str = "") -> tuple[int, ...]:
    """That each layer keeps of a token in pages: a key and a value a head. In int8 each has an fp32 scale, in int4
    one and a byte for each 32 numbers; codes of a span have two numbers of the dtype `wide`, of the tokens of a
    channel and of the channels of a token."""
    size = spec.head_size
    if bits := code_bits(dtype):
        token_group, channel_group = min(32, kv_parts(dtype)[1]), gcd(32, size)
        numbers = size // channel_group + size / token_group  # of a key and a value together
        return (spec.kv_heads * int(2 * size * bits / 8 + 2 * numbers * SIZES[wide]),) * spec.layers
    if dtype == "int4":
        vector = size // 2 + 5 * -(-size // 32)
    else:
        vector = size * SIZES[dtype] + (4 if dtype == "int8" else 0)
    return (2 * spec.kv_heads * vector,) * spec.layers
