"""A decoder that only serves keeps the codes of its file: fewer bytes a step, the same bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from tandem.kernels.weight import Weight
from tandem.models.checkpoint import Checkpoint
from tandem.models.decoder import Decoder
from tandem.numerics.blocks import Blocks, Fp4
from tandem.numerics.quantise import Quantised


def hold_codes(decoder: Decoder, checkpoint: Checkpoint, *, learns: bool = False) -> frozenset[str]:
    """Take every matrix whose tensors the file has as codes of one form; call before `Decoder.load`.

    Returns the Hugging Face names whose values need not be loaded. An embedding's are needed for the look-up of rows,
    a head's where an adapter `learns` (Decoder.freeze).
    """
    held: list[str] = []
    for slot, weight in decoder.slots():
        own = [one.name for one in slot.stored]
        if weight.on_device and weight in (decoder.embed, decoder.head):  # a draw reads the head's values
            continue
        kept = weight is decoder.embed or (learns and weight is decoder.head)
        if _hold(weight, own, checkpoint, rows=kept) and not kept:
            held += own
    return frozenset(held)


def described(decoder: Decoder) -> str:
    """For people: how many matrices are held as codes of how many bits; "" for none."""
    bits = Counter(weight.codes.bits for _, weight in decoder.weights() if weight.codes is not None)
    counted = ((count, "matrix" if count == 1 else "matrices", size) for size, count in sorted(bits.items()))
    return ", ".join(f"{count} {noun} of {size} bits" for count, noun, size in counted)


def _hold(weight: Weight, names: list[str], checkpoint: Checkpoint, *, rows: bool) -> bool:
    if weight.packed is None and not weight.on_device:
        return False
    if weight.on_device:
        as_filed = [one for name in names if (one := checkpoint.fp4(name)) is not None]
        if len(as_filed) == len(names) and len({one.form for one in as_filed}) == 1:
            return weight.hold(_joined(as_filed), rows=rows)
    found = _codes(names, checkpoint)
    return found is not None and weight.hold(found, rows=rows)


def layer_codes(decoder: Decoder, checkpoint: Checkpoint) -> Callable[[str], Quantised | None]:
    """A function that reads a matrix of the layers, by the decoder's own name, as the codes that the file has; None
    where it has none of one form."""
    names = {
        f"layers.{layer.index}.{slot.name}": [one.name for one in slot.stored]
        for layer in decoder.layers
        for slot, _ in layer.weights()
        if slot.columns is not None
    }
    return lambda name: _codes(names[name], checkpoint) if name in names else None


def _codes(names: list[str], checkpoint: Checkpoint) -> Quantised | None:
    """Of the matrix that these tensors are together."""
    found = [codes for name in names if (codes := checkpoint.codes(name)) is not None]
    forms = {(one.bits, one.group, one.scales_NG.dtype, one.minima_NG is None) for one in found}
    if len(found) < len(names) or len(forms) > 1:
        return None
    if len(found) == 1:
        return found[0]
    minima = [one.minima_NG for one in found if one.minima_NG is not None]
    return Quantised(
        torch.cat([one.codes_NK for one in found]),
        torch.cat([one.scales_NG for one in found]),
        found[0].bits,
        found[0].group,
        torch.cat(minima) if minima else None,
    )


def _joined(parts: list[Fp4]) -> Fp4:
    """One below the other, each with its own scale of the tensor."""
    blocks = [one.blocks for one in parts]
    wholes = [one.whole.expand(len(one.codes), 1) for one in blocks if one.whole is not None]
    codes, scales = (torch.cat(same) for same in zip(*(one[:2] for one in blocks), strict=True))
    return Fp4(Blocks(codes, scales, torch.cat(wholes) if wholes else None), parts[0].form)
