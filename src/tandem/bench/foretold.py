"""A work on a device: every operation with its bytes, its count and the time that it takes at least."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tandem.bench.devices import THIS, arithmetic_on, device_of, served_as
from tandem.bench.operations import Phase, Work, operations, parameters_of, room, total, weight_bytes
from tandem.errors import ConfigError
from tandem.models.spec import ModelSpec

if TYPE_CHECKING:
    from tandem.bench.measured import Measured


def predict(
    spec: ModelSpec, form: str, name: str, phase: Phase, batch: int, context: int, measured: Measured | None = None
) -> dict[str, Any]:
    """A record of it, seconds and bytes. By published rates each operation takes the larger of its products' and its
    bytes' time, one operation after another; `measured`, for device "this", knows more (bench/measured.py).

    ConfigError for an unknown device or format, and for a context beyond the model's.
    """
    served = served_as(form)
    assert (name == THIS) == (measured is not None), name
    device = device_of(name) if measured is None else measured.device()
    if context > spec.max_position:
        raise ConfigError(
            f"--context {context}: the model knows {spec.max_position} positions. Give at most so many, or a config "
            "with a larger max_position_embeddings."
        )
    work = Work(phase, batch, context)
    found = operations(spec, served, work, device)
    rows = []
    for one in found:
        seconds, bound = one.least_s(device), one.bound(device)
        if measured is not None:
            seconds, bound = measured.seconds(one, spec, served, work)
        rows.append(
            {"operation": one.name, "kind": one.kind, "calls": one.calls, "flop": one.flop, "bytes": one.bytes}
            | {"arithmetic": one.arithmetic if one.flop else "", "seconds": seconds, "bound": bound}
            | {"rows": one.shape[0], "columns": one.shape[1], "depth": one.shape[2]}
        )
    flop, moved = total(found)
    held, notes = room(spec, served, work, device), []
    arithmetic, why = arithmetic_on(device, served)
    if phase == "train" and form not in ("bf16", "fp32"):
        notes.append(f"forward products are those of {form}, and those of gradients bf16's")
    if why:
        notes.append(why)
    if measured is not None and form not in ("bf16", "fp32", "w8a8", "int8", "int4"):
        notes.append(
            "tandem's own products on a CPU are of bf16, fp32, w8a8 and files' 4 and 8 bit codes: this is none"
        )
    return {
        "model": spec.architecture, "format": form, "device": name, "title": device.title, "phase": phase,
        "batch": batch, "context": context, "tokens": work.tokens, "multiplied_in": arithmetic,
        "rows": rows, "seconds": sum(row["seconds"] for row in rows), "flop": flop, "bytes": moved,
        "measured": measured is not None, "source": device.source, "notes": notes,
        "bits_a_parameter": 8 * weight_bytes(spec, served) / parameters_of(spec),
        "memory": {
            "bytes": held.memory, "weights": held.weights, "training": held.training, "sequence": held.sequence,
            "sequences": held.sequences, "devices": held.devices,
        },
    }  # fmt: skip
