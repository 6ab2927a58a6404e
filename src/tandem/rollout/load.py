"""How many groups at once: as few as keep engine and learner at work, so that their tokens are new."""

from __future__ import annotations

from tandem.rollout.queue import Queue

STARVED = 0.02  # share of a batch's seconds: programs that call a tool which answers at once take less


class Load:
    """Groups that may run, wait or be learned: between 2 P, a batch that is learned and the next, and (S + 1) P.

    shares: engine and learner compute on the same cores. Where the engine always has something to run, more than one
    batch's groups, or groups beside a batch that is learned, then end none sooner, and all that is in its midst when
    the weights change is computed again.

    >>> from tandem.rollout.config import AsyncConfig
    >>> load = Load(Queue(4, AsyncConfig("full", lag=3)), shares=False, now_s=0.0)
    >>> load.limit, load.may_begin(1.0)
    (8, True)
    """

    def __init__(self, queue: Queue, shares: bool, now_s: float) -> None:
        self.queue = queue
        self.shares = shares and queue.config.mode == "full"  # one_off: when a batch begins hangs on no clock
        self.least = min(2 * queue.size, queue.capacity)
        self.limit = self.least
        self.starves = False  # before the last batch the engine had nothing to run
        self._idle_s = 0.0  # since: that it had nothing to run, all programs waiting for their environments
        self._since_s = now_s

    def idle(self, seconds: float) -> None:
        """The engine had nothing to run for so long, while programs waited for their environments."""
        self._idle_s += seconds

    def starved(self, now_s: float) -> bool:
        """Whether it had nothing to run for a share of the seconds since the last batch."""
        return self._idle_s > STARVED * (now_s - self._since_s)

    def may_begin(self, now_s: float) -> bool:
        """Whether the learner seems to need one more group."""
        if self.shares and not (self.starves or self.starved(now_s)):
            return not self.queue.whole and len(self.queue) < self.queue.size
        return len(self.queue) < self.limit

    def adapt(self, waited: bool, now_s: float) -> None:
        """A batch is whole. More at once where the learner had to wait and the engine had nothing to run; else fewer,
        newer."""
        starved = self.starved(now_s)
        more, fewer = self.limit + max(1, self.limit // 4), self.limit - max(1, self.limit // 8)
        self.limit = min(more, self.queue.capacity) if waited and starved else max(fewer, self.least)
        self.starves, self._idle_s, self._since_s = starved, 0.0, now_s
