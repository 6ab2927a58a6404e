"""The commands that start a sandbox, by backend, and what to do where one does not start."""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from tandem import env
from tandem.errors import ConfigError, SandboxError
from tandem.sandbox import calls
from tandem.sandbox.config import SandboxConfig

WORK = "/".join(("", "work"))  # inside
TEMPORARY = "/".join(("", "tmp"))
BIN = "/run/python"  # a folder with `python` in it
USER_ID = 1000
INSTALL = "Debian, Ubuntu: apt-get install bubblewrap; or use task.sandbox.backend=container"
CONTAINER_WORK = "/".join(("", "tandem"))  # a folder that an image has keeps its owner, and is not to be written
CONTAINER_PROCESSES = 16  # at least: the runtime starts the first one with threads of its own
CONTAINER_MEMORY_BYTES = 64 << 20  # more than its processes may have: the limits inside act first
REMOVE_S = 30.0  # for a container to be removed
END_S = 5.0  # for a sandbox to be gone once its orders have ended

# What bubblewrap says -> what to do.
REMEDIES = {
    r"No permissions to creat|namespace failed: Operation not permitted|unshare.*not permitted": (
        "user namespaces are off. Debian: sysctl kernel.unprivileged_userns_clone=1; in a container start it with "
        "--security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt systempaths=unconfined"
    ),
    r"setting up uid map|loopback: Failed|Permission denied": (
        "the system refuses namespaces to programs without a profile. Ubuntu 24.04: "
        "sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile for bwrap that allows userns"
    ),
    r"No space left on device": "no user namespace is left: sysctl user.max_user_namespaces=10000",
    r"mount proc": (
        "a container hides parts of /proc. Start it with --security-opt systempaths=unconfined (Docker), "
        "--security-opt unmask=ALL (Podman)"
    ),
    r"Cannot connect to the Docker daemon": (
        "Docker's daemon does not run: start it, or take docker out of PATH where podman is to be used"
    ),
    r"Unknown option": "bubblewrap is older than 0.7: install a newer one",
}


@dataclass(frozen=True, slots=True)
class Command:
    """What is started, with what it inherits, the folder that is removed after it, and what ends it where it has to be
    killed."""

    argv: tuple[str, ...]
    environment: dict[str, str]
    work: str
    inherits: tuple[int, ...] = ()
    folder: str = ""
    remove: tuple[str, ...] = ()


class Started:
    """A sandbox that is coming up: its process, the socket to its first process, and what it says to stderr."""

    def __init__(self, config: SandboxConfig, stderr: IO[bytes], command: Command) -> None:
        self.config, self.stderr, self.command = config, stderr, command
        self.socket, theirs = socket.socketpair()
        try:
            self.popen = subprocess.Popen(
                command.argv,
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=stderr,
                env=command.environment,
                pass_fds=command.inherits,
                cwd=command.folder or "/",
                start_new_session=True,
            )
        except BaseException:
            self.socket.close()
            raise
        finally:
            theirs.close()
            for descriptor in command.inherits:
                os.close(descriptor)
        # Where nobody ends it: with whoever held it, or with this process.
        self._gone = weakref.finalize(self, _drop, self.popen, self.socket, stderr, command)

    def end(self) -> None:
        """Wait until it is gone: its first process leaves where its socket is closed. Otherwise kill it."""
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(END_S)
        self._gone()

    def fault(self) -> SandboxError:
        """Why it did not come up, once its socket has ended."""
        try:
            self.popen.wait(END_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
        self.stderr.seek(0)
        said = " ".join(self.stderr.read(4000).decode(errors="replace").split())
        advice = next((advice for pattern, advice in REMEDIES.items() if re.search(pattern, said)), "")
        advice = advice or "tandem doctor says more"
        reason = said or f"its process ended with {self.popen.returncode}"
        return SandboxError(
            f"task.sandbox.backend={self.config.backend}: no sandbox starts: {reason[-500:]}. {advice}."
        )


def _drop(popen: subprocess.Popen[bytes], inside: socket.socket, stderr: IO[bytes], command: Command) -> None:
    inside.close()
    lives = popen.poll() is None
    popen.kill()  # nothing where it has ended
    popen.wait()
    stderr.close()
    if lives and command.remove:  # a container outlives the client that started it
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                command.remove, env=command.environment, capture_output=True, stdin=subprocess.DEVNULL, timeout=REMOVE_S
            )
    if command.folder:
        shutil.rmtree(command.folder, ignore_errors=True)


