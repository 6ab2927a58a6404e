"""Rollouts on another server: a policy that is not the run's, stale weights, or an answer that nobody can learn from.

The servers are `tandem serve` in a process of its own, and in a thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tandem import env
from tandem.config import override
from tandem.kernels.build.toolchain import compiler
from tandem.run import local
from tandem.run.config import RunConfig
from tests.display import Silent
from tests.multi.test_asynchronous import tiny, weights

__all__ = ["tiny"]
STEPS = 2
pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels' bits depend on the batch")


@contextmanager
def child(folder: Path, *settings: str) -> Iterator[str]:
    """The url of a `tandem serve` of that model."""
    given = ["server.port=0", "server.control=true", "engine.kv_memory_bytes=4194304", *settings]
    command = [sys.executable, "-m", "tandem", "serve", str(folder)]
    for one in given:
        command += ["--set", one]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env.child()
    ) as running:
        try:
            assert running.stdout is not None
            seen = ""
            for line in running.stdout:
                seen += line
                if "http://" in line:
                    break
            else:
                raise AssertionError(seen)
            yield "http://" + line.partition("http://")[2].split()[0].rstrip("/.,")
        finally:
            running.kill()


def test_a_run_on_a_server_is_the_run_itself(tiny: RunConfig, tmp_path: Path) -> None:
    """Another seed, an older version, a rounded log-prob: anything by which what a server of the same bits draws is not
    what an engine here would."""
    config = override(tiny, {"steps": "2", "rollout.max_turns": "2"})
    local.train(config, out=tmp_path / "here", resume=None, display=Silent())
    with child(Path(config.model.source)) as url:
        served = override(config, {"remote.servers": url})
        code, _ = local.train(served, out=tmp_path / "there", resume=None, display=Silent())
    assert code == 0
    here, there = (weights(tmp_path / name) for name in ("here", "there"))
    assert there == here and len(set(here)) == STEPS
    rows = [json.loads(line) for line in (tmp_path / "there" / "metrics.jsonl").read_text().splitlines()]
    assert [row["error_budget"]["mismatch"] for row in rows] == [0.0] * STEPS
