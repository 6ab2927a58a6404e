"""Regression caught: a request goes to an engine that is overloaded, or that has less of its prefix than another."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tandem.engine import affinity
from tandem.engine.affinity import OVERLOAD, Affinity, Prefixes
from tandem.engine.space import Space


class One:
    """An engine with so much to do."""

    def __init__(self, room: int) -> None:
        self.room, self.tokens, self.prefixes = room, 0, Prefixes()
        self.told: Space | None = None
        self.counts = Counter[str]()

    def space(self) -> Space | None:
        return self.told

    def load(self, more_tokens: int = 0) -> float:
        return (self.tokens + more_tokens) / self.room


class Machine(RuleBasedStateMachine):
    """Requests of conversations that branch, some of a group, come and end; engines come and go; the rule against what
    it promises, over a memory of all that was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.affinity = Affinity[One]()
        self.engines = [One(1000), One(1000), One(2000)]
        self.there = [True, True, True]
        self.sent: list[set[tuple[int, ...]]] = [set(), set(), set()]
        self.running: list[tuple[One, int]] = []
        self.homes: dict[str, One] = {}

    def shared(self, place: int, path: list[int]) -> int:
        """How many of the path's first steps the engine was sent, from all that it was."""
        count = 0
        while count < len(path) and tuple(path[: count + 1]) in self.sent[place]:
            count += 1
        return count

    @rule(path=st.lists(st.integers(0, 2), max_size=5), group=st.sampled_from(["", "a", "b"]), more=st.integers(1, 600))
    def asks(self, path: list[int], group: str, more: int) -> None:
        may = [one for one, there in zip(self.engines, self.there, strict=True) if there]
        if not may:
            return
        looked: list[None] = []

        def keys() -> list[bytes]:
            looked.append(None)
            return [bytes(path[: count + 1]) for count in range(len(path))]

        chosen = self.affinity.choose(may, group, more, keys)
        assert chosen in may
        least = min(one.load(more) for one in may)
        home = self.homes.get(group)
        if home in may and home is not None and home.load(more) <= max(OVERLOAD * least, 1):
            assert chosen is home and not looked
        else:
            assert chosen.load(more) <= OVERLOAD * least
            fits = [
                place for place, one in enumerate(self.engines) if one in may and one.load(more) <= OVERLOAD * least
            ]
            best = max(self.shared(place, path) for place in fits)
            equal = [self.engines[place] for place in fits if self.shared(place, path) == best]
            assert chosen in equal and chosen.load(more) == min(one.load(more) for one in equal)
            self.sent[self.engines.index(chosen)] |= {tuple(path[: count + 1]) for count in range(len(path))}
            if group:
                self.homes[group] = chosen
        chosen.tokens += more
        self.running.append((chosen, more))

    @rule(place=st.integers(0, 50))
    def ends(self, place: int) -> None:
        if self.running:
            one, tokens = self.running.pop(place % len(self.running))
            one.tokens -= tokens

    @rule(place=st.integers(0, 2))
    def comes_or_goes(self, place: int) -> None:
        self.there[place] = not self.there[place]

    @invariant()
    def homes_are_known(self) -> None:
        assert all(self.affinity.home(group) is home for group, home in self.homes.items())


TestRule = Machine.TestCase


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=30))
def test_what_is_forgotten_is_the_end_of_what_was_met_longest_ago(paths: list[list[int]]) -> None:
    """The beginning of a prefix is forgotten before its end, which nobody finds then."""
    most, affinity.MOST_BLOCKS = affinity.MOST_BLOCKS, 8
    try:
        prefixes = Prefixes()
        for path in paths:
            keys = [bytes(path[: count + 1]) for count in range(len(path))]
            prefixes.sent(keys)
            assert prefixes.prefix(keys) == len(keys)
            assert len(prefixes._blocks) <= 8
            for key in prefixes._blocks:  # with each block all before it
                assert prefixes.prefix([key[: count + 1] for count in range(len(key))]) == len(key)
    finally:
        affinity.MOST_BLOCKS = most


def test_a_paused_program_goes_where_there_is_room() -> None:
    """A program that is paused waits at its engine while another has room; or one that has pages there leaves them."""
    rule, one, two, three = Affinity[One](), One(1000), One(1000), One(1000)
    may, keys = [one, two, three], lambda: [b"a", b"ab"]

    def asks(program: str, tokens: int = 10) -> One:
        return rule.choose(may, "siblings", tokens, keys, program)

    home = asks("p")
    others = [engine for engine in may if engine is not home]
    home.told, others[0].told = Space(50, {"p": 80, "q": 40}), Space(100, {})
    others[1].told = Space(79, {})
    assert asks("placed") is home, "it is not paused"
    assert asks("q") is home and home.told == Space(10, {"p": 80}), "there is room at home"
    assert asks("p") is others[0] and others[0].told == Space(20, {}) and home.told.paused == {}
    assert asks("p") is others[0] and asks("sibling") is home, "it goes back, or takes its siblings along"
    home.told = Space(-1, {"r": 30})
    others[1].told = None
    assert asks("r") is home, "no other has room"
    others[1].told = Space(500, {})
    others[1].tokens, home.told = 1000, Space(-1, {"r": 30})
    assert asks("r") is home, "the other is overloaded"
    assert [engine.counts["moved"] for engine in (home, *others)] == [0, 1, 0]
    others[0].told = Space(-5, {"p": 90})
    others[1].tokens, others[1].told = 0, Space(500, {})
    assert asks("p") is others[1], "it is held where it went first"
    may.remove(others[1])
    assert asks("p") in may
