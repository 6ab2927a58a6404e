"""compressed-tensors' files: what llm-compressor writes and vLLM reads.

Integers of 1 to 8 bits packed along inputs (`pack-quantized`, zero points along outputs) or a byte each; e4m3 by
tensor, row, group or block; NVFP4, whose scale of the tensor divides; MXFP4 and MXFP8. Words hold integers plus half
their range, so none below 0; bytes hold them signed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tandem.errors import ConfigError, ModelError
from tandem.models.fields import Fields, flag, listed, number, optional, shown, table, text, whole
from tandem.models.quantised.integers import centred
from tandem.models.quantised.scheme import (
    E8M0_DTYPES,
    Held,
    Scheme,
    centre_of,
    code_bits,
    refuse_blocks,
    scales_name,
    widened,
)
from tandem.numerics.blocks import FORMATS, WHOLE, WHOLE_ROW, Blocks, Format
from tandem.numerics.elements import E2M1, E4M3, Fixed
from tandem.numerics.packing import num_words, pack, pack_nibbles, unpack, unpack_nibbles

LAYOUTS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)


@dataclass(frozen=True, slots=True)
class _Group:
    """Of config_groups: how the weights of its targets are stored."""

    targets: tuple[str, ...]
    bits: int
    strategy: str
    group: int
    rows: int  # of a block
    columns: int
    symmetric: bool
    ordered: bool  # columns lie in the order of their groups

    @property
    def size(self) -> int:
        """Inputs of a block, as a `Format` says it."""
        sizes = {"tensor": WHOLE, "channel": WHOLE_ROW, "block": self.columns}
        return sizes.get(self.strategy, self.group)


class CompressedTensors(Scheme):
    """By its config's groups."""

    method = "compressed-tensors"
    parts = frozenset(
        {"weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale"}
        | {"weight_g_idx"}
    )
    key = "weight_scale"
    spare = frozenset(
        {"input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"}
        | {"k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point"}
    )

    def __init__(self, config: Fields) -> None:
        super().__init__(config)
        layout = config.take("format", optional(text), None) or "mixed-precision"
        sparsity = config.take("sparsity_config", optional(table), None)
        turned = config.take("transform_config", optional(table), None)
        sparse = (sparsity or {}).get("format", "dense") != "dense"
        if layout not in LAYOUTS or sparse or turned:
            raise ModelError(
                f"{self.where} has compressed-tensors' layout {shown(layout)}"
                f"{', sparse weights' if sparse else ''}"
                f"{', rotations in the forward pass (transform_config)' if turned else ''}; read are "
                f"{', '.join(LAYOUTS)}, dense and not rotated. Save the model in one of these."
            )
        if config.take("quantization_status", optional(text), "compressed") not in ("compressed", None):
            raise ModelError(
                f"{self.where} has quantization_status {shown(config.values['quantization_status'])}: its weights are "
                "not stored as codes. Save the model with save_compressed=True."
            )
        groups = config.take("config_groups", table)
        self.groups = [self._group(name, one) for name, one in groups.items()]
        if config.take("kv_cache_scheme", optional(table), None):
            self.notes.append("its scales of keys and values (engine.kv_dtype says how they are kept)")

    def _group(self, name: str, given: Any) -> _Group:
        where = f"group {shown(name)} of {self.where}"
        if not isinstance(given, dict):
            raise ModelError(f"{where} is a preset's name and not a scheme. Save the model again with a newer package.")
        scheme = Fields(where, given)
        targets = scheme.take("targets", listed(text))
        layout = scheme.take("format", optional(text), None)
        if layout is not None and layout not in LAYOUTS:
            raise ModelError(f"{where} has the layout {shown(layout)}; read are {', '.join(LAYOUTS)}.")
        activations = scheme.take("input_activations", optional(table), None)
        if activations:
            bits = Fields(where, activations).take("num_bits", optional(number()), None)
            self.notes.append(
                f"its rounding of activations to {bits:g} bits: products are of the weights' values and of activations "
                "as they are where engine.weights and model.weights do not round them (w8a8, w4a8)"
                if bits
                else "its rounding of activations"
            )
        given = scheme.take("weights", table)
        weights = Fields(f"weights of {where}", given)
        group = weights.take("group_size", optional(whole(-1)), None) or -1
        strategy = weights.take("strategy", optional(text), None) or ("group" if group > 0 else "channel")
        if strategy not in ("tensor", "channel", "group", "block", "tensor_group"):
            raise ModelError(f"{weights.where} has strategy {shown(strategy)}, which is not read.")
        block = weights.take("block_structure", optional(listed(whole(1))), None) or (1, 1)
        return _Group(
            targets,
            weights.take("num_bits", whole(1, 8), 8),
            strategy,
            group,
            block[0] if strategy == "block" else 1,
            block[-1],
            weights.take("symmetric", flag, True),
            weights.take("actorder", optional(text), None) not in ("group", "dynamic"),
        )

    def _of(self, module: str) -> _Group:
        """By a module's name before its class."""
        for one in self.groups:
            if any(_names(target, module) for target in one.targets):
                return one
        linear = [one for one in self.groups if any(target in ("Linear", "Embedding") for target in one.targets)]
        if not linear:
            raise ModelError(f"{self.where} has no group for {module}, which is quantised. The config is another's.")
        return linear[0]

    def shape(self, parts: Mapping[str, tuple[int, ...]], small: Mapping[str, Tensor]) -> tuple[int, int]:
        if "weight_shape" in small:
            if small["weight_shape"].is_floating_point():
                raise ValueError("a shape is of whole numbers")
            rows, columns = small["weight_shape"].flatten().tolist()
            return rows, columns
        if "weight_packed" in parts:
            rows, columns = parts["weight_packed"]
            return rows, columns * 2
        rows, columns = parts["weight"]
        return rows, columns

    def coded_bits(self, module: str, dtypes: Mapping[str, str]) -> float:
        group = self._of(module)
        if dtypes.get("weight_packed") == "U8":
            return code_bits(8, group.group, True)
        plain = group.strategy in ("group", "channel") and "weight_g_idx" not in dtypes
        if not plain or dtypes.get("weight", "I8") != "I8" or group.bits == 8 and not group.symmetric:
            return 0
        return code_bits(group.bits, group.size, group.symmetric)

    def held(self, module: str, parts: Mapping[str, Tensor]) -> Held:
        group, scale = self._of(module), parts["weight_scale"]
        packed = parts.get("weight_packed")
        if packed is not None and packed.dtype == torch.uint8:
            _refuse_order(module, parts)
            return _fp4(module, packed, parts, group.size)
        if packed is not None:
            rows, columns = parts["weight_shape"].flatten().tolist()
            codes_NK = _unpacked(module, packed, group.bits, columns)
            bits = group.bits
        else:
            stored = parts["weight"]
            rows, columns = stored.shape
            if stored.dtype == torch.float8_e4m3fn:
                _refuse_order(module, parts)
                return _e4m3(module, stored, scale, group)
            if stored.dtype != torch.int8:
                raise ModelError(
                    f"{module}.weight is of {stored.dtype} beside a weight_scale: the model is saved as rounded floats "
                    "and not as codes. Save it with save_compressed=True."
                )
            codes_NK, bits = stored.view(torch.uint8) ^ 128, 8
        scales_NG = _grid(module, scale, rows, columns, group)
        zeros_NG = _zeros(module, parts, group, bits, rows, scales_NG.shape)
        if zeros_NG is None:
            codes_NK = codes_NK ^ (1 << (bits - 1))
        form = Format(f"int{bits}", Fixed(f"int{bits}", bits, 0), group.size, scales_name(scales_NG.dtype))
        form = replace(form, rows=group.rows, zero_point=zeros_NG is not None)
        order = parts.get("weight_g_idx")
        if order is None and not group.ordered and form.block > 0:
            raise ModelError(f"{module} has no weight_g_idx, but the config says actorder. Download the file again.")
        size = columns if form.block == WHOLE_ROW else form.block
        ordered = order is None or bool((order < 0).all()) or torch.equal(order.long(), torch.arange(columns) // size)
        groups_K = None if ordered or order is None else order.long()
        return centred(Held(Blocks(codes_NK, scales_NG, None, zeros_NG), form, groups_K))

    @classmethod
    def form_of(cls, form: Format) -> Format:
        element = form.element
        if isinstance(element, Fixed) and not element.fraction and form.scale != "e8m0" and form.rows == 1:
            return replace(form, scale="bf16")
        if element == E4M3 and form.scale not in ("e8m0", "e4m3"):
            return form
        if form.name == "nvfp4":
            return FORMATS["nvfp4_divided"]
        if element == E2M1 and (form.scale, form.block, form.chain, form.rows) in (
            ("e4m3", 16, "divided", 1),
            ("e8m0", 32, "training", 1),
        ):
            return form
        raise ConfigError(
            f"compressed-tensors files have integers, e4m3, nvfp4 and mxfp4, and not {form.name}. Choose int4_g128, "
            "int8_row, fp8_row, fp8_128x128, nvfp4 or mxfp4."
        )

    @classmethod
    def written(cls, form: Format, blocks: Blocks) -> dict[str, Tensor]:
        rows, columns = blocks.codes.shape
        if form.block > 0 and form.rows == 1:
            refuse_blocks("compressed-tensors files have whole groups", columns, form.block)
        if form.element == E2M1:
            parts = {"weight_packed": pack_nibbles(blocks.codes)}
            if form.scale == "e8m0":
                return parts | {"weight_scale": blocks.scales}
            assert blocks.whole is not None
            return parts | {
                "weight_scale": blocks.scales.view(torch.float8_e4m3fn),
                "weight_global_scale": blocks.whole.float().reshape(1).clone(),
            }
        if form.element == E4M3:
            scales = blocks.scales.reshape(1) if form.block == WHOLE else blocks.scales
            return {"weight": blocks.codes.view(torch.float8_e4m3fn), "weight_scale": scales}
        assert isinstance(form.element, Fixed)
        bits = form.element.bits
        half = 1 << (bits - 1)
        codes_NK = blocks.codes if form.zero_point else blocks.codes ^ half
        if _bytes(form):
            parts = {"weight": (codes_NK ^ half).view(torch.int8), "weight_scale": blocks.scales}
            if blocks.zeros is not None:
                parts["weight_zero_point"] = (blocks.zeros ^ half).view(torch.int8)
            return parts
        parts = {
            "weight_packed": pack(codes_NK, bits),
            "weight_scale": blocks.scales,
            "weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
        }
        if blocks.zeros is not None:
            parts["weight_zero_point"] = pack(blocks.zeros.t(), bits).t().contiguous()
        return parts

    @classmethod
    def config(cls, form: Format, plain: Sequence[str]) -> dict[str, Any]:
        integer, tensor_group = isinstance(form.element, Fixed), form.chain == "divided"
        strategies = {WHOLE: "tensor", WHOLE_ROW: "channel"}
        strategy = "block" if form.rows > 1 else strategies.get(form.block, "tensor_group" if tensor_group else "group")
        weights = {
            "num_bits": form.element.bits,
            "type": "int" if integer else "float",
            "symmetric": not form.zero_point,
            "strategy": strategy,
            "group_size": form.block if strategy in ("group", "tensor_group") else None,
            "block_structure": [form.rows, form.block] if strategy == "block" else None,
            "dynamic": False,
            "scale_dtype": {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}.get(form.scale),
        }
        if form.element == E2M1:
            layout = "nvfp4-pack-quantized" if tensor_group else "mxfp4-pack-quantized"
        elif form.element == E4M3:
            layout = "float-quantized"
        else:
            layout = "int-quantized" if _bytes(form) else "pack-quantized"
        scheme = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": _activations(form) if layout in ("float-quantized", "int-quantized") else None,
            "output_activations": None,
        }
        return {
            "quant_method": cls.method,
            "format": layout,
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme | {"format": layout}},
            "ignore": list(plain),
            "kv_cache_scheme": None,
        }


