"""Regression caught: code in a sandbox that reaches this machine's files, processes or network, or outruns a limit.

Every probe is harmless where it is not contained: it opens, asks or counts, and says what it got. No test here is
skipped: where no sandbox starts they fail, with what to do.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tandem.sandbox import backend
from tandem.sandbox.pool import check
from tests.sandboxes import LIMITS, python, refused

SECRET = "a-secret-of-this-machine"


@pytest.fixture(scope="module", autouse=True)
def works() -> None:
    check(LIMITS)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What there is to be found: a file that all may read, a process, servers on every kind of socket."""
    folder = tmp_path_factory.mktemp("machine")
    os.chmod(folder, 0o755)
    (folder / "secret.txt").write_text(SECRET)
    servers = []
    names = {"abstract": f"\0tandem-probe-{os.getpid()}", "path": f"{folder}/socket"}
    for family, address in (
        (socket.AF_INET, ("127.0.0.1", 0)),
        (socket.AF_INET6, ("::1", 0)),
        (socket.AF_UNIX, names["abstract"]),
        (socket.AF_UNIX, names["path"]),
    ):
        server = socket.socket(family)
        server.bind(address)
        server.listen()
        servers.append(server)
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind(("127.0.0.1", 0))
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", SECRET])
    ports = {name: str(each.getsockname()[1]) for name, each in zip(("v4", "v6"), servers, strict=False)}
    yield {
        "file": f"{folder}/secret.txt",
        "abstract": names["abstract"][1:],
        "path": names["path"],
        "udp": str(datagrams.getsockname()[1]),
        "sleeper": str(sleeper.pid),
        **ports,
    }
    sleeper.kill()
    sleeper.wait()
    for server in (*servers, datagrams):
        server.close()


# What code may try to learn -> it prints the leaks that it found. {names} are of `machine`.
SECRETS = {
    "a file by its path": 'attempt("file", read, "{file}")',
    "users and passwords": 'for name in ("passwd", "shadow", "hostname", "hosts"): attempt(name, read, "/etc/" + name)',
    "home folders": """
        for top in ("/home", "/root", "/var", "/mnt", "/srv", "/opt", "/boot", "/sys"):
            for folder, _, files in os.walk(top):
                if not folder.startswith(sys.base_prefix):
                    leaks.extend(f"{{folder}}/{{name}}" for name in files)
        """,
    "any file of the name": """
        for folder, folders, files in os.walk("/"):
            folders[:] = [name for name in folders if folder != "/" or name not in ("proc", "usr")]
            leaks.extend(f"{{folder}}/{{name}}" for name in files if name == "secret.txt")
        """,
    "through the root of another process": """
        for pid in [name for name in os.listdir("/proc") if name.isdigit()]:
            for door in ("root", "cwd"):
                attempt(pid, read, f"/proc/{{pid}}/{{door}}{file}")
        """,
    "a link to a file": """
        os.symlink("{file}", "link")
        attempt("link", read, "link")
        """,
    "a hard link to a file": """
        attempt("secret", os.link, "{file}", "hard")
        attempt("a program", os.link, "/usr/bin/env", "env")
        """,
    "a file by its number": refused("name_to_handle_at", "open_by_handle_at"),
    "the environment": """
        leaks += [name for name in os.environ if name == "PROBE"]
        for pid in [name for name in os.listdir("/proc") if name.isdigit()]:
            try:
                leaks += [pid] if b"{secret}" in read(f"/proc/{{pid}}/environ") else []
            except OSError:
                pass
        """,
    "other processes": """
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        leaks += [pid for pid in pids if pid not in (1, os.getpid())]
        leaks += [pid for pid in pids if pid != os.getpid() and b"{secret}" in read(f"/proc/{{pid}}/cmdline")]
        """,
    "a process by its number": """
        attempt("signal", os.kill, {sleeper}, 0)
        attempt("pidfd", os.pidfd_open, {sleeper})
        """,
    "the memory of its parent": """
        for name in ("mem", "environ", "maps", "syscall", "stack"):
            attempt(name, read, f"/proc/1/{{name}}")
        attempt("descriptors", lambda: [os.readlink(f"/proc/1/fd/{{n}}") for n in os.listdir("/proc/1/fd")])
        attempt("stdout", open, "/proc/1/fd/1", "wb")
        """,
    "another process's calls": refused("ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd"),
    "keys": refused("add_key", "request_key", "keyctl"),
    "devices": """
        known = {{"null", "zero", "full", "random", "urandom", "tty", "pts", "shm", "fd", "core", "ptmx"}}
        leaks += set(os.listdir("/dev")) - known - {{"stdin", "stdout", "stderr", "console"}}
        attempt("console", lambda: open("/dev/tty"))
        attempt("mknod", os.mknod, "disk", 0o60600, os.makedev(8, 0))
        attempt("kernel log", read, "/proc/kmsg")
        attempt("kernel memory", read, "/proc/kcore")
        """,
    "sockets of this machine, IPv4": """
        attempt("tcp", socket.create_connection, ("127.0.0.1", {v4}), 2)
        """,
    "sockets of this machine, IPv6": """
        attempt("tcp", socket.create_connection, ("::1", {v6}), 2)
        """,
    "sockets of this machine, abstract": """
        attempt("abstract", socket.socket(socket.AF_UNIX).connect, "\\0{abstract}")
        """,
    "sockets of this machine, by path": """
        attempt("path", socket.socket(socket.AF_UNIX).connect, "{path}")
        """,
    "sockets that are listed": """
        for name in ("tcp", "tcp6", "udp", "unix"):
            leaks += read(f"/proc/net/{{name}}").splitlines()[1:]
        """,
    "datagrams": """
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender.connect(("127.0.0.1", {udp}))
        sender.send(b"x")
        time.sleep(0.1)
        attempt("udp", sender.send, b"x")  # refused, since nobody took the first
        """,
    "the world": """
        for address in ("192.0.2.1", "198.51.100.1"):
            attempt(address, socket.create_connection, (address, 80), 2)
        attempt("name", socket.getaddrinfo, "example.com", 80)
        leaks += [line for line in read("/proc/net/dev").splitlines()[2:] if not line.strip().startswith(b"lo:")]
        """,
    "every family of sockets": """
        for family in range(50):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
                if family not in (1, 2, 10) or (kind == socket.SOCK_RAW and family != 1):
                    attempt((family, kind), socket.socket, family, kind)
        """,
    "netlink, packet, vsock": """
        for family in (16, 17, 40, 38, 31, 44):
            try:
                socket.socket(family, socket.SOCK_RAW)
            except OSError as error:
                leaks += [] if error.errno == errno.EAFNOSUPPORT else [(family, str(error))]
        """,
}


