"""Files of few-bit floats: blocks of e4m3 as DeepSeek and Transformers have them, ModelOpt's, gpt-oss's MXFP4.

All their scales multiply, `weight_scale_inv` too; two codes of 4 bits lie in a byte, the first in the low half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tandem.errors import ConfigError, ModelError
from tandem.models.fields import Fields, listed, optional, shown, table, text, whole
from tandem.models.quantised.scheme import E8M0_DTYPES, Held, Scheme, code_bits, refuse_blocks, scales_name, widened
from tandem.numerics.blocks import FORMATS, WHOLE, WHOLE_ROW, Blocks, Format
from tandem.numerics.elements import E2M1, E4M3
from tandem.numerics.packing import pack_nibbles, unpack_nibbles


def _e4m3(module: str, stored: Tensor, scale: Tensor, rows: int, columns: int, *, blocks: bool = False) -> Held:
    """By the shape of its scales: one, one a row, or one a block of rows x columns. blocks: the last alone."""
    if stored.dtype != torch.float8_e4m3fn:
        raise ModelError(
            f"{module}.weight is of {stored.dtype} {tuple(stored.shape)} beside a scale, and read is e4m3. The config "
            "is another's, or the model is not saved as codes."
        )
    high, wide = stored.shape
    scale = widened(scale)
    name = scales_name(scale.dtype)
    codes = stored.view(torch.uint8)
    if scale.numel() == 1 and not blocks:
        return Held(Blocks(codes, scale.reshape(1)), Format("fp8_tensor", E4M3, WHOLE, name))
    if scale.shape == (-(-high // rows), -(-wide // columns)):
        return Held(Blocks(codes, scale.contiguous()), Format("fp8", E4M3, columns, name, rows=rows))
    if scale.shape in ((high,), (high, 1)) and not blocks:
        return Held(Blocks(codes, scale.reshape(high, 1)), Format("fp8_row", E4M3, WHOLE_ROW, name))
    raise ModelError(
        f"{module} has scales of shape {tuple(scale.shape)} for a matrix of {high} x {wide} in blocks of {rows} x "
        f"{columns}. The config is another's, or the file is damaged."
    )


class Fp8(Scheme):
    """quant_method fp8: `weight_scale_inv` by blocks, or `weight_scale` of the tensor or of a row."""

    method = "fp8"
    parts = frozenset({"weight", "weight_scale_inv", "weight_scale"})
    key = "weight_scale_inv"
    spare = frozenset({"input_scale", "activation_scale", "k_scale", "v_scale"})

    def __init__(self, config: Fields) -> None:
        super().__init__(config)
        block = config.take("weight_block_size", optional(listed(whole(1))), None)
        self.block, self.in_blocks = block or (128, 128), block is not None
        kind = config.take("fmt", optional(text), "e4m3") or "e4m3"
        if kind != "e4m3" or len(self.block) != 2:
            raise ModelError(
                f"{self.where} has fp8 of {shown(kind)} in blocks of {self.block}; read is e4m3 in two axes."
            )
        self.notes.append("its rounding of activations to fp8: products are of activations as they are")

    def shape(self, parts: Mapping[str, tuple[int, ...]], small: Mapping[str, Tensor]) -> tuple[int, int]:
        rows, columns = parts["weight"]
        return rows, columns

    def coded_bits(self, module: str, dtypes: Mapping[str, str]) -> float:
        return 0

    def held(self, module: str, parts: Mapping[str, Tensor]) -> Held:
        if "weight_scale_inv" not in parts:
            return _e4m3(module, parts["weight"], parts["weight_scale"], *self.block)
        if "weight_scale" in parts:
            raise ModelError(f"{module} has a weight_scale_inv and a weight_scale. Remove the one that is not meant.")
        return _e4m3(module, parts["weight"], parts["weight_scale_inv"], *self.block, blocks=self.in_blocks)

    @classmethod
    def form_of(cls, form: Format) -> Format:
        if form.element != E4M3 or form.rows == 1 or form.scale != "fp32":
            raise ConfigError(f"fp8 files have fp8_128x128, and not {form.name}. Choose that, or compressed-tensors.")
        return form

    @classmethod
    def written(cls, form: Format, blocks: Blocks) -> dict[str, Tensor]:
        return {"weight": blocks.codes.view(torch.float8_e4m3fn), "weight_scale_inv": blocks.scales}

    @classmethod
    def config(cls, form: Format, plain: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": cls.method,
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [form.rows, form.block],
            "modules_to_not_convert": list(plain),
        }


class ModelOpt(Scheme):
    """NVFP4, whose scale of the tensor (`weight_scale_2`) multiplies, and FP8."""

    method = "modelopt"
    parts = frozenset({"weight", "weight_scale", "weight_scale_2", "pre_quant_scale"})
    key = "weight_scale"
    spare = frozenset({"input_scale", "k_scale", "v_scale", "output_scale"})

    def __init__(self, config: Fields) -> None:
        super().__init__(config)
        inner = config.take("quantization", optional(table), None)
        config = config if inner is None else Fields(self.where, inner)
        kind = config.take("quant_algo", optional(text), None) or "NVFP4"
        if kind not in ("NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MIXED_PRECISION", "W4A16_NVFP4"):
            raise ModelError(f"{self.where} has ModelOpt's {shown(kind)}; read are NVFP4 and FP8.")
        self.group = config.take("group_size", optional(whole(1)), None) or 16
        if config.take("kv_cache_quant_algo", optional(text), None):
            self.notes.append("its scales of keys and values (engine.kv_dtype says how they are kept)")
        if kind != "W4A16_NVFP4":
            self.notes.append("its rounding of activations: products are of activations as they are")

    def shape(self, parts: Mapping[str, tuple[int, ...]], small: Mapping[str, Tensor]) -> tuple[int, int]:
        rows, columns = parts["weight"]
        return rows, columns * 2 if "weight_scale_2" in parts else columns

    def coded_bits(self, module: str, dtypes: Mapping[str, str]) -> float:
        return code_bits(8, self.group, True) if dtypes.get("weight") == "U8" else 0

    def held(self, module: str, parts: Mapping[str, Tensor]) -> Held:
        if "pre_quant_scale" in parts:
            raise ModelError(
                f"{module} has a pre_quant_scale, which multiplies activations before the product; that is not "
                "computed here. Export the model without AWQ's scales, or with them folded in."
            )
        stored, scale = parts["weight"], parts["weight_scale"]
        if stored.dtype != torch.uint8:
            return _e4m3(module, stored, scale, 128, 128)
        codes_NK = unpack_nibbles(stored)
        if scale.dtype != torch.float8_e4m3fn or scale.shape[-1] * self.group != codes_NK.shape[-1]:
            raise ModelError(
                f"{module}.weight_scale is of {scale.dtype} and shape {tuple(scale.shape)} for {codes_NK.shape[-1]} "
                f"inputs in blocks of {self.group}. The config is another's, or the file is damaged."
            )
        bytes_NG = scale.view(torch.uint8)
        blocks = Blocks(codes_NK, bytes_NG, parts["weight_scale_2"].float().reshape(()))
        return Held(blocks, replace(FORMATS["nvfp4"], block=self.group))

    @classmethod
    def form_of(cls, form: Format) -> Format:
        if form.element != E2M1 or (form.scale, form.block) != ("e4m3", 16) or form.chain == "divided":
            raise ConfigError(
                f"modelopt files have nvfp4, nvfp4_inference or nvfp4_four_six, and not {form.name}. Choose one."
            )
        return form

    @classmethod
    def written(cls, form: Format, blocks: Blocks) -> dict[str, Tensor]:
        refuse_blocks("ModelOpt's files have whole blocks", blocks.codes.shape[1], form.block)
        assert blocks.whole is not None
        return {
            "weight": pack_nibbles(blocks.codes),
            "weight_scale": blocks.scales.view(torch.float8_e4m3fn),
            "weight_scale_2": blocks.whole.float().reshape(()).clone(),
        }

    @classmethod
    def config(cls, form: Format, plain: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": cls.method,
            "quant_algo": "W4A16_NVFP4",
            "group_size": form.block,
            "kv_cache_quant_algo": None,
            "ignore": list(plain),
        }


class Mxfp4(Scheme):
    """gpt-oss's: `NAME_blocks`, bytes [N, blocks, 16], and `NAME_scales`, e8m0."""

    method = "mxfp4"
    parts = frozenset({"blocks", "scales"})
    key = "blocks"

    def split(self, name: str) -> tuple[str, str]:
        for part in ("blocks", "scales"):
            if name.endswith(f"_{part}"):
                return name.removesuffix(f"_{part}"), part
        return super().split(name)

    def shape(self, parts: Mapping[str, tuple[int, ...]], small: Mapping[str, Tensor]) -> tuple[int, int]:
        *_, rows, blocks, half = parts["blocks"]
        return rows, blocks * half * 2

    def coded_bits(self, module: str, dtypes: Mapping[str, str]) -> float:
        return code_bits(8, 32, True)

    def held(self, module: str, parts: Mapping[str, Tensor]) -> Held:
        if parts["blocks"].dtype != torch.uint8 or parts["scales"].dtype not in E8M0_DTYPES:
            raise ModelError(
                f"{module} has blocks of {parts['blocks'].dtype} and scales of {parts['scales'].dtype}, and both are "
                "bytes. The file is damaged."
            )
        codes_NK = unpack_nibbles(parts["blocks"].flatten(-2))
        scales_NG = parts["scales"].view(torch.uint8)
        if scales_NG.shape[-1] * 32 != codes_NK.shape[-1]:
            raise ModelError(
                f"{module}: {scales_NG.shape[-1]} scales of blocks of 32 for {codes_NK.shape[-1]} inputs. The file is "
                "damaged."
            )
        return Held(Blocks(codes_NK, scales_NG), FORMATS["mxfp4"])

    @classmethod
    def form_of(cls, form: Format) -> Format:
        if form.element != E2M1 or (form.scale, form.block, form.rows) != ("e8m0", 32, 1):
            raise ConfigError(f"mxfp4 files have mxfp4 by any of its rules, and not {form.name}. Choose one.")
        return form

    @classmethod
    def written(cls, form: Format, blocks: Blocks) -> dict[str, Tensor]:
        refuse_blocks("MXFP4's files have whole blocks", blocks.codes.shape[1], form.block)
        packed = pack_nibbles(blocks.codes).unflatten(-1, (-1, 16))
        return {"blocks": packed, "scales": blocks.scales}

    @classmethod
    def config(cls, form: Format, plain: Sequence[str]) -> dict[str, Any]:
        return {"quant_method": cls.method, "modules_to_not_convert": list(plain)}
