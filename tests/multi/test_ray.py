"""Workers as Ray's actors: what is so of children is so of them, and what Ray does otherwise does not show."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'tandem-rl[ray]'")

import ray

from tandem import env
from tandem.errors import CapacityError, TandemWarning, WorkerDied, WorkerError, WorkerFlooded, WorkerStalled
from tandem.run.config import RunConfig, WorkersConfig
from tandem.run.ray import Ray
from tandem.run.workers import Spec
from tests.odd_workers import ODD, Strange
from tests.placed import run, same, tiny

SOON_S, LONG_S = 3.0, 120.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty home folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("TANDEM_CACHE", str(env.cache_dir()))  # else each actor builds the kernels
        patch.setenv("HOME", str(folder))
        patch.delenv("RAY_ADDRESS", raising=False)
        yield folder


@pytest.fixture(scope="module")
def backend(home: Path) -> Iterator[Ray]:
    backend = Ray(WorkersConfig("ray"), processors=8)
    yield backend
    backend.close()
    assert not ray.is_initialized()


@pytest.fixture
def worker(backend):
    worker = backend.start(Spec("engine", ODD, ""), LONG_S)
    yield worker
    worker.end()


def asked(worker, method: str, *arguments, phase: str = "rollout", deadline_s: float = LONG_S):
    return worker.ask(phase, method, *arguments, deadline_s=deadline_s).result()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def until_gone(pid: int) -> None:
    until_s = time.monotonic() + LONG_S
    while not gone(pid):
        assert time.monotonic() < until_s, f"process {pid} is still there"
        time.sleep(0.05)


def test_calls_are_answered_in_the_order_asked(worker, monkeypatch):
    """Answers that go to another call; a worker that computes with as many threads as Ray thinks it should."""
    calls = [worker.ask("rollout", "echo", value, deadline_s=LONG_S) for value in (1, "two", b"3", (4, None))]
    assert [call.result() for call in reversed(calls)] == [(4, None), b"3", "two", 1]
    assert asked(worker, "pid") != os.getpid()


def test_a_ray_of_its_own_leaves_nothing_in_the_home_folder(worker, home):
    """A token in the user's home folder, left by every run, that all later Rays of that user take for theirs."""
    assert asked(worker, "echo", 1) == 1
    assert list(home.iterdir()) == []
    assert os.environ["RAY_AUTH_TOKEN"]


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ("exits", WorkerDied, "worker engine, phase start: its process ended"),
        ("stops", WorkerStalled, r"worker engine, phase start: no answer came within 8 s, .*workers\.start_deadline_s"),
        ("refuses", CapacityError, r"^worker engine, phase start: 7 pages are too few; allowed: 8 or more\.$"),
        ("breaks", WorkerError, r"^worker engine, phase start: its code raised ValueError: seven lines$"),
    ],
)
def test_a_worker_that_does_not_come_up(backend, given, kind, said):
    """A run that waits for an actor for ever, or an error that names neither worker nor phase."""
    with pytest.raises(kind, match=said) as caught:
        backend.start(Spec("engine", ODD, given), 8.0 if kind is WorkerStalled else LONG_S)
    if isinstance(caught.value, WorkerError):
        assert (caught.value.worker, caught.value.phase) == ("engine", "start")


def test_a_worker_without_a_place(backend):
    """An actor that waits, in silence, for a machine that the cluster does not have."""
    backend.gpus = 64
    try:
        with pytest.raises(
            WorkerError, match="worker engine, phase start: it found no place within 3 s: .* has 1 CPU and 64 GPU free"
        ):
            backend.start(Spec("engine", ODD, ""), SOON_S)
    finally:
        backend.gpus = 0


@pytest.mark.parametrize("method", ["exits", "dies"])
def test_a_worker_that_dies_within_a_call(worker, method):
    """An actor that is unavailable for a moment, and then comes back without its state."""
    with pytest.raises(WorkerDied, match="worker engine, phase publish: its process ended") as caught:
        asked(worker, method, phase="publish")
    assert (caught.value.worker, caught.value.phase) == ("engine", "publish")
    with pytest.raises(WorkerDied, match="worker engine, phase score: its process ended"):
        asked(worker, "echo", 1, phase="score")


def test_a_cluster_that_is_small_for_a_run(backend):
    """A run that ends in its middle, when its fourth environment finds no place, without a word before."""
    with pytest.warns(
        TandemWarning, match=r"the cluster has \d+ processors, and this run may ask for 4096, one a worker"
    ):
        Ray(WorkersConfig("ray"), processors=4096)


def test_a_restartable_actor_is_what_ray_says_of_it(backend):
    """Why actors are made without Ray's restarts: the call in flight says unavailable, and the state is gone."""

    class Counts:
        def __init__(self) -> None:
            self.count = 0

        def one(self) -> int:
            self.count += 1
            return self.count

        def dies(self) -> None:
            os._exit(1)

    actor = ray.remote(Counts).options(num_cpus=0, max_restarts=1).remote()
    assert ray.get([actor.one.remote(), actor.one.remote()], timeout=LONG_S) == [1, 2]
    with pytest.raises(ray.exceptions.ActorUnavailableError) as caught:
        ray.get(actor.dies.remote(), timeout=LONG_S)
    assert isinstance(caught.value, ray.exceptions.RayActorError)  # what run/ray.py takes for a death
    until_s = time.monotonic() + LONG_S
    while True:
        try:
            assert ray.get(actor.one.remote(), timeout=LONG_S) == 1
            break
        except ray.exceptions.ActorUnavailableError:
            assert time.monotonic() < until_s
    ray.kill(actor)


