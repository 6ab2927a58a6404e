"""`bench ahead`: runs that sample while they learn beside the loop in steps, in turns; what their books cost; a kill.

Each run is a process of its own. Samples a second are of the steps behind the first ones, in which a queue fills.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem import env
from tandem.bench.books import spent_in
from tandem.bench.work import MODEL
from tandem.errors import WorldError

if TYPE_CHECKING:
    from tandem.run.config import RunConfig
    from tandem.run.session import Display

ROUNDS = 2  # of both sides, in turns
SIZE = {"waits": (4, 4), "none": (8, 8)}  # groups of a step and samples of each; few, so that waits are what is long
LAG = 2
STEPS = {"waits": 8, "none": 4}  # that count
FIRST = LAG + 1  # that do not, of either side: a queue fills, and both sides' steps have the same prompts
OPEN = 4, 8  # groups of a step and samples of each, where a run is killed: with a lag of 1, 64 programs
KILL_AFTER = 2  # steps
LEFT_S = 1.0  # between a checkpoint and the kill
DEADLINE_S = 200.0  # for one run
WANTED = {"waits": 2.0, "none": 0.95, "books": 0.01, "resume_s": 5.0}

Run = dict[str, Any]


def ahead() -> dict[str, Any]:
    """Samples a second of both sides, their ratio within a round; a share of the books; seconds of a resume."""
    rows: list[Run] = []
    runs: list[Run] = []
    for waits in ("waits", "none"):
        pairs = []
        for _ in range(ROUNDS):
            pairs.append([_child(f"{mode}/{waits}") for mode in ("sync", "full")])
            runs += pairs[-1]
        rates = [[run["samples_s"] for run in side] for side in zip(*pairs, strict=True)]
        ratio = statistics.median(full / sync for sync, full in zip(*rates, strict=True))
        sides = dict(zip(("sync", "full"), map(statistics.median, rates), strict=True))
        rows.append({"work": waits, **sides, "ratio": ratio, "wanted": WANTED[waits]})
    books = [run["books"] for run in runs if run["arm"] == "full/none"]
    resumed = kill_and_resume(open_config())
    return {
        "bench": "ahead",
        "rows": rows,
        "books": {"share": max(books), "wanted": WANTED["books"]},
        "resume": resumed | {"wanted_s": WANTED["resume_s"]},
        "runs": runs,
    }


def config_of(arm: str) -> RunConfig:
    """SmolLM2 and a calculator, whose answers come after 0.2 to 5 s or at once."""
    from tandem.engine.config import EngineConfig
    from tandem.models.config import ModelConfig
    from tandem.program.config import TaskConfig
    from tandem.rollout.config import AsyncConfig, RolloutConfig
    from tandem.run.config import CheckpointConfig, EvaluationConfig, RunConfig
    from tandem.train.config import LearnerConfig

    mode, _, waits = arm.partition("/")
    task = TaskConfig("tandem.bench.slow_tools:SlowCalculator", parameters=(("waits", waits != "none"),))
    return RunConfig(
        "ahead",
        steps=FIRST + STEPS[waits],
        model=ModelConfig(MODEL),
        task=replace(task, heldout_size=1),
        rollout=RolloutConfig(*SIZE[waits], max_new_tokens=40, max_turns=3),
        engine=EngineConfig(kv_memory_bytes=256 << 20),
        learner=LearnerConfig(lr=1e-9, beta2=0.99),  # each step is the same work
        evaluation=EvaluationConfig(prompts=0),
        checkpoint=CheckpointConfig(minutes=0.0),
        asynchrony=AsyncConfig("full", lag=LAG) if mode == "full" else AsyncConfig(),
    )


def run_arm(config: RunConfig, out: Path, display: Display) -> Run:
    """A run: samples a second of the steps behind the first, seconds of each worker by phase, and its books' share."""
    from tandem.report.metrics import read_metrics
    from tandem.run.account import Account
    from tandem.run.journal import Journal
    from tandem.run.ledger import Ledger
    from tandem.run.local import train

    with spent_in(Account, Ledger, Journal) as spent:
        train(config, out=out, resume=None, display=display)
    rows, asked = read_metrics(out), config.rollout
    found = measured(rows, FIRST, asked.prompts_per_step * asked.samples_per_prompt)
    wall_s = sum(sum(row["seconds"].values()) for row in rows)
    return found | {"books": spent.seconds / wall_s, "books_calls": spent.calls}


def measured(rows: Sequence[Run], first: int, samples: int) -> Run:
    """Of the steps behind the first so many.

    >>> rows = [{"step": n, "time_s": 2.0 * n, "seconds": {"learner": 1.0}, "reward": 0.5} for n in (1, 2, 3)]
    >>> measured(rows, 1, 8)
    {'samples_s': 4.0, 'step_s': 2.0, 'reward': 0.5, 'phases': {'main': {'learner': 1.0}}}
    """
    rows = [row for row in rows if row["step"]]
    counted = rows[first:]
    step_s = (counted[-1]["time_s"] - rows[first - 1]["time_s"]) / len(counted)
    phases: dict[str, Counter[str]] = {}
    for row in counted:
        for worker, spent in {"main": row["seconds"], **row.get("workers", {})}.items():
            phases.setdefault(worker, Counter()).update(spent)
    return {
        "samples_s": samples / step_s,
        "step_s": step_s,
        "reward": statistics.fmean(row["reward"] for row in counted),
        "phases": {
            worker: {phase: round(whole / len(counted), 4) for phase, whole in spent.most_common()}
            for worker, spent in phases.items()
        },
    }


