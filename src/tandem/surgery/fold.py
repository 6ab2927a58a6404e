"""What a model computes, written otherwise: scales of inputs folded into what gives them, norms into what follows, and
the residual stream rotated. Nothing is rounded here, and logits stay what they were but for fp32's roundings.

Of every family of models/families: each norm before a matrix is a root mean square's, which a rotation commutes with
once its weights are 1, and biases are of q, k and v alone, which no fold of theirs passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tandem.models.parts import Slot, attention_slots, dense_slots, outer_slots
from tandem.models.spec import ModelSpec

Tensors = dict[str, Tensor]  # fp32, by Hugging Face name


def slots(spec: ModelSpec, index: int) -> Mapping[str, Slot]:
    """Of a layer, by the part's own name."""
    return {slot.name: slot for slot in (*attention_slots(spec, index), *dense_slots(spec, index))}


def matrix(tensors: Tensors, slot: Slot) -> Tensor:
    """The tensors of a slot as one, a copy."""
    return torch.cat([tensors[one.name] for one in slot.stored])


def put(tensors: Tensors, slot: Slot, value: Tensor) -> None:
    """`matrix` back."""
    for one, part in zip(slot.stored, value.split([one.rows for one in slot.stored]), strict=True):
        tensors[one.name] = part.contiguous()


def alike(spec: ModelSpec, site: str, x_K: Tensor) -> Tensor:
    """Means over inputs that can have one scale alone: of `out`, those of a value head's dimension in
    all query heads that read it."""
    if site != "out":
        return x_K
    by_head = x_K.view(spec.kv_heads, -1, spec.head_size)
    return by_head.mean(1, keepdim=True).expand_as(by_head).reshape(-1)


def fold_scales(spec: ModelSpec, tensors: Tensors, index: int, site: str, s_K: Tensor) -> None:
    """Multiply a matrix's inputs by s and divide what gives them: its norm's weights, or rows of v or of up.

    s_K of `out` is alike in the query heads of a value head.
    """
    own = slots(spec, index)
    put(tensors, own[site], matrix(tensors, own[site]) * s_K)
    if site in ("qkv", "gate_up"):
        name = own["norm" if site == "qkv" else "feed_norm"].stored[0].name
        tensors[name] = tensors[name] / s_K
        return
    source = own["qkv"].stored[2] if site == "out" else own["gate_up"].stored[1]
    if site == "out":
        s_K = s_K.view(spec.kv_heads, -1, spec.head_size)[:, 0].reshape(-1)
    tensors[source.name] = tensors[source.name] / s_K[:, None]
    if site == "out" and "qkv_bias" in own:
        bias = own["qkv_bias"].stored[2].name
        tensors[bias] = tensors[bias] / s_K


def fuse_norms(spec: ModelSpec, tensors: Tensors) -> tuple[ModelSpec, Tensors]:
    """Each norm's weights in the matrix behind it, and ones in their place. A tied head becomes one of its own."""
    made = dict(tensors)
    embed, norm, head = outer_slots(replace(spec, tied_embeddings=False))
    if spec.tied_embeddings:
        made[head.stored[0].name] = made[embed.stored[0].name]
    pairs = [(norm, head)]
    for index in range(spec.layers):
        own = slots(spec, index)
        pairs += [(own["norm"], own["qkv"]), (own["feed_norm"], own["gate_up"])]
    for before, behind in pairs:
        name = before.stored[0].name
        put(made, behind, matrix(made, behind) * made[name])
        made[name] = torch.ones_like(made[name])
    return replace(spec, tied_embeddings=False), made


def rotated(spec: ModelSpec, tensors: Tensors, turn_MM: Tensor, head_DD: Tensor | None = None) -> Tensors:
    """Of a model whose norms are fused: its residual stream times an orthogonal matrix, and each value head times
    another, undone in what reads them."""
    made = dict(tensors)
    embed, _, head = outer_slots(spec)
    for outer in (embed, head):
        put(made, outer, matrix(made, outer) @ turn_MM)
    for index in range(spec.layers):
        own = slots(spec, index)
        for site in ("qkv", "gate_up"):
            put(made, own[site], matrix(made, own[site]) @ turn_MM)
        for site in ("out", "down"):
            put(made, own[site], turn_MM.T @ matrix(made, own[site]))
        if head_DD is not None:
            turn_heads(spec, made, index, head_DD)
    return made


def turn_heads(spec: ModelSpec, tensors: Tensors, index: int, head_DD: Tensor) -> None:
    """Each head of values times an orthogonal matrix, in v's rows and out's inputs."""
    own, size = slots(spec, index), spec.head_size
    value, out = own["qkv"].stored[2].name, own["out"].stored[0].name
    tensors[value] = (head_DD.T @ tensors[value].view(spec.kv_heads, size, -1)).reshape(tensors[value].shape)
    tensors[out] = (tensors[out].view(len(tensors[out]), spec.heads, size) @ head_DD).reshape(tensors[out].shape)
    if "qkv_bias" in own:
        bias = own["qkv_bias"].stored[2].name
        tensors[bias] = (tensors[bias].view(spec.kv_heads, size) @ head_DD).reshape(-1)
