"""Where kernels come from: a compiler, the cache that one left, or neither; and a cache that is of no use."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tandem.cli import doctor
from tandem.engine.config import EngineConfig
from tandem.errors import KernelError, TandemWarning
from tandem.kernels import choice, selfcheck
from tandem.kernels import sample as sampler
from tandem.kernels.build import load, toolchain
from tandem.kernels.page_sum import page_sums, page_sums_reference
from tandem.models.config import ModelConfig
from tandem.sync.departures import of_engine

pytestmark = pytest.mark.skipif(toolchain.compiler() is None, reason="no C++ compiler")

LIBRARIES = ("page_sum", "unit")
CACHED = (load.library, load.function, load._unit, load._kept, load._warn_reference)
POOLS = [torch.arange(64.0).view(4, 16)]


def forget() -> None:
    for cached in (*CACHED, sampler._compiled, choice._asked):
        cached.cache_clear()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the sources of two libraries, and a cache that holds them compiled and checked."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "sources").mkdir()
    for path in (*load.SOURCES.glob("*.h"), *(load.SOURCES / f"{name}.cpp" for name in LIBRARIES)):
        shutil.copy(path, folder / "sources")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "SOURCES", folder / "sources")
        patch.setattr(load, "FLAGS", ("-O1", *load.FLAGS[1:], "-w"))
        patch.setenv("TANDEM_CACHE", str(folder / "cache"))
        forget()
        selfcheck.build_all()  # as `make` does
        yield folder
    forget()


@pytest.fixture
def cache(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the compiled kernels, of this test alone."""
    shutil.copytree(made / "cache", tmp_path / "cache")
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    forget()
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder that is all of PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def library_file(cache: Path, name: str) -> Path:
    (found,) = cache.glob(f"{name}-*.so")
    return found


def check_computes() -> None:
    """The C++ runs, without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load.library("page_sum") is not None
    assert page_sums(POOLS, [1]) == page_sums_reference(POOLS, [1])


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nope", "dangling"])
def test_a_cache_that_cannot_be_written(cache, monkeypatch, tmp_path, place):
    """A traceback in place of the folder and the variable that names it; doctor dies of it, or calls it sound."""
    if place.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("needs Linux")
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "deeper")
    folder = tmp_path / place
    monkeypatch.setenv("TANDEM_CACHE", str(folder))
    with pytest.raises(KernelError, match=rf"cannot be kept in {folder}/kernels: .*TANDEM_CACHE"):
        load.library("page_sum")
    (kernels,) = doctor.check_kernels()
    assert kernels.fatal and "TANDEM_CACHE" in kernels.found
    (finding,) = doctor.check_cache()
    assert finding.status == "slow" and f"{folder} cannot be written: " in finding.found, finding


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no g++ and no clang++ in PATH"),
        ("#!/bin/sh\necho 'libmpc.so is gone' >&2\nexit 3\n", "g++ --version exits with 3 and says libmpc.so is gone"),
        ("#!/bin/sh\n", "g++ --version exits with 0 and says nothing"),
        ("#!/no/such/shell\n", "g++ does not run: "),
        ("\x7fELF", "g++ does not run: "),
    ],
)
def test_a_compiler_that_does_not_work(cache, monkeypatch, tmp_path, tools, text, said):
    """A traceback of the compiler's; slow kernels that run without a word, warn at every call or hide their cost."""
    if text:
        script(tools / "g++", text)
    empty = tmp_path / "empty"
    monkeypatch.setenv("TANDEM_CACHE", str(empty))
    with pytest.warns(TandemWarning) as caught:
        assert load.library("page_sum") is None and load.matrix_unit() == "reference"
    (warning,) = [str(each.message) for each in caught]
    assert said in warning and f"{empty}/kernels holds none" in warning and load.REFERENCE_COST in warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load.library("unit") is None
        assert page_sums(POOLS, [1]) == page_sums_reference(POOLS, [1])
    assert [each.setting for each in of_engine(ModelConfig("any"), EngineConfig())] == ["no C++ compiler"]
    (finding,) = doctor.check_compiler()
    assert finding.status == "slow" and said in finding.found and load.REFERENCE_COST in finding.advice
    assert list(doctor.check_kernels()) == []


def test_the_next_compiler_is_asked(tools):
    """A g++ that does not work hides a clang++ that does."""
    script(tools / "g++", "#!/bin/sh\nexit 1\n")
    script(tools / "clang++", "#!/bin/sh\necho clang version 15\necho Target: any\n")
    assert toolchain.compiler() == str(tools / "clang++")
    assert toolchain.version(str(tools / "clang++")) == ("clang version 15", "")


