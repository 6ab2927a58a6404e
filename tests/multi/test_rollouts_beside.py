"""Rollouts and served requests on one engine, the real one: who comes starts in the next step, and guarantees hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from tandem.engine.deal import Deals
from tandem.engine.engine import Engine
from tandem.kernels.build.toolchain import compiler
from tandem.models.config import ModelConfig
from tandem.run.parts import build_parts
from tandem.types import Request, Sampling
from tests.placed import tiny

pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels are slow")
COST = {"base_s": 1e-3, "decode_token_s": 1e-3, "prefill_token_s": 1e-4, "held_token_s": 1e-12}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Callable[..., Engine]:
    folder = tmp_path_factory.mktemp("beside")
    config = tiny(folder, write_model)

    def build(**tenants: dict[str, float]) -> Engine:
        (folder / "shares.json").write_text(json.dumps({"tenants": tenants, "cost": COST}))
        shares = str(folder / "shares.json")
        asked = replace(config.engine, order="shares", shares=shares, max_sequences=8)
        return build_parts(ModelConfig(config.model.source), asked, learns=False).engine

    return build


class Asked:
    """Tenants that keep so many requests on their way."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.count = engine, 0

    def ask(self, tenant: str, requests: int, new: int = 40) -> None:
        for _ in range(requests):
            self.count += 1
            tokens = (3 + self.count % 50, 5 + self.count % 60, *range(10, 18))
            name = f"{tenant}#{self.count}"
            self.engine.submit(Request(name, name, tokens, Sampling(max_new_tokens=new), self.count, tenant))

    def steps(self, count: int) -> None:
        for _ in range(count):
            for completion in self.engine.step():
                self.ask(completion.request_id.partition("#")[0], 1)

    def had(self, tenant: str) -> float:
        order = self.engine.scheduler.order
        assert isinstance(order, Deals)
        return order.tree.tenant(tenant).had / 1e12


@pytest.mark.parametrize("comes", [1, 4])
def test_who_is_served_starts_in_the_next_step(built: Callable[..., Engine], comes: int) -> None:
    """A request waits for a rollout to end, since rollouts have all places."""
    engine = built(rollouts={"weight": 0.01, "guarantee": 0.1}, served={})
    asked = Asked(engine)
    asked.ask("rollouts", 30)
    asked.steps(10)
    assert [one.request.tenant for one in engine.scheduler.running] == ["rollouts"] * 8
    asked.ask("served", comes)
    engine.step()
    begun = [one for one in engine.scheduler.running if one.request.tenant == "served"]
    assert len(begun) == comes and begun[0].computed > 0
    asked.steps(12)  # short ones: a prompt is a few quanta
    assert all(len(engine.drawn(one.request.id, 0)) for one in begun)
    assert any(one.request.tenant == "rollouts" for one in engine.scheduler.running)


@pytest.mark.parametrize(("crowd", "other"), [("served", "rollouts"), ("rollouts", "served")])
def test_a_guarantee_holds_on_either_side(built: Callable[..., Engine], crowd: str, other: str) -> None:
    """Training stops while many ask; or nobody is served while it samples."""
    engine = built(**{crowd: {"weight": 100.0}, other: {"weight": 0.01, "guarantee": 0.25}})
    asked = Asked(engine)
    asked.ask(crowd, 40)
    asked.ask(other, 10)
    asked.steps(60)
    before = {tenant: asked.had(tenant) for tenant in (crowd, other)}
    asked.steps(240)
    had = {tenant: asked.had(tenant) - before[tenant] for tenant in (crowd, other)}
    assert had[other] / sum(had.values()) == pytest.approx(0.25, rel=0.05)
    asked.engine.check_integrity()
