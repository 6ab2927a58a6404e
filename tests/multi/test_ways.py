"""Weights to engines elsewhere through a folder and by broadcast: the same run, whatever becomes of a process."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.config import override
from tandem.errors import ConfigError, DeliveryError, TandemWarning
from tandem.kernels.build.toolchain import compiler
from tandem.run.config import RunConfig, WorkersConfig
from tandem.run.parts import Parts
from tandem.sync import files
from tandem.sync.group import GroupSender
from tandem.sync.transport import Held
from tandem.sync.ways import Address, InFolder, reader_of
from tests.grid import crossed
from tests.placed import APART, closes, patience_s, run, same, struck, tiny

pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels are not batch-invariant")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> RunConfig:
    return tiny(tmp_path_factory.mktemp("ways"), write_model)


@pytest.fixture(scope="module")
def plain(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(config, tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(params=["folder", "broadcast"])
def workers(request: pytest.FixtureRequest, tmp_path: Path) -> WorkersConfig:
    folder = str(tmp_path / "shared") if request.param == "folder" else ""
    return replace(APART, transport=request.param, folder=folder)


def test_a_run_over_each_way_is_the_same_run(config, plain, workers, tmp_path):
    """A run whose weights hang on how they travel; versions that stay on a shared disk for ever."""
    two = replace(config.engine, replicas=2)
    same(run(replace(config, engine=two, workers=workers), tmp_path / "run"), plain)
    closes(tmp_path / "run")
    if workers.folder:
        assert list(Path(workers.folder).iterdir()) == []


@pytest.mark.parametrize(("phase", "fault"), crossed(["rollout", "publish"], [signal.SIGKILL, signal.SIGSTOP]))
def test_an_engine_lost_is_met_again(config, plain, workers, tmp_path, phase, fault):
    """A new engine that nobody sends the weights to, a learner that waits for the old one, or an engine beside it that
    takes what it is sent for the next version."""
    hit, seen = list[int](), list[Parts]()

    def watch(parts: Parts) -> None:
        seen.append(parts)
        struck(phase, fault, hit)(parts)

    with pytest.warns(TandemWarning, match=f"worker engine 1, phase {phase}: .* In its place another is started"):
        two = replace(config.engine, replicas=2)
        rows = run(
            replace(config, engine=two, workers=replace(workers, deadline_s=patience_s(fault))), tmp_path / "run", watch
        )
    assert len(hit) == 1
    assert [engine.seat.replaced for engine in seen[0].sampling] == [1, 0]  # type: ignore[attr-defined]
    same(rows, plain)
    closes(tmp_path / "run")


def test_what_is_damaged_on_its_way_comes_whole(config, plain, workers, tmp_path, monkeypatch):
    """Damage that ends a run, or that is served."""
    damaged: list[str] = []
    save, broadcast = files.save_file, GroupSender.broadcast

    def saves(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save(tensors, path, metadata)
        if ".changes." in path.name and not damaged:
            damaged.append(path.name)
            content = bytearray(path.read_bytes())
            content[-3] ^= 1
            path.write_bytes(content)

    def broadcasts(self: GroupSender, tensors: dict[str, torch.Tensor]) -> None:
        if "changes" in tensors and not damaged:
            damaged.append("changes")
            tensors = {"changes": tensors["changes"].clone()}
            tensors["changes"][1] ^= 1
        broadcast(self, tensors)

    monkeypatch.setattr(files, "save_file", saves)
    monkeypatch.setattr(GroupSender, "broadcast", broadcasts)
    same(run(replace(config, workers=workers), tmp_path / "run"), plain)
    assert len(damaged) == 1


HOLDS = """
import sys
import time
from pathlib import Path

from tandem.sync.files import FileSender

sender = FileSender(Path(sys.argv[1]))
print("holds", flush=True)
time.sleep(600)
"""


def test_what_a_killed_run_left_in_a_folder_goes(tmp_path):
    """Weights that stay on a shared disk for ever; or those of another run that goes on, taken from under it."""
    (tmp_path / "weights-dead").mkdir()
    (tmp_path / "weights-dead" / "000000001-0.whole.safetensors").write_text("whole")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "weights-held")], stdout=subprocess.PIPE
    ) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == b"holds\n"
            way = InFolder(tmp_path)
            assert {path.name for path in tmp_path.iterdir()} == {"weights-held", way.folder.name}
            way.close()
        finally:
            other.kill()


def test_nobody_there():
    """A worker that waits for ever for a learner which it cannot reach."""
    with pytest.raises(DeliveryError, match=r"joining the learner's store at 127\.0\.0\.1:9: .*reaches that one"):
        reader_of(Address("broadcast", "127.0.0.1:9", "engine, 1"), Held({}), 1.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workers.transport": "broadcast"}, "workers.transport is broadcast, and workers.backend none"),
        ({"workers.backend": "local", "workers.transport": "folder"}, "a folder goes with transport folder"),
        ({"workers.backend": "local", "workers.folder": "there"}, "a folder goes with transport folder"),
    ],
)
def test_settings_that_go_together(config, changes, said):
    """A transport that is set and never used."""
    with pytest.raises(ConfigError, match=said):
        override(config, changes)
