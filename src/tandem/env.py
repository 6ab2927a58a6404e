"""The environment variables that tandem reads; no other module looks at os.environ.

TANDEM_API_KEY   that calls of `tandem serve` need; its holder may do all (server.keys: a file of several)
TANDEM_CACHE     folder for compiled kernels and converted tokenisers; default $XDG_CACHE_HOME/tandem
TANDEM_KERNELS   triton: run Triton's kernels on the CPU too, as tests/gpu does under its interpreter; very slow
                 reference: PyTorch in place of the C++ kernels; slow, and a row's bits depend on its batch
TANDEM_THREADS   threads a process computes with; default OMP_NUM_THREADS, else the cores this process may use
GOMP_SPINCOUNT   how long OpenMP spins; set to 2000 where it is not given
remote.key_env   names one with the API key of other engines' servers
RAY_ADDRESS      a cluster for workers.backend=ray to join; without it a Ray is started here, and ends with the run
WANDB_MODE       passed on to W&B; offline where it is not given
NO_COLOR         any text: no colours (https://no-color.org)
XDG_CACHE_HOME   default ~/.cache
"""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from tandem.errors import ConfigError, nearest

VARIABLES = ("TANDEM_API_KEY", "TANDEM_CACHE", "TANDEM_KERNELS", "TANDEM_THREADS")
SERVICE_LINK = re.compile("_SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)$|_PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?$")
MOST_THREADS = 1024  # far beyond any use; many more cannot be made
SPIN_COUNT = "2000"
_OURS: set[str] = set()  # variables that were set here


def check(environment: Mapping[str, str] | None = None) -> None:
    """ConfigError for a TANDEM_* variable that tandem does not know: a misspelt one would be ignored in silence. Those
    that Kubernetes sets in a pod beside a service whose name begins with tandem are let by. ConfigError also where
    Python drops asserts: they guard what compiled kernels take for granted (kernels/address.py)."""
    if sys.flags.optimize:
        raise ConfigError("Python runs with -O, without the checks of tandem's asserts. Drop -O, or PYTHONOPTIMIZE.")
    for name in os.environ if environment is None else environment:
        if name.startswith("TANDEM_") and name not in VARIABLES and not SERVICE_LINK.search(name):
            raise ConfigError(f"no environment variable {name} is known.{nearest(name, VARIABLES)} Unset it.")


def _read(name: str) -> str:
    check()
    return os.environ.get(name, "").strip()


def cache_dir() -> Path:
    """Folder for what can be made again; it need not exist yet."""
    given = _read("TANDEM_CACHE")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(base) if base else Path.home() / ".cache") / "tandem"


def api_key() -> str:
    """That callers of a server need; "" where none is set."""
    return _read("TANDEM_API_KEY")


def named(name: str) -> str:
    """The value of a variable that a setting names. ConfigError where it is not set."""
    given = _read(name)
    if not given:
        raise ConfigError(f"the environment variable {name} is not set, or empty. Export it, or name another.")
    return given


def kernels() -> str:
    """Which kernels are asked for: "triton", on the CPU too, "reference" or "". ConfigError for any other name."""
    given = _read("TANDEM_KERNELS")
    if given not in ("", "triton", "reference"):
        allowed = "allowed: triton, reference"
        raise ConfigError(f"TANDEM_KERNELS={given} is not known; {allowed}. Unset it for the C++ kernels.")
    return given


