"""The micro-kernel by every matrix unit, against a model of its order of reduction in NumPy, to the bit.

AMX runs as plain C++ with the semantics that Intel documents (amx.h): all but the instruction is tested anywhere.
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tandem.algo.config import AlgoConfig
from tandem.algo.objective import PolicyGradient
from tandem.algo.pack import count_prompts, pack
from tandem.cli import doctor
from tandem.kernels import choice
from tandem.kernels import sample as sampler
from tandem.kernels.build import check, load, toolchain
from tandem.train.config import LearnerConfig
from tandem.train.step import Learner, score

HARNESS = """
#include "tile.h"
using namespace tandem;
extern "C" int most_rows() { return ROWS; }
extern "C" void run(int count, const bf16* x, const int64_t* starts, int64_t step, const bf16* panel, int64_t depth,
                    float* out, int64_t stride, int add, const char* next, int64_t every) {
    const bf16* rows[ROWS];
    for (int r = 0; r < count; r++) rows[r] = x + starts[r];
    tile<bf16>(count, rows, step, panel, depth, out, stride, add != 0, Ahead{next, every});
}
"""
# name -> (compiler's flags, instructions that they take)
UNITS: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "amx": (("-march=native", "-DTANDEM_AMX_EMULATED"), frozenset()),
    "amx-portable": (("-march=native", "-DTANDEM_AMX_EMULATED", "-DTANDEM_PORTABLE"), frozenset()),
    "refused": (("-march=native", "-DTANDEM_AMX_EMULATED=0"), frozenset()),
    "native": (("-march=native",), frozenset({"avx512_bf16"})),
    "avx512": (("-march=native", "-mno-avx512bf16"), frozenset({"avx512f", "avx512dq"})),
    "avx2": (("-march=x86-64-v3",), frozenset({"avx2", "fma"})),
    "plain": (("-march=native", "-DTANDEM_PORTABLE"), frozenset()),
}
EMULATED = ("linear", "gradient", "codes", "attention")

pytestmark = pytest.mark.skipif(toolchain.compiler() is None, reason="no C++ compiler")


def forget() -> None:
    for cached in (load.library, load.function, sampler._compiled, load._unit, choice._asked):
        cached.cache_clear()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Kernels in a cache of their own, compiled quickly."""
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "FLAGS", ("-O1", *load.FLAGS[1:], "-w"))
    forget()
    yield monkeypatch
    forget()


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """unit -> the compiled HARNESS."""
    folder, present = tmp_path_factory.mktemp("harness"), doctor.processor()[1]
    (folder / "harness.cpp").write_text(HARNESS)
    built: dict[str, Any] = {}

    def compiled(unit: str) -> Any:
        flags, needed = UNITS[unit]
        if not needed <= present:
            pytest.skip(f"needs {' '.join(sorted(needed - present))}")
        if unit not in built:
            command = [
                toolchain.compiler(),
                *load.FLAGS,
                "-w",
                *flags,
                f"-I{load.SOURCES}",
                "-o",
                folder / f"{unit}.so",
            ]
            subprocess.run([*map(str, command), str(folder / "harness.cpp")], check=True)
            built[unit] = ctypes.CDLL(str(folder / f"{unit}.so"))
        return built[unit]

    return compiled


def flushed(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)


def by_tiles(x: NDArray[np.float32], w: NDArray[np.float32], start: NDArray[np.float32]) -> NDArray[np.float32]:
    """Intel's TDPBF16PS, 32 inputs at a time: even and odd ones from zero, then the tile. x is [R, K], w [64, K].

    A fused sum is rounded from fp64, in which the product is exact.
    """
    out = start
    for k in range(0, x.shape[1], 32):
        chains = [np.zeros_like(start), np.zeros_like(start)]
        for i in range(k, min(k + 32, x.shape[1])):
            product = x[:, i, None].astype(np.float64) * w[None, :, i]
            chains[i % 2] = flushed((chains[i % 2].astype(np.float64) + product).astype(np.float32))
        out = flushed(flushed(out) + flushed(chains[0] + chains[1]))
    return out


