"""Regression caught: limits, commands and filters of a sandbox that are not those that were asked for."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import platform
import re
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.cli import doctor
from tandem.config import dump, load, override
from tandem.errors import ConfigError, SandboxError
from tandem.program.config import TaskConfig
from tandem.sandbox import backend, calls
from tandem.sandbox.box import Result, Sandbox
from tandem.sandbox.config import SandboxConfig
from tandem.sandbox.init import share
from tandem.sandbox.pool import SandboxPool, check, run_once
from tandem.sandbox.values import decode, encode

MB = 1 << 20
OPEN = SandboxConfig(
    "unsandboxed_subprocess", seconds=5.0, cpu_seconds=2, memory_bytes=200 * MB, file_bytes=MB, output_bytes=10_000
)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"backend": "docker"}, "sandbox.backend=docker"),
        ({"backend": "container"}, "task.sandbox.image is empty"),
        ({"seconds": "0"}, "task.sandbox.seconds is 0"),
        ({"processes": "0"}, "task.sandbox.processes is 0"),
        ({"paths": "there"}, "task.sandbox.paths has 'there'"),
        ({"paths": "/no/such/place"}, "task.sandbox.paths has '/no/such/place'"),
    ],
)
def test_settings_that_are_wrong(settings: dict[str, str], said: str) -> None:
    """A limit of 0, or a backend misspelt, that shows when the first program has been sampled."""
    with pytest.raises(ConfigError, match=re.escape(said)):
        override(TaskConfig(), {f"sandbox.{name}": value for name, value in settings.items()})


def test_settings_travel() -> None:
    """A run's config.json that loses the sandbox's limits."""
    config = override(TaskConfig(), {"sandbox.memory_bytes": "1000000", "sandbox.paths": "/usr,/bin"})
    assert config.sandbox == SandboxConfig(memory_bytes=1_000_000, paths=("/usr", "/bin"))
    assert load(TaskConfig, json.loads(json.dumps(dump(config)))) == config


# The filter, run by hand.


def ruled(program: bytes, machine: int, number: int, first: int = 0) -> int:
    """What the kernel's machine returns for a call: 0 where it is allowed, else the error."""
    lines = list(struct.iter_unpack("<HBBI", program))
    words = {0: number, 4: machine, 16: first & 0xFFFFFFFF}
    at, held = 0, 0
    while True:
        code, yes, no, k = lines[at]
        at += 1
        if code == 0x20:
            held = words[k]
        elif code == 0x06:
            return 0 if k == 0x7FFF0000 else k & 0xFFFF if k >> 16 == 5 else -1
        else:
            at += yes if {0x15: held == k, 0x35: held >= k, 0x45: bool(held & k)}[code] else no


@pytest.mark.parametrize("machine", calls.MACHINES)
def test_the_filter_by_hand(machine: str) -> None:
    """A jump that is off by one, and a filter that allows what it is to refuse."""
    program, column = calls.program(machine), list(calls.MACHINES).index(machine)
    arch = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    socket, clone = {"x86_64": (41, 56), "aarch64": (198, 220)}[machine]
    refused = {numbers[column] for numbers in calls.REFUSED.values()}
    for number in range(600):
        wanted = errno.EPERM if number in refused else 0
        wanted = errno.ENOSYS if number == 435 else wanted
        wanted = errno.EAFNOSUPPORT if number in (socket, {41: 53, 198: 199}[socket]) else wanted
        assert ruled(program, arch, number) == wanted, number
        assert ruled(program, 0x40000003, number) == errno.EPERM  # a call as 32-bit programs make it
    assert [family for family in range(64) if ruled(program, arch, socket, family) == 0] == [1, 2, 10]
    for bit in range(32):
        wanted = errno.EPERM if 1 << bit in (0x20000, *(1 << n for n in range(25, 31))) else 0
        assert ruled(program, arch, clone, 1 << bit | 17) == wanted, bit
    assert ruled(program, arch, 0x40000000 + 101) == errno.EPERM
    assert len(program) // 8 < 256  # far below the kernel's 4096, and no jump is longer than a byte


