"""`tandem convert`: a student cut out of a teacher, a teacher's log-probs on disk, an adapter folded in, fewer bits."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from tandem.cli.options import Assignments, ConfigFiles
from tandem.cli.quantised import MethodName, NumberFormat, Sequences, Texts, quantise


class Kind(str, Enum):
    PRUNE = "prune"
    TEACHER = "teacher"
    MERGE = "merge"
    QUANTISE = "quantise"


class Dtype(str, Enum):
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


KIND_HELP = (
    "prune: a smaller student of a model; teacher: what a recipe's distil.teacher says of its texts, to learn later; "
    "merge: an adapter folded into the model that it is of; quantise: its matrices in few bits, in a format of files "
    "that other engines read"
)
SOURCE_HELP = (
    "Of prune and quantise: a model, or a run, whose newest checkpoint is meant. Of teacher: a recipe. Of merge: an "
    "adapter's folder in PEFT's format, or a run that trained one."
)
TOLD_S = 10.0  # between two lines on how far it is
SIZES = ("layers", "heads", "kv_heads", "ff_width", "width")


def convert(
    kind: Annotated[Kind, typer.Argument(metavar="prune|teacher|merge|quantise", help=KIND_HELP)],
    source: Annotated[str, typer.Argument(metavar="MODEL|RECIPE|ADAPTER", help=SOURCE_HELP)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A folder to make; a file, with --format gguf:TYPE.")],
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="Of prune, what is left: layers=6, heads, kv_heads, ff_width, width."),
    ] = None,
    measure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of prune: choose by importance over this text, not evenly.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Of merge: in place of the model that the adapter names.")
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Of merge and quantise: of the tensors written as floats; bfloat16, or float32 of a format alone."
        ),
    ] = None,
    format: NumberFormat = None,
    method: MethodName = None,
    texts: Texts = None,
    sequences: Sequences = None,
    files: ConfigFiles = None,
    settings: Assignments = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> int:
    """Make a smaller student of a model, store what a teacher says of a recipe's texts, fold an adapter in, or write a
    model in few bits."""
    from tandem.errors import ConfigError

    if (format or method or texts or sequences) and kind is not Kind.QUANTISE:
        raise ConfigError("--format, --method, --texts and --sequences are of `convert quantise`. Leave them out.")
    if kind is not Kind.TEACHER:
        from tandem.run.source import say_trained_as

        say_trained_as(source, (), left=f"convert {kind.value}")
    if kind is Kind.QUANTISE:
        if size or measure or base or files or settings:
            raise ConfigError("--size, --measure, --base, --config and --set are not of `convert quantise`.")
        return quantise(source, out, (format, method, texts, sequences), dtype.value if dtype else None, json)
    if kind is Kind.MERGE:
        if size or measure or files or settings:
            raise ConfigError("--size, --measure, --config and --set are not of `convert merge`. Leave them out.")
        return _merge(source, out, base or "", (dtype or Dtype.BFLOAT16).value, json)
    if base or dtype:
        raise ConfigError("--base is of `convert merge`, --dtype of that and `convert quantise`. Leave them out.")
    if kind is Kind.PRUNE:
        if files or settings:
            raise ConfigError("--config and --set are settings of a recipe: give them to `convert teacher`.")
        return _prune(source, out, _sizes(size or []), measure, json)
    if size or measure:
        raise ConfigError("--size and --measure are of `convert prune`: a recipe says what its models are.")
    return _teacher(source, out, files or [], settings or [], json)


def _merge(source: str, out: Path, base: str, dtype: str, json: bool) -> int:
    from tandem.run.merge import merge

    merge(source, out, dtype, base)
    print(jsonlib.dumps({"model": str(out), "source": source}) if json else f"{out}: a model of its own")
    return 0


def _sizes(given: list[str]) -> dict[str, int]:
    from tandem.errors import ConfigError, nearest

    found: dict[str, int] = {}
    for text in given:
        name, _, number = text.partition("=")
        if name not in SIZES:
            raise ConfigError(f"--size {text}: a model has no {name!r}.{nearest(name, SIZES)}")
        if not (number.isascii() and number.isdecimal() and len(number) < 10):
            raise ConfigError(f"--size {text}: {name} is {number!r}; give a whole number, as {name}=6.")
        found[name] = int(number)
    return found


def _prune(source: str, out: Path, sizes: dict[str, int], text: Path | None, json: bool) -> int:
    from tandem.run.convert import described, prune

    found: dict[str, Any] = described(prune(source, out, sizes, text))
    if json:
        print(jsonlib.dumps({"model": str(out), "source": source} | found))
        return 0
    kept = ", ".join(map(str, found["kept_layers"]))
    how = "evenly" if text is None else f"by importance over {text}"
    shape = ", ".join(f"{name} {found[name]}" for name in SIZES)
    print(f"{out}: {found['parameters']:,} of {found['of']:,} parameters, {how}: {shape}; layers {kept}")
    return 0


def _teacher(source: str, out: Path, files: list[Path], settings: list[str], json: bool) -> int:
    from tandem.cli.recipes import find_recipe
    from tandem.cli.settings import assignments
    from tandem.config import override

    recipe = find_recipe(source)()
    config = override(recipe, assignments(recipe, files, settings))

    from tandem.run.convert import store_teacher

    last = time.monotonic()

    def told(texts: int, tokens: int) -> None:
        nonlocal last
        if time.monotonic() - last > TOLD_S:
            last = time.monotonic()
            print(f"{texts:,} texts, {tokens:,} tokens", file=sys.stderr, flush=True)

    texts, tokens = store_teacher(config, out, told)
    if json:
        print(jsonlib.dumps({"folder": str(out), "texts": texts, "tokens": tokens, "top_k": config.distil.top_k}))
    else:
        print(f"{out}: {tokens:,} tokens of {texts:,} texts, {config.distil.top_k} log-probs each")
    return 0