def test_a_tasks_error_is_what_ray_says_of_it(backend):
    """Why errors of actors travel as values: Ray's exception is an instance of the worker's own type, with a traceback
    for its text, or of no type that either side knows."""

    class Raises:
        def refuses(self) -> None:
            raise CapacityError("7 pages")

        def is_strange(self) -> None:
            raise Strange(1, 2)

    actor = ray.remote(Raises).options(num_cpus=0).remote()
    with pytest.raises(CapacityError) as caught:
        ray.get(actor.refuses.remote(), timeout=LONG_S)
    assert isinstance(caught.value, ray.exceptions.RayTaskError) and type(caught.value) is not CapacityError
    assert "ray::" in str(caught.value)
    with pytest.raises(Exception) as strange:
        ray.get(actor.is_strange.remote(), timeout=LONG_S)
    assert not isinstance(strange.value, Strange)
    ray.kill(actor)


DIES = """
import sys
import time

from tandem.errors import WorkerDied
from tandem.run.config import WorkersConfig
from tandem.run.ray import Ray
from tandem.run.workers import Spec

backend = Ray(WorkersConfig("ray"))
worker = backend.start(Spec("engine", "tests.odd_workers:Odd", ""), 120.0)
try:
    worker.ask("rollout", "dies", deadline_s=120.0).result()
except WorkerDied as error:
    print(error, file=sys.stderr)
time.sleep(3)  # what Ray says of it comes in its own time
backend.close()
"""


def test_deaths_are_not_told_on_stdout(home):
    """Ray's own lines among those of `--json`."""
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", DIES], cwd=root, env=env.foreign(), capture_output=True, text=True, timeout=LONG_S
    )
    assert "worker engine, phase rollout: its process ended" in found.stderr, found.stderr[-2000:]
    assert found.stdout == ""


def test_a_stopped_worker_is_named_and_ended(worker):
    """A call that outlives its deadline; a stopped process that stays for ever."""
    pid = asked(worker, "pid")
    with pytest.raises(WorkerStalled, match="worker engine, phase publish: no answer came within 3 s"):
        asked(worker, "stops", phase="publish", deadline_s=SOON_S)
    until_gone(pid)


def test_a_worker_killed_between_calls(worker):
    """A call that waits for an actor which is long dead."""
    os.kill(asked(worker, "pid"), signal.SIGKILL)
    with pytest.raises(WorkerDied, match="worker engine, phase rollout: its process ended"):
        asked(worker, "echo", 1)


def test_what_a_workers_own_code_raises(worker, capsys):
    """A user's mistake as an exception of Ray's, whose text is a remote traceback; an actor that is ended for it; or a
    fault of its code of which nobody sees where it was."""
    with pytest.raises(
        CapacityError, match=r"^worker engine, phase rollout: 7 pages are too few; allowed: 8 or more\.$"
    ) as e:
        asked(worker, "refuses")
    assert not isinstance(e.value, ray.exceptions.RayError)
    for method, said in (
        ("breaks", "ValueError: seven lines"),
        ("is_strange", "Strange: 1 and 2"),
        ("keeps", "pickle"),
    ):
        with pytest.raises(WorkerError, match=f"^worker engine, phase rollout: its code .*{said}"):
            asked(worker, method)
    assert asked(worker, "echo", 7) == 7
    shown = capsys.readouterr().err
    assert "odd_workers.py" in shown and "in breaks" in shown and "in refuses" not in shown


def test_a_worker_that_floods(worker):
    """An answer that fills this process's memory."""
    with pytest.raises(WorkerFlooded, match="worker engine, phase rollout: its answer has more than 1024 MiB"):
        asked(worker, "floods_ray")
    with pytest.raises(WorkerDied):
        asked(worker, "echo", 1)


# --- an engine


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_model) -> RunConfig:
    return replace(
        tiny(tmp_path_factory.mktemp("ray"), write_model), workers=WorkersConfig("ray", deadline_s=60.0, restarts=1)
    )


@pytest.mark.grid  # test_ray_tasks.py has one with all of it in actors
def test_a_run_with_its_engine_in_an_actor_is_the_same_run(backend, config, tmp_path):
    """A run whose weights hang on where its engine lives, or on the death of an actor in the middle of its rollouts."""
    plain = run(replace(config, workers=WorkersConfig()), tmp_path / "plain")
    hit: list[int] = []

    def watch(parts) -> None:
        engine = parts.engine
        ask = engine.seat.ask

        def faulty(asked: str, *given, **named):
            if asked == "rollout" and engine.version.step == 1 and not hit:
                hit.append(engine.seat.worker.ask("rollout", "pid", deadline_s=LONG_S).result())
                os.kill(hit[0], signal.SIGKILL)
            return ask(asked, *given, **named)

        engine.seat.ask = faulty

    with pytest.warns(
        TandemWarning, match="worker engine, phase rollout: its process ended .* In its place another is started"
    ):
        rows = run(config, tmp_path / "run", watch)
    assert hit and gone(hit[0])
    same(rows, plain)