def _activations(form: Format) -> dict[str, Any]:
    """Of readers that multiply in 8 bits: each token by its own largest, or 128 inputs of it."""
    blocks = form.rows > 1
    return {
        "num_bits": 8,
        "type": "int" if isinstance(form.element, Fixed) else "float",
        "symmetric": True,
        "strategy": "group" if blocks else "token",
        "group_size": form.block if blocks else None,
        "dynamic": True,
    }


def _bytes(form: Format) -> bool:
    """Whether an integer has a byte of its own."""
    return form.element.bits == 8 and form.block == WHOLE_ROW


def _names(target: str, module: str) -> bool:
    if target.startswith("re:"):
        try:
            return re.match(target.removeprefix("re:"), module) is not None
        except re.error as error:
            raise ModelError(f"the target {shown(target)} is no regular expression: {error}.") from error
    return target == module


def _unpacked(module: str, packed: Tensor, bits: int, columns: int) -> Tensor:
    """uint8 [N, K]. Dense, or as older versions packed 3, 5, 6 and 7 bits: as many codes to a word as fit."""
    words = packed.shape[1]
    if words == num_words(columns, bits):
        return unpack(packed, bits, columns)
    whole_ones = 32 // bits
    if words == -(-columns // whole_ones):
        shifts = torch.arange(0, whole_ones * bits, bits, dtype=torch.int32)
        return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)[:, :columns]
    raise ModelError(
        f"{module}.weight_packed has {words} words a row for {columns} codes of {bits} bits; "
        f"{num_words(columns, bits)} are needed. The config is another's, or the file is damaged."
    )


