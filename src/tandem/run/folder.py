"""A run's folder: one writer, files that survive a crash, checkpoints that are whole or absent.

    config.json  plan.json  metrics.jsonl  ledger.json  trajectories/step-N.jsonl
    checkpoints/step-N/  set_aside/after-step-N.K/  report.html  *.png

Invariants:
- While a `RunFolder` is open no other process can open it for writing; the lock dies with its process.
- `checkpoints/step-N` is complete wherever it exists: it was written aside, synced, then renamed.
- Every line of metrics.jsonl but the last is whole; a torn last line is dropped on opening.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from safetensors import SafetensorError

from tandem.config import diff, dump, load
from tandem.errors import CheckpointError, ConfigError, RunFolderError, WorldError, nearest, unwritten
from tandem.run.course import marked_best
from tandem.run.lock import LOCK_NAME, FolderLock

C = TypeVar("C")

# Of a resumed run's config: how far it goes, what is shown, and what changes no token, reward or weight.
_TARGETS = ("evaluation.stop_accuracy", "evaluation.stop_reward")
_SERVERS = ("remote.servers", "remote.folder", "remote.key_env", "remote.deadline_s")  # of one dialect
_BIT_FOR_BIT = ("task.workers", "engine.draft", "engine.replicas", "engine.answer_s", "workers", *_SERVERS)
MAY_DIFFER = ("steps", "alarms", "track", "rollout.keep_tokens", *_TARGETS, *_BIT_FOR_BIT)

_STEP = re.compile(r"step-(\d+)")
_ASIDE = re.compile(r"\.step-(\d+)\.(partial|replaced|pruned)")


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A whole checkpoint on disk, taken after `step` updates."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class SetAside:
    """What a resumed run does again: steps that no checkpoint holds."""

    steps: tuple[int, ...]  # with a row or trajectories
    path: Path  # where those are now
    rows: tuple[dict[str, Any], ...]  # metrics, of this resume and of earlier ones from the same checkpoint


class RunFolder:
    """The only writer of a run folder. Make one with `create` or `open`; it is a context manager.

    `config` is the dumped config of the run; `keep` is how many of the newest checkpoints stay (None: all).
    """

    def __init__(self, path: Path, config: Mapping[str, Any], keep: int | None, lock: FolderLock) -> None:
        assert keep is None or keep >= 1, f"keep={keep} would leave no checkpoint"
        self.path = path
        self.config = dict(config)
        self._keep = keep
        self._lock: FolderLock | None = lock
        self._appending: dict[str, int] = {}  # file name -> descriptor

    @classmethod
    def create(cls, path: Path | str, config: Any, keep: int | None = 2) -> RunFolder:
        """Start a run in `path`, which must be absent or empty. `config` is a config dataclass.

        Raises RunFolderError where `path` holds a run, holds anything else, is in use or cannot be made.
        """
        path = Path(path)
        check_new(path, make=True, run=False)
        lock = FolderLock(path)
        try:
            check_new(path)
            dumped = dump(config)
            for name in ("trajectories", "checkpoints"):
                (path / name).mkdir(exist_ok=True)
            _write_json(path / "config.json", dumped)
        except BaseException:
            lock.release()
            raise
        return cls(path, dumped, keep, lock)

    @classmethod
    def open(
        cls, path: Path | str, config: Any = None, may_differ: Iterable[str] = MAY_DIFFER, keep: int | None = 2
    ) -> RunFolder:
        """Continue the run in `path`: cleans what a crash left, checks `config` where one is given.

        Dotted names in `may_differ` (and names under them) may differ: the new values are then written to
        config.json. Raises RunFolderError with the differing lines for any other difference, and where the
        folder is absent, holds no run, is damaged or is in use.
        """
        path = Path(path)
        _check_run(path)
        lock = FolderLock(path)
        try:
            dumped = _read_json(path / "config.json")
            if config is not None and _differs(path, dumped, config, tuple(may_differ)):
                dumped = dump(config)
                _write_json(path / "config.json", dumped)
            _recover(path)
        except BaseException:
            lock.release()
            raise
        return cls(path, dumped, keep, lock)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder. Closing twice is harmless."""
        for descriptor in self._appending.values():
            os.close(descriptor)
        self._appending.clear()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add a step's row (it must have "step"). Non-finite numbers become null, so that any JSON reader takes it."""
        assert "step" in row, sorted(row)
        self._append("metrics.jsonl", row)

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """What the program decided: plan.json."""
        _write_json(self.path / "plan.json", plan)

    def write_ledger(self, ledger: Mapping[str, Any]) -> None:
        """The closed ledger: ledger.json."""
        _write_json(self.path / "ledger.json", ledger)

    def drop_ledger(self) -> None:
        """Of an earlier sitting: checkpoints have it, and the next one writes it anew."""
        (self.path / "ledger.json").unlink(missing_ok=True)

    def write_trajectories(self, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
        """One line a trajectory (see `trajectory_rows`) in trajectories/step-N.jsonl, replacing an earlier one."""
        path = self.trajectories(step)
        _write_whole(path, "".join(map(_short_line, rows)), sync=False)
        return path

    def extend_trajectories(self, step: int, more: Iterable[Mapping[str, Any]]) -> None:
        """Further keys of each line that `write_trajectories` wrote, in order."""
        path = self.trajectories(step)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise unwritten(path, error, "Check the run folder.") from error
        pairs = zip(lines, more, strict=True)
        added = [f"{line[:-1]},{_short_line(keys)[1:]}" if keys else f"{line}\n" for line, keys in pairs]
        _write_whole(path, "".join(added), sync=False)

    def trajectories(self, step: int) -> Path:
        """Where a step's trajectories lie."""
        return self.path / "trajectories" / f"step-{step}.jsonl"

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """Yield an empty folder to write a checkpoint into; on leaving it becomes checkpoints/step-N at once.

        Any exception removes what was written and leaves the earlier checkpoints as they were. What the disk or a
        serialiser raises (OSError, SafetensorError, torch's RuntimeError) becomes CheckpointError.
        """
        root = self.path / "checkpoints"
        partial = root / f".step-{step}.partial"
        whole = False
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            _sync_tree(partial)
            for descriptor in self._appending.values():
                os.fsync(descriptor)
            _swap(partial, root / f"step-{step}", root / f".step-{step}.replaced")
            _sync(root)
            whole = True
        except (OSError, RuntimeError, SafetensorError) as error:
            last = self.latest_checkpoint()
            kept = f"The last good one stays: {last.path}" if last else "There is no earlier one"
            reason = getattr(error, "strerror", None) or str(error)
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written to {root}: {reason}. {kept}. "
                f"Free some space, then continue with --resume {self.path}."
            ) from error
        finally:
            if not whole:
                shutil.rmtree(partial, ignore_errors=True)
        self.prune()

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return _read_lines(self.path / "metrics.jsonl")

    def checkpoints(self) -> list[SavedCheckpoint]:
        """Whole checkpoints, oldest first."""
        return _checkpoints(self.path)

    def latest_checkpoint(self) -> SavedCheckpoint | None:
        """The newest whole checkpoint, or None."""
        return latest_checkpoint(self.path)

    def rewind(self, step: int) -> SetAside:
        """Set metrics rows and trajectories of steps after `step` (the checkpoint resumed from) aside.

        Their rows come back, so that the ledger can count what the interruptions cost: the checkpoint's own ledger
        knows none that came after it. Where there is no checkpoint, rewind(0) keeps the evaluation before training and
        rewind(-1) keeps nothing. A crash in here leaves each row and each trajectory in one place at least.
        """
        path = self.path / "metrics.jsonl"
        kept: list[dict[str, Any]] = []
        dropped: list[dict[str, Any]] = []
        for row in _read_lines(path):
            (dropped if row["step"] > step else kept).append(row)
        found = [(_STEP.fullmatch(entry.stem), entry) for entry in (self.path / "trajectories").glob("step-*.jsonl")]
        later = {int(match.group(1)): entry for match, entry in found if match and int(match.group(1)) > step}
        name = f"after-step-{max(step, 0)}"
        earlier = [_read_lines(entry) for entry in sorted((self.path / "set_aside").glob(f"{name}.*/metrics.jsonl"))]
        if dropped and dropped in earlier:  # a crash came between writing them there and dropping them here
            earlier.remove(dropped)
        places = (self.path / "set_aside" / f"{name}.{number}" for number in itertools.count(1))
        aside = next(place for place in places if not place.exists())  # a user may have tidied some away
        if dropped or later:
            aside.mkdir(parents=True)
        for number, entry in later.items():
            entry.rename(aside / f"step-{number}.jsonl")
        if dropped:
            _write_whole(aside / path.name, "".join(_line(row) for row in dropped), sync=True)
            self._stop_appending(path.name)
            _write_whole(path, "".join(_line(row) for row in kept), sync=True)
        steps = sorted({row["step"] for row in dropped} | set(later))
        return SetAside(tuple(steps), aside, (*(row for rows in earlier for row in rows), *dropped))

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        assert self._lock is not None, f"{self.path} is closed"
        if name not in self._appending:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            try:
                self._appending[name] = os.open(self.path / name, flags, 0o644)
            except OSError as error:
                raise unwritten(self.path / name, error, "Check the run folder.") from error
        descriptor = self._appending[name]
        start = os.fstat(descriptor).st_size
        try:
            _write_all(descriptor, _line(row).encode())
        except OSError as error:
            os.ftruncate(descriptor, start)
            raise WorldError(
                f"{self.path / name} could not be written: {error.strerror}. Free some space, then continue with "
                f"--resume {self.path}."
            ) from error

    def _stop_appending(self, name: str) -> None:
        descriptor = self._appending.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)

    def prune(self) -> None:
        """Remove the checkpoints that are neither among the newest nor marked as the best."""
        older = self.checkpoints()[: -self._keep] if self._keep is not None else []
        for saved in [one for one in older if one.path.name != marked_best(self.path / "checkpoints")]:
            # Renamed first: a crash in the middle of the removal must not leave a half that looks whole.
            doomed = saved.path.with_name(f".step-{saved.step}.pruned")
            saved.path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def latest_checkpoint(path: Path | str) -> SavedCheckpoint | None:
    """The newest whole checkpoint of the run in `path`, or None. Needs no lock."""
    saved = _checkpoints(Path(path))
    return saved[-1] if saved else None


