"""Adapters beside all weights: the speed and the memory of training, and a decode step whose sequences have one each.

Training is of random tokens, 4 samples of 1,024, a microbatch each, in a process of its own: its peak memory is that of
the process. "lora" keeps the base in bf16, "lora on codes" as the 4-bit codes of its file.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from tandem import env
from tandem.bench.work import MODEL, answer, build_engine, learner_on, random_requests, random_samples
from tandem.errors import WorldError
from tandem.plan.roofline import SMOLLM2, timed

SAMPLES, LENGTH = 4, 1024
RANK = 16
DECODE, ADAPTERS, PROMPT_TOKENS, NEW = 64, 8, 47, 64
REPEATS = 3  # within a process; the best counts
LIMIT_S = 600.0  # of a process
WANTED = {"lora": (1.3, 0.5), "lora on codes": (None, 0.35)}  # speed and memory over those of "full"
WANTED_DECODE = 0.85  # rate over that of the base


def lora(rounds: int) -> dict[str, Any]:
    """Medians of the rounds, each kind in turn within a round."""
    with tempfile.TemporaryDirectory() as folder:
        source = _in_bf16(Path(folder) / "model")
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(rounds):
            for kind, model in (("full", source), ("lora", source), ("lora on codes", MODEL)):
                found.setdefault(kind, []).append(_child("train", kind, model))
        decodes = [_child("decode", "", source) for _ in range(rounds)]
    rows = []
    for kind, runs in found.items():
        row: dict[str, Any] = {"work": kind} | {
            name: statistics.median(run[name] for run in runs) for name in ("tok_s", "gb")
        }
        for name, wanted in zip(("tok_s", "gb"), WANTED.get(kind, (None, None)), strict=True):
            ratios = [run[name] / full[name] for run, full in zip(runs, found["full"], strict=True)]
            row |= {f"{name}_ratio": statistics.median(ratios), f"{name}_wanted": wanted}
        rows.append(row)
    decode = {name: statistics.median(run[name] for run in decodes) for name in ("base_tok_s", "adapters_tok_s")}
    ratio = statistics.median(run["adapters_tok_s"] / run["base_tok_s"] for run in decodes)
    decode |= {"ratio": ratio, "wanted": WANTED_DECODE}
    return {"bench": "lora", "rounds": rounds, "rows": rows, "decode": decode}


def _in_bf16(folder: Path) -> str:
    """The measured model as a folder whose tensors have no codes."""
    from tandem.models.checkpoint import open_checkpoint, save_checkpoint

    found = open_checkpoint(MODEL)
    save_checkpoint(folder, found.spec, dict(found.tensors()), found.load_tokenizer(), "bfloat16")
    return str(folder)


def _child(work: str, kind: str, source: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tandem.bench.lora", work, kind, source]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=env.foreign())
    except subprocess.TimeoutExpired as error:
        raise WorldError(f"{work} {kind} did not end within {LIMIT_S:g} s.") from error
    if done.returncode:
        raise WorldError(f"{work} {kind} failed: {done.stderr[-1500:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _train(kind: str, source: str) -> dict[str, float]:
    from tandem.algo.pack import count_prompts
    from tandem.engine.config import EngineConfig
    from tandem.models.config import AdapterConfig, ModelConfig
    from tandem.plan.memory import peak_bytes
    from tandem.run.config import RunConfig
    from tandem.run.parts import build_parts
    from tandem.train.config import LearnerConfig

    adapter, engine = AdapterConfig(rank=0 if kind == "full" else RANK), EngineConfig(kv_memory_bytes=1 << 26)
    run = RunConfig("bench", 1, ModelConfig(source), adapter=adapter, engine=engine)
    learner = learner_on(build_parts(run.model, engine, run=run).decoder, LearnerConfig(lr=1e-6))
    samples = random_samples(SAMPLES, LENGTH, SMOLLM2.vocab_size)
    totals = count_prompts(samples)
    step_s = min(timed(lambda: learner.step(samples, totals)) for _ in range(REPEATS))
    return {"tok_s": SAMPLES * LENGTH / step_s, "gb": peak_bytes() / 1e9}


def _decode() -> dict[str, float]:
    import random

    import torch

    from tandem.models.adapter import AdapterSet
    from tandem.models.config import AdapterConfig
    from tandem.sync.receive import serve_adapter

    parts, rng = build_engine(), random.Random(0)
    for number in range(ADAPTERS):
        made = AdapterSet(parts.decoder, AdapterConfig(rank=RANK), f"a{number}").draw(number)
        for one in made.additions:
            one.piece.up.value.copy_(0.01 * torch.randn(one.piece.up.value.shape))
        made.repack()
        serve_adapter("the engine", parts.engine, made, 0)
    best = {"base_tok_s": 0.0, "adapters_tok_s": 0.0}
    for _ in range(REPEATS):
        asked = random_requests(DECODE, PROMPT_TOKENS, SMOLLM2.vocab_size, NEW, rng)
        theirs = [replace(one, id=f"{one.id}a", adapter=f"a{n % ADAPTERS}") for n, one in enumerate(asked)]
        for name, requests in (("base_tok_s", asked), ("adapters_tok_s", theirs)):
            best[name] = max(best[name], DECODE / answer(parts.engine, requests)[1])
    return best


if __name__ == "__main__":
    _, work, kind, source = sys.argv
    print(json.dumps(_train(kind, source) if work == "train" else _decode()))
