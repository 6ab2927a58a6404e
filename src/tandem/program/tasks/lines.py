"""JSON lines of a task file, plain or gzipped, each checked."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem.errors import TaskError
from tandem.program.reward import clipped

MOST_BYTES = 1 << 30


def read_lines(path: str, wanted: Mapping[str, type]) -> list[dict[str, Any]]:
    """Objects of the file, blank lines left out; TaskError names the line and the field that is not as `wanted`."""
    try:
        with gzip.open(path) if path.endswith(".gz") else Path(path).open("rb") as file:
            text = file.read(MOST_BYTES).decode().removeprefix("\ufeff")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read: {error}. Give a .jsonl or .jsonl.gz file.") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{path}, line {number}: no JSON ({error}). Mend or remove the line.") from error
        if not isinstance(row, dict):
            raise TaskError(f"{path}, line {number}: an object is needed, not {type(row).__name__}.")
        for field, kind in wanted.items():
            if not isinstance(row.get(field), kind):
                found = clipped(row[field]) if field in row else "not there"
                raise TaskError(f"{path}, line {number}: its {field!r} is {found}; wanted: {kind.__name__}.")
        rows.append(row | {"line": number})
    if not rows:
        raise TaskError(f"{path} holds no line.")
    return rows
