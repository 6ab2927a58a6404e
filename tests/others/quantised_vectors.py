"""What packages write of small matrices and read back: tests/goldens/quantised.safetensors, for CI without them.

`quantised_vectors.py OUT [SOURCES]` in an environment of files.txt. SOURCES, a folder with the unpacked sources of
autoawq 0.2.9 (awq), auto_gptq 0.7.1 (auto_gptq) and nvidia-modelopt 0.47.0 (modelopt), whose own requirements exclude
today's Transformers: their packing alone is imported. Without it those vectors are left out.

A case METHOD/NAME has tensors METHOD/NAME/PART, and as METHOD/NAME/values some rows of the matrix in the dtype in which
the package gives it; of all rows a digest, beside the case's config, in the file's metadata.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file

ROWS, COLUMNS = 32, 64
KEPT = [0, 3, 31]  # rows of `values` in the file


def matrix(seed: int) -> torch.Tensor:
    """bf16 numbers as fp32: ties are frequent; rows of unlike sizes, one of zeros, and a column beyond the rest."""
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.1
    x *= torch.logspace(-2, 1, ROWS)[:, None]
    x[3] = 0
    x[:, 5] *= 8
    return x.to(torch.bfloat16).float()


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "int4_asym": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
    "int3": ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32}),
    "int8_packed": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int5_asym_channel": ("pack-quantized", {"num_bits": 5, "strategy": "channel", "symmetric": False}),
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8_asym": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8_tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8_block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [24, 48]},
    ),
    "mxfp8": (
        "mxfp8-quantized",
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": torch.float8_e4m3fn,
        },
    ),
}


def blocked(x: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """[.., the numbers of a scale]."""
    strategy = str(getattr(args.strategy, "value", args.strategy))
    if strategy == "tensor":
        return x.reshape(1, -1)
    if strategy == "channel":
        return x[:, None]
    if strategy == "block":
        high, wide = args.block_structure
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % wide, 0, -x.shape[0] % high))
        return padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).transpose(1, 2).flatten(-2)
    return x.unflatten(1, (-1, args.group_size))


def compressed(layout: str, given: dict[str, Any], weight: torch.Tensor) -> dict[str, torch.Tensor]:
    args = QuantizationArgs(**given)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    packer = BaseCompressor.get_value_from_registry(layout)
    numbers, whole = blocked(weight, args), None
    if layout.startswith("nvfp4"):
        whole = generate_gparam(weight.amin(), weight.amax())
    scale, zero = calculate_qparams(numbers.amin(-1), numbers.amax(-1), args, global_scale=whole)
    if whole is None and not layout.startswith("mx"):
        scale = scale.to(torch.bfloat16)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    if whole is not None:
        state["weight_global_scale"] = whole
    parts = packer.compress(state, scheme)
    back = packer.decompress(dict(parts), scheme)["weight"]
    return {**{name: torch.as_tensor(one).detach() for name, one in parts.items()}, "values": back.detach()}


def stub(name: str, path: Path) -> None:
    """A package whose own __init__ is not run."""
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(path)]


def group_scales(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of integers from 0 on, [G, N]: scales, whole zero points."""
    numbers = weight.unflatten(1, (-1, group))
    low, high = numbers.amin(-1).clamp_max(0), numbers.amax(-1).clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-4)
    scale = scale.half().float()
    return scale.t().contiguous(), (-low / scale).round().clamp(1, 2**bits - 1).t().contiguous()


def awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    module = importlib.import_module("awq.modules.linear.gemm")
    tools = importlib.import_module("awq.utils.packing_utils")
    scales, zeros = group_scales(weight, 4, 32)
    zeros[0, 0] = 0  # AWQ's zero points may be 0
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    numbers = ((weight / scales.t().repeat_interleave(32, 1)).round() + zeros.t().repeat_interleave(32, 1)).clamp(0, 15)
    linear.weight.data = (numbers - zeros.t().repeat_interleave(32, 1)) * scales.t().repeat_interleave(32, 1)
    made = module.WQLinear_GEMM.from_linear(linear, 4, 32, scales=scales.t().t(), zeros=zeros)
    back = tools.dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, 32)
    return {"qweight": made.qweight, "qzeros": made.qzeros, "scales": made.scales, "values": back.t().contiguous()}


