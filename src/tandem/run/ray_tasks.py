"""Environments and rewards in Ray's actors: a process of program/child.py beside an actor of its own, on whichever
machine has a processor free. The actor hands messages on as they are, so that what a task is told and asked, its
interpreter, its limits and its deadlines are those of a child here.

`program/workers.py` holds one as it holds a child. What an actor's death takes with it is what a child's takes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import threading
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tandem.errors import TaskError
from tandem.program.child import Answer, Call, Child, read
from tandem.program.config import TaskConfig

LEAVE_S = 2.0  # for an actor to end its process, before it is ended itself


class _Relay:
    """Inside an actor: a child, and its pipe."""

    def __init__(self) -> None:
        self._there = threading.Event()
        self._child: Child | None = None
        self._refused = b""  # why there is none

    @ray.method(concurrency_group="tell")
    def start(self, config: TaskConfig, paths: list[str], folder: str) -> None:
        """Start it, with the driver's paths where they are."""
        sys.path[:] = [*paths, *(path for path in sys.path if path not in paths)]
        with contextlib.suppress(OSError):
            os.chdir(folder)
        try:
            self._child = Child(f"task {config.label}", config, python=config.python)
        except TaskError as error:
            self._refused = pickle.dumps((0, "task_error", str(error), 0.0))
        self._there.set()

    @ray.method(concurrency_group="tell")
    def tell(self, text: bytes) -> None:
        """Hand a call on; where the process has ended, who hears finds that."""
        if self._child is not None:
            with contextlib.suppress(OSError):
                self._child.connection.send_bytes(text)

    @ray.method(concurrency_group="hear")
    def hear(self) -> tuple[bytes, str]:
        """What the process says next; or how it ended."""
        self._there.wait()
        if self._child is None:
            return self._refused, ""
        try:
            return self._child.connection.recv_bytes(), ""
        except (EOFError, OSError):
            self._child.end()
            return b"", self._child.ended()

    @ray.method(concurrency_group="leave")
    def leave(self) -> None:
        """End it, with what it started."""
        if self._child is not None:
            self._child.end()


class RayHome:
    """What a Child is to program/workers.py."""

    def __init__(self, config: TaskConfig) -> None:
        self.started = False
        self.concurrent = False
        self.reason = ""
        self._ended = ""  # how
        self._group = ray.util.placement_group([{"CPU": 1}], strategy="PACK")
        made: Any = ray.remote(concurrency_groups={"tell": 1, "hear": 1, "leave": 1})(_Relay)
        placed = PlacementGroupSchedulingStrategy(self._group)
        self._actor = made.options(num_cpus=1, max_restarts=0, scheduling_strategy=placed).remote()
        self._actor.start.remote(config, [*sys.path], os.getcwd())
        self._hearing = self._actor.hear.remote()
        self._leaving: threading.Thread | None = None

    def send(self, call: Call) -> None:
        """As Child's."""
        if not self._ended:
            self._actor.tell.remote(pickle.dumps(call))

    def receive(self, deadline_s: float) -> Answer | None:
        """As Child's."""
        if self._ended:
            return None
        try:
            text, ended = ray.get(self._hearing, timeout=min(deadline_s, 1e6))
        except ray.exceptions.GetTimeoutError:
            return None
        except ray.exceptions.RayError as error:  # the actor died, or its machine went
            self._ended = f"its actor ended: {' '.join(str(error).split())[:200]}"
            return None
        if ended:
            self._ended = ended
            return None
        self._hearing = self._actor.hear.remote()
        return read(text)

    def alive(self) -> bool:
        """As Child's."""
        return not self._ended

    def ended(self) -> str:
        """As Child's."""
        if not self._ended and not self._group.wait(0):
            return "no machine of the cluster has 1 CPU free for it; add one, or lower task.workers"
        return self._ended or "it hung"

    def end(self) -> None:
        """As Child's."""
        if self._leaving is None:
            self._ended = self._ended or "it was ended"
            self._leaving = threading.Thread(target=self._leave, name="task leaves", daemon=True)
            self._leaving.start()

    kill = end

    def _leave(self) -> None:
        """The child first: what an actor's death leaves behind goes by itself only where it does not hang."""
        with contextlib.suppress(ray.exceptions.RayError):  # Ray itself has ended
            if self._group.wait(0):
                ray.wait([self._actor.leave.remote()], timeout=LEAVE_S)
            ray.kill(self._actor)
            ray.util.remove_placement_group(self._group)

    def join(self, deadline_s: float) -> None:
        """As Child's."""
        if self._leaving is not None:
            self._leaving.join(deadline_s + LEAVE_S)