def saved_config(path: Path | str, kind: type[C]) -> C:
    """The config of the run in `path`. Needs no lock.

    RunFolderError where it is absent, holds no run, is damaged or is of another version.
    """
    path = Path(path)
    _check_run(path)
    return _load_saved(path, kind, _read_json(path / "config.json"))


def check_new(path: Path, *, make: bool = False, run: bool = True) -> None:
    """RunFolderError where no run can begin in `path`: it holds other things or, where `run`, one already."""
    try:
        if make:
            path.mkdir(parents=True, exist_ok=True)
        present = {entry.name for entry in path.iterdir()} if path.exists() else set()
    except OSError as error:
        raise RunFolderError(f"Cannot make the run folder {path}: {error.strerror}. Change --out.") from error
    if present and LOCK_NAME not in present and "config.json" not in present:
        raise RunFolderError(f"{path} is not empty and holds no run. Choose a new folder with --out.")
    if run and "config.json" in present:
        saved = _checkpoints(path)
        reached = f"its last checkpoint is step {saved[-1].step}" if saved else "it has no checkpoint yet"
        raise RunFolderError(f"{path} already holds a run ({reached}). Give --resume {path}, or a new --out.")


def _check_run(path: Path) -> None:
    if not (path / "config.json").exists():
        siblings = [entry.parent.name for entry in path.parent.glob("*/config.json")]
        hint = nearest(path.name, siblings) if siblings else ""
        what = "holds no run (no config.json)" if path.exists() else "does not exist"
        raise RunFolderError(f"The run folder {path} {what}. Give a folder that `tandem train` made.{hint}")


