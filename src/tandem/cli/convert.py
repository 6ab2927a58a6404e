"""`tandem convert`: a model made of another, written as a Hugging Face folder."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Way(str, Enum):
    MERGE = "merge"


class Kind(str, Enum):
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


WAYS_HELP = "merge: an adapter folded into the model that it is of."


def convert(
    way: Annotated[Way, typer.Argument(metavar="WAY", help=WAYS_HELP)],
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="An adapter's folder in PEFT's format, or a run that trained one.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the model is written.")],
    base: Annotated[str, typer.Option(metavar="MODEL", help="In place of the model that the adapter names.")] = "",
    dtype: Annotated[Kind, typer.Option(help="Of the tensors written.")] = Kind.BFLOAT16,
) -> int:
    """Make a model of another one."""
    from tandem.run.merge import merge

    merge(source, out, dtype.value, base)
    print(f"{out}: a model of its own")
    return 0
