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
from tandem.numerics.names import ablated_of
from tandem.report.aligned import aligned
from tandem.report.format_page import write_format_page
from tandem.report.kept import write_file
from tandem.report.numerics import gradient_figure, pareto_figure, sensitivity_figure
from tandem.run.folder import plain
from tandem.study.figure import compact
from tandem.study.gradients import gradient_errors
from tandem.study.quality import Asked, accuracies, rewards
from tandem.study.sensitivity import pareto as found_of
from tandem.study.sensitivity import sensitivity as cells_of

PERPLEXITY = Asked()  # and KL: no more


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def sensitivity(
    model: str, formats: Sequence[str], texts: Path, out: Path | None, json: bool, tensors: str = "weights"
) -> int:
    """Each tensor alone in a format; or (tensors: gradients) how far gradients in one are from exact ones."""
    if len(formats) != 1:
        raise ConfigError("`numerics sensitivity` takes one format, as --format nvfp4: a picture is of one.")
    _check_picture(out)
    if tensors == "gradients":
        if formats[0] == "same":
            raise ConfigError("--format same rounds no gradient: there is nothing to measure. Give a format.")
        return _gradients(gradient_errors(model, formats[0], texts, note), out, json)
    found = cells_of(model, formats[0], texts, note, ablated_of(tensors))
    if out is not None:
        _write(out, sensitivity_figure, found)
    if json:
        print(jsonlib.dumps(plain(found), allow_nan=False))
        return 0
    _grid("KL, nats a token, x 1,000", found, lambda cell: f"{1e3 * cell['kl']:.3f}")
    _grid("SQNR of the tensor, dB", found, lambda cell: _or_exact(cell["sqnr_db"], ".3f"))
    worst = sorted(found["cells"], key=lambda cell: -cell["kl"])[:3]
    named = ", ".join(f"{_place(cell['layer'])} {cell['tensor']} {_spanned(cell)}" for cell in worst)
    print(
        f"\n{found['format']} of one tensor at a time, on {found['texts']} texts ({found['tokens']:,} tokens, "
        f"perplexity {found['perplexity_before']:.3f}); most KL: {named}"
    )
    if kv := found["kv"]:
        print(
            f"all keys and values at once: {_or_exact(kv['sqnr_db'], '.2f')} dB, KL {_spanned(kv)}, perplexity "
            f"{kv['perplexity']:.3f}, same likeliest {kv['same_top']:.1%}"
        )
    return 0


def _gradients(found: dict[str, Any], out: Path | None, json: bool) -> int:
    if out is not None:
        _write(out, gradient_figure, found)
    if json:
        print(jsonlib.dumps(plain(found), allow_nan=False))
        return 0
    _grid("SQNR of each matrix's gradient, dB", found, lambda cell: _or_exact(cell["sqnr_db"], ".1f"))
    print(
        f"\ngradients in {found['format']}, all matrices: {_or_exact(found['sqnr_db'], '.2f')} dB, cosine "
        f"{_or_exact(found['cosine'], '.5f')} to the exact ones; {found['texts']} texts, {found['tokens']:,} tokens"
    )
    return 0


def _grid(title: str, found: Mapping[str, Any], written: Callable[[Mapping[str, Any]], str]) -> None:
    """Layers by tensors; last what is of no layer."""
    columns = list(dict.fromkeys(cell["tensor"] for cell in found["cells"]))
    by_place = {(cell["layer"], cell["tensor"]): cell for cell in found["cells"]}
    rows = []
    for layer in dict.fromkeys(cell["layer"] for cell in found["cells"]):
        cells = [by_place.get((layer, name)) for name in columns]
        rows.append([_place(layer).removeprefix("layer "), *("" if cell is None else written(cell) for cell in cells)])
    print(f"\n{title}")
    aligned(("layer", *columns), rows, ())


def _place(layer: int | None) -> str:
    return "out" if layer is None else f"layer {layer}"


