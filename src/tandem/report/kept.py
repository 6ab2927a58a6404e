"""What pages read of a run folder beside its metrics, JSON objects and trajectories; and how they are written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandem.errors import RunFolderError, unwritten

_STEP = re.compile(r"step-(\d+)\.jsonl")
_TEXTS = ("program_id", "prompt_id", "text")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where the file is absent. RunFolderError where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, no object")
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} is damaged: {error}. Restore the file.") from error
    return content


def trajectory_files(folder: Path) -> dict[int, Path]:
    """Where the trajectories of each step lie, in order."""
    found = [(_STEP.fullmatch(path.name), path) for path in (folder / "trajectories").glob("step-*.jsonl")]
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def read_trajectories(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a step's file. RunFolderError where a line is none."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                yield _row(line, f"{path} is damaged: line {number} is no trajectory. Remove it to go on.")
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror}.") from error


def _row(line: str, damaged: str) -> dict[str, Any]:
    """With what every row has, as what pages read."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RunFolderError(damaged) from error
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in _TEXTS):
        raise RunFolderError(damaged)
    return row


def write_file(path: Path, content: str | bytes, remedy: str = "Free some space.") -> Path:
    """Write a page or a picture. WorldError where that cannot be done, which says what to do."""
    try:
        path.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)
    except OSError as error:
        raise unwritten(path, error, remedy) from error
    return path
