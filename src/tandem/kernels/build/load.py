"""Compile the C++ kernels on first use and keep them.

A library is named by the hash of its source, the headers beside it, the flags and the processor, and by that of the
compiler, so that a change of any of them compiles anew and nothing stale is loaded. Where no compiler works, the
libraries of an earlier one are taken: all of one compiler, or none, since two may choose different matrix units. A file
ends with the hash of what is before, so that a damaged one is compiled anew and never loaded.

The libraries have a plain C interface and are called through ctypes: they depend on no torch version. They are linked
without an OpenMP runtime and find torch's, which torch loads globally, so that kernels and torch share one pool of
threads.

A compiled file is checked against its reference when it is first loaded (check.py); a mark beside it says that it
passed, so that later starts only read the mark.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from tandem import env
from tandem.errors import KernelError, TandemWarning
from tandem.kernels.build.toolchain import REFERENCE, compile_file, compiler, fault, processor_flags, version

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
T = TypeVar("T")

SOURCES = Path(__file__).parents[1]
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno")
# 2 cores of a Zen 5, bf16, SmolLM2-135M: 1 to 64 sequences; packs of 1,024 to 4,096 tokens, and steps of GRPO.
REFERENCE_COST = "a decode step takes 10 to 70 times as long, a training step 5 to 20 times"
HASH_BYTES = hashlib.sha256().digest_size


def _whole(path: Path) -> bool:
    """Whether the file is there and ends with the hash of what is before.

    A shortened library would load, and end the process without a word at the first page that it lacks.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-HASH_BYTES]).digest() == content[-HASH_BYTES:]


def lacking() -> str:
    """Why no C++ kernels run here, in words; "" where a compiler works, or one has left all of them in the cache."""
    return "" if compiler() else _kept(_folder(), SOURCES, FLAGS)[1]


def available() -> bool:
    """Whether C++ kernels run here: nothing is lacking (else one warning), and the reference is not asked for."""
    if env.kernels() == "reference":
        return False
    if why := lacking():
        _warn_reference(why)
    return not why


def _folder() -> Path:
    return env.cache_dir() / "kernels"


def _stem(name: str, flags: tuple[str, ...]) -> str:
    """What the compiled `name`.cpp is called whichever compiler made it."""
    digest = hashlib.sha256()
    for path in (SOURCES / f"{name}.cpp", *sorted(SOURCES.glob("*.h"))):
        digest.update(path.read_bytes())
    for part in (" ".join(flags), processor_flags()):
        digest.update(part.encode())
    return f"{name}-{digest.hexdigest()[:16]}"


def compiled_path(name: str, flags: tuple[str, ...]) -> Path:
    """Where the compiled `name`.cpp lies or will lie; where nothing is `lacking`."""
    cxx = compiler()
    by = hashlib.sha256(version(cxx)[0].encode()).hexdigest()[:8] if cxx else _kept(_folder(), SOURCES, FLAGS)[0]
    assert by, (name, cxx)
    return _folder() / f"{_stem(name, flags)}-{by}.so"


@functools.cache
def _kept(folder: Path, sources: Path, flags: tuple[str, ...]) -> tuple[str, str]:
    """(the compiler, as files name it, that left every library in `folder`, the latest; "" where none did, then why).

    Read once: a process that began with the reference stays with it.
    """
    assert sources == SOURCES, (sources, SOURCES)
    why = f"{folder} holds none that are compiled for this processor and these sources"
    units = sorted(folder.glob(f"{_stem('unit', flags)}-*.so"), key=os.path.getmtime, reverse=True)
    for unit in units:
        by = unit.stem.rpartition("-")[2]
        for tried in (flags, (*flags, NO_AMX)):
            paths = [folder / f"{_stem(name, tried)}-{by}.so" for name in names()]
            broken = [path for path in paths if not _whole(path)]
            if not broken:
                return by, ""
            if tried == flags and unit == units[0]:
                words = [path.name.partition("-")[0] + " (damaged)" * path.exists() for path in broken]
                why = f"{folder} lacks {', '.join(words)}"
    return "", why


def _compiled(name: str, flags: tuple[str, ...]) -> Path:
    target, cxx = compiled_path(name, flags), compiler()
    if not _whole(target):
        if cxx is None:
            raise KernelError(
                f"the kernel {target} is missing or damaged, and no C++ compiler works here: {fault()}. Install one "
                f"(Debian: apt-get install g++), or {REFERENCE}."
            )
        compile_file(cxx, flags, SOURCES / f"{name}.cpp", target)
    return target


