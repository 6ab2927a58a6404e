"""Rollouts on another server: a policy that is not the run's, stale weights, or an answer that nobody can learn from.

The servers are `tandem serve` in a process of its own, and in a thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tandem import env
from tandem.config import override
from tandem.kernels.build.toolchain import compiler
from tandem.run import local
from tandem.run.config import RunConfig
from tests.display import Silent
from tests.multi.test_asynchronous import tiny, weights
from tests.serving import serving

__all__ = ["tiny"]
STEPS = 2
pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels' bits depend on the batch")


@contextmanager
def child(folder: Path, *settings: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The url of a `tandem serve` of that model, and its process."""
    given = ["server.port=0", "server.control=true", "engine.kv_memory_bytes=4194304", *settings]
    command = [sys.executable, "-m", "tandem", "serve", str(folder), *(f"--set={one}" for one in given)]
    told: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env.child()}
    with subprocess.Popen(command, **told) as running:
        try:
            seen = ""
            while "http://" not in seen:
                line = running.stdout.readline() if running.stdout is not None else ""
                assert line, seen
                seen += line
            yield "http://" + seen.partition("http://")[2].split()[0].rstrip("/.,"), running
        finally:
            running.kill()


class Noted(Silent):
    """A display that keeps what a run says, and shows rows to `looks`."""

    def __init__(self, looks: Callable[[Any], Any] = lambda row: None) -> None:
        self.notes: list[str] = []
        self.update = looks  # type: ignore[method-assign, assignment]

    def __enter__(self) -> Noted:
        return self

    def note(self, text: str) -> None:
        self.notes.append(text)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_on_a_server_is_the_run_itself(tiny: RunConfig, tmp_path: Path) -> None:
    """Another seed, an older version, a rounded log-prob: anything by which what a server of the same bits draws is not
    what an engine here would."""
    config = override(tiny, {"steps": "2", "rollout.max_turns": "2"})
    local.train(config, out=tmp_path / "here", resume=None, display=Silent())
    with child(Path(config.model.source)) as (url, _):
        served = override(config, {"remote.servers": url})
        code, _ = local.train(served, out=tmp_path / "there", resume=None, display=Silent())
    assert code == 0
    here, there = (weights(tmp_path / name) for name in ("here", "there"))
    assert there == here and len(set(here)) == STEPS
    assert [row["error_budget"]["mismatch"] for row in rows(tmp_path / "there")] == [0.0] * STEPS


def test_kept_sets_come_along(tiny: RunConfig, tmp_path: Path) -> None:
    """Under top-p the learner divides by all tokens where the server drew from a part of them."""
    config = override(tiny, {"steps": "2", "rollout.top_p": "0.8", "rollout.temperature": "0.7"})
    local.train(config, out=tmp_path / "here", resume=None, display=Silent())
    with serving(Path(config.model.source), **{"server.control": True}) as server:
        served = override(config, {"remote.servers": server.url})
        local.train(served, out=tmp_path / "there", resume=None, display=Silent())
    assert weights(tmp_path / "there") == weights(tmp_path / "here")
    assert [row["error_budget"]["mismatch"] for row in rows(tmp_path / "there")] == [0.0] * STEPS


def test_a_server_that_dies_changes_no_weight(tiny: RunConfig, tmp_path: Path) -> None:
    """What a server had when it died is lost, or drawn otherwise by the one that is asked again; or the run waits for
    it, or ends."""
    config = override(tiny, {"steps": "2", "rollout.max_new_tokens": "64", "engine.kv_memory_bytes": str(8 << 20)})
    local.train(config, out=tmp_path / "here", resume=None, display=Silent())
    source = Path(config.model.source)
    with serving(source, **{"server.control": True}) as stays, child(source) as (url, process):
        servers = ",".join((url, stays.url))
        display = Noted(lambda row: process.kill() if row["step"] == 1 else None)
        served = override(config, {"remote.servers": servers})
        code, _ = local.train(served, out=tmp_path / "there", resume=None, display=display)
    assert code == 0 and weights(tmp_path / "there") == weights(tmp_path / "here")
    assert any("did not take the learner's weights" in note or "died" in note for note in display.notes), display.notes
