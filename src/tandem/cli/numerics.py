"""`tandem numerics`: number formats of few bits, two of them told apart, and what they cost and save."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import math
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from tandem.study.quality import Task
    from tandem.train.config import LearnerConfig


class Kind(str, Enum):
    FORMATS = "formats"
    COMPARE = "compare"
    ROOFLINE = "roofline"
    SENSITIVITY = "sensitivity"
    PARETO = "pareto"
    PAGE = "page"


class Phase(str, Enum):
    DECODE = "decode"
    PREFILL = "prefill"
    TRAIN = "train"


KIND_HELP = (
    "formats: a table of those that are known; compare: two of them, and the first input that separates them; "
    "roofline: bytes, operations and the least time of a model's operations on a device, and what fits its memory; "
    "sensitivity: each tensor of a model alone in a format, by decibels and by KL; pareto: formats by bytes and time "
    "against KL, perplexity, accuracy and reward; page: what a format is, as an HTML page"
)
NAMES_HELP = (
    "Of compare: two formats; then, in place of inputs at the edges of their rules, a model's matrices. Of page: a "
    "format. Of the others: a model; of roofline a folder with config.json alone, or new:width=..., too"
)
FORMAT_HELP = (
    "Of roofline, sensitivity, pareto: bf16, fp32, w8a8, w4a8 or a name of `numerics formats`, and behind a + one for "
    "the rows that are multiplied; several with commas between. bf16."
)
SHOWN = 8  # numbers of a block that are printed
# Which kinds take a flag.
TAKES: dict[str, tuple[Kind, ...]] = {
    "device": (Kind.ROOFLINE, Kind.PARETO),
    "format": (Kind.ROOFLINE, Kind.SENSITIVITY, Kind.PARETO),
    "batch": (Kind.ROOFLINE, Kind.PARETO),
    "context": (Kind.ROOFLINE, Kind.PARETO),
    "phase": (Kind.ROOFLINE, Kind.PARETO),
    "measure": (Kind.ROOFLINE, Kind.PARETO),
    "check": (Kind.ROOFLINE,),
    "texts": (Kind.SENSITIVITY, Kind.PARETO),
    "out": (Kind.SENSITIVITY, Kind.PARETO, Kind.PAGE),
    "tensors": (Kind.SENSITIVITY,),
    "task": (Kind.PARETO,),
    "study": (Kind.PARETO,),
    "set": (Kind.ROOFLINE, Kind.PARETO),
}
TENSORS_HELP = (
    "weights, rows (what a product multiplies), kv, logits, with commas between; or gradients, whose --format is a "
    "learner.gradients. weights. Of kv alone --format may be an engine.kv_dtype: kivi2, fp8_head, nvfp4_sinks4."
)
TASK_HELP = (
    "Accuracy on held-out prompts too: a recipe, a reasoning-gym name, or a .toml or .yaml file with one task, as "
    "--suite of eval."
)
SET_HELP = "Of a training step's prediction (learner.*), or of --task."


def numerics(
    kind: Annotated[Kind, typer.Argument(metavar="|".join(one.value for one in Kind), help=KIND_HELP)],
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help=NAMES_HELP)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="h200, b200, mi300x, ..., or this, which is measured.")
    ] = None,
    format: Annotated[str | None, typer.Option("--format", "--formats", metavar="F[,F]", help=FORMAT_HELP)] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences. 1.")] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens before the one that is decoded, or of each sequence. 1024.")
    ] = None,
    phase: Annotated[Phase | None, typer.Option(help="decode.")] = None,
    measure: Annotated[bool, typer.Option(help="Take this machine's rates anew.")] = False,
    check: Annotated[
        bool, typer.Option(help="Beside the prediction for this machine, what each kernel takes. Three minutes.")
    ] = False,
    texts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON lines with a text each, or paragraphs of plain text.")
    ] = None,
    tensors: Annotated[str | None, typer.Option(metavar="T[,T]", help=TENSORS_HELP)] = None,
    task: Annotated[str | None, typer.Option(metavar="TASK", help=TASK_HELP)] = None,
    study: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Reward after steps of RL too: a study's result.json.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help=SET_HELP)] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Where a picture (PNG) or the pages (a folder) go.")
    ] = None,
) -> int:
    """Show number formats, tell two of them apart, or say what they cost a model and what they save."""
    from tandem.errors import ConfigError

    names = names or []
    given = {
        "device": device, "format": format, "batch": batch, "context": context, "phase": phase,
        "measure": measure or None, "check": check or None, "texts": texts, "out": out,
        "tensors": tensors, "task": task, "study": study, "set": settings,
    }  # fmt: skip
    _refuse_unread(kind, given)
    if kind is Kind.FORMATS:
        if names:
            raise ConfigError(f"`numerics formats` takes no names; {' '.join(names)} were given. Leave them out.")
        return _formats(json)
    if kind is Kind.COMPARE:
        if len(names) not in (2, 3):
            raise ConfigError(f"`numerics compare` takes two formats and maybe a model; {len(names)} names were given.")
        return _compare(names[0], names[1], names[2] if len(names) == 3 else "", json)
    if len(names) != 1:
        wanted = "a format" if kind is Kind.PAGE else "a model"
        raise ConfigError(f"`numerics {kind.value}` takes {wanted}; {len(names)} names were given.")
    from tandem.bench import roofline
    from tandem.study import formats

    learner, others = _learner(settings or [], task, trains=phase is Phase.TRAIN or check)
    forms = tuple(format.split(",")) if format else ()
    asked = roofline.Asked(
        device or "h200", forms, batch or 1, context or 1024,
        phase.value if phase else "decode", measure, learner,
    )  # fmt: skip
    if kind is Kind.ROOFLINE:
        return roofline.check(names[0], asked, json) if check else roofline.roofline(names[0], asked, json)
    if kind is Kind.PAGE:
        return formats.page(names[0], out)
    if texts is None:
        raise ConfigError(f"`numerics {kind.value}` needs --texts FILE: what the model reads, about as it is used.")
    from tandem.run.source import say_trained_as

    say_trained_as(names[0], (), left=f"numerics {kind.value}")
    if kind is Kind.SENSITIVITY:
        return formats.sensitivity(names[0], asked.formats, texts, out, json, tensors or "weights")
    work = {"device": asked.device, "phase": asked.phase, "batch": asked.batch, "context": asked.context}
    more = formats.Asked(_task(names[0], task, others) if task else None, study)
    known = roofline.foretold(asked)
    return formats.pareto(names[0], asked.formats, texts, out, json, work=work, foretold=known, asked=more)


def _refuse_unread(kind: Kind, given: Mapping[str, object]) -> None:
    """ConfigError for flags that are of another kind or would be passed over, and for a format without a name."""
    from tandem.errors import ConfigError

    for name, value in given.items():
        if value is not None and kind not in TAKES[name]:
            those = ", ".join(one.value for one in TAKES[name])
            raise ConfigError(f"--{name} is not of `numerics {kind.value}`, but of {those}. Leave it out.")
    if unread := [name for name in ("batch", "context", "phase") if given["check"] and given[name] is not None]:
        raise ConfigError(f"--check has works of its own: --{unread[0]} would be passed over. Leave it out.")
    if "" in str(given["format"]).split(","):
        raise ConfigError(
            f"--format {given['format']} names a format that is empty. Give names with one comma between."
        )


def _learner(settings: list[str], task: str | None, trains: bool) -> tuple[LearnerConfig, list[str]]:
    """Of --set: the learner's, and those of a task. ConfigError where there is none that they could be of, and for a
    learner's that no prediction looks at."""
    from tandem.bench.foretold import LEARNED
    from tandem.cli.recipes import parse_settings
    from tandem.config import override
    from tandem.errors import ConfigError
    from tandem.train.config import LearnerConfig

    given = parse_settings(settings)
    own = {name.removeprefix("learner."): text for name, text in given.items() if name.startswith("learner.")}
    others = [text for text in settings if not text.strip().startswith("learner.")]
    if others and task is None:
        raise ConfigError(
            f"--set {others[0]}: a prediction has settings of learner.*; others are of --task. Leave it out."
        )
    config = override(LearnerConfig(), own)
    if unread := [name for name in own if name not in LEARNED]:
        looked = ", ".join(f"learner.{name}" for name in LEARNED)
        raise ConfigError(f"--set learner.{unread[0]}: a prediction looks at {looked} alone. Leave it out.")
    if own and not trains:
        raise ConfigError(f"--set learner.{next(iter(own))} is of --phase train. Give that too, or leave it out.")
    return config, others


