"""The first process inside a sandbox: takes orders on its stdin, runs commands, holds their limits, answers on stdout.

It is handed to the sandbox's Python as text, so it imports nothing but the standard library. It is PID 1 there: the
kernel keeps signals from inside away from it, it adopts whatever detaches itself, and with it all ends. What it runs
has its user id, so it is not dumpable: nobody reads its memory or takes its descriptors.

A message is two sizes, a JSON object and bytes (`HEADER`). Orders: run, write, read; answers: one each, and `out`
as it comes in a run that talks.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import stat
import struct
import sys
import time
from typing import Any

HEADER = struct.Struct(">II")  # bytes of JSON, bytes that follow it
TICK_S = 0.02  # between two looks at what runs
CHUNK = 1 << 16
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
SECCOMP_MODE_FILTER = 2
INSTRUCTION_BYTES = 8  # of a filter
CAPABILITY_VERSION = 0x20080522
PAGE = resource.getpagesize()


def receive(descriptor: int) -> tuple[dict[str, Any], bytes] | None:
    """The next order; None where who gives them has gone."""
    head = exactly(descriptor, HEADER.size)
    if head is None:
        return None
    sizes = HEADER.unpack(head)
    parts = [exactly(descriptor, size) for size in sizes]
    return None if None in parts else (json.loads(parts[0]), parts[1])  # type: ignore[arg-type, return-value]


def exactly(descriptor: int, size: int) -> bytes | None:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def send(descriptor: int, answer: dict[str, Any], rest: bytes = b"") -> None:
    text = json.dumps(answer).encode()
    left = memoryview(HEADER.pack(len(text), len(rest)) + text + rest)
    while left:
        left = left[os.write(descriptor, left) :]


class Stream:
    """What a command writes to one of its outputs, up to a limit."""

    def __init__(self, descriptor: int, limit: int) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor, self.limit = descriptor, limit
        self.kept = bytearray()
        self.cut = self.ended = False

    def take(self) -> bytes:
        """What is there now; b"" where nothing is, or where it ended."""
        try:
            part = os.read(self.descriptor, CHUNK)
        except BlockingIOError:
            return b""
        self.ended = self.ended or not part
        return part

    def keep(self) -> None:
        while not self.cut and (part := self.take()):
            self.kept += part
            if len(self.kept) > self.limit:
                self.cut = True
                del self.kept[self.limit :]


class Init:
    """The orders, and the state between them."""

    def __init__(self, settings: dict[str, Any], orders: int, answers: int) -> None:
        self.settings, self.orders, self.answers = settings, orders, answers
        self.alone = os.getpid() == 1  # whatever else runs here is a command's
        self.work = settings["work"]
        self.folders = [self.work, *settings["folders"]]  # file systems of this sandbox's own
        self.environment = {**settings["environment"], "HOME": self.work, "PWD": self.work}
        self.ended: dict[int, tuple[int, float]] = {}  # (code, seconds of the processor) of those that have
        self.in_background = False
        self.wake, theirs = os.pipe()
        for descriptor in (self.wake, theirs):
            os.set_blocking(descriptor, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)

    def serve(self) -> None:
        while True:
            if self.in_background and not select.select([self.orders], [], [], TICK_S)[0]:
                self.reap()
                if self.excess():
                    self.end_all()
                continue
            if (order := receive(self.orders)) is None:
                return
            asked, rest = order
            try:
                answer, blob = getattr(self, "do_" + asked["do"])(asked, rest)
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else None
                answer, blob = {"error": reason or str(error)}, b""
            send(self.answers, answer, blob)

    # Files

    def place(self, path: str) -> str:
        """A path below the working folder, its links followed; ValueError elsewhere."""
        whole = os.path.join(self.work, path)
        real = os.path.join(os.path.realpath(os.path.dirname(whole)), os.path.basename(whole))
        if not real.startswith(os.path.realpath(self.work) + os.sep) or os.path.basename(path) in ("", ".", ".."):
            raise ValueError("it is not below the working folder")
        return real

    def do_write(self, asked: dict[str, Any], rest: bytes) -> tuple[dict[str, Any], bytes]:
        at = 0
        for path, size in asked["files"]:
            try:
                real = self.place(path)
                os.makedirs(os.path.dirname(real), exist_ok=True)
                if os.path.lexists(real):
                    os.unlink(real)  # a pipe or a link that a command left is not written through
                descriptor = os.open(real, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                with open(descriptor, "wb") as file:
                    file.write(rest[at : at + size])
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}: {error.strerror if isinstance(error, OSError) else error}") from None
            at += size
        return {}, b""

    def do_read(self, asked: dict[str, Any], rest: bytes) -> tuple[dict[str, Any], bytes]:
        real = self.place(asked["path"])
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("it is no regular file")
            text = file.read(self.settings["output_bytes"] + 1)
        return {"cut": len(text) > self.settings["output_bytes"]}, text[: self.settings["output_bytes"]]

    # Commands

    def do_run(self, asked: dict[str, Any], rest: bytes) -> tuple[dict[str, Any], bytes]:
        """Run a command to its end or to a limit; then nothing of it runs on, but by `background`."""
        began = time.monotonic()
        stdin, outputs = self.start(asked)
        watch = Watch(self, asked, stdin, rest, outputs)
        reason = watch.through(began + asked["seconds"])
        self.in_background = asked["background"] and not reason
        if not self.in_background:
            self.end_all()
        watch.finish()
        code, processor_s = self.ended.get(watch.pid, (None, 0.0))
        self.ended.clear()
        reason = reason or ("output" if any(output.cut for output in outputs) else "")
        # By the kernel: first a signal that can be ignored. Its count and this one differ by a few hundredths.
        long = code == -signal.SIGKILL and processor_s > 0.8 * self.settings["rlimits"]["RLIMIT_CPU"]
        reason = reason or ("time" if long or code == -signal.SIGXCPU else "")
        out, err = (bytes(output.kept) for output in outputs)
        cut = [output.cut for output in outputs]
        answer = {"code": code, "reason": reason, "seconds": time.monotonic() - began, "out": len(out), "cut": cut}
        return answer, out + err

    def start(self, asked: dict[str, Any]) -> tuple[int, list[Stream]]:
        """Descriptors of its stdin and its outputs; its id becomes `asked["pid"]`."""
        pipes = [os.pipe() for _ in range(3)]
        theirs = [pipes[0][0], pipes[1][1], pipes[2][1]]
        asked["pid"] = os.fork()
        if asked["pid"] == 0:
            self.become(asked, theirs)
        for descriptor in theirs:
            os.close(descriptor)
        os.set_blocking(pipes[0][1], False)
        return pipes[0][1], [Stream(reader, self.settings["output_bytes"]) for reader, _ in pipes[1:]]

    def become(self, asked: dict[str, Any], descriptors: list[int]) -> None:
        """In the new process: turn into the command."""
        try:
            signal.set_wakeup_fd(-1)
            os.setsid()
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
            for ignored in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
                signal.signal(ignored, signal.SIG_DFL)
            for name, amount in self.settings["rlimits"].items():
                hard = resource.getrlimit(getattr(resource, name))[1]
                most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
                limits = min(amount, most), min(amount + (name == "RLIMIT_CPU"), most)
                resource.setrlimit(getattr(resource, name), limits)
            os.nice(5)  # who holds the limits goes first
            os.chdir(self.work)
            os.execvpe(asked["argv"][0], asked["argv"], self.environment)
        except BaseException as error:  # noqa: BLE001 - between fork and exec nothing may go on
            os.write(2, f"{asked['argv'][0]}: {getattr(error, 'strerror', error)}\n".encode())
        finally:
            os._exit(127)

    def reap(self) -> None:
        """Take the ends of those that ended."""
        while True:
            try:
                pid, status, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.ended[pid] = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime

    def end_all(self) -> None:
        """Kill all that runs here. In a namespace of its own in one call, which no fork outruns."""
        if self.alone:
            try:
                os.kill(-1, signal.SIGKILL)
            except ProcessLookupError:
                pass
            while True:
                try:
                    pid, status, _ = os.wait4(-1, 0)
                except ChildProcessError:
                    return
                self.ended[pid] = os.waitstatus_to_exitcode(status), 0.0
        while others := self.others():
            for pid in others:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            self.reap()

    def others(self) -> dict[int, tuple[int, int]]:
        """(threads, resident bytes) of the processes that came of commands; those that ended count until reaped."""
        found, parents = {}, {}
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                try:
                    with open(f"/proc/{name}/stat", "rb") as file:
                        fields = file.read().rpartition(b")")[2].split()
                except OSError:
                    continue
                found[int(name)] = int(fields[17]), PAGE * int(fields[21])
                parents[int(name)] = int(fields[1])
        if self.alone:
            return found
        ours = {os.getpid()}
        while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
            ours |= more
        return {pid: found[pid] for pid in ours & found.keys()}

    def excess(self) -> str:
        """The limit that all processes together are past, or ""."""
        if self.alone and sum(map(str.isdigit, os.listdir("/proc"))) > self.settings["processes"] + 1:
            return "processes"  # before a look at each: there may be many more by then
        others = self.others()
        if sum(threads for threads, _ in others.values()) > self.settings["processes"]:
            return "processes"
        in_files = number = 0
        for folder in self.folders if self.alone else ():
            system = os.statvfs(folder)
            in_files += (system.f_blocks - system.f_bfree) * system.f_frsize
            number += system.f_files - system.f_ffree
        if number > self.settings["files"] + len(self.folders):
            return "files"
        left = self.settings["memory_bytes"] - in_files
        resident = sum(size for _, size in others.values())
        # What several share counts once; to know that takes a walk of their page tables.
        return "memory" if resident > left and sum(map(share, others, others.values())) > left else ""


def share(pid: int, seen: tuple[int, int]) -> int:
    """Bytes of a process, what it shares divided by those that share it; all where it does not let itself be read.

    None of one that ended since it was seen: many that end at once would be killed for the memory that they gave back.
    """
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return 1024 * int(line.split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
    except OSError:
        pass
    return seen[1]


class Watch:
    """A command while it runs."""

    def __init__(self, init: Init, asked: dict[str, Any], stdin: int, first: bytes, outputs: list[Stream]) -> None:
        self.init, self.pid, self.talks = init, asked["pid"], asked["talks"]
        self.stdin, self.waiting = stdin, bytearray(first)
        self.outputs = outputs
        self.poll = select.poll()
        for descriptor in (init.orders, init.wake, *(output.descriptor for output in outputs)):
            self.poll.register(descriptor, select.POLLIN)
        self.stopped = False
        self.feed()

    def through(self, until: float) -> str:
        """Until it ends; why it has to be ended, or ""."""
        looked = 0.0
        while True:
            # What talks may talk faster than a tick.
            events = self.poll.poll(1000 * max(0.0, min(TICK_S, until - time.monotonic())))
            self.heed([descriptor for descriptor, _ in events])
            if events:
                self.init.reap()
            if self.pid in self.init.ended:
                return ""
            now = time.monotonic()
            if self.stopped or any(output.cut for output in self.outputs):
                return "stopped" if self.stopped else "output"
            if now >= until:
                return "time"
            if now - looked >= TICK_S:
                looked = now
                if reason := self.init.excess():
                    return reason

    def heed(self, descriptors: list[int]) -> None:
        if self.init.wake in descriptors:
            os.read(self.init.wake, CHUNK)
        if self.init.orders in descriptors:
            self.order()
        for output in self.outputs:
            if output.descriptor in descriptors:
                self.listen(output)
        if self.stdin in descriptors:
            self.feed()

    def listen(self, output: Stream) -> None:
        if self.talks and output is self.outputs[0]:
            if part := output.take():
                send(self.init.answers, {"out": True}, part)
        else:
            output.keep()
        if output.ended:
            self.poll.unregister(output.descriptor)

    def order(self) -> None:
        """What comes while it runs: more for its stdin, or its end."""
        if (order := receive(self.init.orders)) is None:
            self.init.end_all()
            os._exit(0)
        asked, rest = order
        if asked["do"] == "stop":
            self.stopped = True
        else:
            self.waiting += rest
            self.feed()

    def feed(self) -> None:
        """Give it of its stdin what it takes."""
        if self.stdin < 0:
            return
        try:
            while self.waiting:
                del self.waiting[: os.write(self.stdin, self.waiting[:CHUNK])]
        except BlockingIOError:
            self.poll.register(self.stdin, select.POLLOUT)
            return
        except BrokenPipeError:
            self.waiting.clear()
        try:
            self.poll.unregister(self.stdin)
        except KeyError:
            pass
        if not self.talks:
            os.close(self.stdin)
            self.stdin = -1

    def finish(self) -> None:
        """What it wrote last, and the ends of its pipes."""
        for output in self.outputs:
            if self.talks and output is self.outputs[0]:
                while part := output.take():
                    send(self.init.answers, {"out": True}, part)
            else:
                output.keep()
            os.close(output.descriptor)
        if self.stdin >= 0:
            os.close(self.stdin)


def refuse(libc: Any, program: bytes) -> None:
    """Lay a filter of system calls on this process and all that come of it, where nobody else did."""
    import ctypes

    text = ctypes.create_string_buffer(program, len(program))
    filtered = struct.pack("HL", len(program) // INSTRUCTION_BYTES, ctypes.addressof(text))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filtered, 0, 0):
        raise OSError("prctl(PR_SET_SECCOMP) failed")


def main(settings: dict[str, Any]) -> None:
    import ctypes

    libc = ctypes.CDLL(None)
    prctl = libc.prctl
    if settings["user"]:
        for folder in (settings["work"], *settings["folders"]):
            os.chown(folder, settings["user"], settings["user"])
        os.setgroups([])
        os.setresgid(*[settings["user"]] * 3)
        os.setresuid(*[settings["user"]] * 3)
        libc.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())  # nor inherited
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # as it was before
    if prctl(PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise OSError("prctl(PR_SET_DUMPABLE) failed")
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if text := settings["filters"].get(os.uname().machine):
        refuse(libc, bytes.fromhex(text))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # PID 1 is only reached by signals that it handles
    orders, answers = os.dup(0), os.dup(1)  # not inherited by commands
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.umask(0o022)
    init = Init(settings, orders, answers)
    try:
        send(answers, {"ready": True})
        init.serve()
    except (BrokenPipeError, ConnectionResetError):
        pass
    init.end_all()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
