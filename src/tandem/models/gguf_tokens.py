"""A tokeniser as a GGUF file has it: tokens by id, their kinds, merges, and llama.cpp's name for how text is split."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

from tandem.errors import ModelError, TandemWarning
from tandem.models.tokenizer import Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How tokenizer.json splits, and whether its last step, which spells bytes, splits as GPT-2 does: llama.cpp's name, and
# whether a whole word that is a token stays one.
_SPLITS = {
    ((), True): ("gpt-2", False),
    (("digits",), True): ("smollm", False),
    ((_WORDS + r"\p{N}{1,3}" + _REST,), False): ("llama-bpe", True),
    ((_WORDS + r"\p{N}" + _REST,), False): ("qwen2", False),
}


def tokenizer_fields(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Metadata `tokenizer.*` of a byte-level BPE tokeniser. ModelError for another, or a splitting without a name."""
    made = json.loads(tokenizer.backend.to_str())
    model, added = made["model"], made["added_tokens"]
    pre = _split(tokenizer.origin, made)
    tokens = {index: token for token, index in model["vocab"].items()} | {one["id"]: one["content"] for one in added}
    kinds = {one["id"]: _CONTROL if one["special"] else _USER_DEFINED for one in added}
    listed = [tokens.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    if not merges:
        warnings.warn(
            f"the tokeniser of {tokenizer.origin} has no merges, and llama.cpp loads no such file; tandem reads it.",
            TandemWarning,
            stacklevel=2,
        )
    begins = tokenizer.backend.encode("a", add_special_tokens=True).ids[:1] == [tokenizer.bos_token_id]
    stops, eos = tokenizer.stop_token_ids, tokenizer.eos_token_id
    eos = eos if eos is not None else next(iter(stops), None)
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": eos,
        "eot": next((one for one in stops if one != eos), None),
        "unknown": tokenizer.token_to_id(tokenizer.special_tokens.get("unk_token", "")),
        "padding": tokenizer.pad_token_id,
    }
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": listed,
        "tokenizer.ggml.token_type": [
            kinds.get(index, _NORMAL if index in tokens else _UNUSED) for index in range(vocab_size)
        ],
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{name}_token_id": one for name, one in ids.items() if one is not None},
        "tokenizer.ggml.add_bos_token": begins,
        "tokenizer.ggml.add_space_prefix": False,
        **({"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}),
    }


def _split(origin: str, made: Mapping[str, Any]) -> str:
    """llama.cpp's name."""
    model, normal = made["model"], made.get("normalizer")
    steps = _steps(made.get("pre_tokenizer") or {})
    spelt = bool(steps) and steps[-1].get("type") == "ByteLevel" and not steps[-1].get("add_prefix_space")
    if model["type"] != "BPE" or not spelt or (normal or {}).get("type", "NFC") != "NFC":
        raise ModelError(
            f"the tokeniser of {origin} is no byte-level BPE, the one kind that is written into GGUF here. Take the "
            "model from a GGUF file, whose tokeniser is kept, or convert it by llama.cpp's convert_hf_to_gguf.py."
        )
    # Without merges a byte is a token, wherever text is split.
    own = tuple(map(_step, steps[:-1])), bool(steps[-1].get("use_regex", True)) or not model["merges"]
    name, whole = _SPLITS.get(own, ("", False))
    if not name or whole != bool(model.get("ignore_merges")):
        raise ModelError(
            f"the tokeniser of {origin} splits text in a way that llama.cpp has no name for that is known here "
            f"({', '.join(name for name, _ in _SPLITS.values())}). Take the model from a GGUF file, whose tokeniser is "
            "kept, or convert it by llama.cpp's convert_hf_to_gguf.py."
        )
    return name


def _steps(splitter: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = splitter.get("pretokenizers")
    return [splitter] if inner is None else [step for one in inner for step in _steps(one)]


def _step(step: Mapping[str, Any]) -> str:
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return "digits"
    plain = step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert")
    return str(step["pattern"].get("Regex", "?")) if plain else "?"