@pytest.mark.parametrize("broken", [False, True])
def test_kernels_outlive_their_compiler(cache, tools, broken):
    """An image without a compiler, or with one that is broken, leaves the kernels that it was built with."""
    if broken:
        script(tools / "g++", "#!/bin/sh\nexit 1\n")
    check_computes()
    assert load.matrix_unit() != "reference" and load.is_compiled("page_sum")
    assert of_engine(ModelConfig("any"), EngineConfig()) == ()
    (finding,) = doctor.check_compiler()
    assert finding.status == "absent" and "the cache holds every kernel" in finding.found
    assert "passed: page_sum, unit" in {each.name: each for each in doctor.check_kernels()}["kernels"].found


def test_kernels_of_one_compiler(cache, tools):
    """Without a compiler: libraries of two compilers together, whose matrix units may differ; or part of a set."""
    for name in LIBRARIES:
        whole = library_file(cache, name)
        os.utime(whole, (1, 1))
        shutil.copy(whole, whole.with_name(f"{whole.stem.rpartition('-')[0]}-00000000.so"))
    next(cache.glob("page_sum-*-00000000.so")).unlink()  # the later compiler's set is not complete
    assert load.lacking() == ""
    for name in LIBRARIES:
        path = load.compiled_path(name, load.FLAGS)
        assert path.exists() and not path.stem.endswith("-00000000")
    load.compiled_path("page_sum", load.FLAGS).unlink()
    forget()
    assert load.lacking() == f"{cache} lacks page_sum"
    with pytest.warns(TandemWarning, match="lacks page_sum"):
        assert load.library("unit") is None


def test_kernels_of_other_sources(cache, made, monkeypatch, tmp_path, tools):
    """Without a compiler: a library of sources that have changed since, or of another processor."""
    shutil.copytree(made / "sources", tmp_path / "sources")
    monkeypatch.setattr(load, "SOURCES", tmp_path / "sources")
    assert load.lacking() == ""
    with (tmp_path / "sources" / "tile.h").open("a") as file:
        file.write("// changed\n")
    forget()
    assert "these sources" in load.lacking()
    monkeypatch.setattr(load, "SOURCES", made / "sources")
    monkeypatch.setattr(load, "processor_flags", lambda: "flags: another")
    forget()
    assert "this processor" in load.lacking()


@pytest.mark.parametrize("damage", ["cut", "empty", "changed"])
def test_a_damaged_library(cache, monkeypatch, damage):
    """A file that was cut, which ends the process by a signal when it is read, or one with changed bytes, is loaded."""
    path = library_file(cache, "page_sum")
    content = path.read_bytes()
    middle = len(content) // 2
    changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes({"cut": content[:1000], "empty": b"", "changed": changed}[damage])
    assert not load.is_compiled("page_sum")
    with monkeypatch.context() as without:
        without.setattr(shutil, "which", lambda name: None)
        assert load.lacking() == f"{cache} lacks page_sum (damaged)"
        with pytest.warns(TandemWarning, match=r"lacks page_sum \(damaged\)"):
            assert load.library("page_sum") is None
    forget()
    check_computes()
    assert load.is_compiled("page_sum") and load.compiled_path("page_sum", load.FLAGS) == path


def test_a_library_damaged_since(cache, tools):
    """Without a compiler: a file is loaded that was whole when the process began, and no longer is."""
    assert load.matrix_unit() != "reference"
    library_file(cache, "page_sum").write_bytes(b"")
    with pytest.raises(KernelError, match=r"page_sum-\w+-\w+\.so is missing or damaged, and no C\+\+ compiler works"):
        load.library("page_sum")


def test_a_library_that_does_not_load(cache):
    """What the loader refuses, as one of a later C library, is a traceback."""
    path = library_file(cache, "page_sum")
    path.write_bytes(b"no library" + hashlib.sha256(b"no library").digest())
    with pytest.raises(KernelError, match=rf"does not load: .*{path.name}"):
        load.library("page_sum")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o027, 0o750)])
def test_a_library_has_the_modes_of_the_umask(cache, umask, mode):
    """Another user of the cache cannot load what was compiled, or one who should not can."""
    path = library_file(cache, "page_sum")
    path.unlink()
    before = os.umask(umask)
    try:
        assert load._compiled("page_sum", load.FLAGS) == path
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode
    assert sorted(each.name for each in cache.iterdir() if each.is_dir()) == []