def by_pairs(x: NDArray[np.float32], w: NDArray[np.float32], start: NDArray[np.float32]) -> NDArray[np.float32]:
    """VDPBF16PS for numbers that are not denormal: of each pair the odd input, then the even one."""
    out = start
    for k in range(0, x.shape[1], 2):
        for i in (k + 1, k):
            out = out + x[:, i, None] * w[None, :, i]
    return out


@settings(max_examples=40, deadline=None)
@given(
    count=st.one_of(st.integers(1, 32), st.sampled_from([16, 32])),
    pairs=st.one_of(st.integers(1, 60), st.sampled_from([16, 32, 256, 257, 272, 288, 600])),
    form=st.tuples(st.booleans(), st.booleans(), st.booleans()),  # rows turned, rows scattered, sums that go on
    scale=st.sampled_from([1.0, 1.0, 2.0**-66]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("unit", list(UNITS))
def test_order_of_reduction(harness, unit, count, pairs, form, scale, seed):
    """Rows beyond a tile, a rest of the depth, a stride, sums that go on or a chunk of the depth get other bits."""
    loaded, rng, depth = harness(unit), np.random.default_rng(seed), 2 * pairs
    turned, scattered, add = form
    amx = unit.startswith("amx")
    count, scale = min(count, loaded.most_rows()), scale if amx else 1.0
    assert loaded.most_rows() == (32 if amx or unit == "refused" else 6)
    x, w = ((scale * torch.from_numpy(rng.standard_normal((n, depth)))).bfloat16() for n in (count, 64))
    panel = w.view(64, pairs, 2).transpose(0, 1).contiguous()
    if turned:  # rows are columns of a panel
        places = rng.permutation(64)[:count] if scattered else np.arange(count)
        memory = torch.full((pairs, 64, 2), float("nan"), dtype=torch.bfloat16)
        memory[:, torch.from_numpy(places)] = x.view(count, pairs, 2).transpose(0, 1)
        starts, step = 2 * places, 128
    else:
        places = rng.permutation(40)[:count] if scattered else np.arange(count)
        memory = torch.full((40, depth + 4), float("nan"), dtype=torch.bfloat16)
        memory[torch.from_numpy(places), :depth] = x
        starts, step = places * (depth + 4), 2
    out = torch.from_numpy(rng.standard_normal((count + 1, 80)).astype(np.float32))
    before = out.numpy().copy()
    starts = np.ascontiguousarray(starts, dtype=np.int64)
    pointers = (ctypes.c_void_p(memory.data_ptr()), ctypes.c_void_p(starts.ctypes.data))
    sizes = (ctypes.c_int64(depth), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(80), int(add))
    ahead = (ctypes.c_void_p(panel.data_ptr() if seed % 2 else None), ctypes.c_int64(1 + seed % 5))
    loaded.run(count, *pointers, ctypes.c_int64(step), ctypes.c_void_p(panel.data_ptr()), *sizes, *ahead)
    model, start = by_tiles if amx else by_pairs, before[:count, :64] if add else np.zeros((count, 64), np.float32)
    wanted = model(x.float().numpy(), w.float().numpy(), start)
    got = out.numpy()
    assert np.array_equal(got[:count, :64], wanted), np.abs(got[:count, :64] - wanted).max()
    assert np.array_equal(got[count:], before[count:]) and np.array_equal(got[:, 64:], before[:, 64:])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86's")
def test_the_instructions_are_there(tmp_path):
    """The path that no test here can run does not compile, or multiplies by something else."""
    command = [str(toolchain.compiler()), *load.FLAGS, "-march=sapphirerapids", "-w", f"-I{load.SOURCES}", "-S", "-o"]
    subprocess.run([*command, str(tmp_path / "unit.s"), str(load.SOURCES / "unit.cpp")], check=True)
    text = (tmp_path / "unit.s").read_text()
    for instruction in ("tdpbf16ps", "tileloadd", "tilestored", "tilezero", "ldtilecfg", "tilerelease"):
        assert instruction in text, instruction


def test_libraries_by_emulated_tiles(monkeypatch):
    """A library that sizes its tiles by six rows, or multiplies few rows apart from many, on a processor with AMX."""
    monkeypatch.setattr(load, "FLAGS", ("-O1", *load.FLAGS[1:], "-w", "-DTANDEM_AMX_EMULATED"))
    forget()
    try:
        assert load.matrix_unit() == "amx"
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: load._compiled(name, load.FLAGS), EMULATED))
        for name in EMULATED:
            assert load.library(name) is not None
            check.check(name, "amx")
    finally:
        forget()


