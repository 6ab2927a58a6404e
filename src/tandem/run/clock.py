"""A run's two times: that of its start, which chat templates see (in plan.json, so that a prompt with a date stays
the same after a resume and in an evaluation of the run), and how long it has run, all sittings."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

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


class WallClock:
    """Seconds that a run has taken, earlier sittings included, by the clock of its sitting."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.earlier_s = 0.0
        self.started_s = now()

    def seconds(self, now: float | None = None) -> float:
        return self.earlier_s + (self.now() if now is None else now) - self.started_s

    def state(self) -> dict[str, Any]:
        return {"wall_s": self.seconds()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.earlier_s = float(state["wall_s"])
