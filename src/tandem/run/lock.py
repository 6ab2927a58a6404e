"""One writer a run folder: a POSIX record lock, which ends with its process however that ends.

Unlike flock, a forked worker that outlives its parent does not keep it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

from tandem.errors import RunFolderError

LOCK_NAME = ".lock"

# Real paths of the folders this process holds. POSIX locks do not exclude a second open by the same process.
_held: set[Path] = set()


class FolderLock:
    """Held from the constructor to `release`. Raises RunFolderError where the folder is in use or cannot be locked."""

    def __init__(self, path: Path) -> None:
        self._real = path.resolve()
        if self._real in _held:
            raise RunFolderError(f"The run folder {path} is already open in this process. Close it first.")
        try:
            self._descriptor = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunFolderError(f"Cannot write in the run folder {path}: {error.strerror}.") from error
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        except OSError as error:
            owner = os.pread(self._descriptor, 256, 0).decode(errors="replace").split()
            os.close(self._descriptor)
            raise RunFolderError(_refusal(path, error, owner)) from error
        _held.add(self._real)

    def release(self) -> None:
        """Let another process in. The lock file stays: removing it would race with a process that just opened it."""
        _held.discard(self._real)
        os.close(self._descriptor)


def _refusal(path: Path, error: OSError, owner: list[str]) -> str:
    if error.errno not in (errno.EACCES, errno.EAGAIN):
        return f"The run folder {path} cannot be locked: {error.strerror}. Choose a folder on another disk with --out."
    pid, host = (owner + ["unknown", "unknown"])[:2]
    where = "" if host in (socket.gethostname(), "unknown") else f" on {host}"
    return (
        f"The run folder {path} is in use by process {pid}{where}. Wait until it ends, stop it with "
        f"`kill -INT {pid}` (it saves first), or choose another folder with --out."
    )
