"""A run in one process: the stages of the loop, its checkpoints and its rows."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tandem.algo.advantage import FATES, Selection, has_spread, samples_from_groups
from tandem.algo.distil import taught
from tandem.algo.pack import PromptTotal
from tandem.algo.price import Lagrangian
from tandem.engine.driver import Driver
from tandem.errors import AlarmError, CheckpointError, NonFiniteError, ParityError, RunFolderError
from tandem.models.checkpoint import open_checkpoint
from tandem.models.decoder import Decoder, decoder_of
from tandem.plan.memory import peak_bytes
from tandem.program.pool import EnvironmentPool
from tandem.rollout.evaluate import evaluate
from tandem.rollout.first import First
from tandem.rollout.group import program_id, summarise
from tandem.rollout.pieces import Pieces
from tandem.rollout.rollout import Rollouts
from tandem.rollout.router import Router
from tandem.rollout.rows import credits, trajectory_rows
from tandem.run import outlet
from tandem.run.account import Account
from tandem.run.adapted import saved_adapter
from tandem.run.clock import WallClock
from tandem.run.config import RunConfig
from tandem.run.counted import counted
from tandem.run.course import Course, mark_best
from tandem.run.distil import saved_teacher
from tandem.run.engines import endpoint, living
from tandem.run.fairness import Fairness
from tandem.run.figures import figures
from tandem.run.folder import RunFolder, SavedCheckpoint
from tandem.run.learned import OBJECTIVES, critic_of, learner_config, total_updates
from tandem.run.learning import Learns
from tandem.run.ledger import Ledger
from tandem.run.loop import Stages
from tandem.run.parts import Parts
from tandem.run.reading import SELECTIONS, Reading
from tandem.run.reference import scorer_of
from tandem.run.source import resolve_source
from tandem.run.spans import filler_of
from tandem.run.spending import Spending
from tandem.run.stop import StopSignal
from tandem.run.stream import PromptStream
from tandem.run.useful import useful_work
from tandem.sync.departures import of_engine
from tandem.trace import ROLLOUT
from tandem.train import checkpoint as saved_state
from tandem.train.checkpoint import Part, RunState
from tandem.train.score import versions_of, with_sources
from tandem.train.step import Learner, LearnerReport
from tandem.types import Group, Prompt, Sample, WeightVersion

Row = Mapping[str, Any]
SAVE_SHARE = 200  # a save by time waits for this many times what the last one took: after the first, 0.5 % of a run


class Display(Protocol):
    """Where a run's rows are shown."""

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    def update(self, row: Row) -> None: ...

    def note(self, text: str) -> None: ...


