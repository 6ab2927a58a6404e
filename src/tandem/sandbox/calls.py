"""System calls that a sandbox refuses, as the program that the kernel runs before each of them (seccomp).

What a namespace does not hold back: families of sockets that no network namespace covers (AF_VSOCK reaches the host of
a virtual machine), keyrings, memory that is in no process's account (memfd, System V), io_uring, which does all of it
by itself, and namespaces inside, whose owner could mount what no limit covers.
"""

from __future__ import annotations

import errno
import platform
import struct

from tandem.errors import SandboxError

# Number on (x86_64, aarch64).
REFUSED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "io_uring_setup": (425, 425),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "acct": (163, 89),
    "quotactl": (179, 60),
}
CLONE, CLONE3, SOCKET, SOCKETPAIR = (56, 220), (435, 435), (41, 198), (53, 199)
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
FAMILIES = (1, 2, 10)  # AF_UNIX; AF_INET and AF_INET6, which have the sandbox's own loopback and nothing else
NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET
X32 = 0x40000000  # the same calls under other numbers

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in seccomp_data, little-endian
ALLOW, FAIL = 0x7FFF0000, 0x00050000


def program(machine: str | None = None) -> bytes:
    """The filter for this kind of processor; SandboxError where its numbers are not known."""
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise SandboxError(
            f"the sandbox knows no system calls of {machine}, only of {', '.join(MACHINES)}. "
            "Use task.sandbox.backend=container."
        )
    column = list(MACHINES).index(machine)
    lines = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, MACHINES[machine]), _fail(errno.EPERM)]
    lines += [(LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, X32), _fail(errno.EPERM)]
    for numbers in REFUSED.values():
        lines += [(EQUAL, 0, 1, numbers[column]), _fail(errno.EPERM)]
    lines += [(EQUAL, 0, 1, CLONE3[column]), _fail(errno.ENOSYS)]  # libraries go on with clone, whose flags can be read
    lines += [(EQUAL, 0, 4, CLONE[column]), (LOAD, 0, 0, FIRST_ARGUMENT)]
    lines += [(ANY_BIT, 0, 1, NEW_NAMESPACES), _fail(errno.EPERM), (RETURN, 0, 0, ALLOW)]
    for numbers in (SOCKET, SOCKETPAIR):
        allowed = [(EQUAL, 0, 1, family) for family in FAMILIES]
        lines += [(EQUAL, 0, 2 + 2 * len(allowed), numbers[column]), (LOAD, 0, 0, FIRST_ARGUMENT)]
        for line in allowed:
            lines += [line, (RETURN, 0, 0, ALLOW)]
        lines += [_fail(errno.EAFNOSUPPORT)]
    lines += [(RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("<HBBI", *line) for line in lines)


def _fail(number: int) -> tuple[int, int, int, int]:
    return RETURN, 0, 0, FAIL | number
