"""A run in one process: its parts, a sitting over them, and what it ends with."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path

from tandem.corpus.sources import check_sources
from tandem.errors import TandemError, WorldError
from tandem.models.checkpoint import open_checkpoint
from tandem.models.hf_config import to_hf_config
from tandem.plan.memory import Plan, check_counts
from tandem.program.child import child_of
from tandem.program.pool import EnvironmentPool
from tandem.rollout.evaluate import Evaluation
from tandem.run.adapted import resumed
from tandem.run.asynchronous import AsyncSession
from tandem.run.backends import backend_of
from tandem.run.clock import WallClock, started
from tandem.run.config import RunConfig, check_training
from tandem.run.engines import named
from tandem.run.evaluate import evaluate_tasks
from tandem.run.folder import RunFolder, check_new
from tandem.run.learned import begins
from tandem.run.learned_drafter import check_drafter
from tandem.run.loop import run_loop
from tandem.run.parts import build_parts, plan_parts
from tandem.run.reading import reading_of
from tandem.run.session import Display, Session
from tandem.run.source import resolve_source
from tandem.sync.departures import declaration


def train(
    config: RunConfig, *, out: Path | None, resume: Path | None, display: Display, last: int | None = None
) -> tuple[int, Path]:
    """Run a config, new in `out` or on from `resume`; returns the exit code and the run folder.

    last: the step after which it ends, where that is not config.steps, by which the learning rate falls.
    """
    check_training(config)
    check_counts(config)
    check_drafter(config)
    check_sources(config.corpus)
    keep = config.checkpoint.keep
    path = out or Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if resume is None:
        check_new(path)
    clock = WallClock()
    with ExitStack() as leaving:
        workers = backend_of(config)
        if workers is not None:
            leaving.callback(workers.close)
        born = child_of if workers is None else workers.home
        pool = EnvironmentPool(config.task, born=born, idle=not config.asks_task)
        leaving.callback(pool.close)
        folder = leaving.enter_context(RunFolder.open(resume, config, keep=keep)) if resume is not None else None
        own = resumed(config, folder.path) if folder is not None else config
        built = config.model, config.engine, config.sync.lag, own
        parts = build_parts(*built, task=config.task, workers=workers, remote=config.remote)
        leaving.callback(parts.close)
        if config.asks_task:
            pool.ready()
        begun = started(folder.path) if folder is not None else None
        now = parts.tokenizer.now = begun or parts.tokenizer.now
        reading = reading_of(config, parts, pool, display.note)
        if folder is None:  # only now, so that a wrong model, task or corpus leaves no folder behind
            folder = leaving.enter_context(RunFolder.create(path, config, keep=keep))
            for note in begins(config):
                display.note(note)
        for note in reading.notes() if reading is not None else ():
            display.note(note)
        model = {"model": to_hf_config(parts.decoder.spec, config.model.dtype)}
        read = reading.plan() if reading is not None else {}
        folder.write_plan(parts.plan | model | read | {"numerics": declaration(config), "started": now.isoformat()})
        with parts.memory.foreseen():
            kind = Session if config.asynchrony.mode == "sync" else AsyncSession
            session = kind(config, folder, pool, parts, display, clock, reading)
            return _sit(session, config.steps if last is None else last), folder.path


def plan(config: RunConfig) -> Plan:
    """The memory that `train` would take; no weight is read."""
    check_training(config)
    check_sources(config.corpus)
    checkpoint = open_checkpoint(resolve_source(config.model.source))
    return plan_parts(checkpoint, checkpoint.load_tokenizer(), config.model, config.engine, config.sync.lag, config)


def _sit(session: Session, steps: int) -> int:
    config, folder, parts, display = session.config, session.folder, session.parts, session.display
    with display, session.stopping, session.account, closing(session):
        done = session.restore()
        session.follow()
        folder.drop_ledger()  # until this sitting has its own
        session.row_started_s = session.account.begin(named(parts))
        if done == 0 and (config.evaluation.prompts or config.corpus.on):
            saving, session.stopping.ahead = session.stopping.ahead, "nothing to save yet; the evaluation ends first"
            with session.trace.span("rows"):
                begun = session.reading.begun() if session.reading is not None else {}
                session.write({"step": 0, **begun, **session.looked(0), "weights": session.weights_version.digest})
            session.stopping.ahead = saving
        try:
            stages = session.stages()
            last = done if stages.stop() else run_loop(stages, done + 1, steps)
        except (TandemError, OSError, RuntimeError, MemoryError):
            with suppress(WorldError):  # a disk is full, a learner gone: the first error says so
                session.save_newest(session.weights_version)
            with suppress(TandemError, OSError):  # as above
                session.give_up()
                session.finish()
            raise
        session.save_newest(session.weights_version)
        session.finish()
        if session.stopping.requested and last < config.steps:
            if last == 0:
                display.note(f"nothing to save yet: no step is finished. {folder.path} can be removed, or resumed")
            return session.stopping.exit_code
        if session.reasons and not session.graded:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in session.reasons.most_common(3))
            display.note(
                f"no trajectory of steps {done + 1} to {last} could be graded, so nothing was learned: {reasons}"
            )
            return 1
    return 0


def evaluate_model(config: RunConfig) -> Evaluation:
    """Accuracy of `config.model` on `config.task`, greedy unless config.evaluation draws samples; as the servers of
    config.remote have it, where it names some."""
    (one,) = evaluate_tasks({"": config})
    return one.evaluation
