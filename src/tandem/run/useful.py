"""The least work that the samples of a step need: what goodput takes as useful (docs/ledger.md has the equations)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tandem.models.spec import ModelSpec
from tandem.plan.roofline import BYTES, Cost, attention_flop, kv_bytes, layer_parameters, parameters, train_bytes
from tandem.run.ledger import reached_tokens
from tandem.types import Sample


def useful_work(spec: ModelSpec, samples: Iterable[Sample], updates: int) -> dict[str, float]:
    """Operations and bytes of the context, the tokens and the learning of samples that reached a gradient.

    Samples of one prompt share its context; all decode together, in as many passes as the longest has tokens.
    """
    shared: dict[tuple[str, int], int] = {}  # (prompt, its tokens) -> most tokens sampled behind it
    rows = context = drawn = longest = 0
    met = own = seen = 0.0
    for sample in samples:
        if not reached_tokens(sample):
            continue
        sampled_at = np.flatnonzero(sample.columns["loss_mask"])
        start, length, count = int(sampled_at[0]), len(sample.columns), len(sampled_at)
        shared[sample.prompt_id, start] = max(shared.get((sample.prompt_id, start), 0), count)
        rows, drawn, longest = rows + length - start, drawn + count, max(longest, count)
        context += length - start - count
        met += (length * (length + 1) - start * (start + 1)) / 2
        seen += float(sampled_at.sum()) + count
        own += float(sampled_at.sum()) + count * (1 - start)
    if not drawn:
        return {}
    prompts = sum(start for _, start in shared)
    context += prompts
    met += sum(start * (start + 1) / 2 for _, start in shared)
    layers, head, pair, kv = layer_parameters(spec), spec.vocab_size * spec.width, attention_flop(spec), kv_bytes(spec)
    weights = BYTES * parameters(spec)
    read = own + sum(start * most for (_, start), most in shared.items())
    costs = {
        "prefill": Cost(2.0 * context * layers + max(0.0, met - seen) * pair, weights + context * kv),
        "decode": Cost(2.0 * drawn * (layers + head) + seen * pair, longest * weights + read * kv),
        "learner": Cost(
            3 * (2.0 * (rows + prompts) * layers + 2.0 * drawn * head + met * pair), updates * train_bytes(spec)
        ),
    }
    return {f"{name}_{part}": getattr(cost, part) for name, cost in costs.items() for part in ("flop", "bytes")}