def _load_saved(path: Path, kind: type[C], dumped: Mapping[str, Any]) -> C:
    try:
        return load(kind, dumped)
    except ConfigError as error:
        raise RunFolderError(
            f"{path / 'config.json'} does not fit this version of tandem: {error} Resume it with the version that "
            "made it, or start a new run with --out."
        ) from error


def _differs(path: Path, dumped: Mapping[str, Any], config: Any, may_differ: tuple[str, ...]) -> bool:
    """Whether `config` differs from the saved one, in allowed names only; RunFolderError for any other."""
    lines = diff(_load_saved(path, type(config), dumped), config)
    if (saved := latest_checkpoint(path)) and config.steps < saved.step:
        raise ConfigError(f"steps is {config.steps}, and step {saved.step} of {path} is done. Give as many or more.")
    hangs = dumped.get("engine", {}).get("draft", {}).get("verify") == "reject"  # then a text hangs on its drafts
    fixed = "engine.draft." if hangs else "engine.draft.verify"
    forbidden = []
    for line in lines:
        name = line.split(":", 1)[0]
        allowed = any(name == one or name.startswith(f"{one}.") for one in may_differ)
        if not allowed or name.startswith(fixed):
            forbidden.append(f"  {line}")
    if forbidden:
        listed = "\n".join(forbidden)
        raise RunFolderError(
            f"The config differs from the one {path} was started with (saved -> given):\n{listed}\n"
            f"Resume with the saved values (may differ: {', '.join(may_differ) or 'nothing'}), "
            "or start a new run with --out."
        )
    return bool(lines)


