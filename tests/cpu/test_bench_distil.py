"""`bench distil` on texts of a few tokens."""

from __future__ import annotations

from tandem.bench import distil
from tandem.plan.roofline import Machine


def test_a_step_of_distillation_stands_beside_what_it_cannot_do_without(monkeypatch):
    """An objective that asks more of its samples than the bench gives them: no figure at all."""
    monkeypatch.setattr(distil, "MODEL", "new:width=32,layers=2,heads=4,kv_heads=2,ff_width=48,max_position=64")
    monkeypatch.setattr(distil, "TEXTS", (2, 8))
    monkeypatch.setattr(distil, "REPEATS", 1)
    found = list(distil.distil(Machine(1e12, 1e10)))
    kinds = ["forward", "jensen_shannon", "forward and texts", "top 32"]
    assert [(one.peer, one.work) for one in found] == [
        (peer, f"distil {kind} 2x8") for kind in kinds for peer in ("tandem", "sft + teacher")
    ]
    assert all(one.value > 0 for one in found)
