"""What the matrices of a model are given, over texts: second moments and sizes of their inputs, a layer at a time.

One pass through each layer: `change` may replace a matrix between what it is given and what it gives, so that the
matrices behind it see what its rounded values make (`sequential`), or all four of a layer at its end, when none of
their inputs has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tandem.errors import ConfigError, NonFiniteError
from tandem.kernels.gradient import accumulate
from tandem.kernels.linear import linear
from tandem.kernels.norm import rms_norm
from tandem.kernels.swiglu import swiglu
from tandem.models.decoder import Decoder
from tandem.models.view import PackView

SITES = ("qkv", "out", "gate_up", "down")  # slots of a layer (models/parts.py), in the order of the forward pass
PACK_TOKENS = 4096  # of texts that run at once; more where one text is longer
PANEL = 384  # inputs of a block of second moments, of which half are mirrored


@dataclass(slots=True, eq=False)
class Inputs:
    """Of one matrix, over all rows."""

    hessian_KK: Tensor  # sum of x^T x, fp32
    mean_K: Tensor  # of |x|, fp32
    largest_K: Tensor  # of |x|, fp32
    rows: int

    def scaled(self, s_K: Tensor) -> Inputs:
        """Those of x / s."""
        return Inputs(self.hessian_KK / s_K / s_K[:, None], self.mean_K / s_K, self.largest_K / s_K, self.rows)


Change = Callable[[int, Mapping[str, Inputs]], None]  # a layer's index, and what its matrices are given


def moments(parts: Iterable[Tensor], width: int) -> Inputs:
    """Of rows [T, K] in any number of parts."""
    starts = list(range(0, width, PANEL))
    cuts = [slice(start, min(width, start + PANEL)) for start in starts]
    blocks = {
        (i, j): torch.zeros(one.stop - one.start, other.stop - other.start)
        for i, one in enumerate(cuts)
        for j, other in enumerate(cuts[: i + 1])
    }
    total_K, largest_K, rows = torch.zeros(width, dtype=torch.float64), torch.zeros(width), 0
    for x_TK in parts:
        for (i, j), block in blocks.items():
            accumulate(block, x_TK[:, cuts[i]], x_TK[:, cuts[j]])
        size_TK = x_TK.abs()
        total_K += size_TK.sum(0, dtype=torch.float32)
        largest_K = torch.maximum(largest_K, size_TK.amax(0).float())
        rows += len(x_TK)
    hessian_KK = torch.empty(width, width)
    for (i, j), block in blocks.items():
        hessian_KK[cuts[i], cuts[j]] = block
        hessian_KK[cuts[j], cuts[i]] = block.T
    return Inputs(hessian_KK, (total_K / max(1, rows)).float(), largest_K, rows)


def packs(texts: Sequence[Sequence[int]], device: torch.device) -> list[tuple[Tensor, PackView]]:
    """Texts laid end to end, PACK_TOKENS at a time, each with its view. ConfigError where there are none."""
    made: list[tuple[Tensor, PackView]] = []
    group: list[Sequence[int]] = []
    texts = [text for text in texts if len(text)]
    if not texts:
        raise ConfigError("nothing to calibrate on: there is no text. Give a file of some with --texts.")
    for index, text in enumerate(texts):
        group.append(text)
        following = texts[index + 1 : index + 2]
        if not following or sum(map(len, group)) + len(following[0]) > PACK_TOKENS:
            bounds = [0]
            for one in group:
                bounds.append(bounds[-1] + len(one))
            tokens_T = torch.tensor([token for one in group for token in one], device=device)
            made.append((tokens_T, PackView(bounds, device=device)))
            group = []
    return made


def walk(decoder: Decoder, texts: Sequence[Sequence[int]], change: Change, *, sequential: bool) -> None:
    """Every layer's inputs, in order, handed to `change`; texts each from its first position on.

    sequential: a matrix at a time, before its product is taken; else a layer's four together, behind it.
    NonFiniteError for inputs that are not finite, with the layer and the matrix.
    """
    with torch.no_grad():
        packed = packs(texts, decoder.device)
        hidden = [decoder.embed.value[tokens_T] for tokens_T, _ in packed]
        for layer in decoder.layers:
            mix, feed = layer.mix, layer.feed
            seen: dict[str, Inputs] = {}
            site = partial(_site, change if sequential else None, layer.index, seen)
            site("qkv", (rms_norm(h, mix.norm, mix.eps) for h in hidden), decoder.spec.width)
            attended = [
                view.attend(layer.index, mix.project(h), mix.heads, decoder.tables)
                for h, (_, view) in zip(hidden, packed, strict=True)
            ]
            site("out", attended, attended[0].shape[1])
            hidden = [linear(a, mix.out, None, h) for a, h in zip(attended, hidden, strict=True)]
            site("gate_up", (rms_norm(h, feed.feed_norm, feed.eps) for h in hidden), decoder.spec.width)
            inner = [swiglu(linear(rms_norm(h, feed.feed_norm, feed.eps), feed.gate_up)) for h in hidden]
            site("down", inner, decoder.spec.ff_width)
            hidden = [linear(x, feed.down, None, h) for x, h in zip(inner, hidden, strict=True)]
            if not sequential:
                change(layer.index, seen)


def _site(
    change: Change | None, index: int, seen: dict[str, Inputs], name: str, parts: Iterable[Tensor], width: int
) -> None:
    """What a matrix is given: into `seen`, and at once to `change`, where there is one."""
    seen[name] = found = moments(parts, width)
    if not bool(found.hessian_KK.isfinite().all()):
        raise NonFiniteError(
            f"layer {index}: inputs of {name} are not finite over the texts. The model is damaged, or overflows "
            "bf16: look at the weights of the layers before, or leave such texts out."
        )
    if change is not None:
        change(index, {name: found})