def start(config: SandboxConfig) -> Future[Started]:
    """Begin to start a sandbox. The future has SandboxError or ConfigError where it cannot be.

    It runs in a thread that lives as long as this process: bubblewrap's --die-with-parent ends a sandbox with the
    *thread* that started it.
    """
    return starter(os.getpid()).submit(_start, config)


@cache
def starter(process_id: int) -> ThreadPoolExecutor:
    """The one thread of this process that starts sandboxes (a fork has none of its parent's)."""
    return ThreadPoolExecutor(1, thread_name_prefix="sandbox")


def _start(config: SandboxConfig) -> Started:
    command = COMMANDS[config.backend](config)
    stderr = tempfile.TemporaryFile()
    try:
        return Started(config, stderr, command)
    except OSError as error:
        stderr.close()
        raise SandboxError(f"task.sandbox.backend={config.backend}: {error}. {INSTALL}.") from error


def interpreter() -> Path:
    """This machine's Python, without a virtual environment around it."""
    return Path(getattr(sys, "_base_executable", "") or sys.executable).resolve()


@cache
def init_text() -> str:
    return Path(__file__).with_name("init.py").read_text(encoding="utf-8")


def settings(config: SandboxConfig, work: str, folders: tuple[str, ...], path: str, user: int = 0) -> str:
    """What the first process is told of limits and of the commands' environment."""
    rlimits = {
        "RLIMIT_CPU": config.cpu_seconds,
        "RLIMIT_DATA": config.memory_bytes,
        "RLIMIT_FSIZE": config.file_bytes,
        "RLIMIT_NOFILE": 256,
        "RLIMIT_CORE": 0,
    }
    if user or (os.getuid() and config.backend == "bubblewrap" and counts_by_namespace()):
        rlimits["RLIMIT_NPROC"] = config.processes + 1  # with the first one
    environment = {"PATH": path, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    told: dict[str, Any] = {
        "filters": {each: calls.program(each).hex() for each in calls.MACHINES}
        if config.backend == "container"
        else {},
        "user": user,
        "work": work,
        "folders": folders,
        "rlimits": rlimits,
        "environment": environment,
    }
    told |= {name: getattr(config, name) for name in ("memory_bytes", "processes", "files", "output_bytes")}
    return json.dumps(told)


def counts_by_namespace() -> bool:
    """Whether RLIMIT_NPROC is of a sandbox alone, though the user is not: since Linux 5.14."""
    return tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2]) >= (5, 14)


