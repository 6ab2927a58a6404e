"""Recorded programs once more, through the real scheduler: closed loop, on a logical clock.

A turn is asked for when the one before has ended and its tools have run for as long as they did: durations are
replayed, times are not. What steps take says a StepCost. Deterministic: the same trace, settings and cost, the same
outcome.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tandem.engine.config import EngineConfig
from tandem.engine.costs import StepCost
from tandem.engine.schedule import Scheduler
from tandem.errors import WorldError
from tandem.sim.engine import SimEngine
from tandem.sim.traces import Recorded, Turn
from tandem.types import Hints, Request, Sampling

if TYPE_CHECKING:
    from tandem.types import Completion

IDS = 1 << 31  # token ids are made up, and fit 32 bits


@dataclass(frozen=True, slots=True)
class SimulateConfig:
    """What is simulated: the settings of `tandem simulate`."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    cost: StepCost = field(default_factory=StepCost)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a replay."""

    policy: str
    makespan_s: float
    turns: int
    turns_min: float  # ended a minute
    run_tokens: int
    found: float  # of what programs had run, the share that was still in the cache
    mean_s: float  # of a program, from its first request to the end of its last
    turn_p50_s: float  # of a turn, from its request to its end
    turn_p99_s: float
    preemptions: int


@dataclass(slots=True, eq=False)
class Playing:
    """A program on its way."""

    recorded: Recorded
    number: int
    context: list[int]
    turn: int = 0
    began_s: float = 0.0
    asked_s: float = 0.0


def capacity(trace: Sequence[Recorded], page_tokens: int) -> int:
    """Pages that the largest program takes at its end."""
    most = max(turn.prompt + turn.output for one in trace for turn in one.turns)
    return -(-most // page_tokens) + 1


class Replay:
    """One replay."""

    def __init__(
        self, programs: Sequence[Recorded], config: EngineConfig, num_pages: int, cost: StepCost, at_once: int = 0
    ) -> None:
        self.programs, self.cost = programs, cost
        self.engine = SimEngine(Scheduler(config, num_pages), cost)
        self.followed = self.engine.scheduler.programs
        if self.followed is not None:
            self.followed.reload_s = lambda tokens: cost.prefill(0, max(0, tokens))
        self.knows = self.followed is not None and config.programs.policy == "oracle"
        self.policy = config.programs.policy if self.followed is not None else "off"
        self._due: list[tuple[float, int, Playing]] = []  # requests to come
        self._later = list(reversed([Playing(one, number, []) for number, one in enumerate(programs)]))
        self._live: dict[str, Playing] = {}
        self._waited: list[float] = []
        self._lived: list[float] = []
        self._known = self._found = 0
        if at_once:
            for _ in range(min(at_once, len(programs))):
                self._begin(0.0)
        else:
            while self._later:
                self._begin(self._later[-1].recorded.start_s)

    def _begin(self, now: float) -> None:
        playing = self._later.pop()
        self._push(now + playing.recorded.setup_s, playing)

    def _push(self, at_s: float, playing: Playing) -> None:
        heapq.heappush(self._due, (at_s, playing.number, playing))

    def _ask(self, playing: Playing, now: float) -> None:
        turn, name = playing.recorded.turns[playing.turn], playing.recorded.name
        if not playing.turn:
            playing.began_s = now
        ran = playing.context
        del ran[self._kept(playing.recorded.turns, playing.turn, len(ran)) :]
        known = len(ran)
        salt = (playing.number + 1) * 1_000_003 + playing.turn * 7_919
        ran += [(salt + place) % IDS for place in range(known, turn.prompt)]
        playing.asked_s = now
        left = len(playing.recorded.turns) - playing.turn - 1
        tools = (turn.tool,) if turn.tool else ()
        hints = Hints(tools, left, turn.tool_s) if self.knows else Hints(tools)
        sampling = Sampling(max_new_tokens=turn.output)
        request = Request(f"{playing.number}/{playing.turn}", name, tuple(ran), sampling, 0, ran=known, hints=hints)
        self._live[request.id] = playing
        self.engine.submit(request, now)

    def _took(self, completion: Completion, now: float) -> None:
        playing = self._live.pop(completion.request_id)
        turns, turn = playing.recorded.turns, playing.recorded.turns[playing.turn]
        if playing.turn:
            known = self._kept(turns, playing.turn, turns[playing.turn - 1].prompt + turns[playing.turn - 1].output)
            self._known += known
            self._found += min(completion.cached_tokens, known)
        playing.context += completion.columns["tokens"].tolist()
        self._waited.append(now - playing.asked_s)
        playing.turn += 1
        if playing.turn < len(turns):
            self._push(now + turn.tool_s, playing)
            return
        self._lived.append(now - playing.began_s)
        if self.followed is not None:
            self.followed.done(playing.recorded.name, now)
        if self._later:
            self._begin(now + turn.tool_s)

    @staticmethod
    def _kept(turns: Sequence[Turn], place: int, ran: int) -> int:
        """Of the context so far, what a turn goes on from; of one that was shortened, the first prompt."""
        turn = turns[place]
        most = ran if turn.prompt >= ran else min(turns[0].prompt, turn.prompt)
        return most if turn.kept is None else min(most, turn.kept)

    def run(self) -> Outcome:
        """To the end of all programs. WorldError where nothing can go on."""
        now = 0.0
        while self._due or self.engine.has_work:
            while self._due and self._due[0][0] <= now:
                self._ask(heapq.heappop(self._due)[2], now)
            seconds, done = self.engine.step(now) if self.engine.has_work else (0.0, [])
            if seconds == 0.0:
                if not self._due:
                    raise WorldError(f"the replay stands still at {now:g} s with {len(self._live)} requests.")
                now = max(now, self._due[0][0])
            now += seconds
            for completion in done:
                self._took(completion, now)
        stats, waited = self.engine.scheduler.stats, sorted(self._waited)
        return Outcome(
            self.policy,
            now,
            len(waited),
            60.0 * len(waited) / now,
            stats.run_tokens,
            self._found / self._known if self._known else 0.0,
            sum(self._lived) / len(self._lived),
            waited[len(waited) // 2],
            waited[min(len(waited) - 1, int(0.99 * len(waited)))],
            stats.preemptions,
        )


def compare(
    programs: Sequence[Recorded],
    policies: Sequence[str],
    config: EngineConfig,
    num_pages: int,
    cost: StepCost,
    at_once: int = 0,
) -> list[Outcome]:
    """The same programs under each policy; "off" is the engine's own order."""
    outcomes = []
    for policy in policies:
        followed = replace(config.programs, mode="off" if policy == "off" else "enforce")
        if policy != "off":
            followed = replace(followed, policy=policy)  # type: ignore[arg-type]
        outcomes.append(Replay(programs, replace(config, programs=followed), num_pages, cost, at_once).run())
    return outcomes
