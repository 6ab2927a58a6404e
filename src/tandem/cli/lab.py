"""Kinds of `tandem numerics` that take a model: what is printed, and where pictures go."""

from __future__ import annotations

import json as jsonlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tandem.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from tandem.bench.measured import Measured
    from tandem.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Asked:
    """Of a prediction."""

    device: str
    formats: tuple[str, ...]
    batch: int
    context: int
    phase: Any
    measure: bool


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def rates(again: bool) -> Measured:
    """This machine's, from the cache folder or measured now."""
    from tandem.bench.rates import kept_or_measured

    return kept_or_measured(again, note)


def roofline(model: str, asked: Asked, json: bool) -> int:
    """What a device takes for a work at least, by operation."""
    from tandem.bench.foretold import predict
    from tandem.run.source import spec_of

    spec = spec_of(model)
    measured = rates(asked.measure) if asked.device == "this" else None
    if measured is None and asked.measure:
        raise ConfigError("--measure takes the rates of this machine anew. Give --device this, or leave it out.")
    found = [
        predict(spec, name, asked.device, asked.phase, asked.batch, asked.context, measured)
        for name in asked.formats or ("bf16",)
    ]
    if json:
        print(jsonlib.dumps(found))
        return 0
    for one in found:
        _show(model, one)
    return 0


def check(model: str, asked: Asked, json: bool) -> int:
    """What this machine's kernels take, beside the prediction."""
    from tandem.bench.predicted import check as checked

    if asked.device != "this":
        raise ConfigError("--check measures kernels of this machine. Give --device this.")
    form = asked.formats[0] if asked.formats else "bf16"
    found = checked(model, form, rates(asked.measure), note)
    if json:
        print(jsonlib.dumps(found))
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


def aligned(headings: tuple[str, ...], rows: list[list[str]], left: tuple[str, ...]) -> None:
    """A table of any width."""
    widths = [max(len(row[place]) for row in [list(headings), *rows]) for place in range(len(headings))]
    for row in [list(headings), *rows]:
        cells = zip(row, widths, headings, strict=True)
        print("  ".join(f"{one:<{wide}}" if of in left else f"{one:>{wide}}" for one, wide, of in cells).rstrip())


def _show(model: str, found: dict[str, Any]) -> None:
    from tandem.plan.memory import size

    asked = f"{found['phase']}, {found['batch']:,} x {found['context']:,}, {found['format']}"
    print(f"\n{model} on {found['title']}: {asked}")
    rows = []
    for row in found["rows"]:
        flop = f"{row['flop'] / 1e9:,.3f}" if row["flop"] else ""
        counts = [f"{row['calls']:,}", flop, f"{row['bytes'] / 1e6:,.2f}", row["arithmetic"], row["bound"]]
        times = [f"{1e3 * row['seconds']:,.4f}", f"{row['seconds'] / found['seconds']:.1%}"]
        rows.append([row["operation"], *counts, *times])
    aligned(
        ("operation", "calls", "GFLOP", "MB", "in", "bound by", "ms", "of all"), rows, ("operation", "in", "bound by")
    )
    rate, how = found["tokens"] / found["seconds"], "predicted" if found["measured"] else "at least"
    print(
        f"in all {1e3 * found['seconds']:,.3f} ms {how}, {rate:,.0f} tok/s; {found['flop'] / 1e12:,.3f} TFLOP, "
        f"{size(found['bytes'])} moved; {found['bits_a_parameter']:.2f} bits a parameter"
    )
    memory = found["memory"]
    held = f"of {size(memory['bytes'])}: weights {size(memory['weights'])}"
    if memory["training"]:
        held += f", gradients, master weights and moments {size(memory['training'])}"
    if found["phase"] == "train":
        held += f", what a microbatch keeps {size(memory['sequence'])}"
    else:
        held += f", keys and values of a sequence {size(memory['sequence'])}"
    fits = f"{memory['sequences']:,} such sequences fit" if memory["sequences"] else "not one fits"
    fits = fits if found["phase"] != "train" else ("it fits" if memory["devices"] == 1 else "it does not fit")
    more = "" if memory["devices"] == 1 else f"; {memory['devices']} devices hold it, divided evenly"
    print(f"memory {held}; {fits}{more}")
    for text in found["notes"]:
        print(text)
    print(f"source: {found['source']}")


