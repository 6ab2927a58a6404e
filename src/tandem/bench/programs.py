"""`bench programs`: agents whose keys and values are three times what fits, with tools that sleep; policies in turns.

Closed loop on the engine that samples in training, without environments: a program's next request comes when its last
turn has ended and its tool has slept. The same with room for all of them tells what the policies cost.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tandem.bench.work import MODEL

if TYPE_CHECKING:
    from tandem.engine.config import EngineConfig
    from tandem.engine.engine import Engine

SHORT = 3.0  # the programs' keys and values at their ends, over the pool
POLICIES = ("off", "thunder", "continuum", "ttl")
AMPLE = ("off", "thunder", "continuum")
WANTED = {"short": 1.5, "ample": 0.98}
ROUNDS = 3
DEADLINE_S = 1800.0  # for one arm

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Size:
    """Of the work."""

    programs: int = 18
    turns: int = 5
    start: int = 400  # tokens of a first prompt
    said: int = 24  # that a turn draws
    heard: int = 200  # that a tool answers with
    tool_s: tuple[float, float, float] = (0.05, 5.0, 0.5)  # least, most, median; log-normal
    sigma: float = 1.0

    def wait_s(self, rng: random.Random) -> float:
        """Of a tool."""
        least_s, most_s, median_s = self.tool_s
        return min(max(rng.lognormvariate(math.log(median_s), self.sigma), least_s), most_s)

    @property
    def most_tokens(self) -> int:
        """Of a program, at its end."""
        return self.start + self.turns * self.said + (self.turns - 1) * self.heard


Make = Callable[[Size, str, str], "Engine"]  # of a size, for a memory and a policy


class Agents:
    """Programs on their way."""

    def __init__(self, engine: Engine, size: Size, seed: int) -> None:
        self.engine, self.size = engine, size
        self.rng = random.Random(seed)
        vocab = engine.vocab_size
        self.contexts = [[self.rng.randrange(vocab) for _ in range(size.start)] for _ in range(size.programs)]
        self.tool_s = [[size.wait_s(self.rng) for _ in range(size.turns)] for _ in range(size.programs)]
        self.heard = [
            [[self.rng.randrange(vocab) for _ in range(size.heard)] for _ in range(size.turns)]
            for _ in range(size.programs)
        ]
        self.turn = [0] * size.programs
        self.known = self.found = 0
        self.asked_s: dict[str, float] = {}
        self.waited_s: list[float] = []

    def ask(self, number: int) -> None:
        from tandem.types import Hints, Request, Sampling

        turn, context = self.turn[number], self.contexts[number]
        ran = 0 if not turn else len(context) - self.size.heard - 1
        hints = Hints(("sleep",), 0 if turn + 1 == self.size.turns else None)
        request = Request(
            f"{number}/{turn}",
            f"p{number}",
            tuple(context),
            Sampling(max_new_tokens=self.size.said),
            seed=number,
            ran=ran,
            hints=hints,
        )
        self.known += ran
        self.asked_s[request.id] = time.perf_counter()
        self.engine.submit(request)

    def run(self) -> Row:
        """All of them to their ends."""
        began_s, due = time.perf_counter(), [(0.0, number) for number in range(self.size.programs)]
        left = self.size.programs * self.size.turns
        before = self.engine.stats.run_tokens
        while left:
            now = time.perf_counter() - began_s
            assert now < DEADLINE_S, f"{left} turns are left after {now:.0f} s"
            while due and due[0][0] <= now:
                self.ask(heapq.heappop(due)[1])
            if not self.engine.has_work:
                time.sleep(max(0.0, due[0][0] - now))
                continue
            for completion in self.engine.step():
                left -= 1
                number = int(completion.request_id.partition("/")[0])
                now = time.perf_counter()
                self.waited_s.append(now - self.asked_s[completion.request_id])
                turn = self.turn[number]
                if turn:
                    self.found += min(completion.cached_tokens, len(self.contexts[number]) - self.size.heard - 1)
                self.contexts[number] += [*completion.tokens, *self.heard[number][turn]]
                self.turn[number] += 1
                if self.turn[number] < self.size.turns:
                    heapq.heappush(due, (now - began_s + self.tool_s[number][turn], number))
        spent_s, waited = time.perf_counter() - began_s, sorted(self.waited_s)
        return {
            "turns_min": 60.0 * len(waited) / spent_s,
            "found": self.found / self.known if self.known else 0.0,
            "run_tokens": self.engine.stats.run_tokens - before,
            "p50_s": waited[len(waited) // 2],
            "p99_s": waited[int(0.99 * (len(waited) - 1))],
        }


def programs(size: Size | None = None, make: Make | None = None, rounds: int = ROUNDS) -> Row:
    """Turns a minute of each policy, their ratio to the engine's own order within a round, and what was found again."""
    size, make = size or Size(), make or engines()
    arms = [("short", policy) for policy in POLICIES] + [("ample", policy) for policy in AMPLE]
    found: dict[tuple[str, str], list[Row]] = {arm: [] for arm in arms}
    for attempt in range(rounds):
        for memory, policy in arms if attempt % 2 == 0 else reversed(arms):
            print(f"{memory} {policy}", file=sys.stderr, flush=True)
            engine = make(size, memory, policy)
            found[memory, policy].append(Agents(engine, size, attempt).run())
            engine.check_integrity()
    return {"bench": "programs", "rows": [compared(found, *arm) for arm in arms], "tokens": size.most_tokens}


