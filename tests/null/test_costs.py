"""What a step costs, against least squares by hand, and an engine that is simulated by it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.engine.batch import Work
from tandem.engine.config import EngineConfig
from tandem.engine.costs import Rows, StepCost
from tandem.engine.schedule import Scheduler
from tandem.errors import ConfigError
from tandem.sim.engine import SimEngine
from tandem.types import Request, Sampling

TRUE = StepCost(base_s=2e-3, prefill_token_s=3e-5, context_token_s=4e-8, decode_token_s=5e-4)


def asked(name: str, prompt: int, new: int) -> Request:
    return Request(name, name, tuple(range(prompt)), Sampling(max_new_tokens=new), seed=0)


def test_a_row_reads_all_that_is_before_it_and_itself() -> None:
    """Prompts are charged for their first token's context alone, or for none."""
    request = asked("a", 3, 1)
    works = [Work(0, 10, [1], (), 1, request), Work(1, 4, [1, 2, 3], (), 1, request)]
    assert Rows.of(works) == Rows(prefill=3, context=11 + 5 + 6 + 7, decode=1)
    assert TRUE.rows(Rows.of(works[1:])) == pytest.approx(TRUE.prefill(4, 3)) == pytest.approx(3 * 3e-5 + 18 * 4e-8)


@given(st.lists(st.tuples(st.integers(0, 512), st.integers(0, 64), st.integers(0, 4096)), min_size=12, max_size=40))
def test_the_fit_finds_the_profile_that_steps_were_made_of(points: list[tuple[int, int, int]]) -> None:
    """A coefficient is fitted to another's column, or the scale of a column is lost."""
    points = [*points, (0, 1, 10), (64, 0, 100), (128, 8, 3000), (0, 64, 200)]
    rows = [Rows(prefill, context * (prefill + decode), decode) for prefill, decode, context in points]
    found = StepCost.fit([(each, TRUE.of(each)) for each in rows])
    for each in rows:
        assert found.of(each) == pytest.approx(TRUE.of(each), rel=1e-6)


def test_noisy_steps_are_fitted_as_lstsq_fits_them() -> None:
    """Another weighting than by what a step took, under which short steps do not count."""
    rng = np.random.default_rng(7)
    rows = [Rows(int(p), int(c), int(d)) for p, c, d in rng.integers(1, (400, 90_000, 64), (60, 3))]
    took = [TRUE.of(each) * float(rng.uniform(0.9, 1.1)) for each in rows]
    table = np.array([[1.0, *each] for each in rows]) / np.array(took)[:, None]
    wanted = np.linalg.lstsq(table, np.ones(60), rcond=None)[0]
    found = StepCost.fit(list(zip(rows, took, strict=True)))
    assert (found.base_s, found.prefill_token_s, found.context_token_s, found.decode_token_s) == pytest.approx(
        tuple(wanted), rel=1e-9
    )


def test_what_cannot_be_negative_is_left_out() -> None:
    """A step is worth less for having more in it."""
    rows = [Rows(p, c, d) for p in (0, 64, 256) for c in (0, 5000) for d in (0, 8, 32)]
    falling = [(each, 1e-3 + 1e-5 * each.prefill + 1e-4 * each.decode - 1e-8 * each.context) for each in rows]
    found = StepCost.fit(falling)
    assert found.context_token_s == 0.0 and found.decode_token_s == pytest.approx(1e-4, rel=0.05)


def test_steps_that_tell_nothing_apart_are_refused() -> None:
    """Coefficients out of nowhere decide who is served."""
    with pytest.raises(ConfigError, match="cannot be fitted to 5 steps"):
        StepCost.fit([(Rows(0, 10, 4), 1e-3)] * 5)
    with pytest.raises(ConfigError, match=r"cost.base_s is 0"):
        StepCost(base_s=0)


def test_all_memory_for_a_second_is_a_second() -> None:
    """Memory has no price, or one that was named is overwritten."""
    assert TRUE.priced(1000).held_token_s * 500 * 4.0 == pytest.approx(2.0)
    assert StepCost(held_token_s=0.5).priced(1000).held_token_s == 0.5


def test_a_simulated_engine_takes_what_its_steps_cost() -> None:
    """The clock of a simulation stands still, or its requests end at other lengths than asked."""
    scheduler = Scheduler(EngineConfig(page_tokens=4, batch_tokens=16, max_sequences=4), num_pages=32)
    engine, now, ended = SimEngine(scheduler, TRUE), 0.0, {}
    engine.submit(asked("a", 6, 3), now)
    engine.submit(asked("b", 2, 1), now)
    while engine.has_work:
        seconds, completions = engine.step(now)
        now += seconds
        ended |= {one.request_id: (len(one.tokens), one.finished_s) for one in completions}
    first = TRUE.of(Rows(8, 21 + 3, 0))
    assert ended["b"] == (1, pytest.approx(first))
    assert ended["a"] == (3, pytest.approx(first + TRUE.of(Rows(0, 7, 1)) + TRUE.of(Rows(0, 8, 1)))) == (3, now)
    assert engine.busy_s == pytest.approx(now) and engine.step(now) == (0.0, [])
