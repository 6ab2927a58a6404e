"""Which of the slots beside the target's pages are written, on the real scheduler over a fake memory."""

from __future__ import annotations

from array import array
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.batch import Sequence
from tandem.engine.config import EngineConfig
from tandem.engine.draft import Drafter
from tandem.engine.layout import WHOLE, KvLayout
from tandem.speculate.pages import DraftPages
from tandem.types import Reach, WeightVersion
from tests.drafting import at_most
from tests.null.paged_memory import alone, group, make


class Slots(Drafter):
    """Writes into each slot all tokens up to its own, and looks for those of a sequence before it drafts.

    rights: how many drafts of each turn are what will be drawn; of the others none is. turns: which sequences of a turn
    are drafted for. good: whether the slots of drafts need not be written again where those stand.
    """

    def __init__(self, pages: DraftPages, budget: int, rights: list[int], turns: list[int], good: bool) -> None:
        self.pages, self.budget, self.good = pages, budget, good
        self._rights, self._turns = cycle(rights), cycle(turns)
        self.holds: dict[int, tuple[int, ...]] = {}
        self.ran = self.drafted = 0

    def slot(self, table: Any, position: int) -> int:
        page, size = table[position // self.pages.page_tokens], self.pages.page_tokens
        assert 0 <= page < self.pages.num_pages
        return page * size + position % size

    def draft(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in sequences]
        turn = next(self._turns)
        wanted = [i for i, count in enumerate(most) if count and turn >> i % 5 & 1]
        spans = self.pages.missing([sequences[i] for i in wanted], self.budget)
        assert sum(len(span.tokens) for span in spans) <= self.budget
        for i, span in zip(wanted, spans, strict=True):
            tokens = sequences[i].tokens
            assert span.tokens == tokens[span.start : span.end]
            self.ran += len(span.tokens)
            for position in range(span.start, span.end):
                self.holds[self.slot(span.table, position)] = tuple(tokens[: position + 1])
        for i, span in zip(wanted, spans, strict=True):
            sequence, tokens = sequences[i], sequences[i].tokens
            for position in range(span.end):
                there = self.holds.get(self.slot(span.table, position))
                assert there == tuple(tokens[: position + 1]), (sequence.request.id, position, there)
            if span.end < len(tokens):
                assert sum(len(span.tokens) for span in spans) == self.budget
                continue
            right = next(self._rights)
            following = [*alone(sequence.request)[0][sequence.num_drawn :], *[0] * 9]
            found[i] = [token if j < right else 5 for j, token in enumerate(following[: most[i]])]
            for j in range(len(found[i])):
                self.holds[self.slot(span.table, len(tokens) + j)] = (*tokens, *found[i][: j + 1])
            if self.good:
                self.pages.drafted(sequence, found[i])
            self.drafted += len(found[i])
        return found


@given(
    rights=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    turns=st.lists(st.sampled_from([31, 31, 31, 0, 1, 21]), min_size=1, max_size=6),
    reaches=st.sampled_from([(Reach(),), (Reach(window=5), Reach()), (Reach(chunk=6), Reach(), Reach(chunk=6))]),
    spare=st.integers(0, 12),
    prompts=st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=14), st.integers(1, 4)), max_size=5),
    limits=st.tuples(st.integers(1, 7), st.integers(3, 30)),
    good=st.booleans(),
    share_prefixes=st.sampled_from([True, True, True, False]),
)
@settings(max_examples=40, deadline=None)
def test_slots_hold_what_they_are_taken_for(rights, turns, reaches, spare, prompts, limits, good, share_prefixes):
    """A slot is not written again after another wrote to its page, a draft did not stand, its sequence was preempted or
    the weights changed; or a name is kept for what is there no more."""
    layout = KvLayout.of(reaches)
    pages = layout.most_pages(31, 1, 4) + spare
    most, budget = limits
    given: dict[str, Any] = {"max_sequences": 3, "draft": at_most(most), "share_prefixes": share_prefixes}
    config = EngineConfig(page_tokens=4, batch_tokens=16, **given)
    drafter = Slots(DraftPages(layout, pages, 4, config.max_sequences, most), budget, rights, turns, good)
    engine, _ = make(pages, layout=layout, drafter=drafter, **given)
    for round, (prompt, siblings) in enumerate(prompts * 2):
        asked = group(f"{round}", prompt, siblings, 16, stop=())
        for request in asked:
            engine.submit(request)
        done = {one.request_id: one for _ in range(round % 4) for one in engine.step()}
        if round % 3 == 1:
            engine.abort(asked[0].id)
        if round % 4 == 2:
            engine.receive(WeightVersion(round, ""))
        while engine.has_work:
            done |= {one.request_id: one for one in engine.step()}
        assert not engine.scheduler.drafting.off, engine.scheduler.drafting.off
        for request in asked[1:]:
            assert done[request.id].tokens == alone(request)[0]
        engine.check_integrity()


@pytest.mark.parametrize("by", ["tokens", "drafts", "no name"])
def test_who_writes_to_a_page_takes_its_name_away(by):
    """A page under its old name again, by chance, is taken for filled: another wrote to it."""

    def running(arrival: int, tokens: range, table: list[int]) -> Any:
        pages = SimpleNamespace(tables=(array("i", table),), blocks=len(table))
        keys = [bytes(tokens[: end + 4]) for end in range(0, len(tokens) - 4, 4)]
        return SimpleNamespace(arrival=arrival, tokens=list(tokens), pages=pages, keys=keys)

    pages = DraftPages(WHOLE, 9, 4, 3, 4)
    first = running(0, range(9), [0, 1, 2])
    assert [span.start for span in pages.missing([first], 99)] == [0]
    again = running(1, range(9), [0, 1, 4])
    assert [span.start for span in pages.missing([again], 99)] == [8]
    tokens, table = {"tokens": (23, [1]), "drafts": (24, [5, 1]), "no name": (29, [1, 6, 7])}[by]
    other = running(2, range(20, tokens), table)
    other.keys.clear()
    assert [span.start for span in pages.missing([other], 99)] == [0]
    assert [span.start for span in pages.missing([running(3, range(9), [0, 1, 3])], 99)] == [4]