def test_numbers_of_calls_are_the_kernels() -> None:
    """A number of another call in the table: one that is refused for nothing, and one that is not."""
    headers = {
        0: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        1: Path("/usr/include/asm-generic/unistd.h"),
    }
    seen = 0
    for column, header in headers.items():
        if header.exists():
            found = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text()))
            names = {name: numbers[column] for name, numbers in calls.REFUSED.items()}
            names |= {"clone": calls.CLONE[column], "clone3": calls.CLONE3[column], "socket": calls.SOCKET[column]}
            assert {name: int(found.get(name, number)) for name, number in names.items()} == names
            seen += len(names.keys() & found.keys())
    if not seen:
        pytest.skip("the kernel's headers are not installed (linux-libc-dev)")
    assert seen > 40


def test_an_unknown_processor() -> None:
    """A filter with another processor's numbers, which refuses other calls."""
    with pytest.raises(SandboxError, match="knows no system calls of riscv64, only of x86_64, aarch64"):
        calls.program("riscv64")


# Backends


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


FAKE = """#!{python}
import json, os, sys
words = sys.argv[1:]
with open(f"{record}.{{os.getpid()}}", "w") as file: json.dump(words, file)
if words[0] == "run": os.replace(file.name, {record!r})
told = json.loads(words[-1])
told["work"] = {work!r}
os.execv({python!r}, [{python!r}, *words[words.index("-I"):-1], json.dumps(told)])
"""


