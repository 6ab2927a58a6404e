"""The page of a number format: its values, its error over magnitudes and scales, its ties, and its rules.

Blocks that are a whole row or tensor are shown with ROW numbers.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.nn import functional

from tandem.errors import ConfigError, NonFiniteError
from tandem.numerics.blocks import (
    WHOLE,
    WHOLE_ROW,
    Format,
    block_scales,
    format_of,
    properties,
    quantise,
    rounded,
    shared,
    sqnr_db,
)
from tandem.numerics.elements import Element, decode, encode
from tandem.report import plots
from tandem.report.html import inlined, page_template
from tandem.report.kept import write_file

ROW = 128  # numbers of a block that is a whole row or tensor, here
OCTAVES = 20  # below a block's largest that are shown
TOPS = (1.0, 1.1875, 1.375, 1.625, 1.875)  # largest numbers of blocks, within an octave
SHOWN = 6  # ties of long formats at either end
EXACT = 150.0  # decibels that stand for no error at all: a few numbers near fp32's smallest
DRAWN = 64  # blocks of a point of a curve
RULES = {
    "floor": "The exponent of a block's scale is floor(log2 amax) less that of the element's largest number: OCP's "
    "rule. Where amax is above the largest number times the scale, it saturates.",
    "rceil": "The exponent of a block's scale is ceil(log2(amax / largest)): nothing saturates. NVIDIA's for MXFP8.",
    "ceil": "The exponent of a block's scale is ceil(log2 amax) less that of the element's largest number.",
    "even": "amax is rounded to the element's mantissa first, halves up; then floor(log2) less the exponent of the "
    "element's largest number.",
    "training": "The scale of a block is e4m3(amax x (2688 / amax of the tensor) / 6): Transformer Engine's chain.",
    "inference": "The scale of a block is e4m3(amax / 6 / whole), not below 2^-6: torchao's, with a scale of the "
    "tensor.",
    "four_six": "A block's largest becomes 6 or 4, whichever errs less; scales end at 256.",
    "divided": "The scale of a block is e4m3(amax / 6 x whole), and codes are divided by scale / whole: "
    "compressed-tensors', whose scale of the tensor divides.",
    "fp32": "The scale of a block is amax / largest in fp32: its largest number is a code, and nothing saturates.",
    "narrow": "The scale of a block is amax / largest, rounded to fp16 or bf16 before a code is chosen by it: where "
    "down, the largest saturates. One that fp16 does not have is an error.",
    "zero_point": "A block's least and largest number are the ends of the range, and zero is a code: the scale is "
    "(largest - least) / (codes - 1) in fp32, and a zero point is kept beside it.",
}


def write_format_page(name: str, folder: Path) -> Path:
    """Write NAME.html into a folder, which is made. ConfigError for an unknown format."""
    form = format_of(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror}. Give a folder that can be made.") from error
    pictures = [
        inlined(title, *plots.both(partial(draw, form)))
        for title, draw in (
            ("The numbers of an element", grid_figure),
            ("Error of a number by its size beside its block's largest", error_figure),
            ("Decibels of a block by its largest", scale_figure),
        )
    ]
    page = page_template("format.html.jinja").render(
        name=name,
        beside="",
        facts=facts(form),
        rule=RULES[rule_of(form)],
        pictures=pictures,
        ties=ties(form.shown),
        values=values(form.shown),
        element=form.shown.name,
        zero_point=form.zero_point,
    )
    return write_file(folder / f"{name.replace('/', '_').replace(':', '_')}.html", page)


def rule_of(form: Format) -> str:
    """Key of RULES."""
    if form.zero_point:
        return "zero_point"
    return {"e8m0": form.rule, "e4m3": form.chain, "fp32": "fp32"}.get(form.scale, "narrow")


def facts(form: Format) -> list[tuple[str, str]]:
    """Label and figure of each property."""
    known, own, x = properties(form), form.shown, torch.randn(512, 1024, generator=torch.Generator().manual_seed(1))
    heavy, counted = _heavy(512, 1024), form.scale == "fp32" or (form.block != WHOLE and form.rows == 1)
    return [
        ("element", f"{own.name}, {form.element.bits} bits, {_numbers(own.last)} above zero"),
        ("bits a number", f"{form.bits:g}, {_counted(form)}"),
        ("numbers that share a scale", str(known["block"])),
        ("scale", {"e8m0": "e8m0, a power of two", "e4m3": "e4m3, and fp32 of the tensor"}.get(form.scale, form.scale)),
        ("largest and smallest of an element", f"{own.largest:g}, {own.smallest:g}"),
        ("octaves from smallest to largest", f"{math.log2(own.largest / own.smallest):.1f}"),
        ("decibels of normal numbers", f"{known['sqnr_db']}"),
        ("decibels of heavy tails (Student's t, 4)", f"{sqnr_db(heavy, rounded(heavy, form)):.2f}"),
        ("normal numbers that become 0", f"{_lost(x, form):.2%}"),
        (
            "blocks of normal numbers whose largest saturates",
            f"{saturating(x, form):.1%}" if counted else "not counted",
        ),
    ]


def _numbers(count: int) -> str:
    return f"{count} number{'s' * (count > 1)}"


def _counted(form: Format) -> str:
    """What of `Format.bits` is a scale's."""
    if form.block <= 0:
        return f"that of a {shared(form)} not among them"
    return f"its share of a block's scale{' and zero point' * form.zero_point} among them"


