"""What `tandem numerics sensitivity`, `pareto` and `page` print, and where their pictures go."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tandem.errors import ConfigError
from tandem.models.spec import ModelSpec
from tandem.report.aligned import aligned
from tandem.report.format_page import write_format_page
from tandem.report.kept import write_file
from tandem.report.numerics import pareto_figure, sensitivity_figure
from tandem.study.figure import compact
from tandem.study.sensitivity import pareto as found_of
from tandem.study.sensitivity import sensitivity as cells_of


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def sensitivity(model: str, formats: Sequence[str], texts: Path, out: Path | None, json: bool) -> int:
    """Each matrix alone in a format."""

    if len(formats) != 1:
        raise ConfigError("`numerics sensitivity` takes one format, as --format nvfp4: a picture is of one.")
    _check_picture(out)
    found = cells_of(model, formats[0], texts, note)
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


def pareto(
    model: str,
    formats: Sequence[str],
    texts: Path,
    out: Path | None,
    json: bool,
    *,
    work: Mapping[str, Any],
    foretold: Callable[[ModelSpec, str], Mapping[str, Any]],
) -> int:
    """Formats by bits and time against quality."""

    if len(formats) < 2:
        raise ConfigError("`numerics pareto` compares formats: give two or more, as --formats bf16,w8a8,nvfp4,mxfp4.")
    _check_picture(out)
    found = found_of(model, formats, texts, foretold, note)
    found |= work
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

    if out is None:
        raise ConfigError("`numerics page` needs --out DIR: the folder that the page is written into.")
    print(f"wrote {write_format_page(form, out)}")
    return 0


def _check_picture(out: Path | None) -> None:
    if out is not None and (out.suffix != ".png" or not out.absolute().parent.is_dir()):
        raise ConfigError(f"--out {out}: give a file that ends in .png, in a folder that is there.")


def _write(out: Path, draw: Any, found: dict[str, Any]) -> None:

    note(f"wrote {write_file(out, compact(partial(draw, found)))}")
