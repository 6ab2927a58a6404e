"""What fewer bits save on this machine: decoding, prompts, long contexts and learning beside bf16, and what an update
costs then.

Kinds take turns, A B A B, on SmolLM2; a ratio is the median of those within a turn.
"""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tandem.bench.beside import TRAIN, demo_steps
from tandem.bench.sweep import fill_pages, start_decoding, stop_decoding
from tandem.bench.work import MODEL, answer, learner_on, random_requests, random_samples
from tandem.plan.roofline import SMOLLM2, kv_bytes, timed

if TYPE_CHECKING:
    from tandem.engine.engine import Engine
    from tandem.run.parts import Parts

DECODE, CONTEXT = 64, 128  # sequences, and tokens of each
PROMPTS, PROMPT_TOKENS = 16, 1024
LONG, LONG_CONTEXT = 16, 4096
WARM_UP, STEPS = 2, 8  # of decoding in a turn; the median of the steps counts
ROOM_TOKENS = 96  # of a sequence beyond its context
BASE = "bf16"
WEIGHTS = {BASE: {}, "w8a8": {"weights": "w8a8"}, "w4a8": {"weights": "w4a8"}}
LEARNERS = {  # of the model, and of the learner
    BASE: ({}, {}),
    "w8a8": ({"weights": "w8a8"}, {}),
    "w8a8, int8 gradients": ({"weights": "w8a8"}, {"gradients": "int8"}),
    "8-bit moments, no masters": ({}, {"moments": "float8", "masters": "bfloat16"}),
}
PAGES = {BASE: {}, "int8 KV": {"kv_dtype": "int8"}, "int4 KV": {"kv_dtype": "int4"}}
WANTED = {"decode": 1.5, "prefill": 1.6, "long decode": 1.4, "grpo": 1.25}


def numerics(rounds: int) -> dict[str, Any]:
    """Rows of works: seconds of each kind, bf16's over them, and what is wanted of that."""
    rows = _weights(rounds)
    gc.collect()  # before the pages of the long contexts
    rows.append(_pages(rounds))
    gc.collect()
    rows.append(_learners(rounds))
    gc.collect()
    return {"bench": "numerics", "rounds": rounds, "rows": [*rows, _steps(rounds)]}


def _weights(rounds: int) -> list[dict[str, Any]]:
    parts = {kind: _parts(settings, max(DECODE, PROMPTS * 8), CONTEXT) for kind, settings in WEIGHTS.items()}

    def publish(kind: str) -> float:
        one = parts[kind]
        return timed(lambda: one.publisher.publish(one.engine.version.step + 1))

    works: dict[str, Callable[[str], float]] = {
        f"decode {DECODE}x{CONTEXT}": lambda kind: _decode(parts[kind].engine, DECODE, CONTEXT),
        f"prefill {PROMPTS}x{PROMPT_TOKENS}": lambda kind: _prefill(parts[kind].engine),
        "publish": publish,
    }
    kinds = list(WEIGHTS)
    return [row_of(work, take_turns(kinds, rounds, run), WANTED.get(work.split()[0])) for work, run in works.items()]


def _pages(rounds: int) -> dict[str, Any]:
    engines = {kind: _parts(settings, LONG, LONG_CONTEXT).engine for kind, settings in PAGES.items()}
    for engine in engines.values():
        fill_pages(engine)
    turns = take_turns(list(PAGES), rounds, lambda kind: _decode(engines[kind], LONG, LONG_CONTEXT))
    return row_of(f"decode {LONG}x{LONG_CONTEXT}", turns, WANTED["long decode"])


def _learners(rounds: int) -> dict[str, Any]:
    from tandem.algo.pack import count_prompts
    from tandem.engine.config import EngineConfig
    from tandem.models.config import ModelConfig
    from tandem.run.parts import build_parts
    from tandem.train.config import LearnerConfig

    samples = random_samples(*TRAIN, SMOLLM2.vocab_size)
    totals = count_prompts(samples)
    learners = {
        kind: learner_on(
            build_parts(ModelConfig(MODEL, **model), EngineConfig(kv_memory_bytes=1 << 26)).decoder,  # type: ignore[arg-type]
            LearnerConfig(lr=1e-6, **learner),  # type: ignore[arg-type]
        )
        for kind, (model, learner) in LEARNERS.items()
    }
    turns = take_turns(list(learners), rounds, lambda kind: timed(lambda: learners[kind].step(samples, totals)))
    return row_of(f"train {TRAIN[0]}x{TRAIN[1]}", turns, None)


def _steps(rounds: int) -> dict[str, Any]:
    """The demo's steps as one run does them, from sampling to publishing; the first of each run is dropped."""

    def run(kind: str) -> float:
        model, learner = LEARNERS[kind]
        weights = model.get("weights", "same")
        steps = [step.value for step in demo_steps(weights=weights, **learner)]  # type: ignore[arg-type]
        return statistics.median(steps[1:])

    kinds = [kind for kind, (model, _) in LEARNERS.items() if model or kind == BASE]
    return row_of("grpo step 16x8x24", take_turns(kinds, max(1, rounds - 1), run), WANTED["grpo"])


def take_turns(kinds: Sequence[str], rounds: int, run: Callable[[str], float]) -> list[dict[str, float]]:
    """Seconds of each kind in each turn; the first turn, in which memory is touched first, is dropped."""
    return [{kind: run(kind) for kind in kinds} for _ in range(rounds + 1)][1:]


def row_of(work: str, turns: Sequence[Mapping[str, float]], wanted: float | None) -> dict[str, Any]:
    """Medians over the turns, and those of the ratios within a turn (bf16's seconds over a kind's)."""
    kinds = list(turns[0])
    return {
        "work": work,
        "seconds": {kind: statistics.median(turn[kind] for turn in turns) for kind in kinds},
        "ratio": {kind: statistics.median(turn[BASE] / turn[kind] for turn in turns) for kind in kinds if kind != BASE},
        "wanted": wanted,
    }


def _parts(settings: Mapping[str, str], sequences: int, context: int) -> Parts:
    from tandem.engine.config import EngineConfig
    from tandem.models.config import ModelConfig
    from tandem.run.parts import build_parts

    memory = sequences * (context + ROOM_TOKENS) * kv_bytes(SMOLLM2)
    config = EngineConfig(batch_tokens=4096, kv_memory_bytes=memory, **settings)  # type: ignore[arg-type]
    return build_parts(ModelConfig(MODEL), config)


def _decode(engine: Engine, sequences: int, context: int) -> float:
    """Seconds of a step."""
    start_decoding(engine, sequences, context, WARM_UP + STEPS, random.Random(context))
    for _ in range(WARM_UP):
        engine.step()
    step_s = statistics.median(timed(engine.step) for _ in range(STEPS))
    stop_decoding(engine)
    return step_s


def _prefill(engine: Engine) -> float:
    """Seconds until the last of the prompts has its first token."""
    rng = random.Random(str(engine.stats.run_tokens))  # others each time: no prompt is found in the pages
    return answer(engine, random_requests(PROMPTS, PROMPT_TOKENS, engine.vocab_size, 1, rng))[0]