def _heavy(rows: int, columns: int) -> torch.Tensor:
    """Student's t of four degrees: a normal number over the root of the mean square of four."""
    drawn = torch.Generator().manual_seed(2)
    below = torch.randn(4, rows, columns, generator=drawn).square().mean(0).sqrt()
    return torch.randn(rows, columns, generator=drawn) / below


def _lost(x: torch.Tensor, form: Format) -> float:
    return float((rounded(x, form) == 0).float().mean())


def saturating(x: torch.Tensor, form: Format) -> float:
    """Share of blocks [rows, columns / block] whose largest number is beyond the element's, times the scale."""
    if form.zero_point or form.scale == "fp32":  # scaled by their own ends
        return 0.0
    assert form.block != WHOLE and form.rows == 1, form
    blocks = quantise(x, form)
    block = x.shape[1] if form.block == WHOLE_ROW else form.block
    top = functional.pad(x, (0, -x.shape[1] % block)).unflatten(1, (-1, block)).abs().amax(-1)
    return float((top > form.element.largest * block_scales(blocks, form) * (1 + 1e-5)).float().mean())


def values(element: Element) -> list[tuple[str, str]]:
    """Code and number, of those that are not negative; of long elements both ends."""
    codes = _ends(list(range(element.last + 1)), 16)
    digits = len(f"{element.last:x}")
    found = decode(torch.tensor([code for code in codes if code is not None]), element).tolist()
    numbers = iter(found)
    return [("…", "…") if code is None else (f"{code:0{digits}x}", _written(next(numbers))) for code in codes]


def ties(element: Element) -> list[tuple[str, str, str, str]]:
    """Two neighbours, the number in their midst and where it goes; of long elements both ends."""
    known = decode(torch.arange(element.last + 1), element).double()
    middles = ((known[1:] + known[:-1]) / 2).float()
    codes = encode(middles, element).tolist()
    found: list[tuple[str, str, str, str]] = []
    for place in _ends(list(range(len(middles))), SHOWN):
        if place is None:
            found.append(("…",) * 4)
            continue
        low, high, middle = float(known[place]), float(known[place + 1]), float(middles[place])
        goes = low if codes[place] == place else high
        found.append((_written(low), _written(high), _written(middle), _written(goes)))
    return found


def _written(value: float) -> str:
    """With nine digits, or by its power of two where they would not show it: four stand side by side."""
    long = f"{value:.9g}"
    if "e" not in long:
        return long
    part, power = math.frexp(value)
    return f"{2 * part:.12g} x 2^{power - 1}"


def _ends(found: list[int], shown: int) -> list[int | None]:
    return [*found] if len(found) <= 2 * shown + 1 else [*found[:shown], None, *found[-shown:]]


def _figure(count: int, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8.4, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, count, squeeze=False)[0]


def grid_figure(form: Format) -> Figure:
    """Numbers above zero on a line, and by octave how many there are."""
    element = form.shown
    known = decode(torch.arange(1, element.last + 1), element).double().numpy()
    figure, (line, octaves) = _figure(2, 2.6)
    line.vlines(known, 0, 1, color=plots.BLUE, linewidth=1.6 if len(known) < 40 else 0.5)
    line.set_ylim(0, 1.4)
    line.set_yticks([])
    line.grid(False)
    line.spines["left"].set_visible(False)
    line.set_xlim(0, element.largest * 1.03)
    line.set_xlabel("value, times the scale")
    line.set_title(f"The {_numbers(len(known))} of {element.name} above zero")
    if len(known) < 17:
        for value in known:
            line.annotate(f"{value:g}", (value, 1.04), ha="center", va="bottom", fontsize=8.5)
    exponents = np.floor(np.log2(known)).astype(int)
    at, counts = np.unique(exponents, return_counts=True)
    octaves.bar(at, counts, width=0.8, color=plots.BLUE)
    octaves.set_title("How many in each octave")
    octaves.set_xlabel("octave, from 2^n to 2^(n+1)")
    octaves.set_ylabel("numbers")
    octaves.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    octaves.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    return figure


def _block(form: Format) -> int:
    return form.block if form.block > 0 else ROW


