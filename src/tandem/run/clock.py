"""The time that a run's chat templates see: that of its start, kept in its plan.json, so that a prompt with a date is
the same after a resume, and in an evaluation of the run."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from tandem.errors import RunFolderError


def started(folder: Path) -> datetime | None:
    """When the run in `folder` was started; None where there is no run, or one of a version that kept no time."""
    path = folder / "plan.json"
    try:
        plan = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return datetime.fromisoformat(plan["started"]) if "started" in plan else None
    except (OSError, ValueError, TypeError) as error:
        raise RunFolderError(
            f"{path} is damaged ({error}), so the date of the run's prompts is lost. Restore it, or start a new run."
        ) from error
