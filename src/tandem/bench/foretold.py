"""A work on a device: every operation with its bytes, its count and the time that it takes at least."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tandem.bench.devices import THIS, Device, Served, arithmetic_on, device_of, served_as
from tandem.bench.operations import (
    AS_TRAINED,
    Phase,
    Work,
    met_by_gradients,
    operations,
    parameters_of,
    room,
    total,
    weight_bytes,
)
from tandem.errors import ConfigError
from tandem.models.spec import ModelSpec
from tandem.train.config import LearnerConfig

if TYPE_CHECKING:
    from tandem.bench.measured import Measured


def refuse(spec: ModelSpec, forms: Iterable[str], name: str, context: int) -> None:
    """ConfigError for an unknown format or device, and for a context beyond the model's."""
    for form in forms:
        served_as(form)
    if name != THIS:
        device_of(name)
    if context > spec.max_position:
        raise ConfigError(
            f"--context {context}: the model knows {spec.max_position} positions. Give at most so many, or a config "
            "with a larger max_position_embeddings."
        )


def predict(
    spec: ModelSpec,
    form: str,
    name: str,
    phase: Phase,
    batch: int,
    context: int,
    measured: Measured | None = None,
    learner: LearnerConfig = AS_TRAINED,
) -> dict[str, Any]:
    """A record of it, seconds and bytes. By published rates each operation takes the larger of its products' and its
    bytes' time, one operation after another; `measured`, for device "this", knows more (bench/measured.py).

    ConfigError for an unknown device or format, and for a context beyond the model's.
    """
    served = served_as(form)
    assert (name == THIS) == (measured is not None), name
    refuse(spec, (form,), name, context)
    device = device_of(name) if measured is None else measured.device()
    work = Work(phase, batch, context)
    found = operations(spec, served, work, device, learner)
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
    held, notes = room(spec, served, work, device, learner), []
    arithmetic, why = arithmetic_on(device, served)
    if phase == "train":
        notes += _trained(served, device, learner)
    if why:
        notes.append(why)
    if measured is not None and form not in ("bf16", "fp32", "w8a8", "w4a8", "int8", "int4"):
        notes.append(
            "tandem's own products on a CPU are of bf16, fp32, w8a8, w4a8 and files' 4 and 8 bit codes: this is none"
        )
    settings = {name: getattr(learner, name) for name in LEARNED} if phase == "train" else {}
    return {
        "model": spec.architecture, "learner": settings, "format": form,
        "device": name, "title": device.title, "phase": phase,
        "batch": batch, "context": context, "tokens": work.tokens, "multiplied_in": arithmetic,
        "rows": rows, "seconds": sum(row["seconds"] for row in rows), "flop": flop, "bytes": moved,
        "measured": measured is not None, "source": device.source, "notes": notes,
        "bits_a_parameter": 8 * weight_bytes(spec, served) / parameters_of(spec),
        "memory": {
            "bytes": held.memory, "weights": held.weights, "training": held.training, "sequence": held.sequence,
            "sequences": held.sequences, "devices": held.devices,
        },
    }  # fmt: skip


LEARNED = ("gradients", "moments", "masters", "microbatch_tokens")  # of a learner's config, what a prediction looks at


def _trained(served: Served, device: Device, learner: LearnerConfig) -> list[str]:
    """In what products of both passes are, where they are not all the run's dtype's."""
    plain = "fp32" if served.other_bytes == 4 else "bf16"
    met, gradients = met_by_gradients(served, learner.gradients), learner.gradients
    ahead = plain if arithmetic_on(device, served)[1] else served.name
    why = arithmetic_on(device, met)[1] if gradients != "same" else ""
    behind = gradients if gradients != "same" and not why else f"{plain}'s"
    found = []
    if (ahead, behind) != (plain, f"{plain}'s"):
        found.append(f"forward products are those of {ahead}, and those of gradients {behind}")
    if gradients not in ("same", "int8") and device.name == THIS:
        found.append(f"tandem rounds gradients to {gradients} by emulation: what that takes is not predicted")
    elif why:
        found.append(f"of gradients: {why}")
    return found
