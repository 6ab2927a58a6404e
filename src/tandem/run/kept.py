"""What a checkpoint has of rollouts: the queue, and the programs that run, from which they go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tandem.errors import CheckpointError
from tandem.rollout.program import Paused
from tandem.rollout.queue import Queue, Waiting
from tandem.run.journal import packed, unpacked

SAVED = "rollouts.msgpack"


class Begun(NamedTuple):
    """A group that runs."""

    number: int  # in the order in which groups began
    step: int  # whose seeds it has
    place: int  # of its prompt, in the run's order


@dataclass(frozen=True, slots=True)
class Kept:
    """
    >>> Kept(0, 0, 0, (), (), (), (), ()).begun
    0
    """

    journal_bytes: int  # of facts before it
    begun: int  # these, and the waiting ones: see Queue
    replaced: int
    running: tuple[tuple[int, int], ...]  # number, version
    groups: tuple[tuple[str, Begun], ...]  # by id, of those that run
    waiting: tuple[Waiting, ...]
    again: tuple[Waiting, ...]  # kept for another use
    paused: tuple[tuple[str, tuple[Paused, ...]], ...]  # by group
    unusable: tuple[Waiting, ...] = ()
    redrawn: int = 0
    due: tuple[tuple[Waiting, ...], ...] = ()  # parts of a batch that no update was made of

    @classmethod
    def of(
        cls,
        journal_bytes: int,
        queue: Queue,
        begun: Mapping[str, Begun],
        paused: Sequence[tuple[str, tuple[Paused, ...]]],
    ) -> Kept:
        """begun: the groups that run."""
        return cls(
            journal_bytes,
            queue.begun,
            queue.replaced,
            tuple(queue.running.items()),
            tuple(begun.items()),
            tuple(queue.waiting.values()),
            tuple(queue.kept.values()),
            tuple(paused),
            tuple(queue.unusable.values()),
            queue.redrawn,
            (*queue.parts, *queue.due),
        )

    def write(self, directory: Path) -> None:
        (directory / SAVED).write_bytes(packed(self))

    @classmethod
    def read(cls, directory: Path) -> Kept:
        """CheckpointError where it can't be."""
        try:
            return unpacked((directory / SAVED).read_bytes(), cls)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{directory / SAVED} cannot be read: {error}. Remove the checkpoint to go on from the one before."
            ) from error

    def fill(self, queue: Queue) -> None:
        queue.begun, queue.replaced, queue.redrawn = self.begun, self.replaced, self.redrawn
        queue.running = dict(self.running)
        queue.waiting = {one.number: one for one in self.waiting}
        queue.kept = {one.number: one for one in self.again}
        queue.unusable = {one.number: one for one in self.unusable}
        queue.due = list(self.due)