def sensitivity(model: str, asked: Asked, texts: Path, out: Path | None, json: bool) -> int:
    """Each matrix alone in a format."""
    from tandem.report.numerics import sensitivity_figure
    from tandem.study.sensitivity import sensitivity as found_of

    if len(asked.formats) != 1:
        raise ConfigError("`numerics sensitivity` takes one format, as --format nvfp4: a picture is of one.")
    _check_picture(out)
    found = found_of(model, asked.formats[0], texts, note)
    if out is not None:
        _write(out, sensitivity_figure, found)
    if json:
        print(jsonlib.dumps(found))
        return 0
    columns = list(dict.fromkeys(cell["tensor"] for cell in found["cells"]))
    by_place = {(cell["layer"], cell["tensor"]): cell for cell in found["cells"]}
    for title, key, form in (("KL, nats a token, x 1,000", "kl", 1e3), ("SQNR of the matrix, dB", "sqnr_db", 1.0)):
        print(f"\n{title}")
        rows = []
        for layer in range(found["layers"]):
            values = [by_place[layer, name][key] for name in columns]
            cells = ["exact" if value is None else f"{form * value:.3f}" for value in values]
            rows.append([str(layer), *cells])
        aligned(("layer", *columns), rows, ())
    worst = sorted(found["cells"], key=lambda cell: -cell["kl"])[:3]
    named = ", ".join(f"layer {cell['layer']} {cell['tensor']} {_spanned(cell)}" for cell in worst)
    print(
        f"\n{found['format']} of one matrix at a time, on {found['texts']} texts ({found['tokens']:,} tokens, "
        f"perplexity {found['perplexity_before']:.3f}); most KL: {named}"
    )
    return 0


def _spanned(row: dict[str, Any]) -> str:
    """KL with its interval."""
    if row["kl_low"] is None:
        return f"{row['kl']:.3g}"
    return f"{row['kl']:.3g} ({row['kl_low']:.3g} to {row['kl_high']:.3g})"


def pareto(model: str, asked: Asked, texts: Path, out: Path | None, json: bool) -> int:
    """Formats by bits and time against quality."""
    from tandem.bench.foretold import predict
    from tandem.report.numerics import pareto_figure
    from tandem.study.sensitivity import pareto as found_of

    if len(asked.formats) < 2:
        raise ConfigError("`numerics pareto` compares formats: give two or more, as --formats bf16,w8a8,nvfp4,mxfp4.")
    _check_picture(out)
    measured = rates(asked.measure) if asked.device == "this" else None
    work = asked.phase, asked.batch, asked.context

    def foretold(spec: ModelSpec, form: str) -> dict[str, Any]:
        one = predict(spec, form, asked.device, *work, measured)
        return {name: one[name] for name in ("bits_a_parameter", "seconds", "notes")}

    found = found_of(model, asked.formats, texts, foretold, note)
    found |= {"device": asked.device, "phase": asked.phase, "batch": asked.batch, "context": asked.context}
    if out is not None:
        _write(out, pareto_figure, found)
    if json:
        print(jsonlib.dumps(found))
        return 0
    rows = []
    for row in found["rows"]:
        more = f"{row['loss_more']:+.4f}"
        if row["loss_more_low"] is not None:
            more += f" ({row['loss_more_low']:+.4f} to {row['loss_more_high']:+.4f})"
        shares = [f"{row['perplexity']:.3f}", more, f"{row['same_top']:.1%}", "dominated" if row["dominated"] else ""]
        sizes = [f"{row['bits_a_parameter']:.2f}", f"{1e3 * row['seconds']:.4f}"]
        rows.append([row["format"], *sizes, _spanned(row), *shares])
    headings = ("format", "bits", "ms", "KL, nats a token", "perplexity", "loss more, nats", "same likeliest", "")
    aligned(headings, rows, ("format", "KL, nats a token", "loss more, nats", ""))
    print(
        f"{found['texts']} texts, {found['tokens']:,} tokens, perplexity {found['perplexity_before']:.3f} before; "
        f"ms: {found['phase']}, {found['batch']:,} x {found['context']:,} on {found['device']}, predicted"
    )
    return 0


def page(form: str, out: Path | None) -> int:
    """What a format is, as a page that opens offline."""
    from tandem.report.format_page import write_format_page

    if out is None:
        raise ConfigError("`numerics page` needs --out DIR: the folder that the page is written into.")
    print(f"wrote {write_format_page(form, out)}")
    return 0


def _check_picture(out: Path | None) -> None:
    if out is not None and (out.suffix != ".png" or not out.absolute().parent.is_dir()):
        raise ConfigError(f"--out {out}: give a file that ends in .png, in a folder that is there.")


def _write(out: Path, draw: Any, found: dict[str, Any]) -> None:
    from functools import partial

    from tandem.report.kept import write_file
    from tandem.study.figure import compact

    note(f"wrote {write_file(out, compact(partial(draw, found)))}")
