"""Workers as Ray's actors, each in a placement group of its own: on this machine, or on those of the cluster that
RAY_ADDRESS names. (Tried with ray 2.60.)

An actor gives what went wrong in it as a value. For Ray would make another exception of it, one that is an instance of
the worker's own type too. No actor is restarted by Ray: one that is comes back without its state, and its first call
then says that it is unavailable, not that it died.
"""

from __future__ import annotations

import contextlib
import pickle
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tandem import env
from tandem.errors import ConfigError, TandemError, TandemWarning, WorkerDied, WorkerError
from tandem.run.worker import answer, written
from tandem.run.workers import MOST_BYTES, START, Spec, answered, flooded, made, stalled

try:
    env.quiet_ray()
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
except ImportError as error:
    raise ConfigError(
        f"workers.backend is ray, and ray cannot be imported ({error}): pip install 'tandem-rl[ray]'."
    ) from error

from tandem.run.ray_tasks import RayHome

if TYPE_CHECKING:
    from tandem.program.child import Home
    from tandem.program.config import TaskConfig
    from tandem.run.config import WorkersConfig

SHOWN = 16_384  # characters of a traceback


class _Actor:
    """Inside an actor: an object of a worker's class."""

    def __init__(self) -> None:
        self._works: list[Any] = []

    def start(self, role: str, given: Any, threads: int) -> tuple[bytes, str]:
        """Make it."""
        env.set_threads(threads)
        return _told(lambda: self._works.append(made(role, given)))

    def ask(self, method: str, arguments: tuple[Any, ...]) -> tuple[bytes, str]:
        """Call it."""
        text, failed = _told(lambda: getattr(self._works[0], method)(*arguments))
        return text if len(text) <= MOST_BYTES else written(0, "flooded", len(text)), failed


def _told(function: Callable[[], Any]) -> tuple[bytes, str]:
    """An answer, and the traceback of what failed: what an actor prints is in Ray's logs, which end with a Ray of this
    process's own."""
    failed: list[str] = []
    text = written(0, *answer(function, lambda: failed.append(traceback.format_exc())))
    return text, "".join(failed)[-SHOWN:]


@dataclass(slots=True, eq=False)
class _Call:
    """A call to an actor."""

    by: RayWorker
    phase: str
    deadline_s: float
    until_s: float
    answer: Any  # a reference to it

    def result(self) -> Any:
        """As Pending says."""
        name, phase = self.by.spec.name, self.phase
        try:
            text, failed = ray.get(self.answer, timeout=max(0.0, self.until_s - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            self.by.end()
            raise stalled(name, phase, self.deadline_s) from None
        except ray.exceptions.RayActorError as error:  # died, or unavailable where the connection to it broke
            self.by.end()
            told = " ".join(str(error).split())
            raise WorkerDied(name, phase, f"its process ended ({told[:300]}).") from None
        except ray.exceptions.RayError as error:
            self.by.end()
            told = " ".join(str(error).split())
            raise WorkerError(name, phase, told[:300]) from None
        sys.stderr.write(failed)
        _, kind, value = pickle.loads(text)
        if kind == "flooded":
            self.by.end()
            raise flooded(name, phase)
        return answered(kind, value, name, phase)


class RayWorker:
    """An actor with a processor, or a GPU, of its own."""

    def __init__(self, spec: Spec, gpus: int, deadline_s: float) -> None:
        self.spec = spec
        until_s = time.monotonic() + deadline_s
        needs = {"CPU": 1} | ({"GPU": gpus} if gpus else {})
        self._group = ray.util.placement_group([needs], strategy="PACK")
        if not self._group.wait(deadline_s):
            ray.util.remove_placement_group(self._group)
            what = " and ".join(f"{count} {kind}" for kind, count in needs.items())
            raise WorkerError(
                spec.name,
                START,
                f"it found no place within {deadline_s:g} s: no machine of the cluster has {what} free. Add one, end "
                "what holds it, or raise workers.start_deadline_s.",
            )
        self._actor: Any = (
            ray.remote(_Actor)
            .options(
                num_cpus=1,
                num_gpus=gpus,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group),
            )
            .remote()
        )
        first = self._actor.start.remote(spec.role, spec.given, env.num_threads())
        try:
            _Call(self, START, deadline_s, until_s, first).result()
        except TandemError:
            self.end()
            raise

    def ask(self, phase: str, method: str, *arguments: Any, deadline_s: float) -> _Call:
        """As Worker says."""
        return _Call(self, phase, deadline_s, time.monotonic() + deadline_s, self._actor.ask.remote(method, arguments))

    def end(self) -> None:
        """As Worker says."""
        with contextlib.suppress(ray.exceptions.RayError):  # Ray itself has ended
            ray.kill(self._actor)
            ray.util.remove_placement_group(self._group)


class Ray:
    """Actors in a cluster, or in a Ray that is started here and ends with this."""

    def __init__(self, config: WorkersConfig, gpus: int = 0, processors: int = 0) -> None:
        """processors: that the run's workers take, one each."""
        self.config = config
        self.gpus = gpus  # of each worker
        self._workers: list[RayWorker] = []
        self._folder = ""  # of a Ray that was started here
        if not ray.is_initialized():
            self._join(processors)
        if (there := ray.cluster_resources().get("CPU", 0)) < processors:
            warnings.warn(
                f"the cluster has {there:g} processors, and this run may ask for {processors}, one a worker: what "
                "finds no place in time ends it. Add a machine, or lower task.workers or engine.replicas.",
                TandemWarning,
                stacklevel=2,
            )

    def _join(self, processors: int) -> None:
        """The cluster that is named; else a Ray of this process, which gives away what is asked for."""
        try:
            if env.ray_address():
                ray.init(log_to_driver=False)
                return
            # Its token is this run's own: left to itself, Ray writes one into the user's home, for good.
            self._folder = tempfile.mkdtemp(prefix="tandem-ray-")
            env.set_ray_token()
            ray.init(
                num_cpus=max(processors, env.num_cores()),
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=self._folder,
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            self.close()
            raise WorkerError("ray", START, f"it cannot be started or joined: {error}") from error

    @property
    def host(self) -> str:
        """As Backend says."""
        own = ray.get_runtime_context().get_node_id()
        return next(str(node["NodeManagerAddress"]) for node in ray.nodes() if node["NodeID"] == own)

    def start(self, spec: Spec, deadline_s: float) -> RayWorker:
        """As Backend says."""
        worker = RayWorker(spec, self.gpus, deadline_s)
        self._workers.append(worker)
        return worker

    def home(self, config: TaskConfig) -> Home:
        """As Backend says."""
        return RayHome(config)

    def close(self) -> None:
        """As Backend says."""
        for worker in self._workers:
            worker.end()
        if self._folder:
            ray.shutdown()
            shutil.rmtree(self._folder, ignore_errors=True)
