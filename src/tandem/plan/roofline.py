"""The least time that work can take on this machine: the larger of its products over the matrix rate and its bytes over
the memory's bandwidth, both measured in the process that asks.

Operations are the multiplications and additions of matrix products and of attention's two products; a query at position
q meets q + 1 keys. Bytes are what has to come from memory at least once: a step's read of all matrices, the output head
among them, and of the keys and values that its queries see. What is elementwise counts by its bytes alone.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tandem import env
from tandem.models.parts import kept_bytes, layer_slots
from tandem.models.spec import ModelSpec

SMOLLM2 = ModelSpec(
    "llama",
    vocab_size=49152,
    width=576,
    ff_width=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    head_size=64,
    tied_embeddings=True,
    max_position=8192,
)
BYTES = 2  # of a weight, a key or a value channel: bf16
Q4_FILE_BYTES = 96_436_224  # matrices of SmolLM2's Q4_1 file: layers in Q4_1, 66.4 MB, the embedding in Q8_0, 30.1 MB


@dataclass(frozen=True, slots=True)
class Cost:
    """Operations and bytes of some work.

    >>> Cost(1.0, 2.0) + 2 * Cost(3.0, 4.0)
    Cost(flop=7.0, bytes=10.0)
    """

    flop: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flop + other.flop, self.bytes + other.bytes)

    def __rmul__(self, times: float) -> Cost:
        return Cost(times * self.flop, times * self.bytes)


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured rates.

    >>> Machine(flop_s=10.0, bytes_s=5.0).least_s(Cost(20.0, 5.0))
    2.0
    """

    flop_s: float  # of a bf16 product, 2048 cubed
    bytes_s: float  # of a read

    def least_s(self, cost: Cost) -> float:
        return max(cost.flop / self.flop_s, cost.bytes / self.bytes_s)


def timed(run: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def machine_name() -> str:
    """What tells this machine's rates from another's."""
    return f"{platform.node()}, {platform.machine()}, {env.num_threads()} threads"


def measure() -> Machine:
    """The best of five of our own product, 2048 cubed, and of a sum over 400 MB."""
    import torch

    from tandem.kernels.linear import logits
    from tandem.kernels.weight import Weight

    x, weight = torch.randn(2048, 2048).bfloat16(), Weight(torch.randn(2048, 2048).bfloat16(), matrix=True)
    wide = torch.zeros(100_000_000)

    def rate(amount: float, run: Callable[[], Any]) -> float:
        run()
        return amount / min(timed(run) for _ in range(5))

    return Machine(rate(2 * 2048**3, lambda: logits(x, weight)), rate(wide.nbytes, wide.sum))


def layer_parameters(spec: ModelSpec) -> int:
    """Elements of the matrices of all layers."""
    return sum(slot.size for slot in layer_slots(spec) if slot.columns is not None)


def parameters(spec: ModelSpec) -> int:
    """Elements of all matrices that are multiplied by; a tied embedding once."""
    return layer_parameters(spec) + spec.vocab_size * spec.width


def kv_bytes(spec: ModelSpec) -> int:
    """Keys and values of one token."""
    return sum(kept_bytes(spec, "bfloat16"))


def attention_flop(spec: ModelSpec) -> int:
    """Of one query position and one key position, over heads and layers: q k and p v."""
    return 4 * spec.layers * spec.heads * spec.head_size


def pairs(length: float, before: float = 0.0) -> float:
    """Queries times the keys they see, for `length` positions behind `before`.

    >>> pairs(3), pairs(2, before=10)
    (6.0, 23.0)
    """
    return length * before + length * (length + 1) / 2


def decode_cost(spec: ModelSpec, rows: float, context: float, weight_bytes: float | None = None) -> Cost:
    """One step of `rows` sequences, each a token behind `context` others."""
    seen = rows * (context + 1)
    flop = 2 * rows * parameters(spec) + seen * attention_flop(spec)
    return Cost(flop, (weight_bytes or BYTES * parameters(spec)) + seen * kv_bytes(spec))


def prefill_cost(spec: ModelSpec, prompts: int, length: int) -> Cost:
    """Prompts run and one token drawn of each, for which one row a prompt needs more of the last layer than keys and
    values, and needs the head."""
    layer, kv = layer_parameters(spec) / spec.layers, 2 * spec.kv_heads * spec.head_size * spec.width
    rows = 2 * length * ((spec.layers - 1) * layer + kv) + 2 * (layer - kv + spec.vocab_size * spec.width)
    met = (1 - 1 / spec.layers) * pairs(length) + length / spec.layers
    flop = prompts * (rows + met * attention_flop(spec))
    return Cost(flop, BYTES * parameters(spec) + prompts * length * kv_bytes(spec))


def train_bytes(spec: ModelSpec) -> float:
    """What an update has to move."""
    return parameters(spec) * (2 * BYTES + 8 + 24 + BYTES)


def train_cost(spec: ModelSpec, samples: int, length: int) -> Cost:
    """Forward and twice that backward, and AdamW: gradients written and read, master weights and moments (fp32) both
    ways, weights written."""
    flop = 2 * samples * length * parameters(spec) + samples * pairs(length) * attention_flop(spec)
    return Cost(3 * flop, train_bytes(spec))


def group_cost(spec: ModelSpec, prompts: int, length: int, samples: int, own: float) -> Cost:
    """One decode step of groups, `own` tokens behind a shared prompt, whose keys and values are read once a group."""
    step = decode_cost(spec, prompts * samples, length + own)
    return Cost(step.flop, step.bytes - prompts * (samples - 1) * length * kv_bytes(spec))


def step_flop(spec: ModelSpec, row: Mapping[str, Any]) -> float:
    """Operations of a step, by its row of metrics.jsonl: what the engine ran for its programs, and the learner's
    forward and twice that backward; attention by the step's mean lengths. Evaluation and other models are left out."""
    layers, head = 2 * layer_parameters(spec), 2 * spec.vocab_size * spec.width
    sampled = row["tokens"]
    run = row.get("run_tokens", sampled)
    requests = max(1.0, (row.get("trajectories") or 0) * (row.get("turns") or 1))
    behind = (row.get("cached_tokens") or 0) / requests
    flop = run * layers + sampled * head + requests * pairs(run / requests, behind) * attention_flop(spec)
    rows, trained, samples = (row.get(name) or 0 for name in ("learner_rows", "trained_tokens", "trained_samples"))
    if rows and samples:
        own, shared = trained / samples, max(0, rows - trained)  # rows of prompts and of what tools said
        before = max(0.0, behind + run / requests - own)
        met = samples * pairs(own, before) + shared * before / 2
        flop += 3 * (rows * layers + trained * head + met * attention_flop(spec))
    return float(flop)
