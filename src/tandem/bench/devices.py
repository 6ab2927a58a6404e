"""What devices publish of themselves, and what formats weights are kept and multiplied in.

Rates are dense, of products that accumulate in fp32 (int32 of integers): datasheets of NVIDIA print them with
structured sparsity, twice as high, and some print nothing else. No device reaches them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tandem.errors import ConfigError, nearest

if TYPE_CHECKING:
    from tandem.numerics.blocks import Format

Arithmetic = Literal["fp32", "bf16", "fp8", "int8", "fp6", "fp4"]
Scaling = Literal["", "fp32", "mx", "nvfp4"]  # what a product's operands are scaled by: nothing, fp32, e8m0, e4m3
THIS = "this"
TERA, GIGABYTE = 1e12, 1e9
NVIDIA_H200 = "NVIDIA H200 Tensor Core GPU datasheet (SXM), rates halved: printed with sparsity"


@dataclass(frozen=True, slots=True)
class Device:
    """A device's memory and rates.

    >>> DEVICES["h200"].multiplies("fp8", "fp32"), DEVICES["h200"].multiplies("fp4", "mx")
    (True, False)
    """

    name: str
    title: str
    memory_bytes: float
    bytes_s: float
    rates: Mapping[str, float]  # operations a second, by arithmetic
    scaled: tuple[Scaling, ...]  # operands that products take with their scales
    source: str

    def multiplies(self, arithmetic: Arithmetic, scaling: Scaling) -> bool:
        """Whether there is a rate for such operands; fp32 scales are applied to sums, by any device."""
        return arithmetic in self.rates and (scaling in ("", "fp32") or scaling in self.scaled)


def _tera(**rates: float) -> dict[str, float]:
    return {name: TERA * rate for name, rate in rates.items()}


DEVICES: dict[str, Device] = {
    one.name: one
    for one in (
        Device(
            "a100",
            "NVIDIA A100 SXM 80 GB",
            80 * GIGABYTE,
            2.039 * TERA,
            _tera(fp32=19.5, bf16=312, int8=624),
            (),
            "NVIDIA A100 Tensor Core GPU datasheet (80 GB SXM)",
        ),
        Device(
            "h100",
            "NVIDIA H100 SXM",
            80 * GIGABYTE,
            3.35 * TERA,
            _tera(fp32=67, bf16=989.5, fp8=1979, int8=1979),
            (),
            "NVIDIA H100 Tensor Core GPU datasheet (SXM), rates halved: printed with sparsity",
        ),
        Device(
            "h200",
            "NVIDIA H200 SXM",
            141 * GIGABYTE,
            4.8 * TERA,
            _tera(fp32=67, bf16=989.5, fp8=1979, int8=1979),
            (),
            NVIDIA_H200,
        ),
        Device(
            "b200",
            "NVIDIA B200 SXM",
            180 * GIGABYTE,
            8 * TERA,
            _tera(fp32=80, bf16=2250, fp8=4500, int8=4500, fp6=4500, fp4=9000),
            ("mx", "nvfp4"),
            "NVIDIA Blackwell Architecture Technical Brief (HGX B200, dense); memory: NVIDIA DGX B200 datasheet over 8",
        ),
        Device(
            "mi300x",
            "AMD Instinct MI300X",
            192 * GIGABYTE,
            5.3 * TERA,
            _tera(fp32=163.4, bf16=1307.4, fp8=2614.9, int8=2614.9),
            (),
            "AMD Instinct MI300X Accelerator datasheet",
        ),
        Device(
            "mi355x",
            "AMD Instinct MI355X",
            288 * GIGABYTE,
            8 * TERA,
            _tera(fp32=157.3, bf16=2516.6, fp8=5033.2, int8=5033.2, fp6=10066.3, fp4=10066.3),
            ("mx",),
            "AMD Instinct MI355X GPU datasheet",
        ),
    )
}


def device_of(name: str) -> Device:
    """One of DEVICES. ConfigError for others."""
    if name not in DEVICES:
        raise ConfigError(
            f"--device {name}: no such device is known.{nearest(name, [*DEVICES, THIS])} Known are "
            f"{', '.join(DEVICES)}, by their datasheets, and this, which is measured."
        )
    return DEVICES[name]


@dataclass(frozen=True, slots=True)
class Served:
    """How the matrices of the layers are kept and multiplied; embedding, head, norms, keys and values are bf16 (fp32
    under fp32).

    >>> served_as("nvfp4").matrix_bytes(64, 64), served_as("bf16").matrix_bytes(64, 64)
    (2308.0, 8192.0)
    """

    name: str
    bits: float  # of an element, block scales and zero points among them
    row_bytes: float = 0.0  # more for each row of a matrix
    matrix_extra_bytes: float = 0.0  # more for each matrix
    block: int = 0  # inputs of a block, whose last one of a row is charged whole; 0: no blocks
    block_bytes: float = 0.0  # of a block's scale and zero point, of each row (of a tile: its share)
    arithmetic: Arithmetic = "bf16"  # that the format is made for
    scaling: Scaling = ""
    activation_bits: float = 0.0  # of the rows that a product multiplies, where they are rounded too; 0: they are not

    @property
    def other_bytes(self) -> int:
        """Of a number of anything else."""
        return 4 if self.arithmetic == "fp32" else 2

    def matrix_bytes(self, rows: int, columns: int) -> float:
        """Of a matrix [rows, columns], rounded along its columns."""
        blocks = -(-columns // self.block) if self.block else 0
        per_row = columns * self.bits / 8 + blocks * self.block_bytes + self.row_bytes
        return rows * per_row + self.matrix_extra_bytes


# A row of W8A8 has a scale and the sum of its codes, 4 bytes each (kernels/eights.py), one of W4A8 a scale a group;
# int8 and int4 are the engine's integers, in groups of 64 (engine.weight_group).
_PLAIN: dict[str, Served] = {
    "fp32": Served("fp32", 32, arithmetic="fp32"),
    "bf16": Served("bf16", 16),
    "w8a8": Served("w8a8", 8, row_bytes=8, arithmetic="int8", scaling="fp32", activation_bits=8),
    "w4a8": Served("w4a8", 4, block=32, block_bytes=4, arithmetic="int8", scaling="fp32", activation_bits=8),
    "int8": Served("int8", 8, block=64, block_bytes=4),
    "int4": Served("int4", 4, block=64, block_bytes=4),
}
_ELEMENTS: dict[str, Arithmetic] = {"e4m3": "fp8", "e5m2": "fp8", "e2m3": "fp6", "e3m2": "fp6", "e2m1": "fp4"}
_SCALINGS: dict[str, Scaling] = {"e8m0": "mx", "e4m3": "nvfp4", "fp32": "fp32"}


def served_as(name: str) -> Served:
    """As `model.weights` has it (kernels/rounding.py): w8a8, w4a8, int8, int4, or one of `tandem numerics formats`, and
    behind a + one for the rows that are multiplied; bf16 and fp32 too. ConfigError for others.

    >>> served_as("nvfp4").arithmetic, served_as("nvfp4+nvfp4").arithmetic, served_as("mxfp4+mxfp8_e4m3").arithmetic
    ('bf16', 'fp4', 'fp8')
    """
    if name in _PLAIN:
        return _PLAIN[name]
    from tandem.kernels.rounding import rounding_of

    try:
        rounding = rounding_of(name)
    except ConfigError as error:
        raise ConfigError(f"--format {name} is neither bf16 nor fp32, and {error}") from error
    form, rows = rounding.form, rounding.rows
    arithmetic = _arithmetic(form, rows) if form is not None and rows is not None else None
    scaling: Scaling = _SCALINGS[form.scale] if form is not None and arithmetic else ""
    activation_bits = 0.0 if rows is None else rows.bits
    if form is None:
        return Served(name, 16, activation_bits=activation_bits)
    zero_bytes = form.element.bits / 8 if form.zero_point else 0.0
    own = {"e8m0": 1.0, "e4m3": 1.0, "fp32": 4.0}.get(form.scale, 2.0) + zero_bytes
    return Served(
        name,
        float(form.element.bits),
        row_bytes=own if form.block < 0 else 0.0,
        matrix_extra_bytes=4.0 if form.block == 0 or form.scale == "e4m3" else 0.0,
        block=max(0, form.block),
        block_bytes=own / form.rows if form.block > 0 else 0.0,
        arithmetic=arithmetic or "bf16",
        scaling=scaling,
        activation_bits=activation_bits,
    )


def _arithmetic(form: Format, rows: Format) -> Arithmetic | None:
    """That multiplies the two: the wider's, where blocks of 32 with e8m0, or those of NVFP4, or fp32 scales meet their
    like; no fp6 and fp4 by fp32 scales."""
    found = [_ELEMENTS.get(one.element.name) for one in (form, rows)]
    blocks = {"e8m0": 32, "e4m3": 16}.get(form.scale)
    if None in found or form.scale != rows.scale or form.scale not in _SCALINGS:
        return None
    if blocks and ({form.block, rows.block} != {blocks} or form.rows > 1):
        return None
    wider = next(name for name in ("fp8", "fp6", "fp4") if name in found)
    return None if form.scale == "fp32" and wider != "fp8" else wider  # type: ignore[return-value]


def arithmetic_on(device: Device, served: Served) -> tuple[Arithmetic, str]:
    """In what a device multiplies the matrices of a format, and why not as the format is made for ("" where it is)."""
    if served.name in ("fp32", "bf16"):
        return served.arithmetic, ""
    if not served.activation_bits:
        why = f"{served.name} is of matrices alone, which a product widens to bf16, and has its rate"
        return "bf16", f"{why}; behind a + goes a format of rows: {served.name}+mxfp8_e4m3"
    if served.arithmetic != "bf16" and device.multiplies(served.arithmetic, served.scaling):
        return served.arithmetic, ""
    why = f"{device.name} does not multiply {served.name}: its matrices are widened to bf16 in the product"
    return "bf16", f"{why}, at the rate of bf16, and rows stay bf16"
