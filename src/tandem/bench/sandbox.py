"""What a sandbox costs: to start, to run a command, to end; many at once; and what a thousand of them leave behind."""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tandem.sandbox.box import Sandbox
from tandem.sandbox.config import SandboxConfig
from tandem.sandbox.pool import SandboxPool, check

STARTS = 60  # of each kind
AT_ONCE, BATCHES = 16, 8
RUNS = 1000
COMMANDS = {"true": ["true"], "python -S": ["python", "-S", "-c", "print(6 * 7)"]}


def sandbox() -> dict[str, Any]:
    """Rows of (what, median and 95th percentile in ms), and what was left behind. SandboxError where none starts."""
    config = SandboxConfig()
    check(config)
    rows = asyncio.run(_alone(config)) + asyncio.run(_at_once(config))
    before = _there()
    began = time.perf_counter()
    asyncio.run(_many(config, RUNS))
    took_s = time.perf_counter() - began
    left = {name: count - before[name] for name, count in _there().items()}
    return {"bench": "sandbox", "rows": rows, "runs": RUNS, "runs_s": took_s, "left": left}


def _row(what: str, times_s: list[float]) -> dict[str, Any]:
    """
    >>> _row("x", [0.001, 0.002, 0.003])
    {'work': 'x', 'median_ms': 2.0, 'p95_ms': 3.0, 'count': 3}
    """
    ordered = sorted(times_s)
    last = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {"work": what, "median_ms": 1e3 * statistics.median(ordered), "p95_ms": 1e3 * last, "count": len(ordered)}


async def _alone(config: SandboxConfig) -> list[dict[str, Any]]:
    """One sandbox after the other: started anew, and from the prepared ones once those have come up."""
    times: dict[str, list[float]] = {}
    cold, warm = SandboxPool(config, warm=0), SandboxPool(config, warm=2)
    memory: list[float] = []
    for name, pool in (("start, nothing prepared", cold), ("start, prepared", warm)):
        for _ in range(STARTS):
            box = await _timed(times, name, pool.open({"main.py": "print(1)"}))
            if pool is cold:
                for command, argv in COMMANDS.items():
                    await _timed(times, f"command: {command}", box.run(argv))
                memory.append(_memory_bytes(box))
            await _timed(times, "end", box.close())
            if pool is warm:
                await asyncio.sleep(0.05)  # the program thinks
    await warm.close()
    rows = [_row(name, each) for name, each in times.items()]
    return [*rows, {"work": "memory of one that waits", "mb": statistics.median(memory) / 1e6, "count": len(memory)}]


async def _timed(times: dict[str, list[float]], name: str, work: Any) -> Any:
    began = time.perf_counter()
    value = await work
    times.setdefault(name, []).append(time.perf_counter() - began)
    return value


def _memory_bytes(box: Sandbox) -> float:
    """Of its processes, what they share with others divided among them."""
    total = 0
    for pid in _tree(box._started.popen.pid):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            total += 1024 * int(line.split()[1]) if line.startswith("Pss:") else 0
    return float(total)


async def _at_once(config: SandboxConfig) -> list[dict[str, Any]]:
    """From the start to the end of a sandbox with one command, so many at once."""
    pool = SandboxPool(config)
    times: dict[str, list[float]] = {}

    async def one() -> None:
        async with pool.sandbox() as box:
            await box.run(COMMANDS["python -S"])

    for _ in range(BATCHES):
        name = f"start, python, end: {AT_ONCE} at once"
        await asyncio.gather(*(_timed(times, name, one()) for _ in range(AT_ONCE)))
    await pool.close()
    return [_row(name, each) for name, each in times.items()]


async def _many(config: SandboxConfig, count: int) -> None:
    """Commands that leave a process and a file behind, each in a sandbox of its own."""
    pool = SandboxPool(config)

    async def one() -> None:
        async with pool.sandbox() as box:
            done = await box.run(["sh", "-c", "echo x > file; sleep 600 & setsid sleep 600 & true"])
            assert done.ok, done

    for first in range(0, count, AT_ONCE):
        await asyncio.gather(*(one() for _ in range(min(AT_ONCE, count - first))))
    await pool.close()


def _there() -> dict[str, int]:
    """What sandboxes might leave."""
    return {
        "processes": len(_tree(os.getpid())) - 1,
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "files": sum(name.startswith("tandem-") for name in os.listdir(tempfile.gettempdir())),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def _tree(root: int) -> set[int]:
    """A process and all that came of it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended
            continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found
