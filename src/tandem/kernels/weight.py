"""A tensor of the model with what computing on it needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tandem.errors import ConfigError
from tandem.kernels.address import address
from tandem.kernels.build.load import kernel
from tandem.kernels.choice import backend
from tandem.kernels.codes import Codes, fits
from tandem.kernels.eights import Eights
from tandem.kernels.eights import fits as is_eights
from tandem.kernels.eights_gradient import turned
from tandem.kernels.fours import Fours
from tandem.kernels.fours import fits as is_packed
from tandem.kernels.large import large
from tandem.kernels.quantise import dequantise
from tandem.kernels.rounded_gradient import Operands
from tandem.kernels.rounding import NOT_ROUNDED, Rounding
from tandem.kernels.sizes import PANEL, STRIP
from tandem.numerics.blocks import Fp4
from tandem.numerics.compare import same_bits
from tandem.numerics.quantise import Quantised


def padded(depth: int, dtype: torch.dtype) -> int:
    """The depth of a panel: bf16 is reduced in pairs."""
    return depth + depth % 2 if dtype == torch.bfloat16 else depth


def packed_size(rows: int, depth: int) -> int:
    """Elements of the packed form: ceil(rows / 64) panels of this depth."""
    return -(-rows // PANEL) * PANEL * depth


def panels(matrix_NK: torch.Tensor, *, zero: bool = False) -> torch.Tensor:
    """An empty buffer for the packed form of [N, K]; of zeros where that is zeros."""
    rows, depth = matrix_NK.shape
    return large(packed_size(rows, padded(depth, matrix_NK.dtype)), dtype=matrix_NK.dtype, zero=zero)


def matrix_addresses(weight: Weight) -> tuple[int | None, int | None]:
    """Of `packed` and of `codes`, one of them null: what a kernel multiplies by. Both are where rows are rounded
    to 8 bits, which few kernels know."""
    if isinstance(weight.codes, Eights | Fours):
        return None, None
    if weight.codes is not None:
        return None, weight.codes.words.data_ptr()
    (rows, depth), dtype = weight.value.shape, weight.value.dtype
    assert weight.packed is not None, (rows, depth, dtype)
    return address(weight.packed, dtype, packed_size(rows, padded(depth, dtype))), None


@dataclass(frozen=True, slots=True)
class Piece:
    """What an adapter adds to the rows [first, first + N) of its matrix: (scale x A^T) B^T.

    A is the rows [start, start + R) of the adapter's `down`, and the one behind them, zeros, where R is odd.
    """

    first: int
    start: int  # even
    scale: float
    up: Weight  # B, [N, R]
    magnitude: Weight | None = None  # DoRA's, [N] in fp32

    @property
    def rows(self) -> slice:
        """Of the matrix."""
        return slice(self.first, self.first + self.up.value.shape[0])

    @property
    def ranks(self) -> slice:
        """Of `down`."""
        return slice(self.start, self.start + self.up.value.shape[1])


class Adapter:
    """A matrix's low-rank addition (LoRA, Hu et al., 2106.09685), of its rows in pieces, as q, k and v lie in one.

    y = f (x W^T) + f ((s x A^T) B^T), the inner product and both sums rounded. f is 1, or with DoRA (Liu et al.,
    2402.09353) the magnitude over the norm of a row of W + s B A, which follows every change of those.

    down: [sum of ranks, each made even, K]; factor: [rows of the matrix], fp32, or None. Gradients are of the parts.
    """

    __slots__ = ("_words", "down", "factor", "pieces")

    def __init__(self, down: Strips, pieces: tuple[Piece, ...], factor: Weight | None = None) -> None:
        self.down, self.pieces, self.factor = down, pieces, factor
        self._words: tuple[torch.Tensor, ...] | None = None

    @property
    def scales_R(self) -> torch.Tensor:
        """Of each row of `down`, fp32."""
        scales_R = torch.zeros(self.down.value.shape[0])
        for piece in self.pieces:
            scales_R[piece.ranks] = piece.scale
        return scales_R

    @property
    def words(self) -> torch.Tensor:
        """Struct AdapterMatrix of adapter.h as six int64; what it points to stays where it is."""
        if self._words is None:
            scales_R, ranks = self.scales_R, self.down.value.shape[0]
            factor = 0 if self.factor is None else address(self.factor.value, torch.float32, len(self.factor.value))
            pieces = torch.tensor([_piece_words(piece, factor or 0) for piece in self.pieces], dtype=torch.int64)
            assert self.down.packed is not None
            pointers = (self.down.packed.data_ptr(), scales_R.data_ptr(), pieces.data_ptr(), factor or 0)
            words = torch.tensor([*pointers, len(self.pieces), ranks], dtype=torch.int64)
            self._words = words, pieces, scales_R
        return self._words[0]


def _piece_words(piece: Piece, factor: int) -> list[int]:
    up = piece.up
    assert up.packed is not None
    rows, rank = up.value.shape
    own = factor and factor + 4 * piece.first
    return [up.packed.data_ptr(), own, piece.first, rows, piece.start, padded(rank, up.value.dtype)]


class Weight:
    """`value` in the compute dtype; `packed` for the matrix product; `grad` in fp32, summed over microbatches.

    Matrices are [out, in]. The packed form is derived: `repack` follows every change of `value`. A matrix that is only
    served may be `codes` in place of `packed`, or `serve`; its `value` then has a shape and no memory, unless rows are
    looked up. A matrix with a `rounding` is multiplied as it is rounded, and so are the rows; its gradients are those
    of the rounded product, and change `value`. A shard is a weight of fewer rows or columns (`Slot.shard`).
    """

    __slots__ = (
        *("adapter", "codes", "grad", "library", "narrow"),
        *("operands", "packed", "rounded", "rounding", "turned", "value"),
    )

    def __init__(self, value: torch.Tensor, *, matrix: bool, zero: bool = False) -> None:
        """zero: `value` is all zeros, so the packed form is too; neither is touched before something is loaded."""
        self.value = value.contiguous()
        self.packed: torch.Tensor | None = None
        self.codes: Codes | Eights | None = None
        self.grad: torch.Tensor | None = None  # None: frozen
        self.adapter: Adapter | None = None  # added by `linear` and `swiglu_down`
        self.rounding = NOT_ROUNDED
        self.rounded: torch.Tensor | None = None  # `value` as it is multiplied, where no packed form has it
        self.turned: Eights | None = None  # what the backward pass multiplies by, where it is of 8 bits
        self.operands: Operands | None = None  # of the backward pass's products, where they are rounded
        self.narrow = False  # of the output head: logits are rounded to bf16
        self.library = False  # multiply by torch's library where that is faster, see library.py; not batch-invariant
        if matrix and backend(value) == "cpp" and kernel("linear", "pack_weight", value.dtype, "ppii") is not None:
            self.packed = panels(self.value, zero=zero)
            if not zero:
                self.repack()

    def repack(self) -> None:
        """Derive what products read from `value`."""
        if self.turned is not None:
            turned(self.value, self.turned)
        if self.rounding and self.on_device:
            from tandem.kernels.gpu.held import rounded_matrix

            self.codes, self.rounded = rounded_matrix(self.value, self.rounding, self.codes, self.rounded)
            return
        if self.rounding.products:
            if isinstance(self.codes, Eights | Fours):
                self.codes.round(self.value)
            else:
                self.codes, self.packed = (Eights if self.rounding.bits == 8 else Fours)(self.value), None
            return
        value = self.rounding.matrix(self.value)
        if self.packed is None:
            self.rounded = value if self.rounding else None
            return
        pack = kernel("linear", "pack_weight", self.value.dtype, "ppii")
        assert pack is not None
        rows, depth = self.value.shape
        pack(address(value, self.packed.dtype, rows, depth), self.packed.data_ptr(), rows, depth)

    def multiply_rounded(self, rounding: Rounding) -> None:
        """Multiply `value` as it is rounded from now on, and the rows that it is multiplied by. ConfigError where that
        cannot be."""
        if self.library:
            raise ConfigError(
                "model.weights rounds what matrices are multiplied by, and model.kernels is library: torch's own "
                "products round nothing. Set model.kernels to exact, or leave model.weights out."
            )
        if rounding.products and not self.on_device and self.value.dtype == torch.float16:
            raise ConfigError(
                f"w{rounding.bits}a8 is computed in bfloat16 or float32 on the CPU, and the dtype is float16. Set "
                "model.dtype (or engine.dtype) to one of these, or give a format."
            )
        if rounding.products and self.packed is None and not (self.on_device and rounding.bits == 8):
            raise ConfigError(
                f"w{rounding.bits}a8 is computed by tandem's own compiled kernels, which are not used here "
                "(TANDEM_KERNELS, w4a8 on a GPU, or no compiler: tandem doctor). Change that, or give a format."
            )
        self.rounding = rounding
        self.repack()

    def learn_in_8_bits(self) -> None:
        """Have the products of the backward pass in integers (eights_gradient.py). ConfigError where they cannot be."""
        if self.library or self.on_device or (self.packed is None and not isinstance(self.codes, Eights | Fours)):
            raise ConfigError(
                "learner.gradients is int8, whose products are computed by tandem's own compiled kernels on the CPU; "
                "these are not (model.kernels, TANDEM_KERNELS, or no compiler: tandem doctor). Change that, or leave "
                "it out."
            )
        self.turned = turned(self.value)

    def follows(self, value: torch.Tensor) -> bool:
        """Whether what products read is this value, rounded."""
        if isinstance(self.codes, Eights | Fours):
            return self.codes.is_of(value)
        return same_bits(self.served(), self.rounding.matrix(value))

    @property
    def on_device(self) -> bool:
        """Whether Triton multiplies by it."""
        return backend(self._memory) == "triton"

    @property
    def _memory(self) -> torch.Tensor:
        return self.value if self.codes is None else self.codes.packed

    @property
    def addresses(self) -> list[int]:
        """Of what products read."""
        codes = None if self.codes is None else self.codes.packed
        return [one.data_ptr() for one in (self.value, self.packed, self.rounded, codes) if one is not None]

    @property
    def read(self) -> torch.Tensor:
        """[out, in] as products without a packed form read it."""
        return self.value if self.rounded is None else self.rounded

    def served_value(self) -> torch.Tensor:
        """[out, in] as products read it, for those of the backward pass."""
        return self.served() if self.value.is_meta or self.rounding else self.value

    def serve(self) -> None:
        """Only products read this weight from now on: where they read `packed`, `value` lets its memory go."""
        if (self.packed is not None or self.codes is not None) and not self.library:
            self.value = torch.empty_like(self.value, device="meta")

    def hold(self, quantised: Quantised | Fp4, *, rows: bool = False) -> bool:
        """Multiply by these codes from now on, whose values in bf16 have the same products to the last bit.

        `rows`: keep `value` for the look-up of rows; the caller fills it. False, and nothing changed, where this weight
        is not packed for bf16 products, is rounded otherwise, or the codes have no packed form.
        """
        packed = self.packed is not None or (self.codes is None and self.on_device)
        ready = self.codes is not None or (packed and self.value.dtype == torch.bfloat16)
        codes = self._codes_of(quantised) if ready and not self.library and not self.rounding else None
        if codes is None:
            return False
        self._hold(codes, rows)
        return True

    def _codes_of(self, quantised: Quantised | Fp4) -> Codes | None:
        if self.on_device:
            from tandem.kernels.gpu.held import coded

            return coded(quantised, self.codes, self._memory.device)
        return Codes(quantised) if isinstance(quantised, Quantised) and fits(quantised) else None

    def multiply_in_codes(self, value: torch.Tensor, bits: int = 8, filed: Quantised | None = None) -> None:
        """Multiply by this matrix rounded to 8 or 4 bits from now on, a row of x to 8 (kernels/eights.py, fours.py),
        and keep nothing else of it: bf16 or fp32, as it came. It is not rounded where `filed` stands for it."""
        packs = is_packed if bits == 4 else is_eights
        if (
            filed is not None
            and not self.on_device
            and packs(filed)
            and same_bits(dequantise(filed, value.dtype), value)
        ):
            self._hold((Eights if bits == 8 else Fours)(filed), rows=False)
            return
        if isinstance(self.codes, Eights | Fours) and self.codes.is_rounded:
            self.codes.round(value)
            return
        if self.on_device:
            from tandem.kernels.gpu.eights import DeviceEights

            assert bits == 8, "there is no product of 4 and 8 bits on a device"
            self._hold(DeviceEights(value.to(self._memory.device)), rows=False)
            return
        assert self.packed is not None or self.codes is not None, (
            "integers are multiplied by tandem's own kernels alone"
        )
        self._hold(Eights(value) if bits == 8 else Fours(value), rows=False)

    def _hold(self, codes: Codes | Eights, rows: bool) -> None:
        assert codes.shape == self.value.shape, (codes.shape, self.value.shape)
        self.codes, self.packed = codes, None
        if not rows:
            self.value = torch.empty_like(self.value, device="meta")

    def served(self, room: torch.Tensor | None = None) -> torch.Tensor:
        """What the matrix products read, [out, in]: recovered from `packed` or `codes`, else `value` itself.

        `room`, bytes, may be what it is recovered into: fresh memory costs more than the copy.
        """
        if self.codes is not None:
            return self.codes.values(self.value.dtype)
        if self.packed is None:
            return self.read
        unpack = kernel("linear", "unpack_weight", self.value.dtype, "ppii")
        assert unpack is not None
        rows, depth = self.value.shape
        dtype = self.value.dtype  # and no more, where it has no memory
        tensor = torch.empty(rows, depth, dtype=dtype) if room is None else room[: self.value.nbytes].view(dtype)
        unpack(self.packed.data_ptr(), tensor.data_ptr(), rows, depth)
        return tensor.view(rows, depth)


class Strips(Weight):
    """A matrix of few rows, [R, K], whose packed form has no more columns than 16 divides: an adapter's A (adapter.h).

    Panels of 64 of its rows, the last of as many strips of 16 as it needs: [K / PAIR][16 strips][PAIR].
    """

    __slots__ = ()

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__(value, matrix=False)
        if backend(value) == "cpp" and kernel("adapter", "adapt", value.dtype, "pippp" + "iii") is not None:
            rows, depth = value.shape
            self.packed = large(-(-rows // STRIP) * STRIP * padded(depth, value.dtype), dtype=value.dtype)
            self.repack()

    def _panels(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows, and where they are packed: [K / PAIR, 16 strips, PAIR]."""
        assert self.packed is not None
        (rows, depth), pair = self.value.shape, padded(1, self.value.dtype)
        depth = padded(depth, self.value.dtype)
        for first in range(0, rows, PANEL):
            columns = -(-min(PANEL, rows - first) // STRIP) * STRIP
            panel = self.packed[first * depth : (first + columns) * depth]
            yield slice(first, min(rows, first + PANEL)), panel.view(depth // pair, columns, pair)

    def repack(self) -> None:
        for rows, panel in self._panels() if self.packed is not None else ():
            depth, columns, pair = panel.shape
            value = self.value[rows]
            padding = (0, depth * pair - value.shape[1], 0, columns - len(value))
            panel.copy_(torch.nn.functional.pad(value, padding).view(columns, depth, pair).transpose(0, 1))

    def served(self, room: torch.Tensor | None = None) -> torch.Tensor:
        if self.packed is None:
            return self.value
        (count, inputs), found = self.value.shape, []
        for rows, panel in self._panels():
            found.append(panel.transpose(0, 1).reshape(panel.shape[1], -1)[: rows.stop - rows.start, :inputs])
        return torch.cat(found).view(count, inputs)
