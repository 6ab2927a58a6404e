"""`bench soak`: a router and its engines at mixed load with faults, for as long as is asked.

Callers in threads ask in all ways that there are (callers.py): chats, completions, responses, forms, token ids, agents
with tools, of several tenants with keys. Some vanish in the middle, some read slowly, some send what is no call or come
with another's key, some tools fail. Once in a while a flood comes, a trainer pauses, updates the weights (with those
that are served) and resumes, a step of an engine raises, and an engine is killed. No call is lost, seeded answers are
those that were given first, engines end by nothing but what kills them, and memory stays.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tandem.bench.callers import CALL_S, OUTCOMES, TENANTS, Account, Caller, aborted, fate
from tandem.bench.child import Server, own, serving
from tandem.bench.faulty import FAULT
from tandem.errors import WorldError

CALLERS = 12
FLOOD = 400  # calls at once
FLOOD_S, TRAINER_S, LOOK_S, LINE_S = 120.0, 20.0, 5.0, 60.0  # between two of each
STEP_S, KILL_S = 45.0, 150.0  # between two steps that raise, and two engines that are killed
WARM_UP, WARM_UP_S = 0.2, 240.0  # of the time, and seconds at least, in which memory may grow
GROWN_MB_H, LEAST_MB = 64.0, 64.0  # that memory may grow by after that: in an hour, and in all, whatever the time
KV_BYTES = 128 << 20  # of an engine, little: pages are short, and the pool is all touched before the warm-up is over
BUSY = 200  # server.max_requests: so many answers at once, and floods are refused
LAST = "at once, at last"  # the kind of the calls that fill the server when all is over
ADMIN = "sk-soak-admin"
KEY = '[[keys]]\nkey = "{}"\ntenant = "{}"\nadmin = {}\n'
TREE = json.dumps(
    {"tenants": {"a": {"weight": 2}, "b": {"guarantee": 0.2}, "b/x": {"weight": 3}}}, separators=(",", ":")
)
SETTINGS = (
    "route.engines=2",
    "route.start_s=600",  # on a machine that is busy
    f"server.max_requests={BUSY}",
    "server.control=true",
    "server.send_s=20",
    "server.tool_format=hermes",
    "engine.order=shares",
    f"engine.shares={TREE}",
    "engine.programs.mode=enforce",
    "engine.programs.done_s=60",
)

Note = Callable[[str], None]


def flood(server: Server, account: Account) -> None:
    """More calls at once than the server takes: some are refused, none is lost."""
    _at_once(server, account, "flood", FLOOD)


def _at_once(server: Server, account: Account, kind: str, count: int) -> None:
    body = {"model": server.model, "prompt": "What is 1 + 2?", "max_tokens": 4, "temperature": 1.0}

    def call() -> tuple[str, str]:
        status, heard = server.call("POST", "/v1/completions", body)
        if status != 200:
            outcome, said = fate(status, heard)
            return ("lost" if outcome == "refused" and kind == LAST else outcome), said
        return ("withdrawn" if aborted(json.loads(heard)) else "answered"), ""

    threads = [threading.Thread(target=account.called, args=(kind, call), daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    until_s = time.monotonic() + 2 * CALL_S
    for thread in threads:
        thread.join(max(0.0, until_s - time.monotonic()))


def train(server: Server, account: Account, number: int) -> None:
    """What a trainer does amid streams: pauses of each kind, other weights (the same model's), and goes on."""
    from tandem.bench.work import MODEL

    steps: tuple[tuple[str, Any], ...] = (
        (f"/pause?mode={('keep', 'wait', 'abort')[number % 3]}", None),
        ("/update_weights_from_disk", {"model_path": MODEL, "weight_version": f"soak-{number}"}),
        ("/resume", None),
    )
    for path, body in steps if number % 2 else steps[1:2]:

        def call(path: str = path, body: Any = body) -> tuple[str, str]:
            status, heard = server.call("POST", path, body)
            return ("answered", "") if status == 200 else fate(status, heard)

        account.called(path.partition("?")[0], call)


class Faults:
    """Made on purpose, in the engines behind a router: a step that raises in any of them, and one killed. The first
    engine is never killed: with the router, it is of whom memory is looked at."""

    def __init__(self, server: Server, account: Account) -> None:
        self.server, self.account = server, account
        self.made = Counter[str]()
        self.rng = random.Random("faults")
        there = engines(server.pid)
        self.spared = min(there) if there else 0

    def step(self) -> None:
        """A step of an engine raises."""
        self._make("step", engines(self.server.pid), FAULT)

    def engine(self) -> None:
        """An engine is killed."""
        self._make("engine", [one for one in engines(self.server.pid) if one != self.spared], signal.SIGKILL)

    def _make(self, what: str, of: list[int], how: signal.Signals) -> None:
        if of:
            with self.account.lock:
                self.account.faults.append(time.monotonic())
            os.kill(self.rng.choice(of), how)
            self.made[what] += 1

    def restarted(self) -> int:
        """Engines that the router started again, once those that were killed have been."""
        until_s, count = time.monotonic() + CALL_S, 0
        while time.monotonic() < until_s:
            _, body = self.server.call("GET", "/load")
            count = sum(one["restarts"] for one in json.loads(body).get("engines", ()))
            if count >= self.made["engine"]:
                break
            time.sleep(0.5)
        return count

    def resident_bytes(self) -> int:
        """Of the router, and of the engine that is spared."""
        pages = int(Path(f"/proc/{self.spared}/statm").read_text(encoding="ascii").split()[1]) if self.spared else 0
        return self.server.resident_bytes() + pages * os.sysconf("SC_PAGE_SIZE")


def engines(router: int) -> list[int]:
    """Processes that it started and that listen to FAULT, which others end by."""
    found = []
    for path in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            lines = (line.partition(":") for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
            fields = {name: value.strip() for name, _, value in lines}
            if fields.get("PPid") == str(router) and int(fields.get("SigCgt", "0"), 16) >> (FAULT - 1) & 1:
                found.append(int(path.parent.name))
    return found


def slope(at_s: list[float], values: list[float]) -> float:
    """Of the line through the points by least squares, a second; 0 for fewer than two.

    >>> slope([0.0, 1.0, 2.0], [5.0, 7.0, 9.0])
    2.0
    """
    if len(set(at_s)) < 2:
        return 0.0
    return statistics.linear_regression(at_s, values).slope


def judged(found: dict[str, Any]) -> str:
    """Why a soak failed; "" where it did not."""
    if found["total"]["lost"]:
        return f"{found['total']['lost']} calls were lost: {'; '.join(found['said'])}"
    if found["restarts"] != found["faults"].get("engine", 0):
        return f"{found['restarts']} engines were started again, where {found['faults'].get('engine', 0)} were killed."
    if found["differed"]:
        return f"{found['differed']} seeded answers are not those that were given first."
    if found["slope_mb_h"] > found["allowed_mb_h"]:
        grown = f"{found['slope_mb_h']:,.1f} MB an hour, where {found['allowed_mb_h']:,.1f} are allowed"
        return f"the server's memory grows by {grown}."
    return ""


def told(
    account: Account,
    memory: list[tuple[float, float]],
    seconds: float,
    faults: Mapping[str, int] = MappingProxyType({}),
    restarts: int = 0,
) -> dict[str, Any]:
    """The result, of what was asked, of (second, MB) samples of memory, of faults that were made and of engines that
    were started again; its "failure" says why it failed."""
    late = [(at_s, mb) for at_s, mb in memory if at_s >= max(WARM_UP * seconds, WARM_UP_S)] or memory[-1:]
    rows = account.rows()
    found: dict[str, Any] = {
        "bench": "soak",
        "seconds": seconds,
        "calls": rows,
        "total": {name: sum(row[name] for row in rows.values()) for name in ("asked", *OUTCOMES)},
        "said": [f"{count} x {said}" for said, count in account.said.most_common(5)],
        "faults": dict(faults),
        "restarts": restarts,
        "tools": dict(account.tools),
        "tokens": account.tokens,
        "repeated": account.repeated - len(account.first),
        "differed": account.differed,
        "resident_mb": late[0][1] if late else 0.0,
        "slope_mb_h": 3600 * slope([at_s for at_s, _ in late], [mb for _, mb in late]),
        "allowed_mb_h": max(GROWN_MB_H, LEAST_MB / max(1.0, (1 - WARM_UP) * seconds) * 3600),
        "memory": memory,
    }
    return {**found, "failure": judged(found)}


def soak(seconds: float, note: Note) -> dict[str, Any]:
    """A soak of a router with two engines, in processes of their own; a line a minute. WorldError where the router ends
    meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        keys, rows = (
            Path(folder) / "keys.toml",
            [(ADMIN, "", "true"), *((key, name, "false") for name, key in TENANTS.items())],
        )
        keys.write_text("".join(KEY.format(*row) for row in rows), encoding="utf-8")
        settings = [*SETTINGS, f"server.keys={keys}"]
        with serving(own(*settings, kv_bytes=KV_BYTES, module="tandem.bench.faulty"), ADMIN) as server:
            note(f"a router answers after {server.start_s:.1f} s; {CALLERS} callers for {seconds:,.0f} s")
            return _soaked(server, seconds, note)


def _soaked(server: Server, seconds: float, note: Note) -> dict[str, Any]:
    account, over, memory = Account(), threading.Event(), list[tuple[float, float]]()
    faults, trained = Faults(server, account), itertools.count()
    callers = [Caller(server, account, over, number) for number in range(CALLERS)]
    threads = [threading.Thread(target=caller.run, daemon=True) for caller in callers]
    began_s = time.monotonic()

    def line() -> None:
        ended = {name: sum(n for (_, one), n in account.ended.items() if one == name) for name in OUTCOMES}
        counts = ", ".join(f"{count:,} {name}" for name, count in ended.items())
        made = ", ".join(f"{count} {name}" for name, count in faults.made.items())
        now_s = time.monotonic() - began_s
        note(
            f"{now_s:7,.0f} s: {counts}; {account.differed} differed; {memory[-1][1]:,.0f} MB; faults: {made or 'none'}"
        )

    works: dict[Callable[[], None], float] = {
        lambda: flood(server, account): FLOOD_S,
        lambda: train(server, account, next(trained)): TRAINER_S,
        faults.step: STEP_S,
        faults.engine: KILL_S,
        line: LINE_S,
    }
    due = {work: every_s if work is line else every_s / 2 for work, every_s in works.items()}
    for thread in threads:
        thread.start()
    while (now_s := time.monotonic() - began_s) < seconds:
        memory.append((now_s, faults.resident_bytes() / 1e6))
        for work, every_s in works.items():
            if now_s >= due[work]:
                due[work] += every_s
                work()
        over.wait(min(LOOK_S, max(0.0, seconds - now_s)))
    over.set()
    until_s = time.monotonic() + 2 * CALL_S
    for thread in threads:
        thread.join(max(0.0, until_s - time.monotonic()))
    _left(server, account)
    return told(account, memory, time.monotonic() - began_s, faults.made, faults.restarted())


def _left(server: Server, account: Account) -> None:
    """The server's own account, once all have been answered: nothing is on its way, and all that it has room for is
    answered. A place that a call never gave back is missing there."""
    until_s = time.monotonic() + CALL_S
    while time.monotonic() < until_s:
        status, body = server.call("GET", "/load")
        if status != 200:
            raise WorldError(f"/load gave {status} after the soak.")
        left = json.loads(body)
        if not left["running"] and not left["waiting"]:
            _at_once(server, account, LAST, BUSY)
            return
        time.sleep(0.5)
    account.begin("left behind")
    account.end("left behind", "lost", f"the server still has {body[:200]!r}")