def _task(model: str, name: str, settings: list[str]) -> Task:
    """A task's held-out prompts, asked of a model as `tandem eval` asks it."""
    from tandem.cli.eval import FILE_TASKS, tasks_of
    from tandem.cli.recipes import recipe_names
    from tandem.errors import ConfigError
    from tandem.run.source import PLAIN
    from tandem.study.quality import Task

    if name in FILE_TASKS:
        raise ConfigError(f"--task {name} needs its questions: write it into a file as --suite of eval, and give that.")
    named, suite = ([], Path(name)) if name.endswith((".toml", ".yaml", ".yml")) else ([name], None)
    recipe = name in recipe_names()
    plain = [f"{name}={value}" for name, value in PLAIN.items()]
    texts = [*([f"model.source={model}"] if recipe else []), *plain, *settings]
    found = tasks_of(name if recipe else model, ([] if recipe else named, None, suite), ([], texts))
    if len(found) != 1:
        raise ConfigError(f"--task {name} has {len(found)} tasks: {', '.join(found)}. A picture is of one.")
    ((own, asked),) = found.items()
    return Task(own, asked.config, asked.told())


def _formats(json: bool) -> int:
    from tandem.numerics.blocks import FORMATS, properties
    from tandem.run.folder import plain

    rows = [properties(form) for form in FORMATS.values()]
    if json:
        print(jsonlib.dumps(plain(rows), allow_nan=False))
        return 0
    texts = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(texts[0]))]
    for row in texts:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _compare(one: str, other: str, model: str, json: bool) -> int:
    import torch

    from tandem.numerics.apart import compare, edges
    from tandem.numerics.blocks import format_of
    from tandem.run.folder import plain

    first, second = format_of(one), format_of(other)
    columns = max(2, first.block if first.block > 0 else 128)
    held = [form.element.largest * torch.finfo(torch.float16).max for form in (first, second) if form.scale == "fp16"]
    tensors = _matrices(model) if model else edges(first.element, columns, min(held, default=math.inf))
    found = compare(first, second, tensors)
    if json:
        print(jsonlib.dumps(plain({"a": one, "b": other, **dataclasses.asdict(found)}), allow_nan=False))
        return 0
    others = f", {found.recoded:,} of them by other codes" if found.differ else ""
    print(f"{found.differ:,} of {found.numbers:,} numbers are read back otherwise by {one} and by {other}{others}")
    if found.first is not None:
        apart = found.first
        pairs = zip(zip(*apart.values, strict=True), zip(*apart.codes, strict=True), strict=True)
        at = next(i for i, (a, b) in enumerate(pairs) if a[0] != a[1] and (b[0] != b[1] or not found.recoded))
        cut = slice(max(0, at - SHOWN // 2), max(0, at - SHOWN // 2) + SHOWN)
        print(f"the first of {apart.name}, row {apart.place[0]}, from column {apart.place[1] + cut.start} on:")
        print(f"  inputs  {_numbers(apart.inputs[cut])}  (the block's largest {max(map(abs, apart.inputs)):.9g})")
        for name, values, codes, scale in zip((one, other), apart.values, apart.codes, apart.scales, strict=True):
            written = " ".join(f"{code:02x}" for code in codes[cut])
            print(f"  {name}: {_numbers(values[cut])}  codes {written}  x {scale:.9g}")
    return 0


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.9g}" for value in values)


def _matrices(model: str) -> Iterator[tuple[str, Tensor]]:
    from tandem.models.checkpoint import open_checkpoint
    from tandem.run.source import resolve_source

    for name, tensor in open_checkpoint(resolve_source(model)).tensors():
        if tensor.ndim == 2:
            yield name, tensor