def compared(found: dict[tuple[str, str], list[Row]], memory: str, policy: str) -> Row:
    """Medians of an arm, and the median ratio of its rounds to those of the engine's own order.

    >>> rates = {"off": (2, 4), "ttl": (3, 8)}
    >>> rows = {("short", name): [{"turns_min": rate} for rate in both] for name, both in rates.items()}
    >>> compared(rows, "short", "ttl")["ratio"]
    1.75
    """
    runs, base = found[memory, policy], found[memory, "off"]
    ratio = statistics.median(a["turns_min"] / b["turns_min"] for a, b in zip(runs, base, strict=True))
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {"memory": memory, "policy": policy, **medians, "ratio": ratio, "wanted": WANTED[memory]}


def config_of(size: Size, memory: str, policy: str, token_bytes: int, page_tokens: int = 16) -> EngineConfig:
    """An engine whose pool holds a third of all programs at their ends, or all with room to spare."""
    from tandem.engine.config import EngineConfig, ProgramsConfig

    pages = -(-size.most_tokens // page_tokens) + 1
    most = max(pages, math.ceil(size.programs * pages / SHORT)) if memory == "short" else 2 * size.programs * pages
    followed = ProgramsConfig() if policy == "off" else ProgramsConfig("enforce", policy)  # type: ignore[arg-type]
    return EngineConfig(
        page_tokens=page_tokens, kv_memory_bytes=most * page_tokens * token_bytes, programs=followed, batch_tokens=1024
    )


def engines() -> Make:
    """Makes engines of MODEL, on weights that are loaded once."""
    from tandem.engine.config import EngineConfig
    from tandem.engine.layout import KvLayout
    from tandem.engine.runner import dtype_name
    from tandem.models.config import ModelConfig
    from tandem.run.parts import build_parts, engine_on

    parts = build_parts(ModelConfig(MODEL), EngineConfig(kv_memory_bytes=1 << 26), learns=False)
    decoder = parts.decoder
    layout = KvLayout.for_engine(decoder.spec, EngineConfig(), dtype_name(decoder.dtype))

    def make(size: Size, memory: str, policy: str) -> Engine:
        config = config_of(size, memory, policy, layout.groups[0].token_bytes)
        return engine_on(decoder, config, parts.tokenizer)

    return make
