"""How a matrix lies on a device: codes where a kernel multiplies by them, changed in place, since captured steps read
them where they were."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.kernels.codes import Codes
from tandem.kernels.eights import Eights
from tandem.kernels.gpu import codes as gpu
from tandem.kernels.gpu.codes import DeviceCodes
from tandem.kernels.gpu.eights import FP8, DeviceEights, has_fp8
from tandem.kernels.quantise import nearest
from tandem.kernels.rounding import Rounding
from tandem.numerics.blocks import FORMATS, Blocks, Fp4
from tandem.numerics.elements import E2M1
from tandem.numerics.quantise import Quantised

FP8_ROW = FORMATS["fp8_row"]


def coded(matrix: Quantised | Fp4, before: Codes | Eights | None, device: torch.device) -> Codes | None:
    """On the device, where `before` lies if that has the same form; None where there is no kernel."""
    matrix = _moved(matrix, device)
    if isinstance(before, DeviceCodes) and before.take(matrix):
        return before
    return DeviceCodes(matrix) if gpu.fits(matrix) else None


def rounded_matrix(
    value_NK: Tensor, rounding: Rounding, codes: Codes | Eights | None, rounded_NK: Tensor | None
) -> tuple[Codes | Eights | None, Tensor | None]:
    """What products read of a matrix that is rounded, one of the two; where the last one lies."""
    by_row = rounding.form == FP8_ROW and rounding.rows == FP8_ROW.by_row()
    if rounding.products or (by_row and has_fp8(value_NK.device)):
        assert not rounding.products or rounding.bits == 8, rounding
        if isinstance(codes, DeviceEights):
            codes.round(value_NK)
            return codes, None
        return DeviceEights(value_NK, torch.int8 if rounding.products else FP8), None
    form = rounding.form
    if (
        form is not None
        and form.element == E2M1
        and value_NK.dtype == torch.bfloat16
        and form.scale in ("e8m0", "e4m3")
    ):
        made = coded(Fp4(nearest(value_NK, form), form), codes, value_NK.device)
        if made is not None:
            return made, None
    values_NK = rounding.matrix(value_NK)
    if rounded_NK is None or rounded_NK is value_NK:
        return None, values_NK
    return None, rounded_NK.copy_(values_NK)


def _moved(matrix: Quantised | Fp4, device: torch.device) -> Quantised | Fp4:
    if isinstance(matrix, Fp4):
        codes, scales, whole, _ = matrix.blocks
        return Fp4(
            Blocks(codes.to(device), scales.to(device), None if whole is None else whole.to(device)), matrix.form
        )
    minima_NG = None if matrix.minima_NG is None else matrix.minima_NG.to(device)
    moved = matrix.codes_NK.to(device), matrix.scales_NG.to(device)
    return Quantised(*moved, matrix.bits, matrix.group, minima_NG)
