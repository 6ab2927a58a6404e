"""`bench schedule`: what a decision by shares takes; `bench isolation`: two tenants on the real engine."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from tandem.bench.work import MODEL

if TYPE_CHECKING:
    from tandem.engine.engine import Engine

PROGRAMS, RUNNING, LEVELS = 1000, 256, 4
STEPS, WARM_UP = 200, 20
MOST_MS = 1.0  # wanted of a decision
CROWD, FEW = 200, 2  # requests in flight of two tenants
BACKLOGS = {"few": 200, "crowd": 400}  # of two that both have more than runs (engine.max_sequences is 256)
NEW, PROMPT = 32, 24  # tokens
WINDOW_S = 10.0
SLOWER, APART = 1.3, 0.05  # wanted: latency over half an engine's, and shares off the weights'


def schedule() -> dict[str, Any]:
    """Milliseconds of a plan and of its charges, by order: 1,000 programs of 64 users, of whom 256 run."""
    rows = []
    for name, order, thin in (
        ("arrival", "arrival", False),
        ("shares", "shares", False),
        ("one of few", "shares", True),
    ):
        planned, charged, run = _decisions(order, thin)
        row = {
            "order": name,
            "plan_ms": 1e3 * statistics.median(planned),
            "charge_ms": 1e3 * statistics.median(charged),
        }
        rows.append({**row, "p99_ms": 1e3 * sorted(planned)[int(0.99 * len(planned))], "rows": run})
    return {"bench": "schedule", "programs": PROGRAMS, "running": RUNNING, "wanted_ms": MOST_MS, "rows": rows}


def _decisions(order: str, thin: bool) -> tuple[list[float], list[float], int]:
    """Seconds of each plan and of each advance, and rows of a step. thin: a tenant of one program cuts steps short."""
    from tandem.engine.batch import Sampled
    from tandem.engine.config import EngineConfig
    from tandem.engine.costs import StepCost
    from tandem.engine.schedule import Scheduler
    from tandem.engine.share import Shares
    from tandem.types import Request, Sampling

    cost = StepCost(base_s=2e-3, prefill_token_s=1e-5, context_token_s=1e-9, decode_token_s=1e-4)
    config = EngineConfig(max_sequences=RUNNING, order=order)  # type: ignore[arg-type]
    scheduler = Scheduler(config, 1 << 16, shares=Shares(cost=cost) if order == "shares" else None)
    for number in range(PROGRAMS):
        tenant = f"org{number % 4}/team{number // 4 % 4}/user{number // 16 % 4}"
        if thin and number == PROGRAMS - 1:
            tenant = "few/team/user"
        tokens = tuple(range(9 * number, 9 * number + 32))
        request = Request(f"r{number}", f"p{number}", tokens, Sampling(max_new_tokens=4096), seed=0, tenant=tenant)
        scheduler.submit(request, 0.0)
    planned, charged, now = [], [], 0.0
    gc.collect()
    for step in range(WARM_UP + STEPS):
        began = time.perf_counter()
        batch = scheduler.plan(now)
        middle = time.perf_counter()
        scheduler.advance(batch)
        ended = time.perf_counter()
        scheduler.resolve(batch, Sampled([0] * batch.num_draws, {"logprobs": [0.0] * batch.num_draws}), now)
        now += 0.01
        if step >= WARM_UP:
            planned.append(middle - began)
            charged.append(ended - middle)
    return planned, charged, len(batch.works)


def isolation(windows: int = 3) -> dict[str, Any]:
    """Seconds a request, and shares over windows, of tenants alone and together; by arrival too."""
    alone = _served("shares", {"few": FEW}, 1)
    crowd = _served("shares", {"crowd": CROWD}, 1)
    first = _served("arrival", {"few": FEW, "crowd": CROWD}, 1)
    both = _served("shares", {"few": FEW, "crowd": CROWD}, windows)
    many = _served("shares", BACKLOGS, windows)
    return {
        "bench": "isolation",
        "model": MODEL,
        "in_flight": {"few": FEW, "crowd": CROWD},
        "rows": [
            {"work": "few alone, on half an engine", "few_s": 2 * alone["few_s"]},
            {"work": "crowd alone, on half an engine", "crowd_tok_s": crowd["crowd_tok_s"] / 2},
            {"work": "together, by arrival", **first},
            {"work": "together, by shares", **both},
            {"work": f"{BACKLOGS['few']} beside {BACKLOGS['crowd']}, by shares", **many},
        ],
        "slower": both["few_s"] / (2 * alone["few_s"]),
        "wanted_slower": SLOWER,
        "apart": max(many["apart"], default=0.0),
        "backlogged": many["backlogged"],
        "wanted_apart": APART,
    }


def _served(order: str, flights: dict[str, int], windows: int) -> dict[str, Any]:
    """Tenants that ask again as soon as they are answered, for so many windows of WINDOW_S after a warm-up.

    apart: of a window, by how much a share is off its weight. Who runs all that it asks for has what it wants and is
    owed nothing, so that says something of steps in which all have requests that wait (backlogged: their part).
    """
    from tandem.engine.config import EngineConfig
    from tandem.engine.deal import Deals
    from tandem.models.config import ModelConfig
    from tandem.run.parts import build_parts
    from tandem.types import Request, Sampling

    config = EngineConfig(kv_memory_bytes=1 << 29, order=order)  # type: ignore[arg-type]
    engine: Engine = build_parts(ModelConfig(MODEL), config, learns=False).engine
    rng, asked, born = random.Random(0), 0, dict[str, float]()

    def ask(tenant: str) -> None:
        nonlocal asked
        asked += 1
        tokens = tuple(rng.randrange(engine.vocab_size) for _ in range(PROMPT))
        born[f"{tenant}#{asked}"] = time.perf_counter()
        sampling = Sampling(max_new_tokens=NEW)
        engine.submit(Request(f"{tenant}#{asked}", f"{tenant}#{asked}", tokens, sampling, seed=asked, tenant=tenant))

    for tenant, count in flights.items():
        for _ in range(count):
            ask(tenant)
    took, tokens, apart = defaultdict[str, list[float]](list), Counter[str](), list[float]()
    deals, steps, backlogged = engine.scheduler.order, 0, 0
    for window in range(windows + 1):  # the first warms up
        began, before = time.perf_counter(), _had(deals, flights) if isinstance(deals, Deals) else {}
        while time.perf_counter() < began + WINDOW_S:
            for completion in engine.step():
                tenant = completion.request_id.partition("#")[0]
                if window:
                    took[tenant].append(time.perf_counter() - born[completion.request_id])
                    tokens[tenant] += len(completion.tokens)
                ask(tenant)
            if window and isinstance(deals, Deals):
                steps += 1
                backlogged += all(deals.tree.tenant(tenant).waiting for tenant in flights)
        if window and isinstance(deals, Deals):
            had = {tenant: seconds - before[tenant] for tenant, seconds in _had(deals, flights).items()}
            apart.append(max(abs(len(had) * seconds / sum(had.values()) - 1) for seconds in had.values()))
    found: dict[str, Any] = {"apart": apart, "backlogged": backlogged / max(1, steps)}
    for tenant in flights:
        found[f"{tenant}_s"] = statistics.median(took[tenant]) if took[tenant] else float("nan")
        found[f"{tenant}_tok_s"] = tokens[tenant] / (windows * WINDOW_S)
    return found


def _had(deals: Any, flights: dict[str, int]) -> dict[str, float]:
    """Device-seconds of each tenant."""
    return {tenant: deals.tree.tenant(tenant).had / 1e12 for tenant in flights}