def kill_and_resume(config: RunConfig, left_s: float = LEFT_S) -> Run:
    """A run that is killed so many seconds behind its first checkpoint, and goes on.

    first_token_s: from the start of the process that resumes it to the first token that its engine draws.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        with subprocess.Popen(_command(config, folder, "killed"), stdout=subprocess.PIPE, text=True) as running:
            try:
                _wait_for(running, out / "checkpoints" / f"step-{config.checkpoint.every}")
                time.sleep(left_s)
            finally:
                running.send_signal(signal.SIGKILL)
        before = _facts(out)
        began = time.time()
        found = _answer(_command(config, folder, "resumed"))
        after = _facts(out)
    asked, lag = config.rollout, config.asynchrony.most_lag
    return outcome(before, after) | {
        "first_token_s": found["first_token"] - began,
        "programs": (lag + 1) * asked.prompts_per_step * asked.samples_per_prompt,
    }


def outcome(before: Sequence[Run], after: Sequence[Run]) -> Run:
    """What became of the groups that had ended before a kill.

    >>> ends = [{"fact": "end", "number": n} for n in (0, 1)]
    >>> outcome(ends, [*ends, {"fact": "choose", "numbers": [0]}, {"fact": "end", "number": 1}])
    {'finished': 2, 'lost': 0, 'sampled_again': 1, 'trained_twice': 0}
    """
    finished = {fact["number"] for fact in before if fact["fact"] == "end"}
    ended = Counter(fact["number"] for fact in after if fact["fact"] == "end")
    chosen = Counter(number for fact in after if fact["fact"] == "choose" for number in fact["numbers"])
    return {
        "finished": len(finished),
        "lost": len(finished - set(ended)),
        "sampled_again": sum(ended[number] > 1 for number in finished),
        "trained_twice": sum(count > 1 for count in chosen.values()),
    }


def _facts(folder: Path) -> list[Run]:
    from tandem.run.journal import Read

    return [dict(fact.values) for fact in Read(folder).facts]


def _wait_for(running: subprocess.Popen[str], path: Path) -> None:
    until_s = time.monotonic() + DEADLINE_S
    while not path.exists():
        if running.poll() is not None:
            raise WorldError(f"the run to be killed ended with {running.returncode} before {path.name} was written.")
        if time.monotonic() > until_s:
            raise WorldError(f"{path.name} of the run to be killed was not written within {DEADLINE_S:g} s.")
        time.sleep(0.05)


def _child(arm: str) -> Run:
    print(arm, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        return {"arm": arm, **_answer(_command(config_of(arm), folder, "whole"))}


def _command(config: RunConfig, folder: str, part: str) -> list[str]:
    from tandem.config import dump

    saved = Path(folder) / "asked.json"
    saved.write_text(json.dumps(dump(config)), encoding="utf-8")
    return [sys.executable, "-m", "tandem.bench.ahead", part, folder]


def _answer(command: list[str]) -> Run:
    """The last line that a run says."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        raise WorldError(f"a run of `bench ahead` took more than {DEADLINE_S:g} s.") from None
    if done.returncode:
        raise WorldError(f"a run of `bench ahead` ended with {done.returncode}; its words are above.")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def open_config() -> RunConfig:
    """A run with 64 programs open: two steps' groups at a lag of 1."""
    from tandem.run.config import CheckpointConfig

    config = config_of("full/waits")
    return replace(
        config,
        steps=KILL_AFTER + 2,
        rollout=replace(config.rollout, prompts_per_step=OPEN[0], samples_per_prompt=OPEN[1]),
        asynchrony=replace(config.asynchrony, lag=1),
        checkpoint=CheckpointConfig(minutes=0.0, every=KILL_AFTER),
    )


def _first_token() -> list[float]:
    """Will have the time at which an engine of this process first drew."""
    from tandem.engine.engine import Engine

    drawn: list[float] = []
    step = Engine.step

    def seen(engine: Engine) -> Any:
        done = step(engine)
        if engine.stats.sampled_tokens and not drawn:
            drawn.append(time.time())
        return done

    Engine.step = seen  # type: ignore[method-assign,assignment]
    return drawn


def _main(part: str, folder: str) -> None:
    from tandem.config import load
    from tandem.report.live import LiveTable
    from tandem.run.config import RunConfig
    from tandem.run.local import train

    env.limit_spinning()
    config = load(RunConfig, json.loads((Path(folder) / "asked.json").read_text(encoding="utf-8")))
    out, display = Path(folder) / "run", LiveTable(config.steps, sys.stderr)
    if part == "whole":
        print(json.dumps(run_arm(config, out, display)))
        return
    drawn = _first_token()
    train(config, out=out if part == "killed" else None, resume=out if part == "resumed" else None, display=display)
    print(json.dumps({"first_token": drawn[0]}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
