"""Errors by audience.

User errors say what, the value, what is allowed and what to do; the command line prints them without a traceback.
World errors are typed at the boundary they crossed. Programmer errors are asserts.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from errno import ENOENT
from pathlib import Path


class TandemError(Exception):
    """Base of every error tandem raises on purpose."""


class UserError(TandemError):
    """Something the user gave can be mended by the user."""


class ConfigError(UserError, ValueError):
    """A recipe, a flag, a dotted name or a value is wrong."""


class ModelError(UserError):
    """A model path, file, architecture, tensor or tokeniser is wrong."""


class TaskError(UserError):
    """A task name, file or record is wrong."""


class CorpusError(UserError):
    """A file, a line or a row of what is to be learned from is wrong; `fault` is what such rows are counted under."""

    def __init__(self, fault: str, text: str) -> None:
        super().__init__(text)
        self.fault = fault


class CapacityError(UserError):
    """A request cannot fit, or memory does not suffice; names the setting to change."""


class RunFolderError(UserError):
    """A run folder is in use, damaged, or belongs to another config."""


class WorldError(TandemError):
    """Something outside failed: an environment, a reward, a disk, a compiler."""


class EnvironmentFailure(WorldError):
    """An environment or a reward raised, hung past its deadline or returned no finite number."""


class SandboxError(WorldError):
    """Code that nobody vouches for cannot be run here, or its sandbox ended under it."""


class KernelError(WorldError):
    """A kernel could not be compiled or failed its self-check."""


class NonFiniteError(WorldError):
    """A loss or gradient is not finite; raised before the optimiser runs."""


class ParityError(WorldError):
    """The learner's log-probs are not the engine's to the bit, and nothing declares a difference; raised before the
    optimiser runs."""


class AlarmError(WorldError):
    """A drift metric is beyond its threshold under alarms.action stop; raised before the optimiser runs."""


class CheckpointError(WorldError):
    """A checkpoint could not be written or read; the last good one is untouched."""


class EngineError(WorldError):
    """The engine takes no more requests, or did not answer in time; says why."""


class WorkerError(WorldError):
    """A worker died, stands still or answers what can't be: which one, and in which phase."""

    def __init__(self, worker: str, phase: str, reason: str) -> None:
        super().__init__(f"worker {worker}, phase {phase}: {reason}")
        self.worker, self.phase, self.reason = worker, phase, reason


class DeliveryError(WorldError):
    """The engine does not serve what the learner published."""


class WorkerDied(WorkerError):
    """Its process ended."""


class WorkerStalled(WorkerError):
    """It did not answer by the deadline, and was ended."""


class WorkerLied(WorkerError):
    """What it answered is not what was asked for."""


class WorkerFlooded(WorkerError):
    """It sent more than an answer may be, or what nobody asked for, and was ended."""


class TandemWarning(RuntimeWarning):
    """What the user should know of what tandem does; the command line prints it on one line."""


class LedgerWarning(TandemWarning):
    """The ledger does not close: tokens, seconds or samples are unaccounted for. An error in tests."""


def unwritten(path: Path, error: OSError, remedy: str) -> WorldError:
    """What to raise where a file could not be written; the remedy is another where its folder has gone meanwhile."""
    if error.errno == ENOENT:
        remedy = f"{path.parent} is there no more: put it back where it was, or begin again elsewhere."
    return WorldError(f"{path} could not be written: {error.strerror}. {remedy}")


def nearest(name: str, allowed: Iterable[str]) -> str:
    """' Did you mean a, b?' for the allowed names closest to `name`, or the whole list where none is close."""
    names = sorted(allowed)
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    return f" Did you mean {', '.join(close)}?" if close else f" Allowed: {', '.join(names)}."
