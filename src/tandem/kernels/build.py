"""Compile the C++ kernels on first use and keep them.

A library is named by the hash of its source, the headers beside it, the compiler and the processor, so that a change of
any of them compiles anew and nothing stale is loaded. The libraries have a plain C interface and are called through
ctypes: they depend on no torch version. They are linked without an OpenMP runtime and find torch's, which torch loads
globally, so that kernels and torch share one pool of threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from tandem import env
from tandem.errors import KernelError

if TYPE_CHECKING:
    import torch

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno")


def compiler() -> str | None:
    """Path of the C++ compiler, or None."""
    return shutil.which("g++") or shutil.which("clang++")


@functools.cache
def _processor() -> str:
    """What -march=native resolves from: the processor's model and flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


@functools.cache
def _compiler_version(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _compile(cxx: str, source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".so", delete=False) as scratch:
        command = [cxx, *FLAGS, f"-I{SOURCES}", "-o", scratch.name, str(source)]
        # g++ -shared leaves the OpenMP symbols open; libgomp is already global through torch.
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            os.unlink(scratch.name)
            raise KernelError(
                f"kernel {source.name} does not compile with {cxx}:\n{result.stderr.strip()[:2000]}\n"
                "Install a C++17 compiler (Debian: apt-get install g++), or remove it from PATH to run the slow "
                "PyTorch reference instead."
            )
        os.replace(scratch.name, target)


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled `name`.cpp, or None (with one warning) where there is no compiler."""
    import torch  # noqa: F401  (its OpenMP runtime must be loaded before the kernels)

    source = SOURCES / f"{name}.cpp"
    cxx = compiler()
    if cxx is None:
        _warn_no_compiler()
        return None
    digest = hashlib.sha256()
    for path in (source, *sorted(SOURCES.glob("*.h"))):
        digest.update(path.read_bytes())
    for part in (" ".join(FLAGS), _compiler_version(cxx), _processor()):
        digest.update(part.encode())
    target = env.cache_dir() / "kernels" / f"{name}-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        _compile(cxx, source, target)
    return ctypes.CDLL(str(target))


@functools.cache
def _warn_no_compiler() -> None:
    warnings.warn(
        "no C++ compiler found: running the PyTorch reference kernels, several times slower. "
        "Install one (Debian: apt-get install g++) and start again.",
        RuntimeWarning,
        stacklevel=3,
    )


_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double}


@functools.cache
def function(library_name: str, name: str, signature: str) -> Callable[..., None] | None:
    """The C function `name`, or None without a compiler. `signature`: p pointer, i int64, f float, d double."""
    loaded = library(library_name)
    if loaded is None:
        return None
    entry = getattr(loaded, name)
    entry.argtypes = [_TYPES[letter] for letter in signature]
    entry.restype = None
    return entry


SUFFIX = {"torch.bfloat16": "bf16", "torch.float32": "fp32"}


def kernel(library_name: str, name: str, dtype: torch.dtype, signature: str) -> Callable[..., None] | None:
    """`function` for a tensor dtype; None where that dtype has no compiled kernel."""
    suffix = SUFFIX.get(str(dtype))
    return function(library_name, f"{name}_{suffix}", signature) if suffix else None


def build_all() -> None:
    """Compile every kernel now, side by side, so that the first run does not wait for them."""
    names = sorted(path.stem for path in SOURCES.glob("*.cpp"))
    with ThreadPoolExecutor(env.num_cores()) as pool:
        list(pool.map(library, names))