def copied_sources(fresh: pytest.MonkeyPatch, tmp_path: Path, name: str, before: str, after: str) -> None:
    """The kernels' sources with a fault in file `name`."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for path in (*load.SOURCES.glob("*.h"), *load.SOURCES.glob("*.cpp")):
        (folder / path.name).write_text(path.read_text())
    text = (folder / name).read_text()
    assert before in text
    (folder / name).write_text(text.replace(before, after))
    fresh.setattr(load, "SOURCES", folder)


def test_amx_that_fails_gives_way(fresh, tmp_path):
    """Tiles that compute wrong are used, are tried again at every start, or end the start."""
    fresh.setattr(load, "FLAGS", (*load.FLAGS, "-DTANDEM_AMX_EMULATED"))
    copied_sources(fresh, tmp_path, "amx.h", "flushed(even[n] + odd[n])", "flushed(even[n] - odd[n])")
    with pytest.warns(RuntimeWarning, match=r"AMX is not used.*unit.cpp.*off by"):
        assert load.matrix_unit() != "amx"
    forget()
    fresh.setattr(check, "check_unit", None)  # what was found is known
    with pytest.warns(RuntimeWarning, match="AMX is not used"):
        assert load.matrix_unit() != "amx"
    assert load.library("page_sum") is not None


def test_a_library_that_fails_by_tiles(fresh, tmp_path):
    """AMX is tried again, or is given up after the library at fault was mended."""
    fresh.setattr(load, "FLAGS", (*load.FLAGS, "-DTANDEM_AMX_EMULATED"))
    sources = load.SOURCES
    copied_sources(fresh, tmp_path, "page_sum.cpp", "0x9E3779B97F4A7C15", "0x9E3779B97F4A7C13")
    with pytest.raises(load.KernelError, match=r"page_sum\.cpp.*start again: AVX-512"):
        load.library("page_sum")
    forget()
    with pytest.warns(RuntimeWarning, match=r"AMX is not used.*page_sum\.cpp"):
        assert load.matrix_unit() != "amx"
    fresh.setattr(load, "SOURCES", sources)
    forget()
    assert load.matrix_unit() == "amx"


def test_a_broken_kernel_is_refused(fresh, tmp_path):
    """A library that computes wrong is served, at the first call or the next, or is marked as sound."""
    from tandem.kernels.page_sum import page_sums, page_sums_reference

    pools = [torch.arange(64.0).view(4, 16)]
    copied_sources(fresh, tmp_path, "page_sum.cpp", "0x9E3779B97F4A7C15", "0x9E3779B97F4A7C13")
    for _ in range(2):
        with pytest.raises(load.KernelError, match=r"page_sum\.cpp.*fails its self-check.*sums.*=reference"):
            page_sums(pools, [1])
    files = sorted(path.suffix for path in (tmp_path / "cache" / "kernels").glob("page_sum-*"))
    assert files == [".so"], files
    fresh.setattr(load, "SOURCES", Path(load.__file__).parents[1])
    forget()
    assert page_sums(pools, [1]) == page_sums_reference(pools, [1])
    assert len(list((tmp_path / "cache" / "kernels").glob(f"page_sum-*.{load.matrix_unit()}"))) == 1
    forget()
    fresh.setattr(check, "check", None)  # the mark spares the check
    assert page_sums(pools, [1]) == page_sums_reference(pools, [1])


def test_a_slow_processor_is_said_once(fresh, recwarn):
    """Slow products run without a word, or warn at every library; the figure is of another unit."""
    fresh.setattr(load, "FLAGS", (*load.FLAGS, "-DTANDEM_PORTABLE"))
    assert load.library("page_sum") is not None and load.library("quantise") is not None
    assert load.matrix_unit() == "portable"
    said = [str(warning.message) for warning in recwarn if "AVX-512 BF16" in str(warning.message)]
    assert len(said) == 1 and "portable, 18.0 times slower" in said[0], said


def test_a_library_that_nobody_checks(fresh):
    """A library is served unchecked, or marked as sound, where the module that knows its check was never imported."""
    fresh.delitem(check.CHECKS, "page_sum")
    for _ in range(2):
        with pytest.raises(
            AssertionError, match=r"page_sum\.cpp is not checked yet: import tandem\.kernels\.selfcheck"
        ):
            load.library("page_sum")


def test_every_library_has_a_check():
    """A kernel is added and what it computes is checked nowhere."""
    assert set(check.CHECKS) == set(load.names())


def test_the_reference_on_request(monkeypatch, make_decoder, parity):
    """TANDEM_KERNELS=reference is unknown, still runs C++, computes something else, or the learner stops at it."""
    prompt = [[i % 97 for i in range(20)]]
    asked = parity.groups(prompt, 2, 1.0, 5)
    compiled = make_decoder("float32")
    wanted, hidden = parity.engine(compiled).generate(asked), parity.alone(compiled, prompt[0])
    monkeypatch.setenv("TANDEM_KERNELS", "reference")
    monkeypatch.setattr(load, "_compiled", None)
    forget()
    try:
        assert load.matrix_unit() == "reference" and load.library("linear") is None
        decoder = make_decoder("float32")
        done = parity.engine(decoder).generate(asked)
        assert torch.allclose(parity.alone(decoder, prompt[0]), hidden, rtol=1e-4, atol=1e-5)
        assert [each.tokens for each in done] == [each.tokens for each in wanted]
        samples = parity.samples(asked, done)
        for microbatch in pack(samples, count_prompts(samples), 2000, True):
            assert torch.allclose(
                score(decoder, microbatch, 1.0), torch.tensor(microbatch.predictions["logprobs"]).float(), atol=1e-4
            )
        learner = Learner(decoder, LearnerConfig(), PolicyGradient(AlgoConfig(), 1.0), total_updates=2)
        for microbatch in pack(samples, count_prompts(samples), 2000, True):
            learner.backward(microbatch)
        (finding,) = doctor.check_kernels()
        assert finding.status == "slow" and "TANDEM_KERNELS" in finding.found
    finally:
        monkeypatch.undo()
        forget()


def test_doctor_names_the_unit_and_the_checks(fresh, tmp_path):
    """`tandem doctor` is silent about slow products, or about a kernel that computes wrong."""
    found = {finding.name: finding for finding in doctor.check_kernels()}
    assert found["matrix unit"].found.startswith(load.matrix_unit())
    assert "passed: unit;" in found["kernels"].found and "page_sum" in found["kernels"].found
    assert load.library("page_sum") is not None
    assert "passed: page_sum, unit;" in {f.name: f for f in doctor.check_kernels()}["kernels"].found
    copied_sources(fresh, tmp_path, "page_sum.cpp", "0x9E3779B97F4A7C15", "0x9E3779B97F4A7C13")
    load._compiled("page_sum", load.FLAGS)
    forget()
    broken = {finding.name: finding for finding in doctor.check_kernels()}["kernels"]
    assert broken.fatal and "page_sum.cpp" in broken.found
