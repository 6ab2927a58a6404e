"""What `tandem numerics roofline` prints: operations on a device, or beside what this machine's kernels take."""

from __future__ import annotations

import json as jsonlib
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tandem.bench.foretold import predict, refuse
from tandem.bench.measured import Measured
from tandem.bench.operations import AS_TRAINED, Phase
from tandem.errors import ConfigError
from tandem.models.spec import ModelSpec
from tandem.plan.memory import size
from tandem.report.aligned import aligned
from tandem.run.folder import plain
from tandem.run.source import spec_of
from tandem.train.config import LearnerConfig


@dataclass(frozen=True, slots=True)
class Asked:
    """Of a prediction."""

    device: str
    formats: tuple[str, ...]
    batch: int
    context: int
    phase: Phase
    measure: bool
    learner: LearnerConfig = AS_TRAINED  # of training


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def rates(again: bool) -> Measured:
    """This machine's, from the cache folder or measured now."""
    from tandem.bench.rates import kept_or_measured

    return kept_or_measured(again, note)


def roofline(model: str, asked: Asked, json: bool) -> int:
    """What a device takes for a work at least, by operation."""
    spec, forms = spec_of(model), asked.formats or ("bf16",)
    if asked.device != "this" and asked.measure:
        raise ConfigError("--measure takes the rates of this machine anew. Give --device this, or leave it out.")
    refuse(spec, forms, asked.device, asked.context)
    measured = rates(asked.measure) if asked.device == "this" else None
    found = [
        predict(spec, name, asked.device, asked.phase, asked.batch, asked.context, measured, asked.learner)
        for name in forms
    ]
    if json:
        print(jsonlib.dumps(plain(found), allow_nan=False))
        return 0
    for one in found:
        _show(model, one)
    return 0


def check(model: str, asked: Asked, json: bool) -> int:
    """What this machine's kernels take, beside the prediction."""
    from tandem.bench.predicted import check as checked

    if asked.device != "this":
        raise ConfigError("--check measures kernels of this machine. Give --device this.")
    if len(asked.formats) > 1:
        raise ConfigError(f"--check runs kernels of one format. Give one of {', '.join(asked.formats)}.")
    form = asked.formats[0] if asked.formats else "bf16"
    found = checked(model, form, rates(asked.measure), note, asked.learner)
    if json:
        print(jsonlib.dumps(plain(found), allow_nan=False))
        return 0
    rows = []
    for row in found["rows"]:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        outside = "" if row["ratio"] is None or row["near"] else "*"
        times = [f"{1e3 * row[name]:,.3f}" if row[name] is not None else "" for name in ("measured_s", "predicted_s")]
        rows.append([row["work"], row["operation"], *times, ratio + outside, row["bound"]])
    headings = ("work", "operation", "measured ms", "predicted ms", "predicted/measured", "bound by")
    aligned(headings, rows, ("work", "operation", "bound by"))
    for work in found["works"]:
        print(
            f"{work['work']}: kernels {1e3 * work['kernels_s']:,.2f} ms measured, {1e3 * work['predicted_s']:,.2f} "
            f"predicted ({work['predicted_s'] / work['kernels_s']:.2f}); beside them {1e3 * work['host_s']:,.2f} ms"
        )
    print(
        f"{found['near']} of {found['compared']} kernels of {found['least']:.1%} of their work or more are within "
        f"{found['wanted']:.0%}, the others have a star; rates of {found['taken']}"
    )
    return 0


def _digits(value: float) -> str:
    """Four significant digits, or all before the point; no exponent.

    >>> _digits(0.0000123456), _digits(12.3456), _digits(123456.7), _digits(0.0)
    ('0.00001235', '12.35', '123,457', '0')
    """
    if not value:
        return "0"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def _size(count: float) -> str:
    """Bytes; of less than 100 MB all digits that tell."""
    return size(int(count)) if count >= 1e8 else f"{_digits(count / 1e6)} MB"


def _show(model: str, found: dict[str, Any]) -> None:
    asked = f"{found['phase']}, {found['batch']:,} x {found['context']:,}, {found['format']}"
    print(f"\n{model} on {found['title']}: {asked}")
    rows = []
    for row in found["rows"]:
        flop = _digits(row["flop"] / 1e9) if row["flop"] else ""
        counts = [f"{row['calls']:,}", flop, _digits(row["bytes"] / 1e6), row["arithmetic"], row["bound"]]
        times = [_digits(1e3 * row["seconds"]), f"{row['seconds'] / found['seconds']:.1%}"]
        rows.append([row["operation"], *counts, *times])
    aligned(
        ("operation", "calls", "GFLOP", "MB", "in", "bound by", "ms", "of all"), rows, ("operation", "in", "bound by")
    )
    rate, how = found["tokens"] / found["seconds"], "predicted" if found["measured"] else "at least"
    print(
        f"in all {_digits(1e3 * found['seconds'])} ms {how}, {rate:,.0f} tok/s; {_digits(found['flop'] / 1e12)} TFLOP, "
        f"{_size(found['bytes'])} moved; {found['bits_a_parameter']:.2f} bits a parameter"
    )
    memory = found["memory"]
    held = f"of {_size(memory['bytes'])}: weights {_size(memory['weights'])}"
    if memory["training"]:
        held += f", gradients, master weights and moments {_size(memory['training'])}"
    if found["phase"] == "train":
        held += f", what a microbatch keeps {_size(memory['sequence'])}"
    else:
        held += f", keys and values of a sequence {_size(memory['sequence'])}"
    fits = f"{memory['sequences']:,} such sequences fit" if memory["sequences"] else "not one fits"
    fits = fits if found["phase"] != "train" else ("it fits" if memory["devices"] == 1 else "it does not fit")
    more = "" if memory["devices"] == 1 else f"; {memory['devices']} devices hold it, divided evenly"
    print(f"memory {held}; {fits}{more}")
    for text in found["notes"]:
        print(text)
    print(f"source: {found['source']}")


def foretold(asked: Asked) -> Callable[[ModelSpec, str], Mapping[str, Any]]:
    """Bits a parameter, seconds and notes, by shape and format, of what is asked."""
    known: list[Measured] = []

    def of(spec: ModelSpec, form: str) -> Mapping[str, Any]:
        refuse(spec, (form,), asked.device, asked.context)
        if asked.device == "this" and not known:
            known.append(rates(asked.measure))
        measured = known[0] if known else None
        one = predict(spec, form, asked.device, asked.phase, asked.batch, asked.context, measured, asked.learner)
        return {name: one[name] for name in ("bits_a_parameter", "seconds", "notes")}

    return of