def _load(target: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:  # of another C library, or in a folder that is mounted noexec
        raise KernelError(
            f"the compiled kernel does not load: {error}. Delete it, set TANDEM_CACHE to another folder, or "
            f"{REFERENCE}."
        ) from error


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
        loaded = _load(target)
        loaded.matrix_unit.restype = ctypes.c_char_p
        unit = loaded.matrix_unit().decode()
        passed, refusal = target.with_suffix(f".{unit}"), _refusal(flags) if unit == "amx" else ""
        if not refusal and not passed.exists():
            from tandem.kernels.build import check

            try:
                check.check_unit(loaded, unit)
            except KernelError as error:
                if unit != "amx":
                    raise
                refusal = str(error)
                _refuse(target, refusal)
            else:
                _write(passed, "")
        if not refusal:
            break
        warnings.warn(f"AMX is not used, AVX-512 is: {refusal}", TandemWarning, stacklevel=3)
    if slow := cost(unit):
        warnings.warn(f"this processor has neither AMX nor AVX-512 BF16: {slow}.", TandemWarning, stacklevel=3)
    return unit, flags


def _refuse(failed: Path, why: str) -> None:
    """Remember that AMX made the library `failed` compute wrong."""
    _write(failed.with_name(f"amx-{failed.stem}.refused"), why)


def _refusal(flags: tuple[str, ...]) -> str:
    """Why AMX was refused; "" where it was not, or where the library that failed has other sources now."""
    for mark in _folder().glob("amx-*.refused"):
        name = mark.name.split("-")[1]
        if name in names() and mark.stem == f"amx-{compiled_path(name, flags).stem}":
            return mark.read_text(encoding="utf-8")
    return ""


def _write(mark: Path, text: str) -> None:
    with contextlib.suppress(OSError):  # a cache that is only read: checked at every start
        mark.write_text(text, encoding="utf-8")


def matrix_unit() -> str:
    """What multiplies matrices of bf16 in this process: amx, avx512_bf16, avx512, avx2, portable; else reference."""
    return _unit(FLAGS)[0] if available() else "reference"


_under_check: dict[str, ctypes.CDLL] = {}
_derived: list[Callable[[], None]] = []


def remembered(derive: Callable[P, T]) -> Callable[P, T]:
    """functools.cache of what is derived from a library, as long as the library is."""
    cached = functools.cache(derive)
    _derived.append(cached.cache_clear)
    return cached  # type: ignore[return-value]


def forget() -> None:
    """Load every library anew at its next call."""
    for clear in (library.cache_clear, *_derived):
        clear()


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled `name`.cpp; None where kernels are lacking (one warning) or the reference is asked for.

    KernelError where it does not compile, or does not compute what its reference does.
    """
    import torch  # noqa: F401  (its OpenMP runtime must be loaded before the kernels)

    if not available():
        return None
    if name in _under_check:
        return _under_check[name]
    unit, flags = _unit(FLAGS)
    target = _compiled(name, flags)
    loaded = _load(target)
    mark = target.with_suffix(f".{unit}")
    if env.kernels() == "" and not mark.exists():
        _check(name, unit, loaded)
        _write(mark, "")
    return loaded


def _check(name: str, unit: str, loaded: ctypes.CDLL) -> None:
    """The library's self-check; where it fails, nothing of it stays in reach."""
    from tandem.kernels.build import check

    _under_check[name] = loaded
    try:
        check.check(name, unit)
    except KernelError as error:
        forget()
        if unit == "amx":
            _refuse(compiled_path(name, FLAGS), str(error))
            raise KernelError(f"{error} Or start again: AVX-512 then takes AMX's place.") from error
        raise
    finally:
        del _under_check[name]


@functools.cache
def _warn_reference(why: str) -> None:
    warnings.warn(
        f"no C++ compiler works ({fault()}) and {why}: PyTorch's reference kernels run, {REFERENCE_COST}. "
        "Install one (Debian: apt-get install g++) and start again.",
        TandemWarning,
        stacklevel=4,
    )


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


@remembered
def function(library_name: str, name: str, signature: str) -> Callable[..., None] | None:
    """The C function `name`, or None where kernels are lacking. `signature`: p pointer, i int64, f float, d double."""
    loaded = library(library_name)
    if loaded is None:
        return None
    import torch

    entry = getattr(loaded, name)
    entry.profiled = torch.autograd._profiler_enabled
    entry.argtypes = [_TYPES[letter] for letter in signature]
    entry.restype = None
    return entry


SUFFIX = {"torch.bfloat16": "bf16", "torch.float32": "fp32"}


@functools.cache
def _suffix(dtype: torch.dtype) -> str | None:
    return SUFFIX.get(str(dtype))


def kernel(library_name: str, name: str, dtype: torch.dtype, signature: str) -> Callable[..., None] | None:
    """`function` for a tensor dtype; None where that dtype has no compiled kernel.

    While torch's profiler runs, a call is a span "tandem::NAME_DTYPE" whose inputs are the call's integers.
    """
    suffix = _suffix(dtype)
    entry = function(library_name, f"{name}_{suffix}", signature) if suffix else None
    return _spanned(entry, signature) if entry is not None and entry.profiled() else entry  # type: ignore[attr-defined]


def _spanned(entry: Callable[..., None], signature: str) -> Callable[..., None]:
    from torch._C._profiler import _RecordFunctionFast  # a span of torch's own, at a tenth of record_function's time

    def run(*given: object) -> None:
        sizes = [number for number, letter in zip(given, signature, strict=True) if letter == "i"]
        with _RecordFunctionFast(f"tandem::{entry.__name__}", sizes, {}):
            entry(*given)

    return run


def names() -> list[str]:
    """The libraries that there are, by their source files."""
    return sorted(path.stem for path in SOURCES.glob("*.cpp"))


def is_compiled(name: str) -> bool:
    """Whether `library` finds the file compiled; where `available`."""
    return _whole(compiled_path(name, _unit(FLAGS)[1]))
