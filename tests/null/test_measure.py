"""An engine's own steps, timed by a runner that takes as long as a profile says."""

from __future__ import annotations

import time

import pytest

from tandem.engine.batch import Batch, Sampled
from tandem.engine.config import ProgramsConfig
from tandem.engine.costs import Rows, StepCost
from tandem.engine.deal import Deals
from tandem.engine.measure import measure, price
from tests.null.paged_memory import make

TRUE = StepCost(base_s=4e-3, prefill_token_s=4e-5, context_token_s=0.0, decode_token_s=8e-4)


def test_an_engine_is_priced_by_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prices are of a default profile, or the measurement leaves counts, pages or requests behind."""
    engine, runner = make(num_pages=400, batch_tokens=1024, max_sequences=64, order="shares")
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run(batch: Batch) -> Sampled:
        now[0] += TRUE.of(Rows.of(batch.works))
        return Sampled([1] * batch.num_draws, {"logprobs": [-1.0] * batch.num_draws})

    runner.run = run  # type: ignore[method-assign]
    runner.release_memory = lambda: None  # type: ignore[attr-defined]
    found = measure(engine)
    for wanted in (Rows(100, 0, 0), Rows(0, 0, 30), Rows(500, 0, 7)):
        assert found.of(wanted) == pytest.approx(TRUE.of(wanted), rel=1e-3)
    assert engine.stats.run_tokens == 0 and not engine.scheduler.live and not len(engine.scheduler.index)
    price(engine)
    order = engine.scheduler.order
    assert isinstance(order, Deals) and order.measured and order.tree.root.had == 0
    assert order.cost.base_s == pytest.approx(4e-3, rel=1e-3) and order.cost.held_token_s == 1 / 1600


def test_a_renewed_engine_keeps_what_was_measured_and_turned_off() -> None:
    """After a step that raised, service is sold at the default's price, debts are forgotten, or a policy that was
    stopped acts again."""
    engine, _ = make(num_pages=400, order="shares", programs=ProgramsConfig("enforce", "ttl"))
    order, programs, told = engine.scheduler.order, engine.scheduler.programs, list[str]()
    assert isinstance(order, Deals) and programs is not None
    order.price(TRUE)
    order.tree.pay(order.tree.leaf("a", "p"), 5)
    engine.on_restoring(told.append)
    engine.set_programs_mode("shadow")
    again = engine.renewed().scheduler
    assert isinstance(again.order, Deals) and again.programs is not None
    assert again.order.measured and again.order.cost == order.cost and again.order.tree.tenant("a").had == 5
    assert again.programs.mode == "shadow" and again.programs.restoring == programs.restoring