def errors_by_size(form: Format) -> tuple[np.ndarray, np.ndarray]:
    """Of numbers from 2^-OCTAVES to 1 of their block's largest: that share, and their relative error."""
    block, shares, errors = _block(form), [], []
    share = torch.exp2(torch.linspace(-OCTAVES, 0, 64 * OCTAVES))
    beside = max(1, block - 1)  # a number that has a scale for itself is beside none
    share = torch.cat([share, share.new_ones(-len(share) % beside)]).view(-1, beside)
    for top in TOPS:
        x = torch.cat([torch.full((len(share), 1), top), top * share], 1)[:, -block:]
        if form.rows > 1:
            x = torch.cat([x, torch.zeros(-len(x) % form.rows, block)])
        if form.scale == "e4m3":  # the tensor has a larger block
            x = torch.cat([x, torch.full((1, block), 2.0)])
        back = rounded(x, form)[: len(share), -beside:]
        given = x[: len(share), -beside:]
        shares.append(share.flatten().numpy())
        errors.append(((back - given).abs() / given).flatten().numpy())
    return np.concatenate(shares), np.concatenate(errors)


def error_figure(form: Format) -> Figure:
    """Relative error by size beside the block's largest: each number, and the root mean square of a quarter octave."""
    share, error = errors_by_size(form)
    figure, (axes,) = _figure(1, 3.4)
    where = np.log2(share)
    shown = error > 0
    axes.plot(where[shown], error[shown], linestyle="none", marker=".", markersize=2, alpha=0.35, color=plots.SKY)
    bins = np.arange(-OCTAVES, 0.001, 0.25)
    middle = [(bins[i] + bins[i + 1]) / 2 for i in range(len(bins) - 1)]
    mean = [_rms(error[(where >= bins[i]) & (where <= bins[i + 1])]) for i in range(len(bins) - 1)]
    axes.plot(middle, mean, color=plots.BLUE, label="root mean square")
    axes.axhline(1.0, color=plots.VERMILLION, linewidth=1.0, linestyle="--", label="1: the number became 0")
    axes.set_yscale("log")
    axes.set_ylim(max(1e-2 * float(np.nanmin(mean)), float(error[shown].min()) / 2), 3.0)
    reach = math.log2(form.element.largest / form.element.smallest)
    axes.set_xlim(-min(OCTAVES, math.ceil(reach) + 4), 0.15)
    axes.set_xlabel("size of a number beside its block's largest, octaves below")
    axes.set_ylabel("relative error")
    axes.set_title(f"{form.name}: error of a number in a block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=11))
    plots.draw_legend(axes, columns=2)
    return figure


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if len(x) else math.nan


def decibels_by_top(form: Format, tops: torch.Tensor, anchored: bool) -> list[float]:
    """Of blocks of normal numbers scaled to a largest of each of `tops`, all of a point one tensor; `anchored`: beside
    a block whose largest is 1, which a scale of the tensor goes by."""
    block = _block(form)
    normal = torch.randn(DRAWN, block, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    normal = normal / normal.abs().amax(1, keepdim=True)
    if form.block == WHOLE or form.rows > 1:
        normal = normal / normal.abs().amax()
    found = []
    for top in tops.double().tolist():
        x = (normal * top).float()
        if anchored:
            x = torch.cat([x, normal[:1].float()])
        found.append(max(0.0, _decibels(x, form)))
    return found


def _decibels(x: torch.Tensor, form: Format) -> float:
    """Of the first DRAWN rows; 0 where nothing is left of them or a scale has no such number, EXACT where all is."""
    try:
        given, back = x[:DRAWN], rounded(x, form)[:DRAWN]
    except NonFiniteError:
        return 0.0
    if not bool(given.any()) or not bool(back.isfinite().all()):
        return 0.0
    found = sqnr_db(given, back)
    return found if math.isfinite(found) else EXACT


def scale_figure(form: Format) -> Figure:
    """Decibels of blocks by their largest: over all octaves of a scale, and within one."""
    figure, (wide, narrow) = _figure(2, 3.0)
    anchored = form.scale == "e4m3"
    low, high = (-24, 0) if anchored else (-149, 127)
    octaves = torch.arange(low, high + 0.01, 0.5 if anchored else 1.0, dtype=torch.float64)
    tops = torch.exp2(octaves)
    decibels = decibels_by_top(form, tops * 1.25 if not anchored else tops, anchored)
    wide.plot(octaves.numpy(), decibels, color=plots.BLUE)
    wide.set_title("By a block's largest, over all octaves")
    wide.set_xlabel("log2 of it" + (", beside the tensor's" if anchored else ""))
    wide.set_ylabel("decibels")
    wide.set_ylim(0, 1.15 * max(one for one in decibels if one < EXACT))
    within = torch.linspace(1, 2, 65, dtype=torch.float64)
    found = decibels_by_top(form, within / 4 if anchored else within, anchored)
    narrow.plot(within.numpy(), found, color=plots.BLUE)
    narrow.set_title("Within an octave")
    narrow.set_xlabel("largest of a block, over a power of two")
    spread = max(found) - min(found)
    if spread < 1.0:
        middle = (max(found) + min(found)) / 2
        narrow.set_ylim(middle - 1.0, middle + 1.0)
    return figure
