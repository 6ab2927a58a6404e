"""`bench agents`: programs with tools; when the engine stood still while one could run, and what was run twice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tandem.bench.peers import Figure
from tandem.bench.work import build_engine

if TYPE_CHECKING:
    from tandem.engine.engine import Engine
    from tandem.plan.roofline import Machine
    from tandem.types import Completion, Request, Trajectory

PROGRAMS, TURNS, NEW = 64, 6, 32  # at once, completions of each, new tokens of each
WORK = f"agents {PROGRAMS}x{TURNS}x{NEW}"
REPEATS = 2


class Timed:
    """An engine, and the seconds in which it stood still while a program could run.

    A program can run from when its environment has answered (`ready`) until a step begins after its request came; one
    that the engine has can always run.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.idle_s = 0.0
        self._ended_s = time.perf_counter()  # the last step
        self._ready: dict[str, float] = {}  # program -> since when
        self._submitted: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def ready(self, program: str) -> None:
        self._ready[program] = time.perf_counter()

    def submit(self, request: Request) -> None:
        self._submitted.add(request.group)
        self.engine.submit(request)

    def step(self) -> list[Completion]:
        now = time.perf_counter()
        waiting = list(self._ready.values())
        if self.engine.scheduler.running:
            waiting.append(self._ended_s)
        if waiting:
            self.idle_s += now - max(self._ended_s, min(waiting))
        for program in self._submitted:
            self._ready.pop(program, None)
        self._submitted.clear()
        done = self.engine.step()
        self._ended_s = time.perf_counter()
        return done


def agents(_: Machine) -> Iterator[Figure]:
    """Tandem's figures: seconds, and shares."""
    from tandem.engine.driver import Driver
    from tandem.program.config import TaskConfig
    from tandem.program.pool import EnvironmentPool
    from tandem.rollout.config import RolloutConfig
    from tandem.rollout.rollout import Rollouts
    from tandem.rollout.watch import Progress, Watched

    parts = build_engine()
    config = RolloutConfig(samples_per_prompt=1, max_turns=TURNS, max_new_tokens=NEW)
    pool = EnvironmentPool(TaskConfig("tandem.bench.slow_tools:SlowTools", heldout_size=0))
    try:
        prompts = pool.batch(0, (REPEATS + 1) * PROGRAMS)
        for attempt in range(REPEATS + 1):
            timed = Timed(parts.engine)
            watched = Watched(pool, Progress(PROGRAMS), lambda prompt: timed.ready(f"{prompt.id}/{attempt}"))  # noqa: B023
            rollouts = Rollouts(Driver(timed), parts.renderer, watched, config, run_seed=attempt)
            before, began_s = parts.engine.stats.run_tokens, time.perf_counter()
            groups = rollouts.collect(attempt, prompts[attempt * PROGRAMS : (attempt + 1) * PROGRAMS])
            spent_s = time.perf_counter() - began_s
            ended = [trajectory for group in groups for trajectory in group.trajectories]
            assert all(one.failure is None for one in ended), [one.failure for one in ended]
            if attempt:  # the first warms up
                yield Figure("tandem", WORK, spent_s, "s")
                yield Figure("tandem", f"{WORK}: idle while one could run", max(timed.idle_s / spent_s, 1e-9), "share")
                again = parts.engine.stats.run_tokens - before - sum(map(least_run, ended))
                yield Figure("tandem", f"{WORK}: run again", max(again / sum(map(prefixes, ended)), 1e-9), "share")
    finally:
        pool.close()


def least_run(trajectory: Trajectory) -> int:
    """Tokens that must run once: all up to the last sampled one, which nothing follows."""
    mask = trajectory.columns["loss_mask"]
    return int(mask.nonzero()[0][-1])


def prefixes(trajectory: Trajectory) -> int:
    """Tokens of the contexts of all turns after the first that an earlier turn has run."""
    mask = trajectory.columns["loss_mask"]
    ends = [place for place in range(1, len(mask)) if mask[place - 1] and not mask[place]]  # where observations begin
    return sum(end - 1 for end in ends)