def num_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: of its affinity, or as many as its control groups give time for where that is
    less (a container's limit: more threads stand still for the rest of each period). Whole ones, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *_quotas(root)]))


def _quotas(root: Path) -> Iterator[int]:
    """Whole cores of the control groups around this process that limit its time."""
    for place in _groups(root, "", "sys/fs/cgroup"):
        with suppress(OSError, ValueError):
            quota, period = (place / "cpu.max").read_text().split()
            yield int(quota) // int(period)  # ValueError of "max": no limit
    for place in _groups(root, "cpu", "sys/fs/cgroup/cpu"):
        with suppress(OSError, ValueError):
            quota, period = ((place / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:  # -1: no limit
                yield int(quota) // int(period)


def memory_bytes(root: Path = Path("/")) -> tuple[int, int]:
    """(total, available) memory of this process: the machine's, or what a control group around it or a limit of its own
    (ulimit -v, -d) leaves where that is less.

    What a group has read from files and no longer needs counts as available, as in the machine's own figure.
    """
    kilobytes = _figures(root / "proc/meminfo")
    if "MemTotal" in kilobytes:
        total, available = kilobytes["MemTotal"] * 1024, kilobytes.get("MemAvailable", 0) * 1024
    else:  # no Linux: what others use is not known
        total = available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, used, files in _memories(root):
        total, available = min(total, limit), min(available, max(0, limit - used + files))
    for limit, used in _limits(root):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def limits_addresses(root: Path = Path("/")) -> bool:
    """Whether this process's addresses are limited: those of memory that was given back count then."""
    return bool(list(_limits(root)))


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of the process's addresses (ulimit -v) and of those of its own memory (-d), where limited."""
    try:
        lines = (root / "proc/self/limits").read_text().splitlines()
    except OSError:
        return
    used = _figures(root / "proc/self/status")
    for name, counted in (("Max address space", "VmSize"), ("Max data size", "VmData")):
        for soft in (line.removeprefix(name).split()[0] for line in lines if line.startswith(name)):
            if soft.isdigit():
                yield int(soft), 1024 * used.get(counted, 0)


def _groups(root: Path, kind: str, base: str) -> Iterator[Path]:
    """Folders of the control groups around this process, its own first; kind: of version 1, "" of version 2."""
    try:
        lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        lines = []
    own = {kind: name.lstrip("/") for _, kinds, name in lines for kind in kinds.split(",")}
    group = Path(own.get(kind, ""))
    for folder in (group, *group.parents) if group != Path() else (group,):
        yield root / base / folder


def _memories(root: Path) -> Iterator[tuple[int, int, int]]:
    """(limit, used, of that files it can drop) of the control groups around this process that limit memory."""
    for kind, base, *names in (
        ("", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for place in _groups(root, kind, base):
            try:
                limit, used = int((place / names[0]).read_text()), int((place / names[1]).read_text())
            except (OSError, ValueError):  # no such group seen from here, or "max": no limit
                continue
            yield limit, used, _figures(place / "memory.stat").get(names[2], 0)


def _figures(path: Path) -> dict[str, int]:
    """Names and numbers of a file of the kernel's; empty where there is none."""
    try:
        rows = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def num_threads() -> int:
    """Threads to compute with. Raises ConfigError where TANDEM_THREADS is not 1 to MOST_THREADS."""
    given = _read("TANDEM_THREADS")
    if given:
        if not given.isdecimal() or not 1 <= int(given) <= MOST_THREADS:
            raise ConfigError(
                f"TANDEM_THREADS={given} is not in 1 to {MOST_THREADS}. This process has {num_cores()} cores."
            )
        return int(given)
    openmp = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(openmp) if openmp.isdecimal() and 0 < int(openmp) <= MOST_THREADS else num_cores()


def set_threads(count: int) -> None:
    """Compute with so many from here on, in what this process starts too."""
    os.environ["TANDEM_THREADS"] = str(count)


def limit_spinning() -> None:
    """Let OpenMP's threads sleep at a barrier after some 40 microseconds; call before torch is imported.

    By default they spin for milliseconds. Where another process holds a core, both threads then share the other one and
    each burns the time slice that its partner needs: measured on two cores beside one busy process, decoding at 142
    tok/s by default, at 1,390 with this limit, and at 1,390 to 1,500 on an idle machine either way.
    """
    if os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT) == SPIN_COUNT:
        _OURS.add("GOMP_SPINCOUNT")


def foreign() -> dict[str, str]:
    """The environment for a program that is not tandem's: without what tandem set for itself."""
    return {name: value for name, value in os.environ.items() if name not in _OURS}


def tracking() -> dict[str, str]:
    """The environment for a tracker's process: W&B writes to disk alone where the user has not asked for more."""
    return {"WANDB_MODE": "offline", "WANDB_SILENT": "true", **foreign()}


def ray_address() -> str:
    """Of the cluster to join."""
    return os.environ.get("RAY_ADDRESS", "").strip()


def set_ray_token() -> None:
    """A token of this process's own for a Ray that it starts, unless the user has said something of one."""
    if not any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        _OURS.add("RAY_AUTH_TOKEN")


def quiet_ray() -> None:
    """Before Ray is imported: it prints deaths of workers on this process's stdout, also where it was told to print no
    worker's output; a line that matches this is left out."""
    if "RAY_DEDUP_LOGS_SKIP_REGEX" not in os.environ:
        os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = "."
        _OURS.add("RAY_DEDUP_LOGS_SKIP_REGEX")


def no_color() -> bool:
    return bool(os.environ.get("NO_COLOR"))


def child(**extra: str) -> dict[str, str]:
    """The environment for a child process, with `extra` set."""
    return {**os.environ, **extra}
