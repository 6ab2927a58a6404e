"""What holds of a scheduler between any two calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.engine.batch import MIXED

if TYPE_CHECKING:
    from tandem.engine.schedule import Scheduler


def check_integrity(scheduler: Scheduler) -> None:
    """AssertionError unless pages, names, queues and promises agree. O(pages + live tokens / page_tokens)."""
    running, waiting, config = scheduler.running, scheduler.waiting, scheduler.config
    held = [list(s.pages.pages()) for s in running if s.pages is not None]
    programs = scheduler.programs
    scheduler.index.check_integrity(
        [*held, *scheduler.ends.borrowed.values(), *scheduler.branches.pages(), *(programs.tables if programs else ())]
    )
    if programs is not None:
        programs.check_integrity(scheduler.live.values())
    assert scheduler.ends.borrowed.keys() <= {s.arrival for s in running}, "a page is borrowed by nobody that runs"
    assert {id(s) for s in (*running, *waiting)} == {id(s) for s in scheduler.live.values()}
    assert len(running) + len(waiting) == len(scheduler.live), "a sequence is queued twice"
    assert len(running) <= config.max_sequences, len(running)
    for queue in (running, waiting):
        assert all(a.arrival < b.arrival for a, b in zip(queue, queue[1:], strict=False)), "a queue lost its order"
    for sequence in waiting:
        assert sequence.pages is None and sequence.computed == 0, f"waiting sequence {sequence.arrival} holds pages"
    for sequence in running:
        assert sequence.pages is not None, f"running sequence {sequence.arrival} has no page tables"
        sequence.pages.check_integrity(sequence.computed)
        most = sequence.limit + (scheduler.advanced is not None)
        assert sequence.computed < len(sequence.tokens) < most, (sequence.computed, len(sequence.tokens), most)
        pure = sequence.root in (MIXED, scheduler.root(sequence.request))
        assert pure, f"sequence {sequence.arrival} is pure under other weights"
    for key, maker in scheduler.promised.items():
        unkept = (*maker.keys[maker.computed // config.page_tokens :], maker.tail)
        assert maker.pages and key in unkept, "a promise nobody will keep"
    scheduler.tails.check_integrity(running)