@pytest.mark.parametrize("probe", SECRETS)
def test_what_cannot_be_learnt(probe: str, machine: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, a variable, a process or a socket of this machine that code in the sandbox finds."""
    monkeypatch.setenv("PROBE", SECRET)
    code = textwrap.dedent(SECRETS[probe])
    for name, value in {**machine, "secret": SECRET}.items():
        code = code.replace(f"{{{name}}}", value)
    code = code.replace("{{", "{").replace("}}", "}")
    done = python(code + "\nprint(leaks)")
    assert (done.stdout, done.stderr, done.exit_code) == ("[]\n", "", 0)


# What code may try to change -> it prints what it could.
CHANGES = {
    "files of the system": """
        for folder in ("/", "/usr", "/usr/bin", "/etc", "/dev", "/run", "/run/python", "/root", sys.base_prefix):
            attempt(folder, os.open, folder + "/probe", os.O_CREAT | os.O_WRONLY)
            attempt(folder, os.mkdir, folder + "/probe2")
        attempt("python", os.open, os.path.realpath(sys.executable), os.O_WRONLY)
        attempt("unlink", os.unlink, "/usr/bin/env") if os.access("/usr/bin", os.W_OK) else None
        """,
    "settings of the kernel": """
        for folder, _, files in os.walk("/proc/sys"):
            for name in files:
                if os.path.exists(path := f"{folder}/{name}"):
                    attempt(path, os.open, path, os.O_WRONLY)
        for path in ("/proc/sysrq-trigger", "/proc/self/oom_score_adj", "/proc/1/oom_score_adj", "/proc/mtrr"):
            attempt(path, os.open, path, os.O_WRONLY)
        """,
    "mounts": refused("mount", "umount2", "pivot_root", "chroot", "open_tree", "fsopen", "mount_setattr"),
    "namespaces": refused("unshare", "setns")
    + """
clone, clone3 = {"x86_64": (56, 435), "aarch64": (220, 435)}[os.uname().machine]
if libc.syscall(clone, 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0) != -1 or ctypes.get_errno() != errno.EPERM:
    leaks.append("clone")
refused(clone3, error=errno.ENOSYS)
""",
    "its rights": """
        status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
        leaks += [name for name in status if name in ("CapInh", "CapPrm", "CapEff", "CapAmb") and int(status[name], 16)]
        leaks += [] if status["NoNewPrivs"].strip() == "1" and status["Seccomp"].strip() == "2" else [status]
        attempt("root", os.setuid, 0)
        attempt("groups", os.setgroups, [0])
        attempt("name", socket.sethostname, "probe")
        """,
    "its limits": """
        for name in ("CPU", "DATA", "FSIZE", "NOFILE", "CORE"):
            attempt(name, resource.setrlimit, getattr(resource, f"RLIMIT_{name}"), (resource.RLIM_INFINITY,) * 2)
        attempt("nice", os.nice, -10)
        """,
    "memory in nobody's account": refused(
        "memfd_create", "memfd_secret", "shmget", "semget", "msgget", "io_uring_setup"
    ),
    "the kernel": refused(
        "bpf", "perf_event_open", "userfaultfd", "init_module", "finit_module", "kexec_load", "reboot"
    ),
}


@pytest.mark.parametrize("probe", CHANGES)
def test_what_cannot_be_changed(probe: str) -> None:
    """A file, a setting or a right outside of its folders that code in the sandbox changes."""
    done = python(textwrap.dedent(CHANGES[probe]) + "\nprint(leaks)")
    assert (done.stdout, done.stderr, done.exit_code) == ("[]\n", "", 0)


# What code may use without end -> the reason that it is ended for; "": the system says no, and it goes on to its "ok".
EXCESSES = {
    # No probe makes more than two hundred, contained or not. Where the system counts them, it refuses them.
    "processes": (
        "processes",
        """
        made = 0
        for _ in range(200):
            try:
                if os.fork() == 0: time.sleep(60); os._exit(0)
                made += 1
            except BlockingIOError: pass
        print("ok" if made < 24 else made)
        """,
    ),
    "processes of processes": (
        "processes",
        """
        first = os.getpid()
        for _ in range(7):
            try: os.fork()
            except BlockingIOError: pass
        time.sleep(0.5)
        count = sum(name.isdigit() for name in os.listdir("/proc"))
        print("ok" if count <= 25 else count, flush=True) if os.getpid() == first else None
        os._exit(0)  # an interpreter's end writes to pages that it shares, and 24 at once would need more memory
        """,
    ),
    "processes that end": (
        "time",
        """
        while True:
            if os.fork() == 0: os._exit(0)
            os.wait()
        """,
    ),
    "processes that detach": (
        "processes",
        """
        made = 0
        for _ in range(200):
            try:
                if os.fork() == 0:
                    os.setsid()
                    try:
                        if os.fork(): os._exit(0)
                    except BlockingIOError: os._exit(1)
                    time.sleep(60)
                made += os.waitstatus_to_exitcode(os.wait()[1]) == 0
            except BlockingIOError: pass
        print("ok" if made < 24 else made)
        """,
    ),
    "threads": (
        "processes",
        """
        threading.stack_size(65536)
        made = 0
        for _ in range(200):
            try: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            except RuntimeError: continue
            made += 1
        print("ok" if made < 24 else made, flush=True)
        os._exit(0)
        """,
    ),
    "memory of its own": (
        "",
        """
        try: bytearray(10**9)
        except MemoryError: print("ok")
        """,
    ),
    "memory of its children": (
        "memory",
        """
        for _ in range(4):
            if os.fork() == 0:
                held = b"x" * 40_000_000
                time.sleep(60)
        time.sleep(60)
        """,
    ),
    "memory that is shared": (
        "memory",
        """
        held = mmap.mmap(-1, 200_000_000)
        for at in range(0, 200_000_000, 4096): held[at] = 1
        time.sleep(60)
        """,
    ),
    "memory in files": (
        "memory",
        """
        for n in range(9):
            try:
                with open(f"{('.', '/tmp', '/dev/shm')[n % 3]}/{n}", "wb") as file: file.write(b"x" * 15_000_000)
            except OSError:
                pass
        held = b"x" * 70_000_000
        time.sleep(60)
        """,
    ),
    "a file": (
        "",
        """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try: open("big", "wb").write(b"x" * 40_000_000)
        except OSError: print("ok")
        """,
    ),
    "a sparse file": (
        "",
        """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try: os.posix_fallocate(open("big", "wb").fileno(), 0, 1 << 40)
        except OSError: print("ok")
        """,
    ),
    "files in all": (
        "",
        """
        try:
            for n in range(9):
                with open(f"{n}", "wb") as file: file.write(b"x" * 8_000_000)
        except OSError:
            print("ok" if n == 2 else n)
        """,
    ),
    "files": (
        "files",
        """
        for n in range(100_000): open(f"f{n}", "w").close()
        time.sleep(60)
        """,
    ),
    "links": (
        "files",
        """
        open("a", "w").close()
        for n in range(100_000): os.link("a", f"f{n}")
        time.sleep(60)
        """,
    ),
    "folders": ("files", 'while True: os.mkdir("d"); os.chdir("d")'),
    "output": ("output", 'while True: print("x" * 1000)'),
    "output that is binary": ("output", "while True: os.write(1, bytes(range(256)) * 16)"),
    "output of errors": ("output", 'while True: os.write(2, b"x" * 4096)'),
    "time of the processor": ("time", "while True: pass"),
    "time of nobody": ("time", "time.sleep(600)"),
    "time, against all signals": (
        "time",
        """
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: time.sleep(1)
        """,
    ),
    "descriptors": (
        "",
        """
        held = []
        try:
            while True: held.append(open("/dev/null"))
        except OSError:
            held.clear()
            print("ok")
        """,
    ),
}


@pytest.mark.parametrize("probe", EXCESSES)
def test_limits(probe: str) -> None:
    """Time, memory, processes, files or output past the limit; or a limit that kills without its reason."""
    reason, code = EXCESSES[probe]
    began = time.monotonic()
    done = python(code, replace(LIMITS, seconds=3.0))
    if reason == "processes" and (os.getuid() == 0 or backend.counts_by_namespace()):  # the kernel refuses them
        assert not done.reason, done
        assert done.stdout == "ok\n", done
    else:
        assert (done.reason, done.stdout == "ok\n") == (reason, not reason), done
    assert len(done.stdout) < 2 * LIMITS.output_bytes and time.monotonic() - began < 60