class Session:
    """The stages of one sitting, over the parts of a run."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        pool: EnvironmentPool,
        parts: Parts,
        display: Display,
        clock: WallClock,
        reading: Reading | None = None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.pool = pool
        self.parts = parts
        self.display = display
        self.stopping = StopSignal(display.note)
        self.clock, self.row_started_s = clock, clock.started_s
        self.ledger = Ledger()
        self.account = Account(self.ledger, clock, folder.path)
        self.trace = self.account.trace
        self.alarmed: set[str] = set()  # metrics whose alarm has been shown
        self.graded = 0  # trajectories of this sitting
        self.reasons: Counter[str] = Counter()  # of those that were not
        self.settled = (0, 0)  # the last step with a row, and the optimiser's updates then
        self.saved_s, self.save_took_s = time.monotonic(), 0.0
        self.pieces = Pieces(parts.tokenizer.decode)
        self.kept: list[str] = []  # trajectories that have a row, in its order
        objective = OBJECTIVES[config.objective](config)
        self.learner: Learns = parts.learner or Learner(
            parts.decoder,
            learner_config(config, parts.memory),
            objective,
            total_updates(config, objective),
            self.trace,
            critic_of(config, parts.decoder, self._frozen, parts.memory) if "values" in objective.columns else None,
        )
        self.price = Lagrangian(config.algo.price)
        self.stream = PromptStream(pool)
        size, seed = config.rollout.samples_per_prompt, config.seed
        self.spending = Spending(self.stream, config.select, size, seed, self.differ)
        self.saved_parts: dict[str, Part] = {
            "prompts": self.stream,
            "ledger": self.account,
            "clock": self.clock,
            "price": self.price,
        }
        if config.select.on:
            self.saved_parts["spending"] = self.spending
        if self.learner.critic is not None:
            self.saved_parts["critic"] = self.learner.critic
        self.reused: set[str] = set()  # trajectories of the present batch that were in one before
        self.fairness = Fairness(config)
        if self.fairness.lasts:
            self.saved_parts["fairness"] = self.fairness
        self.course = Course(config.evaluation)
        asked = endpoint(parts, self.account, display.note)
        self.rollouts = Rollouts(asked, parts.renderer, pool, config.rollout, config.seed, self.trace)
        self.samples, self.reading = objective.samples, reading  # whether the engine does, and what is read else
        read = reading.saved if reading is not None else {}
        self.saved_parts |= {**read, **saved_teacher(config), **saved_adapter(config)}
        self.reference = scorer_of(parts, config, objective, self._frozen, folder.path, self.trace)
        self.filled = filler_of(config, parts, objective)

    def _frozen(self, source: str) -> Decoder:
        """A model beside the policy, of the same dtype and device."""
        checkpoint = open_checkpoint(resolve_source(source))
        return decoder_of(checkpoint.spec, self.config.model).load(checkpoint.tensors())

    def stages(self) -> Stages:
        return Stages(
            prompts=self.trace.timed("read", self.prompts),
            rollout=self.rollout if self.samples else self.trace.timed("read", self.read),
            credit=self.trace.timed("credit", self.credit),
            keep=self.trace.timed("rows", self.keep),
            rest=self.rest,
            score=self.score,
            learn=self.learn,
            publish=self.publish,
            record=self.record,
            stop=lambda: self.stopping.requested or bool(self.course.reached),
        )

    def prompts(self, step: int) -> Sequence[Prompt]:
        asked = self.config.rollout
        return self.spending.take(step, asked.prompts_per_step + asked.extra_prompts) if self.samples else ()

    def rollout(self, step: int, prompts: Sequence[Prompt]) -> Sequence[Group]:
        """Groups of a step; what the engine's scheduler did for them is counted for the row.

        Where rollout.extra_prompts are asked for, the first groups to end are the step's; where rollout.redraws are,
        prompts are drawn again in place of groups whose rewards are equal.
        """
        asked, groups, lacking = self.config.rollout, list[Group](), self.config.rollout.prompts_per_step
        with counted(self.parts, self.trace, bool(self.config.engine.draft.most)):
            for draw in range(1 + asked.redraws):
                if asked.redraws:
                    self.trace.count("redrawn_groups", lacking if draw else 0)
                if draw:
                    with self.trace.span("read"):
                        prompts = self.spending.take(step, lacking + asked.extra_prompts)
                first = self.fairness.race(First(lacking, self.usable)) if asked.extra_prompts else None
                self.account.dispatch(step, prompts, asked.samples_per_prompt)
                found = self.rollouts.collect(step, prompts, first, self.spending.early(step))
                self.account_for_spared(step, found)
                groups += found
                lacking = asked.prompts_per_step - sum(map(self.usable, groups))
                if lacking <= 0:
                    break
        return groups

    def usable(self, group: Group) -> bool:
        """Whether it counts towards the batch: something of it was graded, and stays in."""
        if self.config.algo.filter_zero_variance:
            return self.differ(group)
        return any(trajectory.failure is None for trajectory in group.trajectories)

    def differ(self, group: Group) -> bool:
        return has_spread(self.config.algo, group, self.price.price)

    def credit(self, groups: Sequence[Group]) -> Selection:
        if not self.samples:
            return self.filled(SELECTIONS[self.config.objective](self.config, groups), groups)
        if self.config.objective in ("distil", "drafter"):  # whatever was said counts, and not what it earned
            batch = self.fairness.weigh(groups, taught(self.config.distil, groups), self.reused)
            return self.filled(batch, groups)
        batch = samples_from_groups(self.config.algo, groups, self.price.price)
        return self.spending.weigh(self.fairness.weigh(groups, batch, self.reused))

    def read(self, step: int, prompts: Sequence[Prompt]) -> Sequence[Group]:
        """What is written, in place of rollouts."""
        return self.reading.take(self.stream) if self.reading is not None else ()

    def keep(self, step: int, groups: Sequence[Group]) -> None:
        kept = self.config.rollout.keep_tokens
        self.folder.write_trajectories(step, trajectory_rows(groups, self.pieces, kept, self.spending.facts))
        self.kept = [trajectory.id for group in groups for trajectory in group.trajectories]

    def rest(self) -> None:
        """The engine's memory is the learner's from here on; fails where a request is live."""
        with self.trace.span("learner"):
            self.release_memory()

    def release_memory(self) -> None:
        """Of the engines that sample."""
        for engine in living(self.parts):
            engine.release_memory()

    def score(self, batch: Selection) -> Selection:
        """The batch under the reference policy, and under the weights that sampled it where those are older."""
        samples, given = batch.samples, (self.config.learner.microbatch_tokens, self.learner.objective.temperature)
        with self.trace.span("learner"):
            if self.reference is not None:
                samples = self.reference(samples, batch.prompts, *given)
            if self.samples:  # texts were drawn by no version
                samples = self.sources(samples, batch.prompts, *given)
            if self.learner.critic is not None:
                samples = self.learner.critic.credit(self.config.algo, samples, batch.prompts)
        return dataclasses.replace(batch, samples=samples)

    def sources(
        self, samples: tuple[Sample, ...], prompts: Sequence[PromptTotal], budget_tokens: int, temperature: float
    ) -> tuple[Sample, ...]:
        """With log-probs under the versions that drew them, where those are older than the learner's."""
        if not versions_of(samples) - {self.weights_version.step}:
            return samples
        asked = self.config.asynchrony
        if asked.mode != "sync" and asked.at_update != "keep" and not of_engine(self.config.model, self.config.engine):
            own = [one.columns.having(source_logprobs=one.columns["logprobs"]) for one in samples]  # the learner's bits
            return tuple(dataclasses.replace(one, columns=columns) for one, columns in zip(samples, own, strict=True))
        return with_sources(self.parts.publisher.sources(), samples, prompts, budget_tokens, temperature)

    @property
    def weights_version(self) -> WeightVersion:
        """The learner's, as it was last published."""
        version = self.parts.publisher.version
        assert version is not None
        return version

    @contextmanager
    def learning(self, step: int) -> Iterator[None]:
        """The learner computes."""
        with self.trace.span("learner"):
            try:
                yield
            except (NonFiniteError, AlarmError, ParityError) as error:
                kept = self.folder.trajectories(step)
                raise type(error)(f"step {step}: {error} The step's trajectories are kept in {kept}.") from error

    def learn(self, step: int, batch: Selection) -> LearnerReport | None:
        """One step of the learner."""
        with self.learning(step):
            return self.learner.step(batch.samples, batch.prompts)

    def publish(self, step: int) -> WeightVersion:
        with self.trace.span("publish"):
            return self.parts.publisher.publish(step)

    def looked(self, step: int) -> dict[str, Any]:
        """A row's keys of what is held out: accuracy on the task, loss of a corpus."""
        found = {"evaluation": self.evaluate(step)} if self.config.evaluation.prompts else {}
        if self.reading is not None:
            self.release_memory()
            with self.trace.span("evaluate"):
                found |= self.reading.heldout(self.learner, lambda groups: self.score(self.credit(groups)))
        return found

    def evaluate(self, step: int) -> dict[str, Any]:
        """Held-out accuracy."""
        with self.trace.span("evaluate"):
            prompts = self.pool.heldout[: self.config.evaluation.prompts]
            own = self.parts.exact_engine is not self.parts.engine
            asked = Driver(self.parts.exact_engine) if own else self.rollouts.driver
            drawing, config = self.config.evaluation.drawing(self.config.seed), self.config.rollout
            result, groups = evaluate(asked, self.parts.renderer, self.pool, prompts, config, drawing, step)
            self.ledger.lose("evaluated", sum(answer.num_sampled for group in groups for answer in group.trajectories))
            if own:
                self.parts.exact_engine.release_memory()
        return dataclasses.asdict(result)

    def record(
        self, step: int, groups: Sequence[Group], batch: Selection, report: LearnerReport | None, version: WeightVersion
    ) -> None:
        """Write and show the step's row, save where it is due. The end saves in any case."""
        with self.trace.span("rows"):  # ended before a checkpoint, whose ledger has what has ended
            best = self.tell(step, groups, batch, report, version)
        if best or (self.config.checkpoint.every and step % self.config.checkpoint.every == 0):
            self.save(step, version)
        elif self.time_to_save():
            try:
                self.save(step, version)
            except CheckpointError as error:  # nobody asked for this one: the run goes on, and tries again in time
                self.saved_s = time.monotonic()
                self.display.note(str(error))
        if best:
            mark_best(self.folder.path / "checkpoints", step)
            self.folder.prune()

    def tell(
        self, step: int, groups: Sequence[Group], batch: Selection, report: LearnerReport | None, version: WeightVersion
    ) -> bool:
        """A step's row, with an evaluation where it is due; returns whether it is the best so far and to be kept."""
        summary = summarise(groups)
        self.graded += summary.trajectories - summary.failed
        self.reasons.update(dict(summary.failures))
        if self.config.rollout.keep_tokens:
            self.folder.extend_trajectories(step, credits(self.kept, batch.samples))
        row: dict[str, Any] = {"step": step, **figures(self.config, summary, report), "weights": version.digest}
        row = self.reading.told(row) if self.reading is not None else row
        cost = self.price.update(groups)
        if self.config.algo.price.budget is not None:
            row |= {"cost": cost, "price": self.price.price}
        row["trained_samples"] = len(batch.samples)
        if self.samples:
            row["dropped"] = {fate: count for fate in FATES if fate != "trained" and (count := batch.count(fate))}
            if report is not None:
                updates = self.learner.objective.updates_per_step
                row["useful"] = useful_work(self.parts.decoder.spec, batch.samples, updates)
            row |= self.fairness.row(step, report)
            taken_out = int(row.get("taken_out", 0))
            self.account_for(groups, batch, taken_out)
            row |= self.spending.learn(groups)
        self.course.sampled(row.get("reward"))
        last, asked, best = step == self.config.steps or bool(self.course.reached), self.config.evaluation, False
        try:
            if last or (asked.every and step % asked.every == 0):
                row |= self.looked(step)
            if "evaluation" in row:
                best = self.course.evaluated(step, row["evaluation"]) and self.config.checkpoint.best
        finally:  # the update is done, whatever becomes of its evaluation
            self.write(row | ({"reached": self.course.reached} if self.course.reached else {}))
        self.announce(step, report)
        if self.course.reached:
            self.display.note(f"step {step}: {self.course.reached}; the run ends here")
        return best

    def account_for(self, groups: Sequence[Group], batch: Selection, taken_out: int) -> None:
        """What became of a step's tokens; taken_out: of those with an advantage, by a correction."""
        self.ledger.record(groups, batch.samples, batch.fates, taken_out, version=self.settled[0])

    def account_for_spared(self, step: int, groups: Sequence[Group]) -> None:
        """The programs of stopped groups that never began."""
        size = self.config.rollout.samples_per_prompt
        for group in groups:
            begun = len(group.programs)
            if group.stopped:
                self.ledger.lose("decided", 0, [program_id(group.prompt.id, step, n) for n in range(begun, size)])

    def check_ledger(self) -> None:
        """Between two steps nothing is without a fate."""
        self.ledger.check()

    def time_to_save(self) -> bool:
        """Whether a checkpoint is due, of whatever step this is."""
        minutes, waited_s = self.config.checkpoint.minutes, time.monotonic() - self.saved_s
        return minutes > 0 and waited_s >= max(60 * minutes, SAVE_SHARE * self.save_took_s)

    def announce(self, step: int, report: LearnerReport | None) -> None:
        """The first time that a metric's alarm fires, in full; the rows have all of them."""
        for alarm in report.measured.alarms if report is not None else ():
            if alarm.metric not in self.alarmed:
                self.alarmed.add(alarm.metric)
                self.display.note(f"alarm, step {step}: {alarm.text()}")

    def write(self, row: dict[str, Any]) -> None:
        """Complete a row with counts, times and memory, and hand it to folder, ledger and display."""
        now = time.perf_counter()
        settled = self.account.settle()
        seconds, counts = settled.seconds, settled.counts
        row["drawn_tokens"] = settled.drawn_tokens
        if "extra_programs" in counts:
            self.ledger.lose("surplus", int(counts["extra_tokens"]), self.ledger.open)
        self.check_ledger()
        rollout_s, sampled = seconds.get("rollout", 0.0), row.get("tokens") or 0
        if settled.workers:
            row["workers"] = settled.workers
        if not rollout_s:  # another worker's
            rollout_s = sum(phases.get(name, 0.0) for phases in settled.workers.values() for name in ROLLOUT)
            sampled = settled.drawn_tokens
        if not self.samples:  # the learner's rate
            sampled, rollout_s = row.get("learner_rows", 0), seconds.get("learner", 0.0)
        if "tokens" in row:
            row["tokens_per_s"] = sampled / rollout_s if rollout_s else None
        row |= counts
        spent = now - self.row_started_s
        row["seconds"] = seconds | {"other": max(0.0, spent - sum(seconds.values()))}
        row["time_s"] = self.clock.seconds(now)
        row["peak_memory_bytes"] = peak_bytes()
        if isinstance(self.rollouts.driver, Router):
            row["engines"] = self.rollouts.driver.settle()
        if outlet.LOST:
            row["output_lost"] = dict(outlet.LOST)
        self.row_started_s = now
        self.folder.append_metrics(row)
        self.settled = row["step"], self.learner.updates
        self.spending.settle()
        self.fairness.settle()
        self.stream.settle()
        if self.reading is not None:
            self.reading.settle()
        self.display.update(row)

    def save(self, step: int, version: WeightVersion) -> None:
        """A checkpoint after `step`."""
        started_s = time.monotonic()
        self.release_memory()
        with self.trace.span("checkpoint"), self.folder.checkpoint(step) as directory:
            parts = {name: part.state() for name, part in self.saved_parts.items()}
            state = RunState(step, self.learner.updates, version.digest, parts)
            self.learner.save(directory, self.parts.tokenizer, state)
            self.save_more(directory)
            saved_state.seal(directory)
        self.saved_s = time.monotonic()
        self.save_took_s = self.saved_s - started_s

    def save_more(self, directory: Path) -> None:
        """Files of a checkpoint beside the learner's."""
        self.parts.publisher.save(directory)

    def give_up(self) -> None:
        """What a step that failed has sampled leads nowhere: a resumed run begins it anew."""
        if self.ledger.open:
            self.account.interrupt()

    def save_newest(self, version: WeightVersion) -> None:
        """A checkpoint of the last finished step, unless there is one, or an update has begun since."""
        saved = self.folder.latest_checkpoint()
        settled = self.settled == (version.step, self.learner.updates)
        if settled and version.step and (saved is None or saved.step < version.step):
            self.give_up()
            self.save(version.step, version)

    def restore(self) -> int:
        """Go back to the newest checkpoint; returns its step, 0 where there is none. Says what is set aside."""
        saved = self.folder.latest_checkpoint()
        aside = self.folder.rewind(-1 if saved is None else self._load(saved))
        self.account.resume(aside.rows)
        if aside.steps:
            since = "there is no checkpoint" if saved is None else f"the newest checkpoint is of step {saved.step}"
            steps = "-".join(map(str, dict.fromkeys((aside.steps[0], aside.steps[-1]))))
            self.display.note(f"{since}: what is there of step {steps} was set aside in {aside.path}")
        self.saved_s = time.monotonic()
        return 0 if saved is None else saved.step

    def _load(self, saved: SavedCheckpoint) -> int:
        """The state of a checkpoint; returns its step."""
        state = self.learner.load(saved.path)
        self.parts.publisher.load(saved.path)
        version = self.parts.publisher.publish(state.step)
        if version.digest != state.weights:
            raise RunFolderError(
                f"the weights of {saved.path} hash to {version.digest[:12]}, not to the {state.weights[:12]} that were "
                "saved: the files were changed. Remove this checkpoint to go on from the one before."
            )
        saved_state.restore_parts(self.saved_parts, state.parts, saved.path)
        self.settled = state.step, state.updates
        return state.step

    def follow(self) -> None:
        """Take up the course of earlier sittings."""
        for row in self.folder.rows():
            self.course.take(row)
        if self.course.reached:
            self.display.note(f"{self.course.reached}, so nothing is left to do. To go on, set evaluation.stop_* anew.")

    def close(self) -> None:
        """What the sitting holds beside its parts."""

    def finish(self) -> None:
        """Close the ledger."""
        self.folder.write_ledger(self.account.close())
