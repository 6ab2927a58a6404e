"""A tiny run, and requests, whose engine may be in this process or in another."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem.algo.config import AlgoConfig
from tandem.engine.config import EngineConfig
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.program.pool import RunningEpisode
from tandem.rollout.config import RolloutConfig
from tandem.run import local
from tandem.run.apart import RemoteEngine
from tandem.run.config import EvaluationConfig, RunConfig, WorkersConfig
from tandem.run.parts import Parts
from tandem.types import Completion, Request, Sampling
from tests.display import Silent
from tests.samples import ended

STEPS = 3
APART = WorkersConfig("local", deadline_s=60.0)


def patience_s(fault: signal.Signals) -> float:
    """A deadline that a stopped process is to pass, and one that is busy is not; a dead one is seen at once."""
    return 8.0 if fault == signal.SIGSTOP else APART.deadline_s


def pid(engine: RemoteEngine) -> int:
    return engine.seat.worker.child.popen.pid  # type: ignore[attr-defined]


def tiny(folder: Path, write_model: Callable[..., None]) -> RunConfig:
    """A run of a random model, written into a folder."""
    write_model(folder / "model", scale=10)
    sums = [{"question": f"{a}+{b}=" * (1 + a), "answer": str(a + b)} for a in range(6) for b in range(6)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    return RunConfig(
        name="tiny",
        steps=STEPS,
        model=ModelConfig(str(folder / "model")),
        task=TaskConfig("jsonl", path=str(folder / "sums.jsonl"), reward="last_number", heldout_size=8),
        rollout=RolloutConfig(prompts_per_step=4, samples_per_prompt=6, max_new_tokens=20),
        engine=EngineConfig(kv_memory_bytes=4 << 20),
        algo=AlgoConfig(kl="k3", kl_weight=0.01),
        evaluation=EvaluationConfig(prompts=4),
    )


def requests(count: int = 12) -> list[Request]:
    drawn = [
        Sampling(temperature=1.0 - place % 3 / 2, top_k=5 * (place % 2), max_new_tokens=5 + 7 * place)
        for place in range(count)
    ]
    prompts = [(3 + place % 4, *range(10, 20 + place % 5)) for place in range(count)]
    return [
        Request(f"r{place}", f"r{place}", prompts[place], drawn[place], seed=place, group=f"g{place % 4}")
        for place in range(count)
    ]


def drawn(completions: list[Completion]) -> list[Any]:
    return [(one.request_id, one.columns, one.stop_reason, one.cached_tokens) for one in completions]


def tokens(found: list[Any]) -> list[Any]:
    return [one[:3] for one in found]


def some(engine: RemoteEngine) -> list[Completion]:
    """The first to end."""
    while not (done := engine.step()):
        assert engine.has_work
    return done


def graded(self: RunningEpisode, unheard: int = 0) -> Any:
    """Rewards that differ within nearly every group."""
    return ended(float(sum(map(ord, self.said[-1].content)) % 11))


def run(
    config: RunConfig,
    out: Path,
    watch: Callable[[Parts], None] = lambda parts: None,
    score: Callable[..., Any] | None = graded,
    last: int | None = None,
) -> list[dict[str, Any]]:
    """The rows of a new run; `watch` is shown its parts. score: in place of an episode's own; None: its own."""
    return _run(config, {"out": out, "resume": None, "last": last}, watch, score)


def resumed(config: RunConfig, out: Path) -> list[dict[str, Any]]:
    """The rows of a run that is taken up again."""
    return _run(config, {"out": None, "resume": out}, lambda parts: None, graded)


def _run(
    config: RunConfig, where: Any, watch: Callable[[Parts], None], score: Callable[..., Any] | None
) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        build = local.build_parts

        def watched(*given: Any, **named: Any) -> Parts:
            parts = build(*given, **named)
            watch(parts)
            return parts

        patch.setattr(local, "build_parts", watched)
        if score is not None:
            patch.setattr(RunningEpisode, "score", score)
        code, folder = local.train(config, **where, display=Silent())
    assert code == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def struck(phase: str, fault: signal.Signals, hit: list[int], times: int = 1) -> Callable[[Parts], None]:
    """The process of the first engine, when it is asked something of a phase in the second step: as it has drawn some,
    where it is to draw."""

    def watch(parts: Parts) -> None:
        engine = parts.engine
        assert isinstance(engine, RemoteEngine)
        ask = engine.seat.ask

        def faulty(asked: str, *given: Any, **named: Any) -> Any:
            drew = phase != "rollout" or engine._counts.sampled_tokens > engine._returned
            if asked == phase and (engine.version.step == 1 or hit) and len(hit) < times and drew:
                hit.append(pid(engine))
                os.kill(pid(engine), fault)
            return ask(asked, *given, **named)

        engine.seat.ask = faulty  # type: ignore[method-assign]

    return watch


def closes(folder: Path, in_flight: bool = False) -> dict[str, int]:
    """Its tokens by fate, when each has one, each program one end and each worker's second one cause. in_flight: where
    what had not ended by the end may be left."""
    ledger = json.loads((folder / "ledger.json").read_text())
    tokens: dict[str, int] = ledger["tokens"]
    assert "unaccounted" not in tokens and sum(tokens.values()) == 2 * tokens["total"] > 0, tokens
    audit = ledger["audit"]
    wrong = ("lost", "strange", "beyond", *(() if in_flight else ("open", "waiting")))
    assert not any(audit[name] for name in wrong), audit
    assert audit["dispatched"] == audit["ended"] + audit["open"] > 0 or tokens["interrupted"] + tokens["crashed"], audit
    for worker, seconds in ledger["seconds"].items():
        assert seconds["unaccounted"] <= max(1.0, 0.02 * seconds["wall"]), (worker, seconds)
    return tokens


def same(rows: list[dict[str, Any]], plain: list[dict[str, Any]]) -> None:
    for name in ("weights", "reward", "tokens", "loss", "mismatch", "kl", "evaluation"):
        assert [row.get(name) for row in rows] == [row.get(name) for row in plain], name
