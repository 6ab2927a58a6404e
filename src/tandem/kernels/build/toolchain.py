"""The C++ compiler and the processor that it compiles for."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from tandem.errors import KernelError

REFERENCE = "run the slow PyTorch kernels with TANDEM_KERNELS=reference"
ANSWER_S = 30.0  # for a compiler to say its version


def _compilers() -> list[str]:
    return [path for path in map(shutil.which, ("g++", "clang++")) if path]


def compiler() -> str | None:
    """Path of the first C++ compiler that says its version, or None."""
    return next((path for path in _compilers() if version(path)[0]), None)


def fault() -> str:
    """Why no compiler works; where `compiler` is None."""
    return "; ".join(version(path)[1] for path in _compilers()) or "no g++ and no clang++ in PATH"


@functools.cache
def version(path: str) -> tuple[str, str]:
    """(what a compiler says of its version, in one line; "" where it does not work, then why)."""
    command = [path, "--version"]
    try:
        asked = subprocess.run(command, capture_output=True, errors="replace", timeout=ANSWER_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{path} does not run: {error}"
    lines = asked.stdout.strip().splitlines()
    if asked.returncode == 0 and lines:
        return lines[0], ""
    said = (asked.stderr.strip() or asked.stdout.strip() or "nothing").splitlines()[0]
    return "", f"{path} --version exits with {asked.returncode} and says {said}"


@functools.cache
def processor_flags() -> str:
    """What -march=native resolves from: the processor's model and flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def processor_name() -> str:
    """The processor's model as it calls itself."""
    named = [line.partition(":")[2].strip() for line in processor_flags().splitlines() if line.startswith("model name")]
    return named[0] if named else platform.machine()


def compile_file(cxx: str, flags: tuple[str, ...], source: Path, target: Path) -> None:
    """A library from a source and the headers beside it; its file ends with the hash of what is before."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # In a folder of its own the compiler makes the file, so that it has the modes that the umask gives.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            scratch = Path(folder) / target.name
            command = [cxx, *flags, f"-I{source.parent}", "-o", str(scratch), str(source)]
            # g++ -shared leaves the OpenMP symbols open; libgomp is already global through torch.
            result = subprocess.run(command, capture_output=True, errors="replace", check=False)
            if result.returncode != 0:
                raise KernelError(
                    f"kernel {source.name} does not compile with {cxx}:\n{result.stderr.strip()[:2000]}\n"
                    f"Install a C++17 compiler (Debian: apt-get install g++), or {REFERENCE}."
                )
            digest = hashlib.sha256(scratch.read_bytes()).digest()
            with scratch.open("ab") as file:
                file.write(digest)
            os.replace(scratch, target)
    except OSError as error:
        raise KernelError(
            f"the compiled kernels cannot be kept in {target.parent}: {error}. Set TANDEM_CACHE to a folder that can "
            f"be written, or {REFERENCE}."
        ) from error
