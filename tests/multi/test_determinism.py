"""A run's weights are a function of its config and seed: not of how the engine scheduled, cached or ordered the work.

`learner.microbatch_tokens` and `learner.share_prefix` are not claimed to leave the weights alone: they change which
gradients are summed first. What they must leave alone is the forward pass, and so mismatch, kl and ratio.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.algo.config import AlgoConfig
from tandem.engine.config import EngineConfig
from tandem.kernels.build.toolchain import compiler
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.program.pool import RunningEpisode
from tandem.rollout.config import RolloutConfig
from tandem.run import local
from tandem.run.config import EvaluationConfig, RunConfig
from tandem.run.counted import SCHEDULED
from tandem.train.config import LearnerConfig
from tests.display import Silent
from tests.samples import ended

STEPS = 5
pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels are not batch-invariant")


def graded(self: RunningEpisode, unheard: int = 0) -> Future[float]:
    """Rewards that differ within nearly every group."""
    return ended(float(sum(map(ord, self.said[-1].content)) % 11))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> RunConfig:
    folder = tmp_path_factory.mktemp("determinism")
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
        learner=LearnerConfig(lr=3e-3, microbatch_tokens=500),
        evaluation=EvaluationConfig(prompts=0),
    )


@dataclass(frozen=True)
class Finished:
    """What a run left behind."""

    rows: list[dict[str, Any]]
    stats: Any  # the engine's counts
    weights: list[str]  # hashes of the weights after each step
    saved: dict[str, str]  # of the tensors of the last checkpoint: fp32 masters and moments, which no rounding hides

    def same(self, other: Finished) -> None:
        assert self.weights == other.weights
        assert self.saved == other.saved


def run(config: RunConfig, out: Path, threads: int = 1) -> Finished:
    """A run, each row of which shows learner and engine as one policy."""
    engines, before = [], torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        build = local.build_parts

        def watched(*given: Any, **named: Any) -> Any:
            parts = build(*given, **named)
            engines.append(parts.engine)
            return parts

        patch.setattr(local, "build_parts", watched)
        patch.setattr(RunningEpisode, "score", graded)
        patch.setenv("TANDEM_THREADS", str(threads))
        code, folder = local.train(config, out=out, resume=None, display=Silent())
    torch.set_num_threads(before)
    assert code == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] > 0]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert (row["mismatch"], row["kl"], row["ratio"], row["ratio_max"]) == (0.0, 0.0, 1.0, 1.0), row
        assert row["ratio_error"] == 0.0 and row["trained_tokens"] > 100, row
    files = sorted((folder / "checkpoints" / f"step-{STEPS}").rglob("*.safetensors"))
    saved = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert len(saved) >= 2, saved  # the model and the optimiser
    return Finished(rows, engines[0].stats, [row["weights"] for row in rows], saved)


@pytest.fixture(scope="module")
def plain(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    done = run(config, tmp_path_factory.mktemp("plain") / "run")
    assert len(set(done.weights)) == STEPS and done.stats.preemptions == 0 and done.stats.cached_tokens
    return done


def test_two_runs(config: RunConfig, plain: Finished, tmp_path: Path) -> None:
    """Something random, or the time, enters a run beside its seed."""
    run(config, tmp_path / "run").same(plain)
    assert run(replace(config, seed=1), tmp_path / "other").weights[0] != plain.weights[0]


def test_two_threads(config: RunConfig, plain: Finished, tmp_path: Path) -> None:
    """A run's weights depend on how many threads computed them."""
    run(config, tmp_path / "run", threads=2).same(plain)


ENGINES: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "batch_tokens": ({"batch_tokens": 12, "max_sequences": 12}, lambda stats: stats.batches > 30 * STEPS),
    "max_sequences": ({"max_sequences": 3}, lambda stats: stats.most_running == 3),
    "share_prefixes": ({"share_prefixes": False}, lambda stats: stats.cached_tokens == 0),
    "page_tokens": ({"page_tokens": 4}, lambda stats: True),
    # 128 bytes a token and 16 tokens a page: 14 pages, where a context takes up to 6.
    "preemption": ({"kv_memory_bytes": 14 * 16 * 128, "lookahead_tokens": 0}, lambda stats: stats.preemptions > 0),
}


@pytest.mark.parametrize("name", ENGINES)
def test_the_engines_limits(config: RunConfig, plain: Finished, tmp_path: Path, name: str) -> None:
    """Chunks, company, pages, the prefix cache or preemption change a token or a bit of a log-prob; or rows that do not
    add up to what the scheduler did.
    """
    limits, happened = ENGINES[name]
    done = run(replace(config, engine=replace(config.engine, **limits)), tmp_path / "run")
    assert happened(done.stats), done.stats
    for name in SCHEDULED:
        assert sum(row[name] for row in done.rows) == getattr(done.stats, name), name
    done.same(plain)


@contextmanager
def shuffled_prompts(seed: int) -> Iterator[None]:
    """The prompts of every step in another order."""
    rng = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        prompts = local.Session.prompts

        def permuted(self: Any, step: int) -> Any:
            found = list(prompts(self, step))
            return rng.sample(found, len(found))

        patch.setattr(local.Session, "prompts", permuted)
        yield


def test_order_of_prompts(config: RunConfig, plain: Finished, tmp_path: Path) -> None:
    """The order in which prompts arrive, which in a larger system is that of luck, enters the gradient's sums."""
    with shuffled_prompts(1):
        run(config, tmp_path / "run").same(plain)


@pytest.mark.parametrize("changes", [{"microbatch_tokens": 150}, {"share_prefix": False}])
def test_microbatches_leave_the_forward_pass_alone(config: RunConfig, plain: Finished, tmp_path: Path, changes) -> None:
    """Another packing scores the engine's tokens with other bits. The weights may differ, by the order of sums."""
    done = run(replace(config, learner=replace(config.learner, **changes)), tmp_path / "run")
    assert done.rows[0]["tokens"] == plain.rows[0]["tokens"]
    assert done.rows[0]["grad_norm"] == pytest.approx(plain.rows[0]["grad_norm"], rel=1e-3)
