#!/usr/bin/env bash
# compressed-tensors 0.20.0 and torchao 0.18.0 with torch 2.13.0, the same weights as MXFP4, each as it comes. Where the largest of a block
# is in [7, 8) x 2^k, compressed-tensors takes a scale twice as large: it rounds the largest to a power of two by one bit of mantissa,
# halves up, so from 1.75; torchao's default (FLOOR) takes the floor, as OCP's specification says. A sixth of all blocks of normal numbers
# come back otherwise: the largest, 7, as 8 or as 6, and 0.6 as 1.0 or as 0.5. A model trained against the rounding of the one and stored
# by the other has other weights, and both files say "mxfp4".
# Output seen: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check compressed-tensors==0.20.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps torchao==0.18.0
cat > "$folder/expected" <<'END'
6: compressed-tensors [6.0, 3.0, 1.0, 0.5], torchao [6.0, 3.0, 1.0, 0.5]
6.99: compressed-tensors [6.0, 3.0, 1.0, 0.5], torchao [6.0, 3.0, 1.0, 0.5]
7: compressed-tensors [8.0, 3.0, 1.0, 1.0], torchao [6.0, 3.0, 1.0, 0.5]
7.5: compressed-tensors [8.0, 3.0, 1.0, 1.0], torchao [6.0, 3.0, 1.0, 0.5]
7.99: compressed-tensors [8.0, 3.0, 1.0, 1.0], torchao [6.0, 3.0, 1.0, 0.5]
8: compressed-tensors [8.0, 3.0, 1.0, 1.0], torchao [8.0, 3.0, 1.0, 1.0]
of 100,000 normal blocks 16789 differ
END
"$folder/venv/bin/python" - 2> /dev/null > "$folder/seen" <<'END'
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torchao.prototype.mx_formats.mx_tensor import MXTensor

args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
for largest in (6.0, 6.99, 7.0, 7.5, 7.99, 8.0):
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([largest, 3.1, 1.2, 0.6])
    amax = x.abs().amax(-1, keepdim=True)
    theirs = fake_quantize(x, calculate_qparams(-amax, amax, args)[0], torch.zeros(1, 1), args)
    other = MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)
    print(f"{largest:g}: compressed-tensors {theirs[0, :4].tolist()}, torchao {other[0, :4].tolist()}")

x = torch.randn(100_000, 32, generator=torch.Generator().manual_seed(0))
amax = x.abs().amax(-1, keepdim=True)
theirs = fake_quantize(x, calculate_qparams(-amax, amax, args)[0], torch.zeros(len(x), 1), args)
other = MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)
print(f"of 100,000 normal blocks {int((theirs != other).any(-1).sum())} differ")
END
diff "$folder/expected" "$folder/seen"
