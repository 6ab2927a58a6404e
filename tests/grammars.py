"""A tokeniser of few tokens for tests of constraints, and the texts of a schema counted out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from tandem.engine.constraint import Grammars

END, OTHER_END = "<|end|>", "<|stop|>"


def tokenizer_json(tokens: Sequence[str]) -> str:
    """A byte-level tokeniser of exactly these tokens, ASCII without spaces; those in <| |> are special."""
    special = [token.startswith("<|") for token in tokens]
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for i, token in enumerate(tokens)
        if special[i]
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []}
    return json.dumps(
        {"version": "1.0", "added_tokens": added, "pre_tokenizer": level, "decoder": level, "model": model}
    )


def grammars_of(tokens: Sequence[str], vocab_size: int | None = None) -> Grammars:
    return Grammars(lambda: tokenizer_json(tokens), len(tokens) if vocab_size is None else vocab_size)


def texts(schema: Any) -> Iterator[str]:
    """Every text without whitespace that a schema of few values has, keys in their order."""
    if "enum" in schema:
        yield from (json.dumps(value, separators=(",", ":")) for value in schema["enum"])
    elif schema.get("type") == "boolean":
        yield from ("true", "false")
    elif schema.get("type") == "integer":
        yield from map(str, range(schema["minimum"], schema["maximum"] + 1))
    elif "anyOf" in schema:
        yield from itertools.chain.from_iterable(texts(one) for one in schema["anyOf"])
    elif schema.get("type") == "array":
        for count in range(schema.get("minItems", 0), schema["maxItems"] + 1):
            yield from (f"[{','.join(some)}]" for some in itertools.product([*texts(schema["items"])], repeat=count))
    else:
        required = set(schema.get("required", ()))
        ways = [
            [f'"{name}":{text}' for text in texts(one)] + [None] * (name not in required)
            for name, one in schema["properties"].items()
        ]
        for some in itertools.product(*ways):
            yield "{" + ",".join(part for part in some if part is not None) + "}"
