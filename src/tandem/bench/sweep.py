"""Decode steps at any number of sequences and any context, without running the prompts; and their rate over both.

The prompts are made up: a stub takes the place of the runner until every sequence has its context, and the pages hold
random keys and values. The steps that are timed are the engine's own.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tandem.bench.work import MODEL, random_requests
from tandem.plan.roofline import SMOLLM2, Machine, decode_cost, kv_bytes, measure, timed

if TYPE_CHECKING:
    from tandem.engine.batch import Batch, Sampled
    from tandem.engine.engine import Engine, Runner

SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SEQUENCES_CONTEXT = 128
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8160)
CONTEXTS_SEQUENCES = 16
WARM_UP, STEPS = 3, 16  # of a point; the median of the steps counts


class _Stub:
    """A runner that draws without running."""

    def __init__(self, runner: Runner) -> None:
        self.layout, self.vocab_size = runner.layout, runner.vocab_size

    def run(self, batch: Batch) -> Sampled:
        from tandem.engine.batch import Sampled

        return Sampled([0] * batch.num_draws, {"logprobs": [-1.0] * batch.num_draws})

    def release_memory(self) -> None:
        """Holds no pages."""


def fill_pages(engine: Engine) -> None:
    """The same random keys and values in every page."""
    import torch

    pools = [tensor for pool in engine.runner.pools for tensor in pool.tensors()]  # type: ignore[attr-defined]
    for pool in pools:
        page = torch.randn(1, pool.shape[1])
        if not pool.is_floating_point():
            page = page.mul(40).abs()  # bytes of codes
        elif not pools[0].is_floating_point():
            page = page.abs() / 40  # their scales
        pool.copy_(page.expand_as(pool))


def start_decoding(engine: Engine, sequences: int, context: int, new: int, rng: random.Random) -> None:
    """Submit requests of `new` tokens and take them, in one step of the stub, to where each runs one token a step."""
    for request in random_requests(sequences, context, engine.vocab_size, new + 1, rng):
        engine.submit(request)
    scheduler, runner = engine.scheduler, engine.runner
    config, engine.runner = scheduler.config, _Stub(runner)
    scheduler.config = dataclasses.replace(config, batch_tokens=config.batch_tokens + sequences * context)
    engine.step()
    engine.runner, scheduler.config = runner, config
    assert not scheduler.waiting and all(s.computed == context for s in scheduler.running), "the pages do not suffice"


def stop_decoding(engine: Engine) -> None:
    """Abort what is live."""
    for request_id in list(engine.scheduler.live):
        engine.abort(request_id)


def _point(engine: Engine, machine: Machine, sequences: int, context: int, axis: str) -> dict[str, Any]:
    start_decoding(engine, sequences, context, WARM_UP + STEPS, random.Random(f"{axis}/{sequences}/{context}"))
    for _ in range(WARM_UP):
        engine.step()
    step_s = statistics.median(timed(engine.step) for _ in range(STEPS))
    stop_decoding(engine)
    cost = decode_cost(engine.runner.decoder.spec, sequences, context + WARM_UP + STEPS / 2)  # type: ignore[attr-defined]
    least_s = machine.least_s(cost)
    return {
        "axis": axis,
        "sequences": sequences,
        "context": context,
        "step_s": step_s,
        "tok_s": sequences / step_s,
        "limit_tok_s": sequences / least_s,
        "share_of_limit": least_s / step_s,
    }


def sweep(sequences: Sequence[int] = SEQUENCES, contexts: Sequence[int] = CONTEXTS) -> dict[str, Any]:
    """A row a point: over `sequences` at a context of 128, and over `contexts` at 16 sequences."""
    from tandem.engine.config import EngineConfig
    from tandem.models.config import ModelConfig
    from tandem.run.parts import build_parts

    slack = EngineConfig().lookahead_tokens + EngineConfig().page_tokens
    tokens = max(
        max(sequences, default=1) * (SEQUENCES_CONTEXT + slack), CONTEXTS_SEQUENCES * (max(contexts, default=1) + slack)
    )
    config = EngineConfig(kv_memory_bytes=tokens * kv_bytes(SMOLLM2))
    engine = build_parts(ModelConfig(MODEL), config).engine
    fill_pages(engine)
    machine = measure()
    points = [("sequences", n, SEQUENCES_CONTEXT) for n in sequences]
    points += [("context", CONTEXTS_SEQUENCES, length) for length in contexts]
    return {
        "bench": "sweep",
        "limits": {"matrix FLOP/s": machine.flop_s, "memory bytes/s": machine.bytes_s},
        "rows": [_point(engine, machine, n, length, axis) for axis, n, length in points],
    }
