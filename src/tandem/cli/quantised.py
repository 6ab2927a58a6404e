"""`tandem convert quantise`: its flags, and what it prints."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

METHOD_HELP = (
    "Of quantise: nearest; gptq; awq, smooth, hadamard or rotation, each with +gptq too. nearest where none is named."
)
FORMAT_HELP = (
    "Of quantise, as awq, compressed-tensors:nvfp4 or gguf:Q4_K: docs/numerics.md. A format alone, as int4_g128, "
    "writes values as floats; left out, smooth and hadamard write the model otherwise and round nothing."
)
NumberFormat = Annotated[str | None, typer.Option(metavar="FILE[:FORMAT]|FORMAT", help=FORMAT_HELP)]
MethodName = Annotated[str | None, typer.Option(metavar="NAME", help=METHOD_HELP)]
Texts = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Of quantise: what the methods look at: JSON lines with a text each, or text."),
]
Sequences = Annotated[
    int | None, typer.Option(min=1, help="Of quantise: pieces of up to 512 tokens, taken evenly out of the texts. 128.")
]


def quantise(
    source: str,
    out: Path,
    given: tuple[str | None, str | None, Path | None, int | None],
    dtype: str | None,
    json: bool,
) -> int:
    """given: format, method, texts, sequences."""
    from dataclasses import replace

    from tandem.errors import ConfigError
    from tandem.run.quantise import Asked, described
    from tandem.run.quantise import quantise as run

    form, *rest = given
    if not form and rest[0] is None:
        raise ConfigError("give --format, as --format compressed-tensors:int4_g128 or --format awq (docs/numerics.md).")
    if rest[2] is not None and rest[1] is None:
        raise ConfigError(f"--sequences {rest[2]} says how much of --texts is taken, and there is none. Leave it out.")
    named = zip(("method", "texts", "sequences"), rest, strict=True)
    asked = replace(Asked(), **{name: value for name, value in named if value is not None})  # type: ignore[arg-type]
    found = described(run(source, out, form or "", dtype, asked))
    if json:
        print(jsonlib.dumps({"model": str(out), "source": source, "method": asked.method} | found, allow_nan=False))
        return 0
    looked = f"; looked at {found['tokens']:,} tokens in {found['pieces']} pieces" if found["pieces"] else ""
    decibels = "exact" if found["sqnr_db"] is None else f"{found['sqnr_db']} dB"
    if not form:
        print(f"{out}: written otherwise by {asked.method}, nothing rounded; {found['bytes']:,} bytes{looked}")
        return 0
    if not found["matrices"]:
        print(
            f"{out}: {found['format']} in {found['file']}'s format, nothing rounded to codes; {found['bytes']:,} bytes"
        )
        return 0
    where = f"in {found['file']}'s format" if found["file"] else "as floats"
    print(
        f"{out}: {found['matrices']} matrices of {found['weights']:,} weights as {found['format']} "
        f"({found['bits']:.4g} bits each), {decibels} by {asked.method}, {where}; {found['bytes']:,} bytes{looked}"
    )
    if isinstance(damped := found["damped"], dict) and damped:
        print(f"the inputs of {len(damped)} matrices needed more on the diagonal of their second moments: {damped}")
    return 0
