"""A step of distillation beside what it can't do without: one of SFT on the same texts, and the teacher's forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from tandem.bench.peers import Figure
from tandem.bench.work import MODEL, random_samples
from tandem.plan.roofline import Machine, timed

if TYPE_CHECKING:
    from tandem.algo.objective import Objective

TEXTS = (8, 256)  # texts, tokens each
KINDS = ("forward", "jensen_shannon")
REPEATS = 2  # the best counts, for each side alike; all sides take turns
FLOOR = "sft + teacher"  # the peer that does both and nothing else


def distil(_: Machine) -> Iterator[Figure]:
    """Of SmolLM2-135M by itself, over the whole vocabulary and over 32 tokens of it. The ratio that is wanted: 0.91."""
    from tandem.algo.config import DistilConfig
    from tandem.algo.distil import Distil
    from tandem.algo.pack import count_prompts, pack
    from tandem.algo.supervised import NextToken
    from tandem.engine.config import EngineConfig
    from tandem.models.config import ModelConfig
    from tandem.run.distil import load_teacher
    from tandem.run.parts import build_parts
    from tandem.train.config import LearnerConfig
    from tandem.train.score import score
    from tandem.train.step import Learner

    model, config = ModelConfig(MODEL), LearnerConfig(lr=1e-6)
    decoder = build_parts(model, EngineConfig(kv_memory_bytes=1 << 26)).decoder
    teacher = load_teacher(MODEL, model)
    trained = TEXTS[0] * (TEXTS[1] - 1)
    samples = [
        replace(one, columns=one.columns.having(loss_weights=one.columns["loss_mask"] / trained))
        for one in random_samples(*TEXTS, decoder.spec.vocab_size)
    ]
    totals = count_prompts(samples)
    microbatches = pack(samples, totals, config.microbatch_tokens)
    learner = Learner(decoder, config, NextToken(), 100)

    def step_s(objective: Objective) -> float:
        learner.objective = objective
        return timed(lambda: learner.step(samples, totals))

    def forward_s() -> float:
        return timed(lambda: [score(teacher, microbatch, 1.0) for microbatch in microbatches])

    taught: dict[str, Objective] = {
        kind: Distil(DistilConfig(MODEL, divergence=kind), lambda: teacher)  # type: ignore[arg-type]
        for kind in KINDS
    }
    taught["forward and texts"] = Distil(DistilConfig(MODEL, text_weight=0.5), lambda: teacher)
    taught["top 32"] = Distil(DistilConfig(MODEL, top_k=32), lambda: teacher)
    step_s(NextToken())  # warms up
    rounds = [
        {name: step_s(objective) for name, objective in taught.items()} | {FLOOR: step_s(NextToken()) + forward_s()}
        for _ in range(REPEATS)
    ]
    best = {name: min(one[name] for one in rounds) for name in rounds[0]}
    for name in taught:
        work = f"distil {name} {TEXTS[0]}x{TEXTS[1]}"
        yield Figure("tandem", work, best[name], "s")
        yield Figure(FLOOR, work, best[FLOOR], "s")
