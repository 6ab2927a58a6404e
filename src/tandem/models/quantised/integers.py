"""AutoAWQ's and GPTQ's files: integers of a few bits in words of 32, matrices lying [inputs, outputs].

AWQ packs eight outputs a word in the order of AWQ_ORDER, zero points alike. GPTQ packs inputs, and zero points along
outputs, as a stream of bits. GPTQ's first format (`checkpoint_format` gptq) stores a zero point less one, `gptq_v2`
as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tandem.errors import ConfigError, ModelError
from tandem.models.fields import Fields, flag, optional, shown, table, text, whole
from tandem.models.quantised.scheme import Held, Scheme, centre_of, code_bits, refuse_blocks, scales_name
from tandem.numerics.blocks import WHOLE_ROW, Blocks, Format
from tandem.numerics.elements import Fixed
from tandem.numerics.packing import from_awq_order, num_words, pack, to_awq_order, unpack

WORD = 32


def _format(bits: int, group: int, dtype: torch.dtype) -> Format:
    """With zero points."""
    return Format(f"int{bits}", Fixed(f"int{bits}", bits, 0), group, scales_name(dtype), zero_point=True)


def centred(held: Held) -> Held:
    """The same without zero points, where all of them are the middle of the range. ValueError unless each block has
    one."""
    element, zeros = held.form.element, held.blocks.zeros
    assert isinstance(element, Fixed)
    half = 1 << (element.bits - 1)
    if zeros is not None and zeros.shape != held.blocks.scales.shape:
        raise ValueError(f"zero points {tuple(zeros.shape)} for scales {tuple(held.blocks.scales.shape)}")
    if zeros is None or not bool((zeros == half).all()):
        return held
    blocks = Blocks(held.blocks.codes ^ half, held.blocks.scales)
    return Held(blocks, replace(held.form, zero_point=False), held.groups_K)


def _fp16(scheme: type[Scheme], form: Format, bits: Sequence[int]) -> Format:
    element = form.element
    if not isinstance(element, Fixed) or element.fraction or element.bits not in bits or form.scale == "e8m0":
        sizes = ", ".join(map(str, bits))
        raise ConfigError(
            f"{scheme.method} files have integers of {sizes} bits in groups, and not {form.name}. Choose int{bits[-1]}"
            "_g128 or a group of your own, with _asym for zero points."
        )
    return replace(form, scale="fp16")


def _unsigned(form: Format, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Codes and zero points as files have them, none of them below 0."""
    assert isinstance(form.element, Fixed)
    half = 1 << (form.element.bits - 1)
    if blocks.zeros is not None:
        return blocks.codes, blocks.zeros
    return blocks.codes ^ half, torch.full(blocks.scales.shape, half, dtype=torch.uint8)


def _words(parts: Mapping[str, Tensor], part: str, bits: int, count: int) -> Tensor:
    """Codes [.., count] of words that are as many as these codes fill. ValueError for others."""
    if parts[part].shape[-1] != num_words(count, bits):
        raise ValueError(f"{part} {tuple(parts[part].shape)} for {count} codes of {bits} bits")
    return unpack(parts[part], bits, count)


