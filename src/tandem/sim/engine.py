"""An engine without a device: the real scheduler, a logical clock, and steps that take what the profile says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.engine.batch import Sampled
from tandem.engine.costs import Rows, StepCost

if TYPE_CHECKING:
    from tandem.engine.schedule import Scheduler
    from tandem.types import Completion, Request


class SimEngine:
    """One engine of a simulation. Every draw is token 0: who ends when is `max_new_tokens`, or the scheduler's `stops`.

    now = 0.0
    while engine.has_work:
        seconds, completions = engine.step(now)
        now += seconds
    """

    def __init__(self, scheduler: Scheduler, cost: StepCost) -> None:
        self.scheduler, self.cost = scheduler, cost
        self.busy_s = 0.0  # of all steps so far

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.live)

    def submit(self, request: Request, now: float) -> None:
        """As an engine's; raises as Scheduler.submit."""
        self.scheduler.submit(request, now)

    def step(self, now: float) -> tuple[float, list[Completion]]:
        """Seconds that the step takes, and who has ended when it has. 0 s: nothing can run now."""
        batch = self.scheduler.plan(now)
        if not batch.works:
            return 0.0, []
        seconds = self.cost.of(Rows.of(batch.works))
        self.busy_s += seconds
        draws = batch.num_draws
        sampled = Sampled([0] * draws, {"logprobs": [0.0] * draws})
        return seconds, self.scheduler.commit(batch, sampled, now + seconds)
