"""The queue between rollouts and the learner: what a streamed batch is, of which groups, in which order."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.rollout.config import AsyncConfig
from tandem.rollout.flow import Ended
from tandem.rollout.queue import Queue
from tandem.types import Group, Prompt

CONFIGS = st.builds(
    lambda lag, order, window, uses: AsyncConfig(
        mode="full", lag=lag, order=order, window=window if order == "window" else 1, replay_uses=uses, replay_groups=3
    ),
    st.integers(0, 2),
    st.sampled_from(["fifo", "window", "completion", "drop"]),
    st.integers(1, 5),
    st.integers(1, 3),
)


class Learning:
    """A queue, and a learner that updates as soon as it has a batch."""

    def __init__(self, size: int, config: AsyncConfig) -> None:
        self.queue = Queue(size, config, redraws=1)
        self.batches: list[list[int]] = [[]]
        self.parts = 0
        self.fill()

    def fill(self) -> None:
        while self.queue.room > 0:
            self.queue.begin(len(self.batches) - 1)

    def end(self, place: int, usable: bool) -> None:
        """The running group at `place` ends, and what may be learned is."""
        number = [*self.queue.running][place % len(self.queue.running)]
        self.queue.end(number, Ended(f"p/{number}", Group(Prompt("p", ()), ()), ()), usable)
        while (choice := self.queue.choose(len(self.batches))) is not None:
            if not self.queue.take(choice):
                continue
            self.parts += 1
            self.batches[-1] += [*choice.numbers, *choice.again]
            if self.queue.whole:
                self.queue.learned()
                self.batches.append([])
        self.fill()


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), CONFIGS, st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=60))
def test_a_streamed_batch_is_the_batch(size: int, config: AsyncConfig, ends: list[tuple[int, bool]]) -> None:
    """A part that takes a group out of its order, twice, over the batch, or in place of one to be used again; more that
    are kept for another use than asked for."""
    plain, streamed = Learning(size, config), Learning(size, replace(config, stream=True))
    for place, usable in ends:
        plain.end(place, usable)
        streamed.end(place, usable)
        assert [sorted(batch) for batch in streamed.batches[:-1]] == [sorted(batch) for batch in plain.batches[:-1]]
        assert streamed.queue.begun == plain.queue.begun and streamed.queue.redrawn == plain.queue.redrawn
        assert sorted(streamed.queue.kept) == sorted(plain.queue.kept) or streamed.queue.parts
        assert len(plain.queue.kept) <= config.replay_groups, plain.queue.kept
    assert all(len(batch) == size for batch in streamed.batches[:-1])


def test_a_group_is_a_part() -> None:
    """A streamed batch that is waited for whole."""
    streamed = Learning(3, AsyncConfig(mode="full", lag=0, stream=True))
    for number, had in ((1, 0), (0, 2), (2, 0)):  # in order: the second to begin waits for the first
        streamed.end([*streamed.queue.running].index(number), True)
        assert streamed.queue.had == had
    assert streamed.batches == [[0, 1, 2], []] and streamed.parts == 2
