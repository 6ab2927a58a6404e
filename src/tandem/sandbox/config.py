"""What code of a model may use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tandem.config import AboveZero, Positive, section
from tandem.errors import ConfigError

Backend = Literal["bubblewrap", "container", "refuse", "unsandboxed_subprocess"]


@dataclass(frozen=True, slots=True)
@section("task.sandbox")
class SandboxConfig:
    """Where code of a model runs, and its limits; of each command, but for files, which are of the sandbox's life.

    There is no network and no setting for one.

    >>> SandboxConfig(seconds=2.0).backend
    'bubblewrap'
    """

    backend: Backend = "bubblewrap"  # container: Docker or Podman; refuse: nothing runs
    seconds: AboveZero = 6.0  # of a command, by the clock on the wall; below task.reward_deadline_s
    cpu_seconds: Positive = 10  # of one process, of the processor
    memory_bytes: Positive = 512 << 20  # of all processes and files together, and of one process's own data
    processes: Positive = 64  # with their threads
    file_bytes: Positive = 64 << 20  # in the working folder; as much again in /tmp and in /dev/shm
    files: Positive = 10_000  # with folders and links
    output_bytes: Positive = 1 << 20  # of stdout and of stderr; who writes more is ended
    paths: tuple[str, ...] = ()  # of this machine, seen read-only: a folder with packages, say
    image: str = ""  # container: with a python3 in it

    def __post_init__(self) -> None:
        if self.backend == "container" and not self.image:
            raise ConfigError(
                "task.sandbox.image is empty, and backend=container needs one that has a python3: "
                "--set task.sandbox.image=python:3.11-slim"
            )
        for path in self.paths:
            if not path.startswith("/") or "," in path or ":" in path or not Path(path).exists():
                raise ConfigError(
                    f"task.sandbox.paths has {path!r}. Allowed: absolute paths that there are, without , and :."
                )
