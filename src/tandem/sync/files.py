"""Weights to other processes through a folder that they can all read: on one machine, or on a disk that many mount.

A version is a safetensors file, written aside and renamed, so that a name stands for a whole file. Every so many
versions it has all tensors, else what changed since the one before; a reader goes on from what it holds, or starts with
the latest whole one. The two latest whole ones are kept, with what follows each.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tandem.errors import DeliveryError
from tandem.kernels.changes import Changes
from tandem.sync.receive import Weights
from tandem.sync.transport import Base, Held, Notice
from tandem.types import WeightVersion

NAME = re.compile(r"(\d{9})-([0-9a-f]{32})\.(whole|changes)\.safetensors")
ASIDE = ".aside-"
LOCK = ".sender"
WHOLE_EVERY = 16  # versions: the most that a reader which starts has to read
POLL_S = 0.02


@dataclass(frozen=True, slots=True, order=True)
class _File:
    turn: int
    kind: str
    path: Path


def _files(folder: Path) -> list[_File]:
    """In the order in which they were published."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise DeliveryError(f"folder {folder}, looking for versions: {error.strerror}.") from error
    matches = filter(None, map(NAME.fullmatch, names))
    return sorted(_File(int(match[1]), match[3], folder / match[0]) for match in matches)


class FileSender:
    """One at a time a folder: a second one is refused; what a dead one left goes with the first versions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._peer = f"folder {folder}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise DeliveryError(f"{self._peer}, opening it: {error.strerror}. Choose another.") from error
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(self._lock, 64, 0).decode(errors="replace") or "unknown"
            os.close(self._lock)
            raise DeliveryError(
                f"{self._peer}, opening it: process {owner} sends weights through it. Choose another folder, or end "
                "that run first."
            ) from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}".encode(), 0)
        for left in folder.glob(f"{ASIDE}*"):
            left.unlink(missing_ok=True)
        self._turn = max((file.turn for file in _files(folder)), default=0)
        self._base, self._since_whole = Base(), 0

    def publish(self, version: WeightVersion, weights: Weights) -> None:
        turn = self._turn + 1
        notice, changes = self._base.advance(version, weights)
        size, whole = sum(each.nbytes for each in changes.values()), self._base.tensors
        by_changes = notice.changes is not None and self._since_whole + 1 < WHOLE_EVERY
        if by_changes and 2 * size < sum(tensor.nbytes for tensor in whole.values()):
            self._write(turn, notice, _parts(changes), "changes")
            self._since_whole += 1
        else:
            self._write(turn, notice.whole(), whole, "whole")
            self._since_whole = 0
            self._prune()
        self._turn = turn

    def again(self) -> None:
        """The last version once more, whole."""
        if self._base.notice is not None:
            self._turn += 1
            self._write(self._turn, self._base.notice.whole(), self._base.tensors, "whole")
            self._since_whole = 0
            self._prune()

    def _write(self, turn: int, notice: Notice, tensors: Mapping[str, Tensor], kind: str) -> None:
        path = self.folder / f"{turn:09d}-{notice.version.digest}.{kind}.safetensors"
        aside = self.folder / f"{ASIDE}{path.name}"
        try:
            save_file(dict(tensors), aside, metadata={"notice": notice.text()})
            aside.replace(path)
        except (OSError, SafetensorError) as error:
            aside.unlink(missing_ok=True)
            self._base = Base()  # what was not sent is nobody's base: the next version is whole
            raise DeliveryError(
                f"{self._peer}, writing version {notice.version.step}: {error}. Earlier versions are untouched. Make "
                "room on that disk, or choose another."
            ) from error

    def _prune(self) -> None:
        """What comes before the last but one that is whole: a reader may be at it."""
        files = _files(self.folder)
        first = [file.turn for file in files if file.kind == "whole"][-2:][0]
        for file in files:
            if file.turn < first:
                file.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Versions stay, for readers that come later."""
        os.close(self._lock)


def _parts(changes: Mapping[str, Changes]) -> dict[str, Tensor]:
    counts = {f"{name}.counts": each.counts for name, each in changes.items()}
    return counts | {f"{name}.streams": each.streams for name, each in changes.items()}


class FileReader:
    """folder: a sender's, who may come later. held: what versions are brought into."""

    def __init__(self, folder: Path, held: Held) -> None:
        self.folder, self.held = folder, held
        self._turn = 0  # of the version held

    def receive(self, timeout_s: float) -> WeightVersion | None:
        """Whether the sender lives can't be told from here."""
        deadline = time.monotonic() + timeout_s
        while True:
            files = _files(self.folder) if self.folder.exists() else []
            if files and files[-1].turn != self._turn:
                try:
                    return self._take(files)
                except FileNotFoundError:
                    pass  # pruned since it was listed
            if time.monotonic() >= deadline:
                return None
            time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))

    def _take(self, files: list[_File]) -> WeightVersion | None:
        for file in self._way(files):
            _read(file, self.held)
            self._turn = file.turn
        return self.held.version

    def _way(self, files: list[_File]) -> list[_File]:
        """From what is held, where what changed since has no gap; else from the latest whole version."""
        on = [file for file in files if file.turn > self._turn]
        turns = list(range(self._turn + 1, self._turn + 1 + len(on)))
        if self.held.version and [file.turn for file in on] == turns and {file.kind for file in on} == {"changes"}:
            return on
        whole = [index for index, file in enumerate(files) if file.kind == "whole"]
        if not whole:
            raise DeliveryError(
                f"folder {self.folder}, looking for versions: {len(files)} files say what changed and none holds a "
                "whole version. Somebody removed it; restart the learner's run."
            )
        return files[whole[-1] :]


def _read(file: _File, held: Held) -> None:
    """DeliveryError, naming file and tensors, where it is damaged or not there for this receiver."""
    peer = f"file {file.path}"
    try:
        with safe_open(file.path, framework="pt") as opened:
            notice = Notice.read((opened.metadata() or {}).get("notice", ""), peer)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        raise DeliveryError(
            f"{peer}, reading it: {error}. It was cut off or overwritten. The learner's next whole version mends this."
        ) from error
    if notice.changes is None:
        held.take(peer, notice, tensors)
        return
    if held.version is None or held.version.digest != notice.base:
        raise DeliveryError(
            f"{peer}: its changes start from version {notice.base[:8]}, and this receiver holds "
            f"{held.version.digest[:8] if held.version else 'none'}. Two learners wrote here; choose another folder."
        )
    names = [name for name in notice.changes if {f"{name}.counts", f"{name}.streams"} <= set(tensors)]
    held.change(peer, notice, {name: Changes(tensors[f"{name}.counts"], tensors[f"{name}.streams"]) for name in names})
