"""Compile the C++ kernels on first use and keep them.

A library is named by the hash of its source, the headers beside it, the compiler and the processor, so that a change of
any of them compiles anew and nothing stale is loaded. The libraries have a plain C interface and are called through
ctypes: they depend on no torch version. They are linked without an OpenMP runtime and find torch's, which torch loads
globally, so that kernels and torch share one pool of threads.

A compiled file is checked against its reference when it is first loaded (selfcheck.py); a mark beside it says that it
passed, so that later starts only read the mark.
"""

from __future__ import annotations

import contextlib
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


def processor_name() -> str:
    """The processor's model as it calls itself."""
    named = [line.partition(":")[2].strip() for line in _processor().splitlines() if line.startswith("model name")]
    return named[0] if named else platform.machine()


@functools.cache
def _compiler_version(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _compile(cxx: str, flags: tuple[str, ...], source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".so", delete=False) as scratch:
        command = [cxx, *flags, f"-I{SOURCES}", "-o", scratch.name, str(source)]
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


def available() -> bool:
    """Whether C++ kernels run here: there is a compiler (else one warning), and the reference is not asked for."""
    if env.kernels() == "reference":
        return False
    if compiler() is None:
        _warn_no_compiler()
        return False
    return True


def compiled_path(name: str, flags: tuple[str, ...]) -> Path:
    """Where the compiled `name`.cpp lies or will lie."""
    cxx = compiler()
    assert cxx is not None
    digest = hashlib.sha256()
    for path in (SOURCES / f"{name}.cpp", *sorted(SOURCES.glob("*.h"))):
        digest.update(path.read_bytes())
    for part in (" ".join(flags), _compiler_version(cxx), _processor()):
        digest.update(part.encode())
    return env.cache_dir() / "kernels" / f"{name}-{digest.hexdigest()[:16]}.so"


def _compiled(name: str, flags: tuple[str, ...]) -> Path:
    target, cxx = compiled_path(name, flags), compiler()
    if not target.exists():
        assert cxx is not None
        _compile(cxx, flags, SOURCES / f"{name}.cpp", target)
    return target


NO_AMX = "-DTANDEM_NO_AMX"
# GFLOP/s of one Zen 5 core, bf16, 64 rows x 576 -> 3072 columns; the others by -mno-avx512bf16, x86-64-v3, x86-64.
GFLOPS = {"avx512_bf16": 505, "avx512": 200, "avx2": 88, "portable": 28}


@functools.cache
def _unit(wanted: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """(what multiplies matrices of bf16, the flags that every kernel is compiled with), after the unit's own check.

    The flags are the wanted ones, without AMX where it fails.
    """
    for flags in (wanted, (*wanted, NO_AMX)):
        target = _compiled("unit", flags)
        loaded = ctypes.CDLL(str(target))
        loaded.matrix_unit.restype = ctypes.c_char_p
        unit = loaded.matrix_unit().decode()
        passed, refusal = target.with_suffix(f".{unit}"), _refusal(target, flags) if unit == "amx" else ""
        if passed.exists() and not refusal:
            break
        try:
            if refusal:
                raise KernelError(refusal)
            from tandem.kernels import selfcheck

            selfcheck.check_unit(loaded, unit)
        except KernelError as error:
            if unit != "amx":
                raise
            if not refusal:
                _refuse(target, target, str(error))
            warnings.warn(f"AMX is not used, AVX-512 is: {error}", RuntimeWarning, stacklevel=3)
            continue
        _write(passed, "")
        break
    if cost(unit):
        _warn_slow(unit)
    return unit, flags


def _refuse(unit: Path, failed: Path, why: str) -> None:
    """Remember beside the unit's library that AMX made the library `failed` compute wrong."""
    _write(unit.with_suffix(".refused"), f"{failed.name}\n{why}")


def _refusal(unit: Path, flags: tuple[str, ...]) -> str:
    """Why AMX was refused; "" where it was not, or where the library that failed has other sources now."""
    try:
        failed, _, why = unit.with_suffix(".refused").read_text(encoding="utf-8").partition("\n")
    except OSError:
        return ""
    name = failed.rpartition("-")[0]
    return why if name in names() and compiled_path(name, flags).name == failed else ""


def _write(mark: Path, text: str) -> None:
    with contextlib.suppress(OSError):  # a cache that is only read: checked at every start
        mark.write_text(text, encoding="utf-8")


def matrix_unit() -> str:
    """What multiplies matrices of bf16 in this process: amx, avx512_bf16, avx512, avx2, portable; else reference."""
    return _unit(FLAGS)[0] if available() else "reference"


_under_check: dict[str, ctypes.CDLL] = {}


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled `name`.cpp; None where there is no compiler (one warning) or the reference is asked for.

    KernelError where it does not compile, or does not compute what its reference does.
    """
    import torch  # noqa: F401  (its OpenMP runtime must be loaded before the kernels)

    if not available():
        return None
    if name in _under_check:
        return _under_check[name]
    unit, flags = _unit(FLAGS)
    target = _compiled(name, flags)
    loaded = ctypes.CDLL(str(target))
    mark = target.with_suffix(f".{unit}")
    if env.kernels() == "" and not mark.exists():
        _check(name, unit, loaded)
        _write(mark, "")
    return loaded


def _check(name: str, unit: str, loaded: ctypes.CDLL) -> None:
    """The library's self-check; where it fails, nothing of it stays in reach."""
    from tandem.kernels import sample, selfcheck

    _under_check[name] = loaded
    try:
        selfcheck.check(name, unit)
    except KernelError as error:
        for cached in (library, function, sample._compiled):
            cached.cache_clear()
        if unit == "amx":
            _refuse(compiled_path("unit", FLAGS), compiled_path(name, FLAGS), str(error))
            raise KernelError(f"{error} Or start again: AVX-512 then takes AMX's place.") from error
        raise
    finally:
        del _under_check[name]


@functools.cache
def _warn_no_compiler() -> None:
    warnings.warn(
        "no C++ compiler found: running the PyTorch reference kernels, several times slower. "
        "Install one (Debian: apt-get install g++) and start again.",
        RuntimeWarning,
        stacklevel=3,
    )


@functools.cache
def _warn_slow(unit: str) -> None:
    warnings.warn(f"this processor has neither AMX nor AVX-512 BF16: {cost(unit)}.", RuntimeWarning, stacklevel=3)


def cost(unit: str) -> str:
    """What a matrix unit costs, in words; "" for the fast ones.

    >>> cost("avx2")
    'matrices of bf16 are multiplied by avx2, 5.7 times slower than by AVX-512 BF16'
    """
    times = GFLOPS["avx512_bf16"] / GFLOPS.get(unit, GFLOPS["avx512_bf16"])
    return (
        f"matrices of bf16 are multiplied by {unit}, {times:.1f} times slower than by AVX-512 BF16" if times > 1 else ""
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


def names() -> list[str]:
    """The libraries that there are, by their source files."""
    return sorted(path.stem for path in SOURCES.glob("*.cpp"))


def is_compiled(name: str) -> bool:
    """Whether `library` finds the file compiled; where `available`."""
    return compiled_path(name, _unit(FLAGS)[1]).exists()


def build_all() -> None:
    """Compile every kernel now, side by side, so that the first run does not wait for them, and check them."""
    if not available():
        return
    flags = _unit(FLAGS)[1]
    with ThreadPoolExecutor(env.num_cores()) as pool:
        list(pool.map(lambda name: _compiled(name, flags), names()))
    for name in names():
        library(name)
