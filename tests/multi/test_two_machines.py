"""A run over two machines, for which two network namespaces stand in: its engine beyond a slow link."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'tandem-rl[ray]'")

from tandem.kernels.build.toolchain import compiler
from tandem.run.config import WorkersConfig
from tests.placed import closes, run, same, tiny
from tests.two_machines import cluster, two

pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels are not batch-invariant")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def there():
    try:
        with two() as made:
            yield made
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or error
        pytest.skip(f"two network namespaces and a slow link between them cannot be made here: {said}")


@pytest.mark.grid
def test_a_run_over_two_machines_is_the_run_of_one(there, tmp_path, write_model):
    """An engine on another machine that looks for the weights on its own, or draws otherwise there."""
    config = tiny(tmp_path, write_model)
    plain = run(config, tmp_path / "here")
    over = replace(config, workers=WorkersConfig("ray", transport="broadcast"))
    (tmp_path / "config").write_bytes(pickle.dumps(over))
    with cluster(there, tmp_path) as environment:
        before = there.crossed_bytes()
        command = [sys.executable, "-m", "tests.two_machines", str(tmp_path / "config"), str(tmp_path / "there")]
        done = subprocess.run(
            [*there.into(there.head), *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=150
        )
        crossed = there.crossed_bytes() - before
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "there" / "metrics.jsonl").read_text().splitlines()]
    same(rows, plain)
    closes(tmp_path / "there")
    weights = next(config_dir for config_dir in (tmp_path / "model").glob("*.safetensors")).stat().st_size
    assert crossed > weights // 2, (crossed, weights)
