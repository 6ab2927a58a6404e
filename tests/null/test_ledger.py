"""Regression caught: a ledger that loses a token or a second."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.columns import Columns
from tandem.run.ledger import FATES, Ledger
from tandem.types import Failure, Group, Prompt, Sample, StopReason, Trajectory

SHAPES = st.sampled_from(["trained", "zero_advantage", "filtered", "truncated", "failed", "aborted", "masked"])


@given(
    st.lists(st.tuples(SHAPES, st.integers(0, 40)), max_size=30),
    st.integers(0, 1000),
    st.lists(
        st.dictionaries(st.sampled_from(["rollout", "learner", "update", "other"]), st.floats(0, 1e4)), max_size=20
    ),
    st.floats(0, 1e5),
)
def test_ledger_closes_without_remainder(shapes, in_flight, steps, spare_s):
    """A token counted twice or not at all; seconds that do not sum to the wall clock."""
    expected = dict.fromkeys(FATES, 0)
    trajectories, samples, fates = [], [], {}
    for place, (fate, sampled) in enumerate(shapes):
        expected[fate] += sampled
        reason = StopReason.ABORTED if fate == "aborted" else StopReason.LENGTH
        failure = Failure("reward", "nan") if fate == "failed" else None
        size = sampled + 2
        columns = Columns.of(tokens=(1,) * size, loss_mask=(False, False) + (True,) * sampled)
        trajectories.append(Trajectory(str(place), "p", columns, 1.0, reason, failure))
        fates[trajectories[-1].id] = "failed" if fate == "aborted" else "trained" if fate == "masked" else fate
        if fate in ("trained", "masked"):
            credited = columns.having(advantages=(float(fate == "trained"),) * size)
            samples.append(Sample(f"{place}/0", "p", credited))
    ledger = Ledger()
    counts = ledger.record([Group(Prompt("p", ()), tuple(trajectories))], samples, fates)
    assert counts == expected
    for seconds in steps:
        ledger.spend(seconds)
    claimed = sum(seconds.get(name, 0.0) for seconds in steps for name in ("rollout", "learner", "update"))
    total = sum(expected.values()) + in_flight
    resumed = Ledger()
    resumed.restore(json.loads(json.dumps(ledger.state())))
    closed = resumed.close({"main": claimed + spare_s}, total)
    assert closed["tokens"] == expected | {"in_flight": in_flight, "total": total}
    phases = dict(closed["nanoseconds"]["main"])
    wall = phases.pop("wall")
    assert sum(phases.values()) == wall == int((claimed + spare_s) * 1e9)
    assert min(phases.values()) >= 0 and "other" not in phases
    assert phases["idle/other"] == pytest.approx(spare_s * 1e9, abs=2e3 + len(steps) * 3, rel=1e-9)


def test_ledger_refuses_what_cannot_be():
    """More tokens trained than sampled, a failed trajectory trained on, or overlapping spans, hidden in a remainder."""
    ledger = Ledger()
    ledger.spend({"rollout": 3.0, "learner": 2.0})
    with pytest.raises(AssertionError, match="phases claim 1.0 s more than its wall of 4.0 s"):
        ledger.close({"main": 4.0})
    ledger.tokens["trained"] = 10
    with pytest.raises(AssertionError, match="10 tokens have a fate, but only 9 were sampled"):
        ledger.close({"main": 5.0}, sampled_tokens=9)
    columns = Columns.of(tokens=(1, 2), loss_mask=(False, True))
    sample = Sample("p/0/0", "p", columns.having(advantages=(0.0, 1.0)))
    with pytest.raises(AssertionError, match="without a trajectory"):
        ledger.record([], [sample], {})
    bad = Trajectory("p/0", "p", columns, failure=Failure("reward", "nan"))
    with pytest.raises(AssertionError, match="failed, yet it was trained"):
        ledger.record([Group(Prompt("p", ()), (bad,))], [sample], {"p/0/0": "trained"})


def test_ledger_counts_what_an_interruption_cost():
    """Steps thrown away by a resume vanish from the bill."""
    ledger = Ledger()
    ledger.discard([{"step": step, "tokens": 1600, "seconds": {"rollout": 2.5, "learner": 1.5}} for step in (4, 5)])
    closed = ledger.close({"main": 9.0})
    assert closed["tokens"]["discarded"] == closed["tokens"]["total"] == 3200
    assert closed["seconds"]["main"] == {"discarded": 8.0, "idle/other": 1.0, "wall": 9.0}