def _or_exact(value: float | None, form: str) -> str:
    return "exact" if value is None else f"{value:{form}}"


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
    asked: Asked = PERPLEXITY,
) -> int:
    """Formats by bits and time against quality."""

    if twice := sorted({form for form in formats if formats.count(form) > 1}):
        raise ConfigError(f"--formats names {', '.join(twice)} twice. Give each format once.")
    if len(formats) < 2:
        raise ConfigError("`numerics pareto` compares formats: give two or more, as --formats bf16,w8a8,nvfp4,mxfp4.")
    _check_picture(out)
    rewarded = rewards(asked.study, formats) if asked.study is not None else None
    found = found_of(model, formats, texts, foretold, note)
    found |= dict(work)
    if asked.task is not None:
        found["task"] = accuracies(asked.task, formats, note)
    if rewarded is not None:
        found["study"] = rewarded
    if out is not None:
        _write(out, pareto_figure, found)
    if json:
        print(jsonlib.dumps(plain(found), allow_nan=False))
        return 0
    rows = []
    for row in found["rows"]:
        more = f"{row['loss_more']:+.4f}"
        if row["loss_more_low"] is not None:
            more += f" ({row['loss_more_low']:+.4f} to {row['loss_more_high']:+.4f})"
        shares = [f"{row['perplexity']:.3f}", more, f"{row['same_top']:.1%}", _dominated(row)]
        sizes = [f"{row['bits_a_parameter']:.2f}", f"{1e3 * row['seconds']:.4g}"]
        rows.append([row["format"], *sizes, _spanned(row), *shares])
    headings = ("format", "bits", "ms", "KL, nats a token", "perplexity", "loss more, nats", "same likeliest", "")
    aligned(headings, rows, ("format", "KL, nats a token", "loss more, nats", ""))
    print(
        f"{found['texts']} texts, {found['tokens']:,} tokens, perplexity {found['perplexity_before']:.3f} before; "
        f"ms: {found['phase']}, {found['batch']:,} x {found['context']:,} on {found['device']}, predicted"
    )
    if "task" in found:
        _accuracy(found["task"])
    if "study" in found:
        _reward(found["study"])
    return 0


def _dominated(row: Mapping[str, Any]) -> str:
    by = [name for key, name in (("bits", "bits"), ("seconds", "time")) if row["dominated"][key]]
    return f"dominated by {' and '.join(by)}" if by else ""


def _accuracy(of: Mapping[str, Any]) -> None:
    rows = []
    for form, row in of["rows"].items():
        more = f"{row['more']:+.1%} ({row['more_low']:+.1%} to {row['more_high']:+.1%})"
        failed = f"{row['failed']} not graded" if row["failed"] else ""
        accuracy = f"{row['accuracy']:.1%} ({row['low']:.1%} to {row['high']:.1%})"
        rows.append([form, accuracy, more, f"{row['p']:.3g}", failed])
    print(
        f"\n{of['name']}: {of['prompts']:,} prompts, {of['samples']} of each; {of['before']:.1%} before, {of['dtype']}"
    )
    headings = ("format", "accuracy", "more than before, paired", "p", "")
    aligned(headings, rows, headings)


def _reward(of: Mapping[str, Any]) -> None:
    rows = []
    for form, arms in of["rows"].items():
        for arm in arms:
            known, more = arm["low"] is not None, ""
            spread = f" ({arm['low']:.3f} to {arm['high']:.3f})" if known else ""
            if arm["more"] is not None:
                more = f"{arm['more']:+.3f} ({arm['more_low']:+.3f} to {arm['more_high']:+.3f})"
            failed = f"{arm['failed']} failed" if arm["failed"] else ""
            rows.append([form, arm["label"], str(arm["seeds"]), f"{arm['reward']:.3f}{spread}", more, failed])
    print(
        f"\nstudy {of['study']}: reward of the last {of['last_steps']} of {of['steps']} steps of {of['recipe']}, 95 % "
        "over seeds"
    )
    headings = ("format", "arm", "seeds", "reward", f"more than {of['baseline']}, paired", "")
    aligned(headings, rows, headings)


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
