"""How other packages read quantised models, for test_files.py: `files_read.py FOLDER OUT`, a model a folder of FOLDER.

OUT gets tensors NAME/TENSOR in fp32: by Transformers with compressed-tensors, and where those read no such model on a
processor, by compressed-tensors' converters and Transformers' own functions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import (
    AutoAWQConverter,
    FP8BlockDequantizer,
    ModelOptNvfp4Converter,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Tensors = dict[str, torch.Tensor]


def by_transformers(folder: Path) -> Tensors:
    config = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    return {name: one for name, one in model.state_dict().items() if name.endswith("proj.weight")}


def unpacked(tensors: Tensors, scheme: Any, layout: str, part: str) -> Tensors:
    """By compressed-tensors, of every module that has `part`."""
    packer, found = BaseCompressor.get_value_from_registry(layout), {}
    for name in tensors:
        module, _, last = name.rpartition(".")
        if last == part:
            own = {
                one.removeprefix(module + "."): tensor
                for one, tensor in tensors.items()
                if one.startswith(module + ".")
            }
            found[f"{module}.weight"] = packer.decompress(own, scheme)["weight"]
    return found


def by_converters(folder: Path, config: dict[str, Any]) -> Tensors:
    tensors = load_file(folder / "model.safetensors")
    if config["quant_method"] == "awq":
        converter: Any = AutoAWQConverter.from_autoawq_config(config)
        scheme = converter._build_quant_config().config_groups["config_group_0"]
        return unpacked(converter.process(tensors), scheme, "pack-quantized", "weight_packed")
    if config["quant_method"] == "modelopt":
        converter = ModelOptNvfp4Converter(targets=["re:.*proj$"], ignore=["lm_head"])
        scheme = converter._build_quant_config().config_groups["config_group_0"]
        return unpacked(converter.process(tensors), scheme, "nvfp4-pack-quantized", "weight_packed")
    if config["quant_method"] == "fp8":
        modules = [name.removesuffix(".weight_scale_inv") for name in tensors if name.endswith("_scale_inv")]
        made = FP8BlockDequantizer(targets=modules, weight_block_size=config["weight_block_size"]).process(tensors)
        return {f"{module}.weight": made[f"{module}.weight"] for module in modules}
    modules = [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]
    return {
        f"{one}.weight": convert_moe_packed_tensors(tensors[f"{one}_blocks"][None], tensors[f"{one}_scales"][None])[0].T
        for one in modules
    }


def read(folder: Path) -> Tensors:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if config["quant_method"] == "compressed-tensors":
        return by_transformers(folder)
    return by_converters(folder, config)


if __name__ == "__main__":
    folders = [one for one in sorted(Path(sys.argv[1]).iterdir()) if (one / "config.json").is_file()]
    every = {f"{one.name}/{name}": tensor.float().contiguous() for one in folders for name, tensor in read(one).items()}
    save_file(every, sys.argv[2])
