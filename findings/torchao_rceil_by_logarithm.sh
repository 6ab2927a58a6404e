#!/usr/bin/env bash
# torchao 0.18.0 with torch 2.13.0, scales of blocks in eager mode (not compiled, not on a Blackwell GPU):
# - MX with ScaleCalculationMode.RCEIL takes ceil(log2(amax / largest)) by torch.log2 in fp32. One unit above most powers of two that
#   logarithm is a whole number, so the scale is half of what rounding up gives (the instruction cvt.rp, which the same function uses
#   on a GPU, rounds up by the bits). Of 200 blocks, whose largest is the next fp32 number above 448 x 2^k, 192 have another byte.
# - nvfp4_quantize with a scale of the tensor writes no block scale below 2^-6, e4m3's smallest normal number, though e4m3 has 2^-9, 2 x 2^-9
#   and so on below it: a block whose scale would be 2^-9 is read back with a step eight times as wide: its largest, 6 steps, as 1 of them.
# Output seen: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps torchao==0.18.0
cat > "$folder/expected" <<'END'
RCEIL: 192 of 200 scales are half of the next power of two
RCEIL of 448 x 2^10 (1 + 2^-23): byte 137, by the bits 138
nvfp4, a block of 2^-9 of the largest scale: byte 8, that of 2^-6; its largest number has the code 2 (1.0), and not 7 (6.0)
END
"$folder/venv/bin/python" - 2> /dev/null > "$folder/seen" <<'END'
import math

import torch
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

powers = torch.tensor([2.0**k for k in range(-100, 100)])
blocks = torch.zeros(200, 32)
blocks[:, 0] = torch.nextafter(powers, torch.tensor(math.inf)) * 448
scales = to_mx(blocks, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)[0].view(torch.uint8).flatten()
bits = (blocks[:, 0] / 448).view(torch.int32)
exact = (bits >> 23) + ((bits & 0x7FFFFF) > 0).int()
print(f"RCEIL: {int((scales == exact - 1).sum())} of 200 scales are half of the next power of two")
print(f"RCEIL of 448 x 2^10 (1 + 2^-23): byte {int(scales[110])}, by the bits {int(exact[110])}")

x = torch.zeros(1, 32)
x[0, 0] = 6.0 * 448.0  # its block's scale is e4m3's largest
x[0, 16] = 6.0 * 2.0**-9  # by a scale of 2^-9 this is 6
whole = per_tensor_amax_to_scale(x.abs().max())
scale, packed = nvfp4_quantize(x, 16, whole)
code = int(packed.view(torch.uint8)[0, 8]) & 15
print(
    f"nvfp4, a block of 2^-9 of the largest scale: byte {int(scale.view(torch.uint8).flatten()[1])}, that of 2^-6; "
    f"its largest number has the code {code} (1.0), and not 7 (6.0)"
)
END
diff "$folder/expected" "$folder/seen"