class Gptq(Scheme):
    """AutoGPTQ's and GPTQModel's."""

    method = "gptq"
    parts = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    key = "qweight"
    version = "gptq"

    def __init__(self, config: Fields) -> None:
        super().__init__(config)
        self.bits = config.take("bits", whole(2, 8))
        self.group = config.take("group_size", optional(whole(-1)), -1) or -1
        kind = config.take("checkpoint_format", optional(text), None) or config.take("format", optional(text), "gptq")
        if kind not in ("gptq", "gptq_v2") or self.bits not in (2, 3, 4, 8):
            raise ModelError(
                f"{self.where}: GPTQ of {self.bits} bits in the layout {shown(kind)}; read are 2, 3, 4 and 8 bits in "
                "gptq and gptq_v2. Save the model in one of these."
            )
        if config.take("dynamic", optional(table), None):
            raise ModelError(f"{self.where} has other settings for some modules (dynamic), which are not read.")
        self.version = kind or "gptq"
        self.ordered = not config.take("desc_act", optional(flag), False)
        self.symmetric = bool(config.take("sym", optional(flag), False))

    def coded_bits(self, module: str, dtypes: Mapping[str, str]) -> float:
        small = self.ordered and (self.bits < 8 or self.symmetric)
        return code_bits(self.bits, self.group, self.symmetric) if small else 0

    def shape(self, parts: Mapping[str, tuple[int, ...]], small: Mapping[str, Tensor]) -> tuple[int, int]:
        words, columns = parts["qweight"]
        return columns, words * WORD // self.bits

    def held(self, module: str, parts: Mapping[str, Tensor]) -> Held:
        scales_NG = parts["scales"].t().contiguous()
        rows, groups = scales_NG.shape
        inputs = parts["qweight"].shape[0] * WORD // self.bits
        codes_NK = unpack(parts["qweight"].t().contiguous(), self.bits, inputs)
        zeros_NG = _words(parts, "qzeros", self.bits, rows).t().contiguous()
        if self.version == "gptq":
            zeros_NG = (zeros_NG + 1) & ((1 << self.bits) - 1)
        group = WHOLE_ROW if self.group <= 0 else self.group
        size = inputs if group == WHOLE_ROW else group
        if groups != -(-inputs // size):
            raise ModelError(
                f"{module}: {groups} groups of {size} for {inputs} inputs; {-(-inputs // size)} are needed. The config "
                "is another's, or the file is damaged."
            )
        if self.symmetric:
            centre_of(module, zeros_NG, self.bits, "sym: true")
        order = parts.get("g_idx")
        if order is None and not self.ordered and group != WHOLE_ROW:
            raise ModelError(f"{module} has no g_idx, but the config says desc_act: true. Download the file again.")
        groups_K = None
        if order is not None and not torch.equal(order.long(), torch.arange(inputs) // size):
            groups_K = order.long()
            if len(groups_K) != inputs or not 0 <= int(groups_K.min()) <= int(groups_K.max()) < groups:
                raise ModelError(f"{module}.g_idx has groups that its scales have not. Download the file again.")
        form = _format(self.bits, group, scales_NG.dtype)
        return centred(Held(Blocks(codes_NK, scales_NG, None, zeros_NG), form, groups_K))

    @classmethod
    def form_of(cls, form: Format) -> Format:
        return _fp16(cls, form, (2, 3, 8, 4))

    @classmethod
    def written(cls, form: Format, blocks: Blocks) -> dict[str, Tensor]:
        assert isinstance(form.element, Fixed)
        bits, (rows, inputs) = form.element.bits, blocks.codes.shape
        if inputs * bits % WORD or rows * bits % WORD:
            raise ModelError(
                f"GPTQ files fill whole words of 32 bits with inputs and with outputs; {rows} x {inputs} of {bits} "
                "bits do not. Choose another file format, as compressed-tensors."
            )
        codes_NK, zeros_NG = _unsigned(form, blocks)
        if cls.version == "gptq":
            if bool((zeros_NG == 0).any()):
                raise ModelError(
                    "a zero point is 0, which GPTQ's first format can't hold: it stores zero points less one, and "
                    "readers disagree on what that is. Choose gptq_v2."
                )
            zeros_NG = zeros_NG - 1
        group = inputs if form.block == WHOLE_ROW else form.block
        return {
            "qweight": pack(codes_NK, bits).t().contiguous(),
            "qzeros": pack(zeros_NG.t(), bits),
            "scales": blocks.scales.t().contiguous(),
            "g_idx": torch.arange(inputs, dtype=torch.int32) // group,
        }

    @classmethod
    def config(cls, form: Format, plain: Sequence[str]) -> dict[str, Any]:
        assert isinstance(form.element, Fixed)
        return {
            "quant_method": "gptq",
            "bits": form.element.bits,
            "group_size": form.block if form.block > 0 else -1,
            "desc_act": False,
            "sym": not form.zero_point,
            "lm_head": False,
            "checkpoint_format": cls.version,
        }


class Gptq2(Gptq):
    """As it is written with zero points as they are."""

    version = "gptq_v2"


class Awq(Scheme):
    """AutoAWQ's, in its layout `gemm`."""

    method = "awq"
    parts = frozenset({"qweight", "qzeros", "scales"})
    key = "qweight"

    def __init__(self, config: Fields) -> None:
        super().__init__(config)
        bits = config.take("bits", optional(whole()), None) or config.take("w_bit", optional(whole()), 4)
        group = config.take("group_size", optional(whole(-1)), None) or config.take("q_group_size", whole(-1), 128)
        layout = config.take("version", optional(text), None) or "gemm"
        if bits != 4 or layout.lower() != "gemm":
            raise ModelError(
                f"{self.where}: AWQ of {bits} bits in the layout {shown(layout)}; read are 4 bits in gemm. Save the "
                "model in that."
            )
        self.zero_points = config.take("zero_point", flag, True)
        self.group = group

    def coded_bits(self, module: str, dtypes: Mapping[str, str]) -> float:
        return code_bits(4, self.group, "qzeros" not in dtypes)

    def shape(self, parts: Mapping[str, tuple[int, ...]], small: Mapping[str, Tensor]) -> tuple[int, int]:
        inputs, words = parts["qweight"]
        return words * 8, inputs

    def held(self, module: str, parts: Mapping[str, Tensor]) -> Held:
        scales_NG = parts["scales"].t().contiguous()
        rows, groups = scales_NG.shape
        codes_NK = from_awq_order(_words(parts, "qweight", 4, rows)).t().contiguous()
        group = WHOLE_ROW if self.group <= 0 else self.group
        inputs = codes_NK.shape[1]
        size = inputs if group == WHOLE_ROW else group
        if groups * size != inputs:
            raise ModelError(
                f"{module}: {groups} groups of {size} for {inputs} inputs. The config is another's, or the file is "
                "damaged."
            )
        form = _format(4, group, scales_NG.dtype)
        if "qzeros" in parts:
            zeros_NG = from_awq_order(_words(parts, "qzeros", 4, rows)).t().contiguous()
            if not self.zero_points:
                centre_of(module, zeros_NG, 4, "zero_point: false")
        elif self.zero_points:
            raise ModelError(
                f"{module} has no qzeros, and the config does not say zero_point: false. The file is incomplete: "
                "download it again."
            )
        else:
            zeros_NG = torch.full((rows, groups), 8, dtype=torch.uint8)
        return centred(Held(Blocks(codes_NK, scales_NG, None, zeros_NG), form))

    @classmethod
    def form_of(cls, form: Format) -> Format:
        return _fp16(cls, form, (4,))

    @classmethod
    def written(cls, form: Format, blocks: Blocks) -> dict[str, Tensor]:
        rows, inputs = blocks.codes.shape
        if form.block > 0:
            refuse_blocks("AWQ files have whole groups", inputs, form.block)
        if rows % 8:
            raise ModelError(f"AWQ files pack eight outputs a word, and a matrix has {rows}. Choose another format.")
        codes_NK, zeros_NG = _unsigned(form, blocks)
        return {
            "qweight": pack(to_awq_order(codes_NK.t()), 4),
            "qzeros": pack(to_awq_order(zeros_NG.t()), 4),
            "scales": blocks.scales.t().contiguous(),
        }

    @classmethod
    def config(cls, form: Format, plain: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": form.block if form.block > 0 else -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(plain),
        }
