"""The ledger: one fate for each sampled token, one cause for each second of each worker, and no remainder.

    ledger.dispatch(ids)                     programs that are sent to be sampled, before they are
    ledger.arrive(groups)                    of those, what ended and waits for the learner (a buffer, a replay queue)
    ledger.record(groups, samples, fates)    what became of trajectories; `samples` are those that one update took
    ledger.reuse(samples)                    samples that a replay queue gave to a further update
    ledger.lose(fate, tokens, ids)           sampled, but in no trajectory: withdrawn, or a worker died with it
    ledger.check(running, waiting)           what the workers have in hand is what has no fate
    ledger.meter(engine, stats)              an engine's own counts, which are the total that fates have to reach
    ledger.spend(seconds, worker)            a worker's exclusive seconds by phase
    ledger.close(wall_s, live_tokens)        both sums, for ledger.json

From any thread. Tokens are integers and seconds integer nanoseconds, so that both sums are exact; what no fate and no
phase claims is `unaccounted`, and a LedgerWarning where it is more than the clock explains. Each dispatched program
ends once, and each sample is trained by as many updates as `uses` allows: a LedgerWarning names those that are lost,
that end or are trained beyond that, and `audit` counts them. A LedgerWarning is an error in tests.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tandem.columns import Columns
from tandem.errors import LedgerWarning
from tandem.types import Group, Sample, StopReason, Trajectory

MAIN = "main"  # the worker that writes rows
FORMAT = 2  # of ledger.json; the first had no "format", and no count but the fates' own
FATES = {
    "trained": "reached a gradient",
    "masked": "in a trained sample, without advantage or taken out by algo.correction",
    "zero_advantage": "an advantage of 0: the whole group scored the same, or others of it were kept",
    "decided": "of a group that was stopped, since the rest would hardly have differed (select.first_samples)",
    "filtered": "of a group whose rewards were equal, which left the batch (algo.filter_zero_variance)",
    "truncated": "cut at rollout.max_new_tokens, and left out (algo.filter_truncated)",
    "failed": "the environment, the reward or the deadline gave no score",
    "aborted": "withdrawn before the end",
    "crashed": "by a worker that died before it handed them over, or after another had",
    "stale": "older than the lag allows, and dropped",
    "surplus": "of a group beyond the batch (rollout.extra_prompts), or that a policy did not choose",
    "evaluated": "answers to held-out prompts",
    "discarded": "of steps after the checkpoint that a resumed run started from",
    "interrupted": "after that checkpoint too, in a step that a kill cut off: in no row",
    "in_flight": "of programs that had not ended, or had and waited for the learner, when the run did",
}
UNACCOUNTED = "unaccounted"
# phase -> (kind, what the worker did)
PHASES = {
    "prefill": ("useful", "the engine ran context for the first time"),
    "decode": ("useful", "the engine ran a token to draw the next"),
    "learner": ("useful", "forward and backward, and scoring under other weights"),
    "update": ("useful", "gradient norm, optimiser, packing of the weights"),
    "reward": ("useful", "rewards that are computed here, or waited for"),
    "tools": ("useful", "an environment acted"),
    "publish": ("useful", "weights on their way to the engines"),
    "recomputed": ("lost", "the engine ran again what it had given up: a preemption, other weights"),
    "discarded": ("lost", "steps after the checkpoint that a resumed run started from"),
    "interrupted": ("lost", "after that checkpoint too, in no row: what a kill cut off, and how the sitting ended"),
    "host": ("idle", "programs between the engine's passes: rendering, reading answers, scheduling"),
    "environment": ("idle", "no program could run before an environment answered"),
    "weights": ("idle", "waited for the next weights"),
    "parked": ("idle", "stood still while batches were chosen, weights changed, a checkpoint was written"),
    "buffer": ("idle", "waited for samples: the buffer was empty"),
    "full_buffer": ("idle", "waited for room: the buffer was full"),
    "cores": ("idle", "waited for processors on which another worker computed"),
    "startup": ("idle", "weights, kernels and environments were made ready, or a checkpoint read"),
    "down": ("idle", "it was not at work: it had died, or had nothing left to do"),
    "checkpoint": ("idle", "a checkpoint was written"),
    "evaluate": ("idle", "held-out prompts were answered"),
    "read": ("idle", "prompts were drawn, or texts that are learned from read, and made into tokens"),
    "credit": ("idle", "advantages were computed, samples chosen"),
    "rows": ("idle", "trajectories and rows were written and shown"),
}
KINDS = {
    "useful": "what training needs, done for the first time",
    "lost": "done, and to be done again",
    "idle": "waited, or did what no gradient needs; the phase is the cause",
}
ENGINE = {  # rows that engines ran; they sum to all of them
    "prefilled": "context, for the first time",
    "decoded": "sampled tokens, for the first time",
    "recomputed": "run again after a preemption",
    "repeated": "context that its program had run before: the cache had it no more, or the weights changed",
    "rejected_draft": "drafted, and not what was drawn",
    "dropped": "one more of a request that had just ended",
}
AUDIT = {
    "dispatched": "programs that were sent to be sampled, each time",
    "ended": "of those, the ones with an end",
    "trained": "samples that an update took",
    "reused": "further updates that took one",
    "lost": "programs and trajectories that nobody had any more",
    "strange": "programs that ended twice, or that nobody had dispatched, or dispatched twice at once",
    "beyond": "samples that were trained again without leave",
}
KNOWN = 65_536  # trained samples whose ids are kept, so that one that comes again is seen
_SLACK_NS = 10_000_000  # a worker's last span may end while its wall is read: 1 ms was seen on a busy machine
SLACK_S, SLACK_SHARE = 1.0, 0.02  # seconds between spans, of a worker: beyond both, a phase is missing


class Counts(Protocol):
    """What the ledger reads of an engine's Stats."""

    run_tokens: int
    sampled_tokens: int
    cached_tokens: int
    prefilled_tokens: int
    recomputed_tokens: int
    repeated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    dropped_tokens: int


