#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, safetensors 0.8.0: `from_pretrained` of a folder of shards reads of
# model.safetensors.index.json only the names of the files. A tensor that lies in two of them is taken from the last
# file in alphabetical order, whatever the index's weight_map says, without a word; where model.safetensors lies beside
# an index that does not name it, the index is not read at all. Output seen:
#   weight_map names shard-a: norm is read from shard-b
#   model.safetensors beside the index: norm is read from model.safetensors
# Exits non-zero where this is no longer so. An index whose torch is built for the CPU keeps the download small.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 safetensors==0.8.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

shape = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_key_value_heads=1, tie_word_embeddings=False))
tensors = {name: one.clone() for name, one in model.state_dict().items()}
name, folder = "model.norm.weight", Path("model")
folder.mkdir()
model.config.architectures = ["LlamaForCausalLM"]
model.config.save_pretrained(folder)


def write(file: str, names: list[str], value: float) -> None:
    held = {one: tensors[one] for one in names} | {name: torch.full((8,), value)}
    save_file(held, folder / file, metadata={"format": "pt"})


def norm() -> float:
    return AutoModelForCausalLM.from_pretrained(folder).model.norm.weight.tolist()[0]


body = [one for one in tensors if one != "lm_head.weight"]
write("shard-a.safetensors", body, 1.0)
write("shard-b.safetensors", ["lm_head.weight"], 2.0)
places = dict.fromkeys(body, "shard-a.safetensors") | {"lm_head.weight": "shard-b.safetensors"}
index = {"metadata": {}, "weight_map": places}
(folder / "model.safetensors.index.json").write_text(json.dumps(index))
first = norm()
print(f"weight_map names shard-a: norm is read from {({1.0: 'shard-a', 2.0: 'shard-b'})[first]}")
write("model.safetensors", list(tensors), 3.0)
second = norm()
print(f"model.safetensors beside the index: norm is read from {'model.safetensors' if second == 3.0 else 'a shard'}")
raise SystemExit(0 if (first, second) == (2.0, 3.0) else 1)
PYTHON
