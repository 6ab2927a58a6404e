#!/usr/bin/env bash
# auto_gptq 0.7.1 (the last version), torch 2.13.0 on a processor: QuantLinear.pack of zero points, as a model is saved with sym=False.
# GPTQ's first file format stores a zero point less one. A group whose weights are all positive has the zero point 0, a float; less one
# it is -1.0, and `.astype(np.uint32)` makes 0xFFFFFFFF of it, which is shifted and or-ed into the word without a mask: the zero points of
# all outputs behind it in the word of eight become 15 as well. What a stored 15 is, two modules of the package answer otherwise:
# qlinear_cuda (and its Triton kernel) masks and adds one, so 16; qlinear_cuda_old adds one and masks, so 0. One of 64 outputs has the zero
# point 0 here: its seven neighbours, whose zero points are 8, come back wrong by 8 scales in every weight, the one itself is right in one
# module of the two. No error, no warning.
# Output seen: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
# Its __init__ needs an older Transformers; the module that packs does not.
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps auto_gptq==0.7.1
cat > "$folder/expected" <<'END'
qlinear_cuda: zero points 0 8 8 8 8 8 8 8 8 8, word 0xffffffff, are read as 16 16 16 16 16 16 16 16 8 8
qlinear_cuda_old: zero points 0 8 8 8 8 8 8 8 8 8, word 0xffffffff, are read as 0 0 0 0 0 0 0 0 8 8
qlinear_cuda: zero points 1 8 8 8 8 8 8 8 8 8, word 0x77777770, are read as 1 8 8 8 8 8 8 8 8 8
qlinear_cuda_old: zero points 1 8 8 8 8 8 8 8 8 8, word 0x77777770, are read as 1 8 8 8 8 8 8 8 8 8
END
"$folder/venv/bin/python" - 2> /dev/null > "$folder/seen" <<'END'
import importlib
import importlib.util
import sys
import types

import torch

root = importlib.util.find_spec("auto_gptq").submodule_search_locations[0]
for name, path in (("auto_gptq", ""), ("auto_gptq.nn_modules", "/nn_modules"), ("auto_gptq.nn_modules.qlinear", "/nn_modules/qlinear")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [root + path]
for first in (0, 1):
    for name in ("qlinear_cuda", "qlinear_cuda_old"):
        QuantLinear = importlib.import_module(f"auto_gptq.nn_modules.qlinear.{name}").QuantLinear
        zeros = torch.full((64, 1), 8.0)
        zeros[0] = first
        linear = torch.nn.Linear(64, 64, bias=False)
        linear.weight.data = torch.arange(64).remainder(16).expand(64, 64) - zeros  # codes 0 to 15, scales of 1
        layer = QuantLinear(4, 64, 64, 64, False, weight_dtype=torch.float32)
        layer.pack(linear, torch.ones(64, 1), zeros.clone(), torch.zeros(64, dtype=torch.int32))
        back = (torch.arange(64).remainder(16) - layer(torch.eye(64)).T.detach())[:10, 0]
        told = " ".join(f"{zero:g}" for zero in zeros[:10, 0].tolist())
        word = int(layer.qzeros[0, 0]) & 0xFFFFFFFF
        print(f"{name}: zero points {told}, word {word:#x}, are read as {' '.join(f'{zero:g}' for zero in back.tolist())}")
END
diff "$folder/expected" "$folder/seen"
