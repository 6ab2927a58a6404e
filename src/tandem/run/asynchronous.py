"""A run whose rollouts go on while it learns: the stages of the loop over a thread that samples.

The thread owns the flow (rollout/flow.py) and with it the engine; the main thread owns the learner. They meet in the
queue (rollout/queue.py), and where the weights change, at a moment between two steps of the engine. Where both compute
on the same cores they take turns, a step of the engine and a microbatch at a time: each then has all of the cores, and
neither waits for one that sleeps.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tandem import env
from tandem.algo.advantage import Selection
from tandem.engine.driver import GRACE_S, Drivable
from tandem.engine.engine import Engine
from tandem.errors import RunFolderError, WorkerError, WorldError
from tandem.rollout.config import AsyncConfig
from tandem.rollout.flow import Ended, Flow
from tandem.rollout.group import group_id
from tandem.rollout.load import Load
from tandem.rollout.program import Paused
from tandem.rollout.queue import Choice, Queue
from tandem.rollout.rollout import Rollouts
from tandem.run.cores import Cores, Taking
from tandem.run.counted import counted
from tandem.run.engines import endpoint, living, serves
from tandem.run.journal import FACTS, Fact, Journal, Read
from tandem.run.kept import Begun, Kept
from tandem.run.ledger import reached_tokens
from tandem.run.parted import PartedSession
from tandem.trace import Trace
from tandem.types import Group, Prompt, WeightVersion

WAIT_S = 0.05  # of the thread, for environments or for room
LOOK_S = 1.0  # of the learner, at whether the thread lives


class AsyncSession(PartedSession):
    """The stages of one sitting, with a thread that samples."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        config: AsyncConfig = self.config.asynchrony
        asked = self.config.rollout
        self.queue = Queue(asked.prompts_per_step, config, self.config.seed, asked.redraws)
        self.begun: dict[str, Begun] = {}  # by group id, what runs
        self.unbegun: dict[str, Begun] = {}  # of that: what an earlier sitting ran, and nothing was kept of
        self.paused: dict[str, tuple[Paused, ...]] = {}  # by group id, of a checkpoint
        self.history: deque[Fact] = deque()  # of an earlier sitting, that are lived through again
        self.earlier: Read | None = None
        self.rolled = Trace([], self.clock.now)  # what the thread's worker of the account keeps
        self.stale_groups = 0
        self.ledger.uses = config.replay_uses
        shared = self.config.model.device == "cpu" and self.parts.workers is None  # by what samples and what learns
        self.cores: Cores | None = Cores() if shared else None
        cores, rolled = self.cores, self.rolled
        takes: Callable[[Engine], Drivable] = (lambda one: Taking(one, cores, rolled)) if cores else lambda one: one
        self.rolling = endpoint(self.parts, self.account, self.display.note, takes)
        given = (self.rolling, self.parts.renderer, self.pool, asked, self.config.seed, self.rolled)
        self.rollouts = Rollouts(*given)
        self.flow = Flow(self.rollouts, waited_s=lambda: cores.engine_s if cores is not None else 0.0)
        if self.cores is not None:
            self.here.between = self._give_way
        self.load = Load(self.queue, self.cores is not None, time.monotonic())
        self.waited = False  # since the last batch the learner had nothing to learn of
        self.lags: dict[str, float] = {}  # of the present step's groups
        self.journal: Journal | None = None
        self._arrived = 0  # groups that ended in this sitting
        self._changed = threading.Condition()  # guards the next five
        self._wanted = 0  # times that the main thread wants what the thread has
        self._rolling = False  # the thread has it
        self._ending = False
        self._draining = False  # nothing begins
        self._failed: BaseException | None = None
        self._turned_s = time.monotonic()
        self._thread: threading.Thread | None = None

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """The learner has the cores."""
        if self.cores is None:
            yield
            return
        with self.trace.span("cores"):
            self.cores.take(lambda: self._check_thread("learn"))
        try:
            yield
        finally:
            self.cores.leave()

    def _give_way(self) -> None:
        assert self.cores is not None
        with self.trace.span("cores"):
            self.cores.give_way(lambda: self._check_thread("learn"))

    def _roll(self) -> None:
        torch.set_num_threads(env.num_threads())
        try:
            with self.account.worker("rollouts") as trace:
                self.rolled.sinks[:] = trace.sinks
                while True:
                    with self.rolled.span("parked"), self._changed:
                        while self._wanted and not self._ending:
                            self._changed.wait(WAIT_S)
                        if self._ending:
                            return
                        self._rolling, self._turned_s = True, time.monotonic()
                    try:
                        idle = self._turn()
                    finally:
                        with self._changed:
                            self._rolling = False
                            self._changed.notify_all()
                    if idle:
                        with self.rolled.span("weights" if self._draining else "full_buffer"), self._changed:
                            self._changed.wait(WAIT_S)
        except BaseException as error:  # noqa: BLE001 - recorded boundary: the main thread raises it
            with self._changed:
                self._failed = error
                self._changed.notify_all()

    def _turn(self) -> bool:
        """Begin what may, and a step; whether there was nothing to do."""
        with self.rolled.span("rollout"), counted(self.parts, self.rolled, bool(self.config.engine.draft.most)):
            while self.queue.room > 0 and not self._draining and self._may_begin():
                place = self.stream.cursor
                (prompt,) = self.stream.take(1)
                self._begin(place, prompt)
            if not len(self.flow):
                return True
            began_s = time.monotonic()
            starves = self.flow.requests < len(living(self.parts))
            ended = self.flow.advance(WAIT_S)
            self.load.idle(time.monotonic() - began_s if starves else 0.0)
            self._end_all(ended)
        return False

    def _end_all(self, ended: Sequence[Ended]) -> None:
        for place, one in enumerate(ended):
            try:
                self._end(one)
            except WorldError:  # what could not be written runs, for a checkpoint, and has nothing: it is drawn again
                lost = [trajectory for other in ended[place:] for trajectory in other.group.trajectories]
                self.ledger.lose("interrupted", sum(trajectory.num_sampled for trajectory in lost))
                raise

    def _may_begin(self) -> bool:
        """Whether an engine would run a group at once, and the learner seems to need one."""
        if not self.config.asynchrony.by_load:
            return True
        at_once = any(not one.scheduler.waiting for one in living(self.parts))
        return at_once and self.load.may_begin(time.monotonic())

    def _begin(self, place: int, prompt: Prompt) -> None:
        step, version = self.queue.step, serves(self.parts).step
        group, number = group_id(prompt.id, step), self.queue.begun
        assert self.journal is not None
        try:
            self.journal.begin(number, group, step, place, version)
        except WorldError:
            self.stream.cursor = place
            raise
        assert self.queue.begin(version) == number
        self.account.dispatch(step, (prompt,), self.config.rollout.samples_per_prompt)
        self.begun[group] = Begun(number, step, place)
        assert self.flow.begin(step, prompt) == group

    def _end(self, ended: Ended) -> None:
        usable = not self.config.rollout.redraws or self.usable(ended.group)
        number = self.begun[ended.id].number
        assert self.journal is not None
        self.journal.end(number, ended, usable)
        del self.begun[ended.id]
        self.queue.end(number, ended, usable)
        self.ledger.arrive([ended.group])
        self._arrived += 1

    @contextmanager
    def parked(self) -> Iterator[None]:
        """The thread does nothing meanwhile. WorkerError where it does not come to rest."""
        with self._changed:
            self._wanted += 1
        try:
            while True:
                with self._changed:
                    if self._changed.wait_for(lambda: not self._rolling or self._failed is not None, LOOK_S):
                        break
                self._check_thread("park")
            yield
        finally:
            with self._changed:
                self._wanted -= 1
                self._changed.notify_all()

    def start(self) -> None:
        """Begin what an earlier sitting had begun, and sample from now on."""
        assert self._thread is None
        for paused in self.paused.values():
            for one in paused:
                if one.anew:
                    self.ledger.lose("interrupted", one.drawn_tokens)
        self.flow.resume([(name, paused) for name, paused in self.paused.items()])
        for group, (_, step, place) in sorted(self.unbegun.items(), key=lambda entry: entry[1]):
            assert self.flow.begin(step, self.pool.prompt(place)) == group, group
        self.paused, self.unbegun = {}, {}
        self._turned_s = time.monotonic()
        self._thread = threading.Thread(target=self._roll, name="rollouts", daemon=True)
        self._thread.start()

    def _end_thread(self) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(GRACE_S)

    def close(self) -> None:
        """No thread, nothing in the engine or with environments."""
        self._end_thread()
        if self._thread is None or not self._thread.is_alive():  # else the engine is in a step that does not end
            self.flow.withdraw()
        if self.journal is not None:
            self.journal.close()

    def _wait(self, seen: int, phase: str) -> None:
        """For more than `seen` groups to have ended, a little. WorkerError where the thread can't."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived > seen or self._failed is not None, LOOK_S)
        self._check_thread(phase)

    def _check_thread(self, phase: str) -> None:
        failed = self._failed
        if failed is not None:
            if isinstance(failed, Exception):
                raise failed
            raise WorkerError("rollouts", phase, f"its thread ended: {failed!r}") from failed
        most_s = self.config.rollout.deadline_s
        since_s = max(self._turned_s, self.cores.since_s if self.cores is not None else 0.0)  # waits are no step
        if self._rolling and time.monotonic() - since_s > most_s:
            raise WorkerError("rollouts", phase, f"a step of the engine has taken {most_s:g} s (rollout.deadline_s)")

    def part(self, step: int) -> list[Group]:
        with self.trace.span("buffer"):
            if self.queue.due:
                self.queue.take_due()
                return self.given()
            while (groups := self._lived(step)) is None:
                if self._thread is None:
                    self.start()
                seen = self._arrived
                with self.parked():
                    choice = self.queue.choose(step)
                    taken = choice is not None and self._take(choice)
                if taken:
                    if self.queue.whole:
                        self.load.adapt(self.waited, time.monotonic())
                        self.waited = False
                    return self.given()
                self.waited = True
                if self.stopping.requested and self.stopping.received is not None:
                    self.stopping.ahead = "the groups of this step are waited for"
                self._wait(seen, "rollout")
        return groups

    def _take(self, choice: Choice) -> bool:
        assert self.journal is not None
        self.journal.choose(choice.step, choice.numbers, choice.again, choice.stale)
        return self._leave(choice)

    def _leave(self, choice: Choice) -> bool:
        """What is chosen leaves the queue, if anything is; what is dropped has its fate."""
        stale = [self.queue.waiting[number].ended.group for number in choice.stale]
        self.stale_groups += len(stale)
        self.fairness.drop(stale)
        fates = {trajectory.id: "stale" for group in stale for trajectory in group.trajectories}
        self.ledger.record(stale, [], fates, version=self.learned_on)
        return bool(self.queue.take(choice))

    def given(self) -> list[Group]:
        lags = [self.learned_on - one.version for part in self.queue.parts for one in part]
        self.lags = {"lag": sum(lags) / len(lags), "lag_max": max(lags)}
        return super().given()

    def account_for(self, groups: Sequence[Group], batch: Selection, taken_out: int) -> None:
        fresh = [group for group in groups if not any(one.id in self.reused for one in group.trajectories)]
        samples = [sample for sample in batch.samples if sample.id not in self.reused]
        again = [sample for sample in batch.samples if sample.id in self.reused]
        reached = sum(map(reached_tokens, samples))
        all_reached = reached + sum(map(reached_tokens, again))
        share = taken_out * reached // all_reached if all_reached else 0  # of the fresh ones, where some are not
        self.ledger.record(fresh, samples, batch.fates, share, version=self.settled[0])
        self.ledger.reuse([sample for sample in again if sample.id in self.ledger.trained])

    def check_ledger(self) -> None:
        """With each checkpoint and at the end; between, the thread is not stopped for it."""

    def _check_all(self) -> None:
        running = [f"{name}/{one}" for name in self.begun for one in range(self.config.rollout.samples_per_prompt)]
        self.ledger.check(running, self._waiting)

    @property
    def _waiting(self) -> list[str]:
        """Trajectories in the queue."""
        held = [*self.queue.waiting.values(), *self.queue.unusable.values(), *self.queue.taken]
        return [trajectory.id for one in held for trajectory in one.ended.group.trajectories]

    def write(self, row: dict[str, Any]) -> None:
        counts = {"running_groups": len(self.flow), "waiting_groups": len(self.queue.waiting)}
        stale, self.stale_groups = self.stale_groups, 0
        if row["step"]:
            row |= self.lags | counts | {"stale_groups": stale, "stale_share": stale / (stale + self.queue.size)}
        super().write(row)

    def publish(self, step: int) -> WeightVersion:
        with self.trace.span("publish"):
            if self._thread is None:  # lived through again
                version = self.parts.publisher.publish(step)
                self.queue.learned()
                self._compare(step, version)
                return version
            if self.config.asynchrony.ends_first:
                self._drain()
            with self.parked():
                version = self._published(step)
                assert self.journal is not None
                self.journal.update(step, version.digest)
                self.queue.learned()
                self._draining = False
        return version

    def _published(self, step: int) -> WeightVersion:
        if self.config.asynchrony.at_update == "keep":
            return self.parts.publisher.publish(step)
        with self.flow.held():
            if self.config.asynchrony.at_update == "restart":
                self.ledger.lose("aborted", self.flow.restart())
            return self.parts.publisher.publish(step)

    def _drain(self) -> None:
        self._draining = True
        while True:
            seen = self._arrived
            with self.parked():
                if not len(self.flow):
                    return
            self._wait(seen, "publish")

    def score(self, batch: Selection) -> Selection:
        with self._computing():
            return super().score(batch)

    @contextmanager
    def learning(self, step: int) -> Iterator[None]:
        with self._computing(), super().learning(step):
            yield

    def evaluate(self, step: int) -> dict[str, Any]:
        with self.parked():
            return super().evaluate(step)

    # Checkpoints, and what came after them.

    def save(self, step: int, version: WeightVersion) -> None:
        with self.parked(), self.flow.held():
            self._end_all(self.flow.ended())
            self._check_all()
            self.stream.settle()
            super().save(step, version)

    def give_up(self) -> None:
        """What a step had taken that failed before its row; a checkpoint has the programs, which go on."""
        self.ledger.interrupt_held(self._waiting)

    def save_more(self, directory: Path) -> None:
        super().save_more(directory)
        assert self.journal is not None
        self.journal.sync()
        paused = [*((name, tuple(ones)) for name, ones in self.flow.pause()), *self.paused.items()]
        size = self.journal.size()
        if self.history:  # what is left of it is lived through by whoever resumes from here
            assert self.earlier is not None
            size = self.earlier.ends[len(self.earlier.facts) - len(self.history)]
        Kept.of(size, self.queue, self.begun, paused).write(directory)

    def restore(self) -> int:
        """To the newest checkpoint; what the journal has behind it is lived through again, step by step."""
        done = super().restore()
        folder = self.folder.path
        saved = self.folder.latest_checkpoint()
        kept = self._kept(saved.path) if saved is not None else None
        if (folder / FACTS).is_file():
            self.earlier = Read(folder)
            self._recall(self.earlier, kept.journal_bytes if kept is not None else 0)
        elif kept is not None:
            self.display.note(f"{folder / FACTS} is gone: the run goes on, and can't be repeated from its start")
        self.journal = Journal(folder)
        self.under, last = self.earlier.settings() if self.earlier is not None else ({}, None)
        if self.earlier is None or not self.earlier.facts:
            self.journal.start(self.weights_version.digest, self.weights_version.step, self.settings)
        elif last != self.settings:
            self.journal.resume(done, self.settings)
        return done

    def _recall(self, earlier: Read, size: int) -> None:
        """What the journal has behind a checkpoint that knew `size` bytes of it."""
        first = next(iter(earlier.facts), None)
        if first is not None and first.kind == "start" and 0 < first.values.get("step", 0) == self.weights_version.step:
            size = 0  # it was begun here, since an older one was gone
        earlier.mend(size)
        if earlier.cut:
            self.display.note(f"the journal was cut: {earlier.cut}; the run goes on from there")
        self.history.extend(fact for fact in earlier.after(size) if fact.kind != "start")

    def _kept(self, directory: Path) -> Kept:
        kept = Kept.read(directory)
        kept.fill(self.queue)
        self.begun = dict(kept.groups)
        self.paused = dict(kept.paused)
        self.unbegun = {group: one for group, one in self.begun.items() if group not in self.paused}
        return kept

    def _lived(self, step: int) -> list[Group] | None:
        """The groups that an earlier sitting chose for a step; None where it did not come so far."""
        while self.history:
            fact = self.history.popleft()
            if fact.kind == "choose":
                if self._leave(self.chosen(self.folder.path / FACTS, fact, step)):
                    return self.given()
            else:
                self._live(fact)
        return None

    def _live(self, fact: Fact) -> None:
        """A fact between two choices."""
        assert self.earlier is not None
        self.follows(self.folder.path / FACTS, fact)
        size = self.config.rollout.samples_per_prompt
        if fact.kind == "begin":
            number = self.queue.begin(fact["version"])
            self.begun[fact["group"]] = self.unbegun[fact["group"]] = Begun(number, fact["step"], fact["prompt"])
            self.ledger.dispatch(f"{fact['group']}/{one}" for one in range(size))
            self.stream.skip(fact["prompt"] + 1)
        elif fact.kind == "end":
            ended = self.earlier.ended(fact)
            self.queue.end(fact["number"], ended, fact["usable"])
            self.ledger.arrive([ended.group])
            before = sum(one.drawn_tokens for one in self.paused.get(fact["group"], ()))
            self.ledger.found(sum(one.num_sampled for one in ended.group.trajectories) - before)
            del self.begun[fact["group"]]
            self.unbegun.pop(fact["group"], None)
            self.paused.pop(fact["group"], None)

    def _compare(self, step: int, version: WeightVersion) -> None:
        """With the hash that the earlier sitting came to."""
        while self.history:
            fact = self.history.popleft()
            if fact.kind == "update":
                if (fact["step"], fact["weights"]) != (step, version.digest):
                    raise RunFolderError(
                        f"step {step} was learned again and gave the weights {version.digest[:12]}, and the journal "
                        f"has {fact['weights'][:12]}: another version of tandem, of its kernels, or a changed file. "
                        "Resume where the run was started."
                    )
                return
            self._live(fact)
        assert self.journal is not None
        self.journal.update(step, version.digest)

    @property
    def learned_on(self) -> int:
        """The version that the present step learns on."""
        return self.weights_version.step

    def finish(self) -> None:
        """Close the ledger: what runs on has been drawn, and is in flight."""
        self._end_thread()
        if self._thread is not None and self._thread.is_alive():
            return  # in a step that does not end: what it has nobody knows
        with self.flow.held():
            try:
                self._end_all(self.flow.ended())
            finally:  # what could not be written is interrupted
                self._check_all()
                paused = sum(one.drawn_tokens for ones in self.paused.values() for one in ones)
                self.folder.write_ledger(self.account.close(self.flow.drawn_tokens + paused))