class Ledger:
    """Tokens and seconds as they happen; `close` makes both sum to their totals.

    >>> ledger = Ledger()
    >>> ledger.spend({"decode": 2.0, "learner": 1.5})
    >>> ledger.close(wall_s={"main": 4.0})["seconds"]["main"]
    {'decode': 2.0, 'learner': 1.5, 'unaccounted': 0.5, 'wall': 4.0}
    """

    def __init__(self, uses: int = 1) -> None:
        assert uses >= 1, uses
        self.uses = uses  # updates that may train a sample
        self.tokens: dict[str, int] = dict.fromkeys(FATES, 0)
        self.reused = 0  # tokens that trained again
        self.nanoseconds: dict[str, dict[str, int]] = {}  # worker -> phase -> ns
        self.sampled = 0  # by all engines of all sittings, as they say
        self.metered = False  # whether they ever said
        self.engine = dict.fromkeys((*ENGINE, "cached"), 0)
        self.audit = dict.fromkeys(AUDIT, 0)
        self.ages: dict[str, dict[int, int]] = {}  # fate -> updates since a token was drawn -> tokens
        self.open: dict[str, None] = {}  # ids of programs that were dispatched and have not ended
        self.held: dict[str, int] = {}  # trajectory -> its tokens: it ended, and has no fate yet
        self.trained: dict[str, int] = {}  # sample -> updates that took it, the last KNOWN samples
        self._set_aside: dict[str, int] = {}  # fate -> tokens, as this sitting began
        self._seen: dict[str, Counts] = {}  # engine -> what it last said, in this sitting
        self._lock = threading.RLock()

    # Tokens.

    def dispatch(self, ids: Iterable[str]) -> None:
        """Programs are sent to be sampled; those of a worker that died are lost first, then dispatched again."""
        ids = list(ids)
        with self._lock:
            again = [one for one in ids if one in self.open] or _repeated(ids)
            self._check(again, "strange", "dispatched twice; lose() a program before it is dispatched again")
            self.open.update(dict.fromkeys(ids))
            self.audit["dispatched"] += len(ids)

    def arrive(self, groups: Iterable[Group]) -> None:
        """These programs have ended: all of a program's trajectories at once, which have no fate yet."""
        with self._lock:
            arrived = [trajectory for group in groups for trajectory in group.trajectories]
            self._end(dict.fromkeys(trajectory.program_id for trajectory in arrived))
            for trajectory in arrived:
                self.held[trajectory.id] = self.held.get(trajectory.id, 0) + trajectory.num_sampled

    def record(
        self,
        groups: Iterable[Group],
        samples: Iterable[Sample],
        fates: Mapping[str, str],
        masked: int = 0,
        version: int | None = None,
    ) -> dict[str, int]:
        """Give each trajectory of `groups` its fate; `samples` are those that an update took, `fates` those of all
        trajectories by id (algo.advantage.FATES, "stale", "surplus"), and `masked` how many of the samples' tokens with
        an advantage a correction took out. `version`: of the learner's weights when this was decided, for `ages`.

        Programs that have not arrived do so. Returns the tokens by fate. A sample in no group is the caller's error.
        """
        groups = list(groups)
        trained = {sample.id: sample for sample in samples}
        counts = dict.fromkeys(FATES, 0)
        with self._lock:
            self.arrive(_without(groups, self.held))
            trajectories = [trajectory for group in groups for trajectory in group.trajectories]
            assert not (twice := _repeated([one.id for one in trajectories])), f"{twice[:5]}: two fates at once"
            self._check(
                [one for one in trained if one in self.trained], "beyond", "trained again; give them to reuse()"
            )
            for trajectory in trajectories:
                sampled, sample = self.held.pop(trajectory.id), trained.pop(trajectory.id, None)
                if sample is None:
                    fate = _fate(trajectory, fates)
                    counts[fate] += sampled
                    self._age(fate, trajectory.columns, trajectory.columns["loss_mask"], version)
                    continue
                assert trajectory.failure is None, f"{trajectory.id} failed, yet it was trained"
                reached_N, sampled_N = _reached(sample), sample.columns["loss_mask"]
                reached = int(reached_N.sum())
                assert reached <= sampled, f"{sample.id}: {reached} trained of {sampled} sampled tokens"
                counts["trained"] += reached
                counts["masked"] += sampled - reached
                self._age("trained", sample.columns, reached_N, version)
                self._age("masked", sample.columns, sampled_N & ~reached_N, version)
                self.audit["trained"] += 1
                self.trained[sample.id] = self.trained.pop(sample.id, 0) + 1
            assert not trained, f"trained samples without a trajectory: {sorted(trained)[:5]}"
            assert 0 <= masked <= counts["trained"], f"{masked} masked of {counts['trained']} tokens"
            counts["trained"] -= masked
            counts["masked"] += masked
            for fate, number in counts.items():
                self.tokens[fate] += number
            while len(self.trained) > KNOWN:
                del self.trained[next(iter(self.trained))]
        return counts

    def reuse(self, samples: Iterable[Sample]) -> None:
        """A replay queue gave these to one more update: their tokens stay trained once, and count as reused."""
        samples = list(samples)
        with self._lock:
            beyond = [one.id for one in samples if not 0 < self.trained.get(one.id, 0) < self.uses]
            self._check(beyond, "beyond", f"reused, which {self.uses} updates have trained, or none")
            for sample in samples:
                self.trained[sample.id] = self.trained.get(sample.id, 0) + 1
                self.reused += reached_tokens(sample)
            self.audit["reused"] += len(samples)

    def lose(self, fate: str, tokens: int, ids: Iterable[str] = ()) -> None:
        """Tokens that are in no trajectory; `ids` are the programs that end without one."""
        with self._lock:
            self._end(ids)
            self.tokens[fate] += tokens

    def interrupt(self) -> None:
        """Programs that run, and what they or ended ones have sampled without a fate, lead nowhere."""
        with self._lock:
            self.tokens["interrupted"] += self.sampled - sum(self.tokens.values())
            self.open, self.held = {}, {}

    def interrupt_held(self, waiting: Iterable[str]) -> None:
        """Trajectories that ended, but for these, lead nowhere: a step took them and failed."""
        with self._lock:
            for one in self.held.keys() - set(waiting):
                self.tokens["interrupted"] += self.held.pop(one)

    def check(self, running: Iterable[str] = (), waiting: Iterable[str] = ()) -> None:
        """Programs that run and trajectories that wait for the learner are all that has no fate: what nobody has is
        lost, and its tokens stay unaccounted for. Call it while nothing is handed from one worker to another."""
        running, waiting = set(running), set(waiting)
        with self._lock:
            lost = [one for one in self.open if one not in running] + [one for one in self.held if one not in waiting]
            strange = sorted(running - set(self.open)) + sorted(waiting - set(self.held))
            self.open = {one: None for one in self.open if one in running}
            self.held = {one: tokens for one, tokens in self.held.items() if one in waiting}
            self._check(lost, "lost", "lost: dispatched or arrived, without a fate, and nobody has it")
            self._check(strange, "strange", "at work on, which nobody dispatched, or has its fate")

    def _end(self, programs: Iterable[str]) -> None:
        programs = list(programs)
        self._check([one for one in programs if one not in self.open], "strange", "ended, which was not on its way")
        for one in programs:
            self.open.pop(one, None)
        self.audit["ended"] += len(programs)

    def _age(self, fate: str, columns: Columns, mask_N: np.ndarray, version: int | None) -> None:
        if version is None or "versions" not in columns:
            return
        ages, counts = np.unique(version - columns["versions"][mask_N], return_counts=True)
        of = self.ages.setdefault(fate, {})
        for age, count in zip(ages.tolist(), counts.tolist(), strict=True):
            of[age] = of.get(age, 0) + count

    def _check(self, wrong: list[str], count: str, what: str) -> None:
        if wrong:
            self.audit[count] += len(wrong)
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            _warn(f"{', '.join(wrong[:5])}{more} {what}")

    def meter(self, engine: str, stats: Counts) -> None:
        """An engine's counts since it was made. One that was made anew, and so counts from 0, has another name."""
        with self._lock:
            self.metered = True
            before, self._seen[engine] = self._seen.get(engine), stats
            for name, now in _rows(stats).items():
                self.engine[name] += now - (_rows(before)[name] if before else 0)
            self.sampled += stats.sampled_tokens - (before.sampled_tokens if before else 0)

    def sampled_with(self, stats: Mapping[str, Counts]) -> int:
        """What `sampled` would be, were it told of these; for who only looks."""
        with self._lock:
            seen = sum(self._seen[engine].sampled_tokens for engine in stats if engine in self._seen)
            return self.sampled + sum(counts.sampled_tokens for counts in stats.values()) - seen

    # Seconds.

    def spend(self, seconds: Mapping[str, float], worker: str = MAIN) -> None:
        """Add a worker's exclusive seconds by phase (PHASES)."""
        with self._lock:
            phases = self.nanoseconds.setdefault(worker, {})
            for phase, value in seconds.items():
                assert phase in PHASES, f"{worker} spent {value} s on {phase!r}, which PHASES does not name"
                assert value >= 0, f"{worker}: {value} s of {phase}"
                phases[phase] = phases.get(phase, 0) + int(value * 1e9)

    # Sittings.

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; `restore` gives the ledger back."""
        with self._lock:
            return {
                "tokens": dict(self.tokens),
                "reused": self.reused,
                "nanoseconds": {worker: dict(phases) for worker, phases in self.nanoseconds.items()},
                "sampled": self.sampled if self.metered else None,
                "engine": dict(self.engine),
                "audit": dict(self.audit),
                "ages": {fate: dict(ages) for fate, ages in self.ages.items()},
                "open": [*self.open],
                "held": dict(self.held),
                "trained": dict(self.trained),
            }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; of a ledger of the first format, whose total is what has a fate."""
        with self._lock:
            self.tokens = dict.fromkeys(FATES, 0) | dict(state["tokens"])
            known = {worker: dict(phases) for worker, phases in state["nanoseconds"].items()}
            self.nanoseconds = {worker: _renamed(phases) for worker, phases in known.items()}
            sampled = state.get("sampled")
            self.metered = sampled is not None
            self.sampled = sum(self.tokens.values()) if sampled is None else sampled
            self.reused = state.get("reused", 0)
            self.engine |= state.get("engine", {})
            self.audit |= state.get("audit", {})
            ages = state.get("ages", {}).items()
            self.ages = {fate: {int(age): number for age, number in of.items()} for fate, of in ages}
            self.open = dict.fromkeys(state.get("open", ()))
            self.held, self.trained = dict(state.get("held", {})), dict(state.get("trained", {}))
            self._seen = {}

    def discard(
        self,
        rows: Sequence[Mapping[str, Any]],
        sampled: int = 0,
        wall_s: float = 0.0,
        workers: Iterable[str] = (MAIN,),
        known: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        """Count what `RunFolder.rewind` dropped: its tokens and seconds were paid for and led nowhere.

        Only for a ledger that does not hold those steps already (one restored from the checkpoint); `known`: what it
        holds of the first of the rows, as a row. `sampled` and `wall_s`: all that engines sampled and each of the
        workers took since that checkpoint, as run/meter.py has it; what is in no row of it was interrupted. Of MAIN,
        the steps' seconds are discarded; other workers' are as the rows have them: where what they sampled was lost,
        the tokens say so. Returns the seconds of each worker.
        """
        tokens, spent = 0, {worker: dict[str, float]() for worker in workers}
        for sign, row in [*((1, row) for row in rows), *([(-1, known)] if rows and known else [])]:
            tokens += sign * int(row.get("drawn_tokens", row.get("tokens") or 0))
            main = {"discarded": sum((row.get("seconds") or {}).values())}
            for worker, phases in {**row.get("workers", {}), MAIN: main}.items():
                for phase, seconds in phases.items() if worker in spent else ():
                    spent[worker][phase] = max(0.0, spent[worker].get(phase, 0.0) + sign * seconds)
        cut = {"discarded": tokens, "interrupted": max(0, sampled - tokens)}
        with self._lock:
            self.sampled += sum(cut.values())
            self._set_aside = cut
            for fate, number in cut.items():
                self.tokens[fate] += number
        for worker, phases in spent.items():
            phases["interrupted"] = max(0.0, wall_s - sum(phases.values()))
            if some := {phase: seconds for phase, seconds in phases.items() if seconds}:
                self.spend(some, worker)
        return {worker: sum(phases.values()) for worker, phases in spent.items()}

    def found(self, tokens: int) -> None:
        """Of what this sitting set aside, a journal gives back: they get their fates anew."""
        with self._lock:
            for fate, number in self._set_aside.items():
                back = min(tokens, number)
                self.tokens[fate] -= back
                self._set_aside[fate] -= back
                tokens -= back
            self.sampled += tokens  # of the meter's last half second

    def close(self, wall_s: Mapping[str, float], live_tokens: int = 0) -> dict[str, Any]:
        """The ledger as ledger.json holds it; "nanoseconds" sum exactly, "seconds" are the same for reading.

        wall_s: seconds of each worker over all sittings, discarded ones included. live_tokens: sampled by requests that
        engines still have. LedgerWarning where more or less is known than there was.
        """
        with self._lock:
            tokens = dict(self.tokens)
            tokens["in_flight"] += live_tokens + sum(self.held.values())
            total = self.sampled if self.metered else sum(tokens.values())
            if rest := total - sum(tokens.values()):
                tokens[UNACCOUNTED] = rest
                _warn(f"the engines sampled {total} tokens, and {total - rest} have a fate: {rest} are unaccounted for")
            assert set(self.nanoseconds) <= set(wall_s), f"no wall time for {set(self.nanoseconds) - set(wall_s)}"
            nanoseconds = {}
            for worker, wall in wall_s.items():
                phases = _closed(worker, self.nanoseconds.get(worker, {}), int(wall * 1e9))
                nanoseconds[worker] = phases | {"wall": sum(phases.values())}
            asked = total - tokens["evaluated"]
            return {
                "format": FORMAT,
                "tokens": tokens | {"total": total},
                "trained_share": tokens["trained"] / asked if asked else None,
                "reused_tokens": self.reused,
                "ages": {fate: dict(sorted(of.items())) for fate, of in self.ages.items()},
                "engine": dict(self.engine),
                "audit": self.audit | {"open": len(self.open), "waiting": len(self.held)},
                "nanoseconds": nanoseconds,
                "seconds": {worker: {n: ns / 1e9 for n, ns in of.items()} for worker, of in nanoseconds.items()},
                "fates": FATES,
                "phases": {phase: {"kind": kind, "meaning": meaning} for phase, (kind, meaning) in PHASES.items()},
            }


def reached_tokens(sample: Sample) -> int:
    """Sampled tokens with an advantage."""
    return int(_reached(sample).sum())


def _reached(sample: Sample) -> np.ndarray:
    return sample.columns["loss_mask"] & (sample.columns["advantages"] != 0.0)


def split_rollout(seconds: Mapping[str, float], passes: Mapping[str, float]) -> dict[str, float]:
    """Seconds of "rollout" as those of the engine's passes (Stats.seconds) and the host's between them.

    >>> split_rollout({"rollout": 3.0, "reward": 0.5}, {"prefill": 0.5, "decode": 2.0, "recomputed": 0.0})
    {'reward': 0.5, 'host': 0.5, 'prefill': 0.5, 'decode': 2.0}
    """
    whole, inside = seconds.get("rollout", 0.0), sum(passes.values())
    fits = min(1.0, whole / inside) if inside else 0.0  # two clocks
    parts = {phase: value * fits for phase, value in passes.items() if value}
    rest = {phase: value for phase, value in seconds.items() if phase != "rollout"}
    return rest | ({"host": max(0.0, whole - sum(parts.values()))} if whole else {}) | parts


def _rows(stats: Counts) -> dict[str, int]:
    """The rows that it ran, which sum to all of them, and tokens found in the cache."""
    rejected = stats.drafted_tokens - stats.accepted_tokens
    named = {
        "prefilled": stats.prefilled_tokens,
        "recomputed": stats.recomputed_tokens,
        "repeated": stats.repeated_tokens,
        "rejected_draft": rejected,
        "dropped": stats.dropped_tokens,
    }
    return named | {"decoded": stats.run_tokens - sum(named.values()), "cached": stats.cached_tokens}


def _without(groups: Iterable[Group], held: Mapping[str, int]) -> list[Group]:
    """What of the groups has not arrived."""
    fresh = [(group, tuple(t for t in group.trajectories if t.id not in held)) for group in groups]
    return [Group(group.prompt, trajectories) for group, trajectories in fresh if trajectories]


def _repeated(ids: list[str]) -> list[str]:
    return sorted({one for one in ids if ids.count(one) > 1}) if len(set(ids)) < len(ids) else []


def _warn(what: str) -> None:
    warnings.warn(f"the ledger does not close: {what}.", LedgerWarning, stacklevel=3)


def _fate(trajectory: Trajectory, fates: Mapping[str, str]) -> str:
    if trajectory.stop_reason is StopReason.ABORTED:
        return "aborted"
    return fates[trajectory.id]


def _renamed(phases: dict[str, int]) -> dict[str, int]:
    """Of the first format, which did not tell engine and host apart."""
    if "rollout" in phases:
        phases["host"] = phases.get("host", 0) + phases.pop("rollout")
    return phases


def _closed(worker: str, phases: Mapping[str, int], wall_ns: int) -> dict[str, int]:
    """Phases and the remainder, in ns; they sum to `wall_ns` exactly."""
    closed = dict(phases)
    rest = wall_ns - sum(closed.values())
    if closed and -_SLACK_NS <= rest < 0:
        closed[max(closed, key=closed.__getitem__)] += rest
        rest = 0
    if rest < 0 or rest > max(SLACK_S * 1e9, SLACK_SHARE * wall_ns):
        claimed = f"phases claim {(wall_ns - rest) / 1e9:.3f} s of its wall of {wall_ns / 1e9:.3f} s"
        _warn(f"{worker}: {claimed}, so {rest / 1e9:.3f} s are unaccounted for")
    return dict(sorted(closed.items(), key=lambda entry: -entry[1])) | {UNACCOUNTED: rest}
