"""Tenants that ask again as soon as they are answered, on a simulated engine."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tandem.engine.config import EngineConfig
from tandem.engine.costs import StepCost
from tandem.engine.deal import Deals
from tandem.engine.integrity import check_integrity
from tandem.engine.schedule import Scheduler
from tandem.engine.share import Node, Shares, Terms
from tandem.sim.engine import SimEngine
from tandem.types import Completion, Request, Sampling

COST = StepCost(base_s=20e-3, prefill_token_s=1e-4, context_token_s=0.0, decode_token_s=1e-3)
LIGHT = 1e-15  # a price of memory that changes nothing


@dataclass
class Loads:
    """A simulated engine under such loads. in_flight: by tenant, requests that it has at once; terms: what others than
    these, or these, were promised; prompt, new: tokens of a request.

    >>> load = Loads({"a": 40, "b": 40}, {"a": Terms(3.0)}).run(20.0)
    >>> round(load.had("a") / load.had("b"), 1)
    3.0
    """

    in_flight: dict[str, int]
    terms: dict[str, Terms] = field(default_factory=dict)
    cost: StepCost = COST
    held_token_s: float = LIGHT
    new: int = 64
    prompt: int = 20
    pages: int = 4_000
    slow: float = 1.0  # times as long as its steps say
    order: str = "shares"
    max_sequences: int = 256
    batch_tokens: int = 2048
    credit_s: float = 0.1
    slack_s: float = 0.05
    one_program: bool = False  # all requests of a tenant are of one program
    now: float = 0.0

    def __post_init__(self) -> None:
        config = EngineConfig(
            page_tokens=32,
            batch_tokens=self.batch_tokens,
            max_sequences=self.max_sequences,
            order=self.order,  # type: ignore[arg-type]
        )
        cost = replace(self.cost, held_token_s=self.held_token_s)
        named = {tenant: Terms() for tenant in self.in_flight} | self.terms
        shares = Shares(named, cost, self.credit_s, self.slack_s) if self.order == "shares" else None
        self.scheduler = Scheduler(config, self.pages, shares=shares)
        self.engine = SimEngine(self.scheduler, cost)
        self.asked, self.open = Counter[str](), Counter[str]()
        self.born: dict[str, float] = {}
        self.took = defaultdict[str, list[float]](list)
        self.tokens = Counter[str]()
        self.after: Callable[[], None] = lambda: None  # each step
        for tenant, count in self.in_flight.items():
            for _ in range(count):
                self.ask(tenant)

    @property
    def deals(self) -> Deals:
        assert isinstance(self.scheduler.order, Deals)
        return self.scheduler.order

    def node(self, tenant: str) -> Node:
        return self.deals.tree.tenant(tenant)

    def had(self, tenant: str) -> float:
        """Device-seconds."""
        return self.node(tenant).had / 1e12

    def ask(self, tenant: str) -> None:
        self.asked[tenant] += 1
        self.open[tenant] += 1
        number = self.asked[tenant]
        name = f"{tenant}#{number}"
        tokens = tuple(range(7 * number, 7 * number + self.prompt))
        sampling = Sampling(max_new_tokens=self.new)
        program = tenant if self.one_program else name
        self.born[name] = self.now
        self.engine.submit(Request(name, program, tokens, sampling, seed=number, tenant=tenant), self.now)

    def answered(self, completion: Completion) -> None:
        tenant = completion.request_id.partition("#")[0]
        self.took[tenant].append(self.now - self.born.pop(completion.request_id))
        self.tokens[tenant] += len(completion.tokens)
        self.open[tenant] -= 1
        if self.in_flight.get(tenant, 0) > self.open[tenant]:
            self.ask(tenant)

    def step(self) -> None:
        seconds, completions = self.engine.step(self.now)
        self.now += seconds * self.slow if seconds else max(1e-3, self.scheduler.wakes_s)
        for completion in completions:
            self.answered(completion)
        self.after()

    def run(self, seconds: float, checked: bool = False) -> Loads:
        """So long; checked: every account and page after every step."""
        until = self.now + seconds
        while self.now < until:
            self.step()
            if checked:
                check_integrity(self.scheduler)
                self.deals.tree.check_integrity()
        return self

    def median_s(self, tenant: str) -> float:
        """Of a request, from asking to its end."""
        return self.quantile_s(tenant, 0.5)

    def quantile_s(self, tenant: str, part: float) -> float:
        took = sorted(self.took[tenant])
        return took[min(len(took) - 1, int(part * len(took)))]
