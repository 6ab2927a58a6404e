"""A decoder that only serves keeps the codes of its file: fewer bytes a step, the same bits."""

from __future__ import annotations

from collections import Counter

import torch

from tandem.kernels.weight import Weight
from tandem.models.checkpoint import Checkpoint
from tandem.models.decoder import Decoder
from tandem.numerics.quantise import Quantised


def hold_codes(decoder: Decoder, checkpoint: Checkpoint, *, learns: bool = False) -> frozenset[str]:
    """Take every matrix whose tensors the file has as codes of one form; call before `Decoder.load`.

    Returns the Hugging Face names whose values need not be loaded. An embedding's are needed for the look-up of rows,
    a head's where an adapter `learns` (Decoder.freeze).
    """
    held: list[str] = []
    for slot, weight in decoder.slots():
        own = [one.name for one in slot.stored]
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
    if weight.packed is None:
        return False
    found = [codes for name in names if (codes := checkpoint.codes(name)) is not None]
    forms = {(one.bits, one.group, one.scales_NG.dtype, one.minima_NG is None) for one in found}
    if len(found) < len(names) or len(forms) > 1:
        return False
    if len(found) == 1:
        return weight.hold(found[0], rows=rows)
    minima = [one.minima_NG for one in found if one.minima_NG is not None]
    joined = Quantised(
        torch.cat([one.codes_NK for one in found]),
        torch.cat([one.scales_NG for one in found]),
        found[0].bits,
        found[0].group,
        torch.cat(minima) if minima else None,
    )
    return weight.hold(joined, rows=rows)
