#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3: the ids that the files give added tokens are not what the tokens get. A token
# beyond the vocabulary is numbered by its turn: `added_tokens_decoder` {"300": "<x>"} over 257 entries makes <x> 257,
# and so does "id": 300 in tokenizer.json. No exception; the model's row 300 is never used, row 257 is.
# Seen: [257] [257].
# Exits non-zero if that changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q "transformers==5.23.0" "tokenizers==0.23.3" jinja2
"$place/venv/bin/python" - "$place" <<'PY'
import json, sys
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

place = Path(sys.argv[1])
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
vocab = {letter: index for index, letter in enumerate([*letters, "ab"])}
seen = []
for name in ("config", "whole"):
    folder = place / name
    folder.mkdir()
    own = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "whole":
        own.add_special_tokens(["<x>"])
    text = own.to_str(pretty=True).replace('"id": 257', '"id": 300')
    (folder / "tokenizer.json").write_text(text)
    given = {"added_tokens_decoder": {"300": {"content": "<x>", "special": True}}} if name == "config" else {}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **given}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    seen.append(AutoTokenizer.from_pretrained(folder).encode("<x>"))
print("ids of <x> by added_tokens_decoder, by tokenizer.json:", *seen)
sys.exit(seen != [[257], [257]])
PY
