"""What is said of logits that no token can be drawn from."""

from __future__ import annotations

from torch import Tensor

from tandem.errors import NonFiniteError


def raise_if_bad(logits_SV: Tensor, row: int) -> None:
    """NonFiniteError for a row that cannot be drawn from; nothing where `row` is negative."""
    if row < 0:
        return
    logits_V = logits_SV[row]
    nan, positive = int(logits_V.isnan().sum()), int((logits_V == float("inf")).sum())
    cause = (
        f"{nan} NaN"
        if nan
        else f"{positive} +infinity"
        if positive
        else "only -infinity"
        if bool((logits_V == float("-inf")).all())
        else "values that overflow when divided by the temperature"
    )
    raise NonFiniteError(
        f"logits row {row} of {logits_SV.shape[0]} holds {cause} (vocabulary {logits_SV.shape[1]}): "
        "no token can be drawn. The weights or activations are not finite: after an update, see its loss and gradient; "
        "before any, check the model's files."
    )
