"""What a file format of quantised matrices is: the tensors that belong to a matrix, and what they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tandem.errors import ModelError
from tandem.models.fields import Fields
from tandem.numerics.blocks import (
    SCALE_DTYPES,
    WHOLE,
    WHOLE_ROW,
    Blocks,
    Format,
    Fp4,
    block_scales,
    dequantise,
    from_e8m0,
)
from tandem.numerics.elements import E2M1, Fixed
from tandem.numerics.quantise import Quantised

ROW_UNIT = 8  # inputs that the engine's codes keep together, kernels/codes.py
E8M0_DTYPES = (torch.uint8, torch.float8_e8m0fnu)


def scales_name(dtype: torch.dtype) -> Any:
    """The name of a scale's dtype in a `Format`. ValueError where scales can't be of it."""
    found = next((name for name, one in SCALE_DTYPES.items() if one == dtype), None)
    if found is None:
        raise ValueError(f"scales are of {dtype}")
    return found


def widened(scales: Tensor) -> Tensor:
    """Scales of e8m0, as bytes or as torch has them, in fp32; others as they are."""
    return from_e8m0(scales.view(torch.uint8)) if scales.dtype in E8M0_DTYPES else scales


def grid_of(form: Format, rows: int, columns: int) -> tuple[int, ...]:
    """Shape of the scales of a matrix."""
    if form.block == WHOLE:
        return (1,)
    return -(-rows // form.rows), 1 if form.block == WHOLE_ROW else -(-columns // form.block)


def centre_of(module: str, zeros_NG: Tensor, bits: int, says: str) -> None:
    """ModelError unless all zero points are the middle of the range: of a file whose config says that it has none."""
    others = int((zeros_NG != 1 << (bits - 1)).sum())
    if others:
        raise ModelError(
            f"{module}: {others} of {zeros_NG.numel()} zero points are not {1 << (bits - 1)}, but the config says "
            f"{says}. It is another's, or the file is damaged."
        )


def scales_fault(blocks: Blocks, form: Format) -> str:
    """What is wrong with the scales of a matrix, "" where nothing is: one that is NaN or infinite is damage."""
    whole = blocks.whole
    if whole is not None and not bool((whole.isfinite() & (whole > 0)).all()):
        return f"its scale of the tensor is {float(whole.min()):g}"
    wrong = int((~block_scales(blocks, form).isfinite()).sum())
    return f"{wrong} of {blocks.scales.numel()} scales are NaN or infinite" if wrong else ""


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A matrix [N, K] as a file has it. All factors are in the scales, but of e2m1, which keeps bytes and `whole`."""

    blocks: Blocks
    form: Format
    groups_K: Tensor | None = None  # the group of each column, int64, where they do not follow one another

    def check(self, shape: tuple[int, ...]) -> None:
        """ValueError unless codes are [N, K] of `shape`, and scales, zero points and groups are those of such codes."""
        codes, scales, whole, zeros = self.blocks
        if tuple(codes.shape) != shape or len(shape) != 2:
            raise ValueError(f"codes {tuple(codes.shape)} for {shape}")
        groups_K, grid = self.groups_K, grid_of(self.form, *shape)
        found = [tuple(one.shape) for one in (scales, zeros) if one is not None]
        if any(one != grid for one in found) or (whole is not None and whole.numel() != 1):
            raise ValueError(f"scales {found} for {grid}")
        if groups_K is not None and (
            len(groups_K) != shape[1] or not 0 <= int(groups_K.min()) <= int(groups_K.max()) < grid[-1]
        ):
            raise ValueError("groups that its scales have not")

    def values(self) -> Tensor:
        """fp32: (code - zero) scale, rounded once."""
        if self.groups_K is None:
            return dequantise(self.blocks, self.form)
        scales_NK = self.blocks.scales.float()[:, self.groups_K]
        return self._signed().float() * scales_NK

    def codes(self) -> Quantised | None:
        """For products by codes, of the same values in bf16; None where there is no such form.

        Integers of up to 4 bits without a zero point are of 4, others of 8; e2m1 is twice its value, in 8, and -0 is 0.
        """
        element, scales_NG = self.form.element, self.blocks.scales
        if element == E2M1:
            scales_NG = block_scales(self.blocks, self.form)
        columns = self.blocks.codes.shape[1]
        group = columns if self.form.block == WHOLE_ROW else self.form.block
        packs = self.groups_K is None and self.form.rows == 1 and self.form.block != WHOLE
        if not packs or group % ROW_UNIT or columns % ROW_UNIT or scales_NG.dtype == torch.uint8:
            return None
        if scales_NG.dtype == torch.bfloat16:
            scales_NG = scales_NG.float()
        if element == E2M1:
            doubled = (E2M1.values() * 2).to(torch.int8)
            return Quantised(doubled[self.blocks.codes.long()], scales_NG.float() / 2, 8, group)
        if not isinstance(element, Fixed) or element.bits + self.form.zero_point > 8:
            return None
        small = element.bits <= 4 and not self.form.zero_point
        return Quantised(self._signed().to(torch.int8), scales_NG.contiguous(), 4 if small else 8, group)

    def fp4(self) -> Fp4 | None:
        """Its bytes, where it is of e2m1."""
        return Fp4(self.blocks, self.form) if self.form.element == E2M1 else None

    def _signed(self) -> Tensor:
        """Codes less their zero points, int16."""
        codes, columns = self.blocks.codes.short(), self.blocks.codes.shape[1]
        if self.blocks.zeros is not None:
            zeros = self.blocks.zeros.short()
            if self.groups_K is not None:
                return codes - zeros[:, self.groups_K]
            group = columns if self.form.block == WHOLE_ROW else self.form.block
            return codes - zeros.repeat_interleave(group, 1)[:, :columns]
        assert isinstance(self.form.element, Fixed), self.form
        half = 1 << (self.form.element.bits - 1)
        return codes - 2 * half * (codes >= half)