def _recover(path: Path) -> None:
    """Undo what a crash interrupted: partial and pruned checkpoints, a torn last line, stray temporary files."""
    root = path / "checkpoints"
    for name in ("trajectories", "checkpoints"):
        (path / name).mkdir(exist_ok=True)
    for entry in root.iterdir():
        found = _ASIDE.fullmatch(entry.name)
        if not found:
            continue
        final = root / f"step-{found.group(1)}"
        if found.group(2) == "replaced" and not final.exists():
            entry.rename(final)
        else:
            shutil.rmtree(entry, ignore_errors=True)
    for stray in [*path.glob(".*.tmp"), *(path / "trajectories").glob(".*.tmp")]:
        stray.unlink()
    _drop_torn_line(path / "metrics.jsonl")


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        previous = content.rfind(b"\n", 0, max(whole - 1, 0)) + 1
        if whole and not _is_json(content[previous:whole]):
            whole = previous
        if whole < len(content):
            file.truncate(whole)


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
            rows[-1]["step"] = int(rows[-1]["step"])
        except (ValueError, TypeError, LookupError) as error:
            raise RunFolderError(f"{path} is damaged: line {number} is no row. Remove that line to go on.") from error
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__}, no object")
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} is damaged: {error}. Start a new run, or restore the file.") from error
    return content


def plain(value: Any) -> Any:
    """As JSON has it: a number that is not finite is None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(plain(row), allow_nan=False) + "\n"


def _short_line(row: Mapping[str, Any]) -> str:
    """Without blanks; a row of finite numbers, as nearly all are, is not walked through in Python."""
    try:
        return json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n"
    except (ValueError, TypeError):
        return json.dumps(plain(row), allow_nan=False, separators=(",", ":")) + "\n"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    _write_whole(path, json.dumps(plain(content), indent=2, allow_nan=False) + "\n", sync=True)


def _write_whole(path: Path, text: str, sync: bool) -> None:
    """Write aside and rename: `path` is the old text or the new one, never a part."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(text.encode())
            file.flush()
            if sync:
                os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise unwritten(path, error, "Free some space and try again.") from error


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for entry in root.rglob("*"):
        _sync(entry)
    _sync(root)


def _swap(partial: Path, final: Path, replaced: Path) -> None:
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    try:
        partial.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _checkpoints(path: Path) -> list[SavedCheckpoint]:
    matches = [(_STEP.fullmatch(entry.name), entry) for entry in (path / "checkpoints").glob("*")]
    saved = [SavedCheckpoint(int(found.group(1)), entry) for found, entry in matches if found]
    return sorted(saved, key=lambda checkpoint: checkpoint.step)
