"""Every kernel of decoding, prefilling and learning on this machine: what it takes, beside what its rates foretell.

Measured as `tandem bench profile` does, predicted by bench/measured.py. What neither predicts (Python, torch) is told
beside. A kernel is near where the two differ by WANTED at most; kernels below LEAST of their work are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tandem.bench.foretold import predict
from tandem.bench.measured import Measured
from tandem.bench.operations import AS_TRAINED, Phase
from tandem.bench.profile import CONTEXT, STEPS, decode_work, learner_work, prefill_work
from tandem.errors import ConfigError
from tandem.plan.roofline import Machine
from tandem.train.config import LearnerConfig

WANTED, LEAST = 0.15, 0.002
DECODES, PREFILL, LEARNER = (1, 64, 256), (16, 1024), (16, 256)
CHECKED = ("bf16", "w8a8")


def check(
    model: str,
    form: str,
    measured: Measured,
    note: Callable[[str], None],
    learner: LearnerConfig = AS_TRAINED,
) -> dict[str, Any]:
    """A table of all kernels of all works; of w8a8 without training. ConfigError for a format without kernels here."""
    if form not in CHECKED:
        raise ConfigError(f"--check knows the kernels of {' and '.join(CHECKED)}; {form} is none. Leave --format out.")
    if learner.gradients not in ("same", "int8"):
        raise ConfigError(
            f"--check measures kernels, and learner.gradients={learner.gradients} is emulated. Give int8, or leave it "
            "out."
        )
    rows, works = [], []
    for work, phase, batch, context in _works(model, form, measured, note, learner):
        spec = work.pop("spec")
        foretold = predict(spec, form, "this", phase, batch, context, measured, learner)
        known = {row["operation"]: row for row in _joined(foretold["rows"], phase)}
        kernels = [row for row in work["rows"] if row["kind"] == "kernel"]
        predicted_s = 0.0
        for row in kernels:
            one = known.pop(row["operation"], None)
            seconds = one["seconds"] if one else None
            predicted_s += seconds or 0.0
            ratio = seconds / row["seconds"] if seconds and row["seconds"] >= LEAST * work["wall_s"] else None
            rows.append(
                {"work": work["work"], "operation": row["operation"], "calls": row["calls"]}
                | {"measured_s": row["seconds"], "predicted_s": seconds, "bound": one["bound"] if one else ""}
                | {"ratio": ratio, "near": ratio is not None and abs(ratio - 1) <= WANTED}
            )
        works.append(
            {"work": work["work"], "kernels_s": sum(row["seconds"] for row in kernels), "predicted_s": predicted_s}
            | {"host_s": work["host_s"], "unseen": sorted(known)}
        )
    compared = [row for row in rows if row["ratio"] is not None]
    return {
        "model": model, "format": form, "rows": rows, "works": works, "wanted": WANTED, "least": LEAST,
        "compared": len(compared), "near": sum(row["near"] for row in compared),
        "machine": measured.machine, "taken": measured.taken,
    }  # fmt: skip


def _joined(rows: list[dict[str, Any]], phase: Phase) -> Iterator[dict[str, Any]]:
    """Predictions as the profile has its rows: what a product's kernel does beside is in its time."""
    if phase == "train":
        yield from _joined_training(rows)
        return
    rounding = sum(row["seconds"] for row in rows if row["operation"] == "rounding of activations")
    products = [row for row in rows if row["kind"] == "product"]
    for row in rows:
        if row["operation"] == "rounding of activations":
            continue
        if row["kind"] == "product" and rounding:  # each rounds what it multiplies
            rounded = row["calls"] * row["rows"] * row["depth"]
            share = rounded / sum(one["calls"] * one["rows"] * one["depth"] for one in products)
            row = row | {"seconds": row["seconds"] + share * rounding}
        yield row


def _joined_training(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """In 8 bits the kernel of an input's gradient rounds a half of what gradients are rounded for, and is not told what
    matrix it multiplies by; that of a weight's rounds the other half, and its rows."""
    drawn, nearest = (
        sum(row["seconds"] for row in rows if row["operation"] == name)
        for name in ("rounding of gradients", "rounding of rows, turned")
    )
    inputs, weights = (
        [row for row in rows if row["operation"].startswith(f"{of} gradient: ")] for of in ("input", "weight")
    )
    tall, wide = (sum(row["calls"] * row[key] * row["depth"] for row in weights) for key in ("rows", "columns"))
    for row in rows:
        name = row["operation"]
        if name in ("rounding of gradients", "rounding of rows, turned", "rounding of activations"):
            continue
        if drawn and row in inputs:
            if row is inputs[0]:
                seconds = drawn / 2 + sum(one["seconds"] for one in inputs)
                yield row | {"operation": "input gradients in 8 bits", "seconds": seconds}
            continue
        if drawn and row in weights:
            more = drawn / 2 * row["rows"] / tall + nearest * row["columns"] / wide
            row = row | {"seconds": row["seconds"] + more * row["calls"] * row["depth"]}
        yield row | {"operation": "AdamW"} if name.startswith("AdamW") else row


def _works(
    model: str, form: str, measured: Measured, note: Callable[[str], None], learned: LearnerConfig
) -> Iterator[tuple[dict[str, Any], Phase, int, int]]:
    from tandem.bench.sweep import fill_pages
    from tandem.bench.work import learner_on, random_samples
    from tandem.engine.config import EngineConfig
    from tandem.models.config import ModelConfig
    from tandem.run.parts import build_parts

    machine = Machine(measured.flop_s["bf16"], measured.read_bytes_s)
    config = EngineConfig(batch_tokens=4096, kv_memory_bytes=1 << 30, weights="w8a8" if form == "w8a8" else "same")
    parts = build_parts(ModelConfig(model), config)
    engine, spec = parts.engine, parts.decoder.spec
    fill_pages(engine)
    for count in DECODES:
        note(f"decode {count}")
        yield decode_work(engine, count, CONTEXT, machine) | {"spec": spec}, "decode", count, CONTEXT + 1 + STEPS
    note("prefill")
    length = min(PREFILL[1], spec.max_position - 1)
    yield prefill_work(engine, PREFILL[0], length, machine) | {"spec": spec}, "prefill", PREFILL[0], length
    if form != "bf16":
        return
    note("learner")
    del engine
    learner = learner_on(parts.decoder, learned)
    samples = random_samples(*LEARNER, spec.vocab_size)
    yield learner_work(learner, samples, machine) | {"spec": spec}, "train", *LEARNER
