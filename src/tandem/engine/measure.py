"""What an engine's steps cost, measured on the engine itself, before anybody has asked it for anything."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tandem.engine.batch import Batch, Sampled
from tandem.engine.costs import Rows, StepCost
from tandem.engine.deal import Deals
from tandem.engine.order import Order
from tandem.types import Request, Sampling

if TYPE_CHECKING:
    from tandem.engine.engine import Engine, Runner

PROMPTS = (16, 64, 256)  # tokens
TOGETHER = (1, 4, 16)  # sequences that draw side by side
STEPS = 4  # of each that draw


class _Watched:
    """A runner that notes what it ran."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.layout, self.vocab_size = runner.layout, runner.vocab_size
        self.rows = Rows()

    def run(self, batch: Batch) -> Sampled:
        self.rows = Rows.of(batch.works)
        return self._runner.run(batch)

    def release_memory(self) -> None:
        self._runner.release_memory()


def measure(engine: Engine) -> StepCost:
    """Runs prompts of several lengths, then draws of several at once, and fits a StepCost to what its steps took.

    The first round warms up and does not count. Nothing may be live; no page keeps what was computed, and counts
    start again.
    """
    scheduler, runner, order = engine.scheduler, engine.runner, engine.scheduler.order
    assert not scheduler.live, "an engine is measured before it is asked"
    watched = _Watched(runner)
    config = scheduler.config
    most = scheduler.layout.capacity_tokens(scheduler.pool.num_pages, config.page_tokens)
    most = min(most, config.batch_tokens)
    most = min(most, scheduler.max_context or most)
    steps: list[tuple[Rows, float]] = []
    engine.runner, scheduler.order = watched, Order(config)
    followed, scheduler.programs = scheduler.programs, None  # what is measured is nobody's program
    try:
        for round_ in range(2):
            for together in TOGETHER:
                for prompt in PROMPTS:
                    length = max(1, min(prompt, most // together - STEPS - config.page_tokens))
                    if together > config.max_sequences:
                        continue
                    for number in range(together):
                        engine.submit(_request(number, length, 97 * len(steps) + round_, engine.vocab_size))
                    while engine.has_work:
                        began = time.perf_counter()
                        engine.step()
                        if round_:
                            steps.append((watched.rows, time.perf_counter() - began))
    finally:
        for request_id in list(scheduler.live):
            scheduler.abort(request_id, 0.0)
        engine.runner, scheduler.order, scheduler.programs = runner, order, followed
    engine.release_memory()
    scheduler._stats.clear()  # who reads them has this object
    return StepCost.fit(steps)


def price(engine: Engine) -> None:
    """What service costs on this engine, where its tree of tenants does not say."""
    order = engine.scheduler.order
    if isinstance(order, Deals) and not order.measured:
        order.price(measure(engine))


def _request(number: int, length: int, salt: int, vocab_size: int) -> Request:
    tokens = tuple((31 * salt + 17 * number + 7 * place + place * place) % vocab_size for place in range(length))
    return Request(f"measure {number}", f"measure {number}", tokens, Sampling(max_new_tokens=STEPS), seed=number)