def _lies(parts_NG: Tensor, grid: tuple[int, ...]) -> bool:
    """Whether it has one number a block; a single group needs no axis."""
    return parts_NG.shape == grid or (grid[1:] == (1,) and parts_NG.shape == grid[:1])


def _grid(module: str, scale: Tensor, rows: int, columns: int, group: _Group) -> Tensor:
    """Scales in the shape of `Blocks`."""
    down = -(-rows // group.rows)
    across = 1 if group.size == WHOLE_ROW else -(-columns // group.size) if group.size > 0 else 1
    count = 1 if group.size == WHOLE else down * across
    if not (_lies(scale, (down, across)) or scale.numel() == count == 1):
        raise ModelError(
            f"{module}.weight_scale has shape {tuple(scale.shape)} for {rows} x {columns} by {group.strategy}; "
            f"{(1,) if group.size == WHOLE else (down, across)} is needed. The config is another's, or the file is "
            "damaged."
        )
    return scale.reshape(1) if group.size == WHOLE else scale.reshape(down, across)


def _refuse_order(module: str, parts: Mapping[str, Tensor]) -> None:
    """ModelError for floats with zero points, or in an order of columns: neither is read, unless it says nothing."""
    zeros, order = parts.get("weight_zero_point"), parts.get("weight_g_idx")
    if zeros is not None and bool((zeros.float() != 0).any()) or order is not None and bool((order >= 0).any()):
        raise ModelError(
            f"{module} is of floats and has a weight_zero_point or a weight_g_idx, which are read of integers alone. "
            "The config is another's, or the file is damaged."
        )


def _zeros(
    module: str, parts: Mapping[str, Tensor], group: _Group, bits: int, rows: int, shape: tuple[int, ...]
) -> Tensor | None:
    """Zero points in the shape of the scales, none below 0; None where the config says that there are none."""
    zeros = parts.get("weight_zero_point")
    if zeros is None:
        if group.symmetric:
            return None
        raise ModelError(
            f"{module} has no weight_zero_point, and the config says symmetric: false. The file is incomplete: "
            "download it again."
        )
    if zeros.dtype == torch.int32:
        if zeros.shape[0] != num_words(rows, bits):
            raise ValueError(f"weight_zero_point {tuple(zeros.shape)} for {rows} codes of {bits} bits")
        zeros_NG = unpack(zeros.t().contiguous(), bits, rows).t().contiguous()
    elif zeros.dtype == torch.int8 and (_lies(zeros, shape) or zeros.numel() == math.prod(shape) == 1):
        zeros_NG = (zeros.short() + (1 << (bits - 1))).to(torch.uint8).reshape(shape)
    else:
        raise ValueError(f"zero points of {zeros.dtype} {tuple(zeros.shape)} for scales {shape}")
    if not group.symmetric:
        return zeros_NG
    centre_of(module, zeros_NG, bits, "symmetric: true")
    return None


def _e4m3(module: str, stored: Tensor, scale: Tensor, group: _Group) -> Held:
    rows, columns = stored.shape
    scales = _grid(module, scale, rows, columns, group)
    scales = widened(scales)
    form = Format("fp8", E4M3, group.size, scales_name(scales.dtype), rows=group.rows)
    return Held(Blocks(stored.view(torch.uint8), scales), form)


def _fp4(module: str, packed: Tensor, parts: Mapping[str, Tensor], group: int) -> Held:
    """NVFP4, whose scale of the tensor divides, and MXFP4, which has none."""
    scale, form, whole = parts["weight_scale"], FORMATS["mxfp4"], None
    if scale.dtype == torch.float8_e4m3fn:
        if "weight_global_scale" not in parts:
            raise ModelError(f"{module} has no weight_global_scale. The file is incomplete: download it again.")
        form, whole = FORMATS["nvfp4_divided"], parts["weight_global_scale"].float().reshape(())
    elif scale.dtype not in E8M0_DTYPES or "weight_global_scale" in parts:
        raise ModelError(
            f"{module}.weight_scale is of {scale.dtype} {tuple(scale.shape)}"
            f"{' beside a weight_global_scale' if 'weight_global_scale' in parts else ''}: NVFP4 has e4m3, MXFP4 has "
            "bytes and no global scale. The config is another's, or the file is damaged."
        )
    codes_NK, scales = unpack_nibbles(packed), scale.view(torch.uint8)
    if scales.shape[-1] * group != codes_NK.shape[-1]:
        raise ModelError(
            f"{module}: {scales.shape[-1]} scales of blocks of {group} for {codes_NK.shape[-1]} inputs. The config is "
            "another's, or the file is damaged."
        )
    return Held(Blocks(codes_NK, scales, whole), replace(form, block=group))