def code_bits(bits: int, group: int, symmetric: bool) -> float:
    """Of integers by `Held.codes`, with scales of 32 bits."""
    return (4 if bits <= 4 and symmetric else 8) + (32 / group if group > 0 else 1)


class Scheme:
    """One file format, opened by what a model's config says of it."""

    method: ClassVar[str]  # quant_method
    parts: ClassVar[frozenset[str]]  # names, behind a module's, of the tensors of a quantised matrix
    key: ClassVar[str]  # the one that no other matrix has
    spare: ClassVar[frozenset[str]] = frozenset()  # read by nobody here: of activations, of keys and values

    def __init__(self, config: Fields) -> None:
        self.where = config.where
        self.notes: list[str] = []  # of what is left out

    def split(self, name: str) -> tuple[str, str]:
        """Module and part of a stored tensor."""
        module, _, part = name.rpartition(".")
        return module, part

    def shape(self, parts: Mapping[str, tuple[int, ...]], small: Mapping[str, Tensor]) -> tuple[int, int]:
        """[N, K] by the shapes of its parts; `small`: those of a few numbers, read."""
        raise NotImplementedError

    def coded_bits(self, module: str, dtypes: Mapping[str, str]) -> float:
        """Of a number of a matrix as `Held.codes`, at most, its share of a scale among them; 0 where it has none."""
        raise NotImplementedError

    def held(self, module: str, parts: Mapping[str, Tensor]) -> Held:
        raise NotImplementedError

    @classmethod
    def form_of(cls, form: Format) -> Format:
        """As the format is written, its scales in the file's dtype. ConfigError where the file has no such form."""
        raise NotImplementedError

    @classmethod
    def written(cls, form: Format, blocks: Blocks) -> dict[str, Tensor]:
        """The parts of a matrix."""
        raise NotImplementedError

    @classmethod
    def config(cls, form: Format, plain: Sequence[str]) -> dict[str, Any]:
        """What config.json's quantization_config says; `plain`: modules whose weights are not quantised."""
        raise NotImplementedError


def refuse_blocks(where: str, width: int, block: int) -> None:
    """ModelError unless blocks of so many inputs divide a width."""
    if width % block:
        divisors = [one for one in (256, 128, 64, 32, 16) if width % one == 0]
        raise ModelError(
            f"{where}: blocks of {block} do not divide a width of {width}. "
            f"{f'Choose blocks of {divisors[0]}, or of a row' if divisors else 'Choose blocks of a row'}."
        )
