"""Paused programs behind a router of engines: they go on where there is room, with the tokens that they would have."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from tandem.engine.config import ProgramsConfig
from tandem.engine.driver import Driver
from tandem.engine.engine import Engine
from tandem.engine.programs import SEPARATOR
from tandem.engine.space import Space, Spaces
from tandem.rollout.router import Replica, Router
from tandem.types import Completion, Request
from tests.null.paged_memory import alone, make
from tests.null.test_programs import Clock, Life, lives, world

PAGES = 48


def fleet(count: int, clock: Clock, mode: str) -> list[Engine]:
    config = ProgramsConfig(mode=mode, policy="thunder", tick_s=0.1, half_life_s=0.5, done_s=1e6)  # type: ignore[arg-type]
    engines = [make(PAGES, programs=config, batch_tokens=32, max_sequences=8)[0] for _ in range(count)]
    for engine in engines:
        engine.clock = clock
    return engines


def ran(engines: list[Engine], clock: Clock, programs: list[Life]) -> tuple[Router, int]:
    """The router after all programs, siblings of one group, have ended; and the steps that it took."""
    replicas = [
        Replica(f"e{n}", Driver(one), lambda one=one: one.version, 10**6, 4)  # type: ignore[misc]
        for n, one in enumerate(engines)
    ]
    router = Router(replicas, clock=clock)
    waits: dict[str, tuple[Life, Request, Future[Completion]]] = {}
    for steps in range(4000):
        for life in programs:
            if not life.live and life.asked < life.turns and life.back_s <= clock.now:
                request = life.ask()
                grouped = Request(
                    request.id, request.program_id, request.tokens, request.sampling, request.seed, group="g"
                )
                waits[life.name] = life, request, router.submit(grouped)
        if not waits and all(life.asked == life.turns for life in programs):
            return router, steps
        router.progress(0, 0.0)
        clock.now += 0.05
        for engine in engines:
            engine.check_integrity()
        for name, (life, request, future) in list(waits.items()):
            if future.done():
                assert future.result().tokens == alone(request)[0]
                life.heard(future.result(), clock.now)
                del waits[name]
    raise AssertionError(f"after {steps} steps: {list(waits)}")


def test_paused_programs_go_to_the_engine_that_has_room() -> None:
    """Programs that one engine paused wait for a place there, while another has nothing to do."""
    clock, told = Clock(), {}
    for mode in ("enforce", "shadow"):
        clock = Clock()
        engines = fleet(2, clock, mode)
        router, steps = ran(engines, clock, lives(6, turns=5, tool_s=0.2, start=60, said=8))
        moved = {name: counts["moved"] for name, counts in router.settle().items()}
        told[mode] = steps, moved, [engine.stats.finished for engine in engines]
    steps, moved, finished = told["enforce"]
    assert sum(moved.values()) >= 2 and moved["e1"] > 0 and min(finished) > 0 and sum(finished) == 30
    assert sum(told["shadow"][1].values()) == 0 and min(told["shadow"][2]) == 0, "nobody is paused, and nobody leaves"
    assert steps < told["shadow"][0]


def test_an_engine_says_what_it_has_room_for() -> None:
    """Room that programs which ask have taken, or names of programs that have a place or ask already."""
    w = world(lives(6, turns=5, tool_s=0.2, start=60, said=8), PAGES, policy="thunder")
    programs = w.engine.scheduler.programs
    seen = set[str]()
    while not w.over:
        w.step()
        space = Spaces(programs).space(w.clock.now)
        assert space is not None
        every = programs.by_name.values()
        assert space.paused == {one.name: one.tokens for one in every if one.phase == "paused" and not one.live}
        asking = [one.pages for one in every if one.phase == "paused" and one.live]
        reasoning = [one.pages for one in every if one.phase == "reasoning"]
        acting = [one.pages for one in every if one.phase == "acting"]
        seen |= {"paused"} if space.paused else set()
        if reasoning or asking:
            assert space.tokens <= 4 * (PAGES - sum(asking) - sum(reasoning))
            assert space.tokens >= 4 * (PAGES - sum(asking) - sum(reasoning) - sum(acting)) - 4
            seen |= {"below 0"} if space.tokens < 0 else {"room"}
        else:
            assert space.tokens == 4 * PAGES
            seen.add("idle")
    assert {"paused", "below 0", "room"} <= seen
    assert w.engine.space() == Spaces(programs).space(w.clock.now)
    w.engine.set_programs_mode("shadow")
    assert w.engine.space() is None and make(8)[0].space() is None
    assert SEPARATOR not in next(iter(programs.by_name), "")


@pytest.mark.parametrize("policy", ["fcfs", "ttl"])
def test_who_pauses_nobody_says_nothing(policy: str) -> None:
    """A policy without places that has programs leave their pages for other engines."""
    w = world(lives(2), policy=policy)
    w.run()
    assert w.engine.space() is None
    assert Space(0, {}) != w.engine.space()
