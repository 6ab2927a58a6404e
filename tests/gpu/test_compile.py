"""The interpreter takes what the compiler does not: every kernel is compiled, for a GPU that need not be here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_every_kernel_compiles(tmp_path):
    """A kernel runs under the interpreter only, sums with atomics, multiplies in TF32, or differs by size of batch."""
    source = Path(__file__).parents[2] / "src"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(source)}
    environment.pop("TRITON_INTERPRET", None)
    program = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, check=False, env=environment, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert not run.stdout, run.stdout