def bubblewrap(config: SandboxConfig) -> Command:
    """A root of this machine's programs and its Python, read-only, and folders of its own.

    Where root starts it, commands have a user id that nothing else has, in place of a user namespace: root's own id in
    one is still root to the kernel, which then ignores its limit on processes and opens /proc/sys for writing.
    """
    program = shutil.which("bwrap", path=env.foreign().get("PATH"))
    if program is None:
        raise SandboxError(f"task.sandbox.backend=bubblewrap: bwrap is not installed. {INSTALL}.")
    python = interpreter()
    prefix = Path(sys.base_prefix).resolve()
    reader, writer = os.pipe()
    os.write(writer, calls.program())  # far less than a pipe holds
    os.close(writer)
    user = unused_user() if os.getuid() == 0 else 0
    argv = [program, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    argv += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL"]
    if user:
        argv += [word for name in ("SETUID", "SETGID", "CHOWN") for word in ("--cap-add", f"CAP_{name}")]
    else:
        argv += ["--unshare-user", "--uid", f"{USER_ID}", "--gid", f"{USER_ID}"]
    argv += ["--hostname", "sandbox", "--seccomp", f"{reader}"]
    argv += ["--ro-bind", "/usr", "/usr"]
    for top in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(top):
            argv += ["--symlink", os.readlink(top), top]
        elif os.path.isdir(top):
            argv += ["--ro-bind", top, top]
    for path in ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"):
        argv += ["--ro-bind-try", path, path]
    for path in (*(f"{each}" for each in (prefix, python.parent.parent)), *config.paths):
        if not Path(path).is_relative_to("/usr") and path != "/":
            for parent in reversed(Path(path).parents[:-1]):
                argv += ["--perms", "0755", "--dir", f"{parent}"]
            argv += ["--ro-bind", path, path]
    argv += ["--proc", "/proc", "--dev", "/dev", "--dir", BIN, "--symlink", f"{python}", f"{BIN}/python"]
    argv += ["--symlink", f"{python}", f"{BIN}/python3"]
    size = ["--size", f"{config.file_bytes}", "--tmpfs"]
    argv += [*size, "/dev/shm", *size, TEMPORARY, *size, WORK]
    # The root and /dev are in memory too and can be written, with no limit.
    argv += ["--remount-ro", "/proc", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", WORK, "--"]
    argv += [f"{python}", "-I", "-S", "-c", init_text()]
    argv += [settings(config, WORK, (TEMPORARY, "/dev/shm"), f"{BIN}:/usr/bin:/bin", user)]
    return Command(tuple(argv), {}, WORK, (reader,))


def unused_user() -> int:
    """A user id that no other sandbox and nobody else has: beyond those that are given to people, where there are."""
    known = int(Path("/proc/self/uid_map").read_text().split()[2])
    first, last = (1 << 30, 1 << 31) if known > 1 << 31 else (20_000, 60_000)
    return first + secrets.randbelow(last - first)


def container(config: SandboxConfig) -> Command:
    """The same in a container of Docker or Podman, whose first process lays the filter on itself.

    Podman would lay writable folders over a read-only root, and this machine's names into /etc/hosts.
    """
    path = env.foreign().get("PATH")
    program = next(filter(None, (shutil.which(name, path=path) for name in ("docker", "podman"))), None)
    if program is None:
        raise SandboxError(
            "task.sandbox.backend=container: neither docker nor podman is found. Install one, or use "
            "task.sandbox.backend=bubblewrap."
        )
    memory = config.memory_bytes + CONTAINER_MEMORY_BYTES
    name = f"tandem-{secrets.token_hex(8)}"
    argv = [program, "run", "--rm", "--interactive", "--name", name, "--network", "none", "--read-only"]
    argv += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", f"{USER_ID}:{USER_ID}"]
    argv += ["--hostname", "sandbox", "--memory", f"{memory}", "--memory-swap", f"{memory}"]
    argv += ["--pids-limit", f"{max(config.processes + 1, CONTAINER_PROCESSES)}", "--shm-size", f"{config.file_bytes}"]
    if Path(program).name == "podman":
        argv += ["--read-only-tmpfs=false", "--no-hosts"]
    for folder in (TEMPORARY, CONTAINER_WORK):
        argv += ["--tmpfs", f"{folder}:rw,exec,nosuid,nodev,mode=1777,size={config.file_bytes}"]
    for path in config.paths:
        argv += ["--volume", f"{path}:{path}:ro"]
    told = settings(config, CONTAINER_WORK, (TEMPORARY, "/dev/shm"), "/usr/local/bin:/usr/bin:/bin")
    argv += ["--workdir", CONTAINER_WORK, "--entrypoint", "python3", config.image, "-I", "-S", "-c", init_text(), told]
    remove = (program, "rm", "--force", name)
    return Command(tuple(argv), env.foreign(), CONTAINER_WORK, remove=remove)


def refuse(config: SandboxConfig) -> Command:
    raise ConfigError(
        "task.sandbox.backend=refuse, and this task runs code. Use bubblewrap or container, or another task."
    )


def unsandboxed_subprocess(config: SandboxConfig) -> Command:
    """A folder and limits, and nothing that keeps code from this machine's files, processes and network."""
    folder = tempfile.mkdtemp(prefix="tandem-unsandboxed-")
    python, path = interpreter(), f"{interpreter().parent}:/usr/bin:/bin"
    argv = (f"{python}", "-I", "-S", "-c", init_text(), settings(config, folder, (), path))
    return Command(argv, {}, folder, (), folder)


COMMANDS = {
    "bubblewrap": bubblewrap,
    "container": container,
    "refuse": refuse,
    "unsandboxed_subprocess": unsandboxed_subprocess,
}
