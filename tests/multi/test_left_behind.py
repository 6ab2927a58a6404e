"""Regression caught: a sandbox that leaves something running or lying about, or that ends under its owner."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tandem.sandbox import backend
from tandem.sandbox.box import Result, Sandbox
from tandem.sandbox.config import SandboxConfig
from tandem.sandbox.pool import SandboxPool, run_once
from tests.sandboxes import LIMITS, PRELUDE, inside

LEFT = """
import os, sys, time
def leave():
    for n in range(10**9):
        open("beat", "w").write(str(n)); time.sleep(0.01)
{how}
while not os.path.exists("beat"): time.sleep(0.01)
"""
WAYS = {
    "a child": "if os.fork() == 0: leave()",
    "a session of its own": "if os.fork() == 0: os.setsid(); leave()",
    "a daemon": "if os.fork() == 0:\n    os.setsid()\n    if os.fork(): os._exit(0)\n    os.closerange(0, 9); leave()",
    "deaf to signals": "import signal\nif os.fork() == 0:\n"
    "    for n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n    os.setsid(); leave()",
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_runs_on(way: str) -> None:
    """A process that a command leaves behind and that is there when what it wrote is graded."""

    async def work(box: Sandbox) -> tuple[Result, Result, str, str]:
        first = await box.run(["python", "-S", "-c", LEFT.replace("{how}", WAYS[way])])
        before = await box.read("beat")
        seen = await box.run(["sh", "-c", "sleep 0.1; echo /proc/[0-9]*"])
        return first, seen, before, await box.read("beat")

    first, seen, before, after = inside(work)
    assert first.ok and first.seconds < LIMITS.seconds - 1.0, first
    assert before == after
    assert len(seen.stdout.split()) <= 2 and "/proc/1" in seen.stdout.split()


def test_in_the_background_it_runs_on() -> None:
    """A server that ends with the command that started it although it was to stay; or one that stays for good."""

    async def work(box: Sandbox) -> list[bool]:
        await box.run(["python", "-S", "-c", LEFT.replace("{how}", WAYS["a daemon"])], background=True)
        beats = []
        for background in (True, True, False, True):
            before = await box.read("beat")
            await box.run(["sleep", "0.1"], background=background)
            beats.append(await box.read("beat") != before)
        return beats

    assert inside(work) == [True, True, True, False]


def test_signals_to_its_parent() -> None:
    """A command that ends or stops the process that holds its limits, and so runs without any."""
    code = """
        for number in range(1, 65):
            for pid in (1, os.getppid()):
                try: os.kill(pid, number)
                except OSError as error: leaks.append(str(error))
        attempt("all", os.kill, -1, signal.SIGCONT)  # there is nobody
        print(leaks, os.getppid())
        while True: pass
        """
    done = inside(lambda box: box.run(["python", "-S", "-u", "-c", PRELUDE + textwrap.dedent(code)], seconds=1.0))
    assert (done.stdout, done.reason, done.exit_code) == ("[] 1\n", "time", -signal.SIGKILL)


def test_files_that_are_traps() -> None:
    """A file that is read or written through a link, a pipe or a folder that code left in its place."""
    code = """
        tmp = f"{os.sep}tmp"
        os.symlink("/proc/1/environ", "link"); os.mkfifo("pipe"); os.mkdir("folder"); os.symlink(tmp, "out")
        os.symlink("/dev/zero", "zero"); os.symlink(f"{tmp}/there", "through")
        open(f"{tmp}/there", "w").write("before")
        """

    async def work(box: Sandbox) -> dict[str, Any]:
        done = await box.run(["python", "-S", "-c", PRELUDE + textwrap.dedent(code)])
        assert done.ok, done
        said: dict[str, Any] = {}
        for path in ("link", "pipe", "folder", "zero", "out/there", "../etc/passwd", "/etc/passwd", "nothing", "."):
            try:
                said[path] = await box.read(path)
            except OSError as error:
                said[path] = error
        for path in ("pipe", "through", "new/deep"):
            await box.write({path: b"mine"})
            said[path] = (await box.read(path), (await box.run(["cat", f"{backend.TEMPORARY}/there"])).stdout)
        for path in ("out/there", "../x", f"{backend.TEMPORARY}/x", "folder"):
            with pytest.raises(OSError, match="the sandbox: .*: "):
                await box.write({path: "x"})
        return said

    said = inside(work)
    assert {path for path, got in said.items() if not isinstance(got, OSError)} == {"pipe", "through", "new/deep"}
    assert {got for got in said.values() if not isinstance(got, OSError)} == {("mine", "before")}


def tree(root: int) -> set[int]:
    """A process's descendants."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {root}
    while more := {each for each, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def left_behind() -> tuple[set[int], int, list[str]]:
    """What this process started and still runs, its mounts, and folders of sandboxes that are none."""
    mounts = len(Path("/proc/self/mountinfo").read_text().splitlines())
    temporary = os.listdir(tempfile.gettempdir())
    return tree(os.getpid()), mounts, sorted(name for name in temporary if name.startswith("tandem-unsandboxed"))


def test_nothing_is_left_behind() -> None:
    """A process, a mount, a file or a descriptor that stays after a sandbox, once for each of thousands."""

    async def many(config: SandboxConfig, count: int) -> None:
        pool = SandboxPool(config, warm=2)

        async def one(number: int) -> None:
            async with pool.sandbox({"n": f"{number}"}) as box:
                done = await box.run(["sh", "-c", "sleep 60 & cat n"])
                assert done.stdout == f"{number}", done

        for first in range(0, count, 10):
            await asyncio.gather(*(one(first + number) for number in range(10)))
        await pool.close()

    before = left_behind()
    asyncio.run(many(LIMITS, 10))
    descriptors = len(os.listdir("/proc/self/fd"))
    asyncio.run(many(LIMITS, 60))
    asyncio.run(many(SandboxConfig("unsandboxed_subprocess", processes=100_000), 10))
    assert left_behind() == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_sandbox_outlives_the_thread_that_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """bubblewrap's --die-with-parent, which ends a sandbox with the thread that started it.

    As root, one started by a thread that had ended was seen to go on all the same, so the thread is looked at too.
    """
    started: list[backend.Started] = []
    threads: list[threading.Thread] = []
    true = backend.Started

    def watched(*given: Any) -> backend.Started:
        threads.append(threading.current_thread())
        return true(*given)

    monkeypatch.setattr(backend, "Started", watched)

    def ask() -> None:
        started.append(backend.start(LIMITS).result())
        time.sleep(0.5)  # it comes up, and has asked the kernel to end with who started it

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert threads[0].is_alive()

    async def later() -> Result:
        box = Sandbox(started[0], LIMITS)
        await box.ready()
        await asyncio.sleep(0.2)
        try:
            return await box.run(["echo", "here"])
        finally:
            await box.close()

    assert asyncio.run(later()).stdout == "here\n"


OWNER = """
import asyncio, os, sys
from tandem.sandbox.config import SandboxConfig
from tandem.sandbox.pool import SandboxPool
async def main():
    pool = SandboxPool(SandboxConfig(seconds=60.0), warm=1)
    box = await pool.open()
    print("open", flush=True)
    await box.run(["sleep", "60"])
asyncio.run(main())
"""


def test_a_sandbox_ends_with_its_owner() -> None:
    """Sandboxes that run on after the process that they belong to was killed."""
    code = f"import sys; sys.path[:] = {sys.path!r}\n{OWNER}"
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert owner.stdout is not None and owner.stdout.readline() == b"open\n"
    until = time.monotonic() + 30
    while len(started := tree(owner.pid)) < 5 and time.monotonic() < until:  # two sandboxes of two, and the command
        time.sleep(0.05)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    while (left := [pid for pid in started if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(started) >= 5 and not left


def test_it_is_of_use() -> None:
    """A sandbox so tight that ordinary programs fail in it."""
    code = """
        import asyncio, json, multiprocessing, sqlite3, tempfile, urllib.request, http.server
        open("/dev/null", "w").write("x")
        assert os.urandom(4) and tempfile.mkdtemp().startswith("/tmp")
        with multiprocessing.Pool(2) as pool: assert pool.map(abs, [-1, 2]) == [1, 2]
        async def shell(): return await (await asyncio.create_subprocess_shell("true")).wait()
        assert asyncio.run(shell()) == 0
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert b"here" in urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/").read()
        sqlite3.connect("base").execute("create table t (x)")
        print(sys.stdin.read(), os.getcwd(), os.environ["HOME"], sys.version_info[:2] >= (3, 11))
        """
    wide = SandboxConfig()
    done = run_once(wide, ["python", "-c", PRELUDE + textwrap.dedent(code)], {"here": ""}, "ü")
    assert done.stdout.split() == ["ü", "/work", "/work", "True"], done
    missing = run_once(wide, ["no-such-program"])
    assert (missing.exit_code, missing.stderr) == (127, "no-such-program: No such file or directory\n")


def test_a_command_that_is_given_up() -> None:
    """A sandbox whose next command is answered with the end of one that was cancelled."""

    async def work(box: Sandbox) -> str:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(box.run(["sleep", "5"]), 0.1)
        with pytest.raises(Exception, match="the sandbox has ended"):
            await box.write({"a": "b"})
        return (await box.run(["echo", "x"])).reason

    assert inside(work) == "sandbox"


def test_in_a_run_of_low_priority() -> None:
    """Commands that cannot start where the run itself has a lower priority than they are given (`nice`)."""
    code = "from tandem.sandbox.config import *; from tandem.sandbox.pool import *; check(SandboxConfig()); print('ok')"
    argv, source = ["nice", "-n", "12", sys.executable, "-c", code], Path(__file__).parents[2] / "src"
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=source)
    assert done.stdout == "ok\n", done.stderr[-500:]
