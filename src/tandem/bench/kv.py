"""What keys and values of few bits do to a model, on texts: a table of docs/numerics.md.

    python -m tandem.bench.kv TEXT.txt [TEXTS [NAME ...]]

prints a JSON object a rule: KL from the model with all in its own dtype. A NAME is an engine.kv_dtype, computed as the
learner and the engine do. Without names, rules of a cache that is no engine's, whose window moves with each token
(numerics/kv.py: `attended`), with decibels of keys (rotated, as the cache has them) and of values, the mean of layers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem.bench.work import MODEL
from tandem.kernels.divergence import Divergence, Head, head_divergence
from tandem.kernels.rounding import kept_of
from tandem.models.checkpoint import open_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.view import Heads, PackView, Tables, turn_reference
from tandem.numerics.blocks import sqnr_db
from tandem.numerics.kv import KvRule, attended, kept
from tandem.numerics.names import check_kv_name
from tandem.run.texts import pieces

RULES: dict[str, tuple[KvRule, KvRule]] = {
    "fp8 by head": (KvRule("head", 8), KvRule("head", 8)),
    "int8 by token": (KvRule("token", 8, 64), KvRule("token", 8, 64)),
    "int8 keys by channel": (KvRule("channel", 8), KvRule("token", 8, 64)),
    "int4 by token": (KvRule("token", 4), KvRule("token", 4)),
    "int4 keys by channel": (KvRule("channel", 4), KvRule("token", 4)),
    "int4 keys by channel, sinks": (KvRule("channel", 4, sinks=4), KvRule("token", 4, sinks=4)),
    "int2 by token": (KvRule("token", 2), KvRule("token", 2)),
    "int2 keys by channel": (KvRule("channel", 2), KvRule("token", 2)),
    "int2 keys by channel, sinks": (KvRule("channel", 2, sinks=4), KvRule("token", 2, sinks=4)),
    "KIVI 2 bits": (KvRule("channel", 2, window=128), KvRule("token", 2, window=128)),
    "KIVI 2 bits, sinks": (KvRule("channel", 2, sinks=4, window=128), KvRule("token", 2, sinks=4, window=128)),
}


class KvView:
    """A pack of one text whose keys and values are read back by rules."""

    def __init__(self, tokens: int, keys: KvRule, values: KvRule) -> None:
        self.positions_T = torch.arange(tokens)
        self.keys, self.values = keys, values
        self.decibels: list[tuple[float, float]] = []  # of each layer: keys, values

    def attend(self, layer: int, qkv_TW: Tensor, heads: Heads, tables: Tables) -> Tensor:
        query, key = turn_reference(qkv_TW, self.positions_T, heads, tables)
        value = heads.cut(qkv_TW)[2]
        self.decibels.append((sqnr_db(key, kept(key, self.keys)), sqnr_db(value, kept(value, self.values))))
        return attended(query, key, value, self.keys, self.values).to(qkv_TW.dtype).flatten(1)


def named_bits(name: str) -> float | None:
    """Of a key's number and a value's, the mean; of a head's scale nothing. None where there is no such format."""
    kept = kept_of(name)
    if kept is None:
        return None
    if kept.span is None:
        return 8.0 if kept.form is None else kept.form.bits
    both = [rule.bits_each for rule in (kept.span.keys, kept.span.values) if rule is not None]
    return sum(both) / len(both)


def table(text: Path, count: int, wanted: Sequence[str] = tuple(RULES)) -> None:
    """A line of JSON a rule."""
    checkpoint = open_checkpoint(MODEL)
    texts = pieces(text, count, checkpoint.load_tokenizer(), checkpoint.spec.max_position).taken
    decoder = Decoder(checkpoint.spec, "bfloat16").load(checkpoint.tensors())
    for name in wanted:
        keys, values = RULES.get(name, (None, None))
        own = decoder
        if keys is None:
            check_kv_name("NAME", name)
            own = Decoder(checkpoint.spec, "bfloat16", kept=kept_of(name)).load(checkpoint.tensors())
        kl, tokens, decibels = 0.0, 0, list[tuple[float, float]]()
        for piece in texts:
            tokens_T = torch.tensor(piece)
            plain = PackView([0, len(piece)])
            view = plain if keys is None or values is None else KvView(len(piece), keys, values)
            with torch.no_grad():
                heads = [
                    Head(one.forward(tokens_T, seen)[:-1], decoder.head)
                    for one, seen in ((own, view), (decoder, plain))
                ]
                found = head_divergence(heads[0], heads[1], tokens_T[1:], Divergence("forward"))
            kl, tokens = kl + float(found.divergence_N.double().sum()), tokens + len(piece) - 1
            decibels += view.decibels if isinstance(view, KvView) else []
        told: dict[str, Any] = {"rule": name}
        if keys is None or values is None:
            told["bits"] = named_bits(name)
        else:
            told["bits"] = (keys.bits_each + values.bits_each) / 2
            for side, db in enumerate(("key_db", "value_db")):
                told[db] = sum(one[side] for one in decibels) / len(decibels)
        print(json.dumps(told | {"kl": kl / tokens, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    table(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 16, sys.argv[3:] or tuple(RULES))
