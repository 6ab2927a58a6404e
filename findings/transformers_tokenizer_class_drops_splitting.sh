#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3: AutoTokenizer keeps only the vocabulary and the merges of tokenizer.json where
# `tokenizer_class` names a class of its own __init__ (GPT2Tokenizer, ...): the pre-tokeniser is built anew, by class.
# A file that splits digits (SmolLM2's does, and its class is GPT2Tokenizer) then gives merged digits, in silence;
# with `tokenizer_class` PreTrainedTokenizerFast, or none, the file's own splitting is kept.
# Seen: file [16, 17], PreTrainedTokenizerFast [16, 17], GPT2Tokenizer [256].
# Exits non-zero if that changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q "transformers==5.23.0" "tokenizers==0.23.3" jinja2
"$place/venv/bin/python" - "$place/model" <<'PY'
import json, sys
from pathlib import Path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

folder = Path(sys.argv[1])
folder.mkdir()
vocab = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"12": 256}
own = Tokenizer(models.BPE(vocab=vocab, merges=[("1", "2")]))
own.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
own.decoder = decoders.ByteLevel()
own.add_special_tokens(["<|endoftext|>"])
own.save(str(folder / "tokenizer.json"))
(folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
seen = [own.encode("12").ids]
for kind in ("PreTrainedTokenizerFast", "GPT2Tokenizer"):
    config = {"tokenizer_class": kind, "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    seen.append(AutoTokenizer.from_pretrained(folder).encode("12", add_special_tokens=False))
print("file, PreTrainedTokenizerFast, GPT2Tokenizer:", *seen)
sys.exit(seen != [[16, 17], [16, 17], [256]])
PY