def gptq(weight: torch.Tensor, bits: int, order: torch.Tensor | None) -> dict[str, torch.Tensor]:
    module = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    groups = torch.arange(COLUMNS) // 32 if order is None else order
    columns = torch.argsort(groups, stable=True)
    scales, zeros = group_scales(weight[:, columns], bits, 32)
    wide_s, wide_z = scales[groups].t(), zeros[groups].t()
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False).half()
    linear.weight.data = (((weight / wide_s).round() + wide_z).clamp(0, 2**bits - 1) - wide_z) * wide_s
    made = module.QuantLinear(bits, 32, COLUMNS, ROWS, False, weight_dtype=torch.float16)
    made.pack(linear, scales.t().contiguous(), zeros.t().contiguous(), groups.to(torch.int32))
    made.scales = made.scales.float()  # so that its product with the identity is the matrix, once rounded
    back = made(torch.eye(COLUMNS)).t().contiguous().detach()
    parts = {"qweight": made.qweight, "qzeros": made.qzeros, "scales": made.scales.half(), "g_idx": made.g_idx}
    return {**parts, "values": back}


def modelopt(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    kind = importlib.import_module("modelopt.torch.quantization.qtensor.nvfp4_tensor").NVFP4QTensor
    made, scale, whole = kind.quantize(weight.clone(), 16)
    back = made.dequantize(torch.float32, scale=scale, double_scale=whole, block_sizes={-1: 16})
    return {"weight": made._quantized_data, "weight_scale": scale, "weight_scale_2": whole, "values": back}


def digest(values: torch.Tensor) -> str:
    values = values + 0  # some packages have no -0
    return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def config_of(case: str) -> dict[str, Any]:
    """As the packages write it into config.json."""
    method, _, name = case.partition("/")
    if method == "compressed-tensors":
        layout, given = CASES[name]
        groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**given), format=layout)}
        whole = QuantizationConfig(
            config_groups=groups, format=layout, quantization_status="compressed", ignore=["lm_head"]
        )
        return whole.model_dump(mode="json")
    if method == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    if method == "modelopt":
        return {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]}
    bits = int(name.removeprefix("int")[0])
    return {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": name.endswith("order"), "sym": False}


def made(sources: Path | None) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """Cases, and what made them."""
    found = {
        f"compressed-tensors/{name}": compressed(layout, given, matrix(index))
        for index, (name, (layout, given)) in enumerate(CASES.items())
    }
    versions = {one: version(one) for one in ("compressed-tensors", "torch")}
    if sources is not None:
        for name in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
            stub(name, sources / name.replace(".", "/"))
        for name in ("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear"):
            stub(name, sources / name.replace(".", "/"))
        found["awq/int4_asym"] = awq(matrix(20))
        found["gptq/int4"] = gptq(matrix(21), 4, None)
        found["gptq/int3"] = gptq(matrix(22), 3, None)
        found["gptq/int8"] = gptq(matrix(23), 8, None)
        shuffled = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0)) // 32
        found["gptq/int4_order"] = gptq(matrix(24), 4, shuffled)
        found["modelopt/nvfp4"] = modelopt(matrix(25))
        versions |= {"autoawq": "0.2.9", "auto_gptq": "0.7.1", "nvidia-modelopt": version("nvidia-modelopt")}
    return found, versions


if __name__ == "__main__":
    cases, packages = made(Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    told = {case: {"config": config_of(case), "digest": digest(parts["values"])} for case, parts in cases.items()}
    for parts in cases.values():
        parts["values"] = parts["values"][KEPT]
    flat = {f"{case}/{part}": one.contiguous().clone() for case, parts in cases.items() for part, one in parts.items()}
    save_file(flat, sys.argv[1], metadata={"made with": json.dumps(packages), "cases": json.dumps(told)})
    print(json.dumps(packages), len(cases))
