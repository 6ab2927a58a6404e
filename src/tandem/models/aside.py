"""Files and folders that are there under their name once all of them is."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tandem.errors import CheckpointError, ConfigError

NAMED = 40  # characters of the name that its place aside begins with


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A path to write a file or a folder at, that becomes `out` when the block ends; where it fails, it is removed.

    It lies in a folder beside `out` that is made for it and that nobody has had. ConfigError where `out` is there
    before or by then, CheckpointError where the disk refuses.
    """
    there = ConfigError(f"{out} is there already. Choose another name, or remove it.")
    if os.path.lexists(out):
        raise there
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f"{out.name[:NAMED]}.", suffix=".part", dir=out.parent))
    except OSError as error:
        raise CheckpointError(f"{out} could not be written: {error}. Choose another place.") from error
    try:
        yield holder / "made"
        if os.path.lexists(out):
            raise there
        try:
            (holder / "made").rename(out)
        except OSError as error:
            raise CheckpointError(f"{out} could not be written: {error}. Free disk space.") from error
    finally:
        shutil.rmtree(holder, ignore_errors=True)