@pytest.mark.parametrize("program", ["docker", "podman"])
def test_a_container(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with a network, a disk that can be written or no limits; or one whose commands never run."""
    (tmp_path / "inside").mkdir()
    record = tmp_path / "words"
    text = FAKE.format(python=str(backend.interpreter()), record=str(record), work=str(tmp_path / "inside"))
    executable(tmp_path / program, text)
    monkeypatch.setenv("PATH", str(tmp_path))
    image = f"python:3.11-{program}"
    config = SandboxConfig("container", image=image, memory_bytes=100 * MB, file_bytes=MB, files=9)
    monkeypatch.setattr(backend, "interpreter", lambda: Path("python3"))
    done = run_once(config, [sys.executable, "-c", "print(open('a').read())"], {"a": "text"})
    assert (done.stdout, done.exit_code) == ("text\n", 0), done
    done = run_once(config, [sys.executable, "-c", "import socket; socket.socket(16, socket.SOCK_RAW)"])
    assert "Address family not supported" in done.stderr  # the first process laid the filter on
    words = json.loads(record.read_text())
    memory = str(164 * MB)
    tmpfs = f"rw,exec,nosuid,nodev,mode=1777,size={MB}"
    pairs = list(zip(words, words[1:], strict=False))
    for pair in (
        ("--network", "none"),
        ("--cap-drop", "ALL"),
        ("--security-opt", "no-new-privileges"),
        ("--user", "1000:1000"),
        ("--memory", memory),
        ("--memory-swap", memory),
        ("--pids-limit", "65"),
        ("--shm-size", str(MB)),
        ("--tmpfs", f"{backend.CONTAINER_WORK}:{tmpfs}"),
        ("--tmpfs", f"{backend.TEMPORARY}:{tmpfs}"),
        (image, "-I"),
    ):
        assert pair in pairs, pair
    assert words[0] == "run" and {"--rm", "--read-only", "--interactive"} < {*words} and "--privileged" not in words
    of_podman = {"--read-only-tmpfs=false", "--no-hosts"}  # which Docker does not know
    assert {*words} & of_podman == (of_podman if program == "podman" else set())


HANGS = """#!/bin/sh
echo "$@" >> {record}
[ "$1" = rm ] || exec sleep 600
"""


def test_a_container_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that goes on, or stays listed, since the client that started it had to be killed."""
    record = tmp_path / "words"
    executable(tmp_path / "podman", HANGS.format(record=record))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(backend, "END_S", 0.1)
    started = backend.start(SandboxConfig("container", image="x")).result()
    until = time.monotonic() + 30
    while not (record.exists() and "--name " in record.read_text()) and time.monotonic() < until:
        time.sleep(0.01)
    started.end()
    said = record.read_text()
    name = said.split("--name ")[1].split()[0]
    assert said.splitlines()[-1] == f"rm --force {name}" and name.startswith("tandem-")


def test_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback, or a run that starts, where no sandbox can."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="bwrap is not installed. Debian, Ubuntu: apt-get install bubblewrap"):
        check(SandboxConfig())
    (finding,) = doctor.check_sandbox()
    assert (finding.status, finding.fatal) == ("absent", False) and "apt-get install bubblewrap" in finding.found
    with pytest.raises(SandboxError, match="neither docker nor podman is found"):
        check(SandboxConfig("container", image="x"))
    executable(tmp_path / "docker", "#!/bin/sh\necho Cannot connect to the Docker daemon at unix >&2\nexit 1\n")
    with pytest.raises(SandboxError, match="Docker's daemon does not run: start it, or take docker out of PATH"):
        check(SandboxConfig("container", image="x"))
    with pytest.raises(ConfigError, match="task.sandbox.backend=refuse, and this task runs code"):
        check(SandboxConfig("refuse"))


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        (
            "bwrap: No permissions to creating new namespace, likely because the kernel does not allow it",
            "kernel.unprivileged_userns_clone=1",
        ),
        ("bwrap: Creating new namespace failed: Operation not permitted", "seccomp=unconfined"),
        ("bwrap: setting up uid map: Permission denied", "kernel.apparmor_restrict_unprivileged_userns=0"),
        ("bwrap: loopback: Failed RTM_NEWADDR: Operation not permitted", "AppArmor profile for bwrap"),
        ("bwrap: Can't mount proc on /newroot/proc: Operation not permitted", "systempaths=unconfined"),
        ("bwrap: Creating new namespace failed: No space left on device", "user.max_user_namespaces"),
        ("bwrap: Unknown option --size", "older than 0.7"),
        ("", "its process ended with 1"),
    ],
)
def test_what_bubblewrap_says_is_answered(
    said: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sandbox that does not start, with no reason or with the remedy of another one."""
    executable(tmp_path / "bwrap", f'#!/bin/sh\necho "{said}" >&2\nexit 1\n')
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError) as caught:
        check(SandboxConfig())
    assert said in str(caught.value) and remedy in str(caught.value)
    others = [other for other in backend.REMEDIES.values() if remedy not in other and other in str(caught.value)]
    assert not others


def test_a_sandbox_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait without end for a sandbox that does not come up."""
    executable(tmp_path / "bwrap", "#!/bin/sh\nexec /bin/sleep 600\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("tandem.sandbox.box.START_S", 0.3)
    monkeypatch.setattr(backend, "END_S", 0.3)
    with pytest.raises(SandboxError, match="did not come up within 0.3 s"):
        check(SandboxConfig())


# A plain subprocess, by its name


def opened(argv: list[str], **more: Any) -> Result:
    return run_once(OPEN, argv, **more)


def test_a_plain_subprocess_has_limits(tmp_path: Path) -> None:
    """Limits that hold in a sandbox alone; a folder or a process that stays."""
    python = [str(backend.interpreter()), "-S", "-c"]
    done = opened(["sh", "-c", "cat; cat a; pwd"], files={"a": "file"}, stdin="in ")
    assert done.ok and done.stdout.startswith("in file/") and not Path(done.stdout[7:].strip()).exists()
    assert "MemoryError" in opened([*python, "bytearray(10**9)"]).stderr
    assert opened([*python, "while True: print('x' * 1000)"]).reason == "output"
    assert opened([*python, "while True: pass"]).reason == "time"
    big = opened([*python, "open('big', 'wb').write(b'x' * 10**8)"])
    assert big.exit_code != 0
    pids = opened(["sh", "-c", "setsid sleep 600 & echo $!; (sleep 600 &) ; echo $$"]).stdout.split()
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_output_says_that_it_was_cut() -> None:
    """Text that ends at the limit and looks whole; bytes that are no text and raise."""
    done = opened(["sh", "-c", "head -c 20000 /dev/zero"])
    assert done.stdout == "\0" * 10_000 + "\n[cut after 10,000 bytes]" and done.reason == "output"
    assert opened(["printf", r"\377\330a"]).stdout == "\ufffd\ufffda"


def test_input_that_nobody_reads() -> None:
    """A command that ends before it has read its stdin, and a wait for it to read; or one that is never given all."""
    text = "x" * 3_000_000
    assert opened(["true"], stdin=text).ok
    assert opened(["wc", "-c"], stdin=text).stdout.strip() == "3000000"


def test_wrong_use() -> None:
    """A command that is taken apart into letters."""
    with pytest.raises(ConfigError, match="the command is 'python main.py'. Give a list of words"):
        run_once(OPEN, "python main.py")


def test_a_closed_pool() -> None:
    """A pool that starts sandboxes after its end, which nobody closes."""

    async def ran() -> None:
        pool = SandboxPool(OPEN, warm=1)
        async with pool.sandbox() as box:
            assert (await box.run(["true"])).ok
        await pool.close()
        with pytest.raises(SandboxError, match="the pool of sandboxes was closed"):
            await pool.open()
        assert (await Sandbox.run(box, ["true"])).reason == "sandbox"

    asyncio.run(ran())


@pytest.mark.skipif(platform.system() != "Linux", reason="RLIMIT_NPROC by namespace is Linux's")
@pytest.mark.parametrize(
    ("user", "release", "counted"), [(0, "5.10.0", False), (1000, "6.1.0", True), (1000, "5.10.0", False)]
)
def test_who_has_a_limit_on_processes(user: int, release: str, counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """RLIMIT_NPROC where it counts all of a user's processes on the machine, so that nothing can start."""
    monkeypatch.setattr(os, "getuid", lambda: user)
    monkeypatch.setattr(platform, "release", lambda: release)
    told = json.loads(backend.settings(SandboxConfig(processes=7), "w", (), "p"))
    assert told["rlimits"].get("RLIMIT_NPROC") == (8 if counted else None) and told["processes"] == 7
    told = json.loads(backend.settings(SandboxConfig(processes=7), "w", (), "p", backend.unused_user()))
    assert told["rlimits"]["RLIMIT_NPROC"] == 8 and told["user"] > 19_999
    assert "RLIMIT_NPROC" not in json.loads(backend.settings(OPEN, "w", (), "p"))["rlimits"]


# Values between tests and program

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.sets(st.integers())
        | st.frozensets(st.text())
    ),
    max_leaves=20,
)


def refuse(value: Any) -> Any:
    raise ValueError(value)


def kinds(value: Any) -> Any:
    """The types of a value, all through: True equals 1."""
    inner = [*value.items()] if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return type(value), [kinds(each) for each in inner]


@given(PLAIN)
def test_values_arrive_as_they_were(value: Any) -> None:
    """A tuple that arrives as a list, a key that becomes text, True that becomes 1."""
    sent = json.loads(json.dumps(encode(value, refuse)))
    arrived = decode(sent, refuse)
    assert arrived == value and kinds(arrived) == kinds(value)


@given(st.recursive(st.none() | st.text() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_no_code_does_harm(code: Any) -> None:
    """An answer of a program that ends the tests with an error that they do not know."""
    try:
        decode(code, refuse)
    except (ValueError, TypeError, LookupError):
        pass


def test_memory_of_a_process_that_ended_is_nobody_s() -> None:
    """Many processes that end at once and are killed for memory: each counted with what it held when it was seen."""
    held = 50 * MB
    running = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    assert 0 < share(running.pid, (1, held)) < held
    assert running.stdin is not None
    running.stdin.close()
    os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOWAIT)
    assert share(running.pid, (1, held)) == 0  # not reaped yet
    running.wait()
    assert share(running.pid, (1, held)) == 0
