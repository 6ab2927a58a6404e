"""A rotation of the residual stream that is learned (SpinQuant, Liu et al., 2405.16406): the loss of the rounded model
on texts, down its gradient by the rotation, in steps that keep it orthogonal.

The gradient passes a rounding as if it were none. Embedding and head turn along and are not rounded, so a rotation
that rounds nothing away has gradient 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tandem.errors import ConfigError, NonFiniteError
from tandem.kernels.logprob import token_logprobs
from tandem.models.decoder import Decoder
from tandem.models.parts import outer_slots
from tandem.models.spec import ModelSpec
from tandem.models.view import PackView
from tandem.numerics.blocks import Format
from tandem.numerics.rotation import cayley_step, random_hadamard, random_orthogonal
from tandem.numerics.scaling import tried
from tandem.surgery.calibrate import SITES
from tandem.surgery.fold import Tensors, matrix, slots

STEPS, TEXTS = 24, 2  # steps, and texts of each
ANGLE = (
    0.6  # of the first step: the length of the rotation's own change, sqrt(2) a radian of a plane; falls to 0 linearly
)
RIGHT, LEFT = ("qkv", "gate_up"), ("out", "down")  # that read the residual stream, and that write to it


def learned_turn(spec: ModelSpec, tensors: Tensors, form: Format, texts: Sequence[Sequence[int]]) -> Tensor:
    """[M, M] fp32, of a model whose norms are fused, from a random Hadamard matrix, or another where none is known."""
    try:
        turn_MM = random_hadamard(spec.width)
    except ConfigError:
        turn_MM = random_orthogonal(spec.width)
    texts = [text for text in texts if len(text) > 1]
    if not texts:
        raise ConfigError(
            "a rotation is learned from texts of two tokens or more: there is none. Give more with --texts."
        )
    decoder = Decoder(spec, "bfloat16")
    for _, weight in decoder.weights():
        weight.grad = torch.zeros(weight.value.shape)
    decoder.norm.grad = None
    for step in range(STEPS):
        some = [texts[(step * TEXTS + index) % len(texts)] for index in range(min(TEXTS, len(texts)))]
        _, gradient_MM = slope(decoder, tensors, turn_MM, form, some)
        skew_MM = gradient_MM @ turn_MM.T
        length = float((skew_MM - skew_MM.T).norm())
        if not math.isfinite(length):
            raise NonFiniteError(f"step {step} of a learned rotation has a gradient that is not finite.")
        if length:
            turn_MM = cayley_step(turn_MM, gradient_MM, ANGLE * (1 - step / STEPS) / length)
    return turn_MM


def slope(
    decoder: Decoder, tensors: Tensors, turn_MM: Tensor, form: Format | None, texts: Sequence[Sequence[int]]
) -> tuple[float, Tensor]:
    """Mean loss (nats a token) of the model turned and rounded, and its gradient by the rotation, [M, M] fp32.

    decoder: of the model's spec, every weight with a gradient to fill; its values are replaced.
    """
    spec = decoder.spec
    embed, _, head = outer_slots(spec)
    for slot, weight in decoder.slots():
        name = slot.stored[0].name
        if slot in (embed, head):
            weight.value.copy_(tensors[name] @ turn_MM)
        elif slot.columns is None:
            weight.value.copy_(torch.cat([tensors[one.name] for one in slot.stored]))
        else:
            given = matrix(tensors, slot)
            turned = given @ turn_MM if slot.name in RIGHT else turn_MM.T @ given
            weight.value.copy_(turned if form is None else tried(turned, form))
        weight.repack()
        if weight.grad is not None:
            weight.grad.zero_()
    bounds = [0]
    for text in texts:
        bounds.append(bounds[-1] + len(text))
    tokens_T = torch.tensor([token for text in texts for token in text])
    rows_N = torch.tensor(
        [row for start, end in zip(bounds, bounds[1:], strict=False) for row in range(start, end - 1)]
    )
    with torch.enable_grad():
        hidden_NM = decoder.forward(tokens_T, PackView(bounds), rows_N)
        loss = -token_logprobs(hidden_NM, decoder.head, tokens_T[rows_N + 1], 1.0)[0].mean()
    loss.backward()
    assert decoder.embed.grad is not None and decoder.head.grad is not None
    used = tokens_T.unique()
    gradient_MM = tensors[embed.stored[0].name][used].T @ decoder.embed.grad[used]
    gradient_MM += tensors[head.stored[0].name].T @ decoder.head.grad
    for index, layer in enumerate(decoder.layers):
        own = slots(spec, index)
        for site in SITES:
            grad = getattr(layer.mix if site in ("qkv", "out") else layer.feed, site).grad
            given = matrix(tensors, own[site])
            gradient_MM += given.T @ grad if site in RIGHT else given @ grad.T
    return float(loss.detach()), gradient_MM
