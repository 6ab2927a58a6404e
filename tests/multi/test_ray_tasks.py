"""Environments and rewards beside Ray's actors: what is so of children here is so of them, whatever is lost when."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'tandem-rl[ray]'")

from tandem import env
from tandem.engine.config import EngineConfig
from tandem.errors import EnvironmentFailure, TaskError
from tandem.kernels.build.toolchain import compiler
from tandem.program.config import TaskConfig
from tandem.program.episode import Observed
from tandem.program.pool import EnvironmentPool
from tandem.run.config import WorkersConfig
from tandem.run.ray import Ray
from tandem.types import Failure, Message
from tests.grid import crossed
from tests.placed import closes, run, same, tiny
from tests.struck import PHASES

LONG_S = 120.0
STRUCK = "tests.struck:Struck"


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ray]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TANDEM_CACHE", str(env.cache_dir()))  # else each actor builds the kernels
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("RAY_ADDRESS", raising=False)
        with closing(Ray(WorkersConfig("ray"), processors=8)) as made:
            yield made


def struck(folder: Path, phase: str, whom: str, fault: signal.Signals, **changes: object) -> TaskConfig:
    given = (("folder", str(folder)), ("phase", phase), ("whom", whom), ("fault", int(fault)))
    task = TaskConfig(STRUCK, parameters=given, heldout_size=0, workers=2, reward_deadline_s=3.0)
    return replace(task, **changes)  # type: ignore[arg-type]


def played(pool: EnvironmentPool, index: int) -> list[float | Failure]:
    """What an episode of one turn comes to: its reward, or why there is none."""
    episode = pool.episode(pool.prompt(index), time.monotonic() + LONG_S)
    episode.said.append(Message("assistant", "one"))
    heard = episode.observe().result(LONG_S)
    found = episode.score().result(LONG_S) if isinstance(heard, Observed) else heard
    episode.teardown()
    return [found] if isinstance(found, Failure) else [float(found)]


@pytest.mark.parametrize(
    ("phase", "whom", "fault"), crossed(PHASES, ["itself", "its actor"], [signal.SIGKILL, signal.SIGSTOP])
)
def test_an_environment_lost_in_each_phase(backend, tmp_path, phase, whom, fault):
    """A program that hangs or pays zero with its process; a pool that answers nothing more; a process left behind."""
    with closing(EnvironmentPool(struck(tmp_path, phase, whom, fault), born=backend.home)) as pool:
        pool.ready()
        (found,) = played(pool, 0)
        if phase == "teardown":  # all was said by then
            assert found == 1.0
        else:
            assert isinstance(found, Failure), found
            assert found.where in ("deadline", "environment", "reward"), found
        assert [played(pool, index) for index in (1, 2)] == [[1.0], [1.0]]
    assert (tmp_path / "struck").exists()
    reached = {int(path.name.rsplit("-")[-1]) for path in tmp_path.glob("*-*")}
    until_s = time.monotonic() + LONG_S
    while left := [pid for pid in reached if _lives(pid)]:
        assert time.monotonic() < until_s, f"{left} are still there"
        time.sleep(0.1)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_wrong_task_says(backend, tmp_path):
    """A user's mistake as an exception of Ray's, or one that is found at the first step."""
    with closing(EnvironmentPool(TaskConfig(f"{tmp_path}/none.py:None"), born=backend.home)) as pool:
        with pytest.raises(TaskError, match=r"none\.py"):
            pool.ready()
    missing = TaskConfig(STRUCK, python=str(tmp_path / "python"), heldout_size=0)
    with closing(EnvironmentPool(missing, born=backend.home)) as pool:
        with pytest.raises(TaskError, match=r"task\.python .*python cannot be run"):
            pool.ready()


def test_a_cluster_without_room(tmp_path, monkeypatch, backend):
    """A task that waits, in silence, for a processor which the cluster does not have."""
    import ray

    held = [ray.util.placement_group([{"CPU": ray.cluster_resources()["CPU"]}])]
    assert held[0].wait(LONG_S)
    try:
        task = struck(tmp_path, "none", "itself", signal.SIGKILL)
        with closing(EnvironmentPool(task, start_deadline_s=2.0, born=backend.home)) as pool:
            with pytest.raises(EnvironmentFailure, match="no machine of the cluster has 1 CPU free"):
                pool.ready()
    finally:
        ray.util.remove_placement_group(held[0])


@pytest.mark.skipif(compiler() is None, reason="the reference kernels are not batch-invariant")
def test_a_run_all_of_whose_workers_are_actors(backend, tmp_path, write_model):
    """A run whose weights hang on where engines, reference, environments and rewards live."""
    config = tiny(tmp_path, write_model)
    config = replace(config, task=TaskConfig("tests.struck:Sums", heldout_size=8))
    plain = run(config, tmp_path / "plain", score=None)
    there = replace(config, engine=EngineConfig(kv_memory_bytes=4 << 20, replicas=2), workers=WorkersConfig("ray"))
    same(run(there, tmp_path / "there", score=None), plain)
    closes(tmp_path / "there")
