"""Which of several engines is asked: the one that has the program, or was sent the prefix, or has least to do.

A group (siblings, a program's turns) stays at the engine that has it. A new one goes to the engine that was sent the
longest prefix of it, of these to the one of least load, and of those to the one that was sent least so far. One that is
overloaded is passed over: for a new group, of more than OVERLOAD times the least load, both with this request; a group
that has an engine moves only where that has no room for it, too. So what an engine is asked for is, with it, at most
OVERLOAD times what the least loaded would have, or at most what it has room for.

A paused program (engine/programs.py) has nothing that ties it to a place: where its engine has no room for it and
another has, its next request goes there, and the program stays there.

In process: rollout/router.py. Over HTTP: server/front.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from tandem.engine.space import Space

OVERLOAD = 2.0  # times the least load
MOST_BLOCKS = 1 << 16  # of prefixes that an engine is remembered to have been sent
MOST_GROUPS = 1 << 14  # that are remembered to have an engine


class Prefixes:
    """Blocks of what an engine was sent, each known by a hash of all up to its end.

    >>> one = Prefixes()
    >>> one.sent([b"a", b"ab"])
    >>> one.prefix([b"a", b"ab", b"abc"]), one.prefix([b"x", b"ab"])
    (2, 0)
    """

    def __init__(self) -> None:
        self._blocks: OrderedDict[bytes, None] = OrderedDict()
        self.count = 0  # that it was sent in all

    def prefix(self, keys: Iterable[bytes]) -> int:
        """How many of these it was sent, from the first on."""
        return sum(1 for _ in itertools.takewhile(self._blocks.__contains__, keys))

    def sent(self, keys: Sequence[bytes]) -> None:
        """The end of a prefix is forgotten before its beginning, without which it could not be found."""
        self.count += len(keys)
        for key in reversed(keys):
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > MOST_BLOCKS:
            self._blocks.popitem(last=False)


class Choosable(Protocol):
    """An engine, as the rule sees it."""

    prefixes: Prefixes
    counts: Counter[str]  # of them `moved`: paused programs that came from another engine

    def space(self) -> Space | None:
        """As it was said last; what is sent there meanwhile is taken off. None: it gives programs no places."""

    def load(self, more_tokens: int = 0) -> float:
        """What it was asked for with so many tokens more, over what it has room for."""


E = TypeVar("E", bound=Choosable)


class Affinity(Generic[E]):
    """Which engine has which group, and the rule."""

    def __init__(self) -> None:
        self._homes: OrderedDict[str, E] = OrderedDict()

    def home(self, group: str) -> E | None:
        """The engine that has it."""
        return self._homes.get(group)

    def choose(
        self, may: Sequence[E], group: str, more_tokens: int, keys: Callable[[], Sequence[bytes]], program: str = ""
    ) -> E:
        """Of one or more engines that may be asked; the group ("": none) is there from now on.

        keys: of the blocks of what is asked, made where the group has no engine. program: of the group, by the name
        that engines know it by ("": none); one that was paused may leave the group.
        """
        group = program if program in self._homes else group
        least = min(may, key=lambda one: one.load(more_tokens))
        bound = OVERLOAD * least.load(more_tokens)
        home = self.home(group)
        fits = [one for one in may if one.load(more_tokens) <= max(bound, 1)]
        need, spaces = _elsewhere(home, home in may, fits, program) if home is not None and program else (0, {})
        if spaces:
            blocks = keys()
            chosen = max(spaces, key=lambda one: (one.prefixes.prefix(blocks), -one.load(more_tokens)))
            spaces[chosen].tokens -= need
            chosen.counts["moved"] += 1
            return self._settled(chosen, program, blocks)
        if home is not None and home in may and not (home.load(more_tokens) > bound and home.load(more_tokens) > 1):
            self._homes.move_to_end(group)
            return home
        blocks = keys()
        fits = [one for one in fits if one.load(more_tokens) <= bound]
        chosen = max(fits, key=lambda one: (one.prefixes.prefix(blocks), -one.load(more_tokens), -one.prefixes.count))
        return self._settled(chosen, group, blocks)

    def _settled(self, chosen: E, group: str, blocks: Sequence[bytes]) -> E:
        chosen.prefixes.sent(blocks)
        if group:
            self._homes[group] = chosen
            self._homes.move_to_end(group)
            if len(self._homes) > MOST_GROUPS:
                self._homes.popitem(last=False)
        return chosen


def _elsewhere(home: E, asked: bool, may: Sequence[E], program: str) -> tuple[int, dict[E, Space]]:
    """(tokens of a program that is paused at `home`, other engines with room for it where `home` has none)."""
    space = home.space()
    need = space.paused.pop(program, None) if space is not None else None
    if space is None or need is None:
        return 0, {}
    if asked and need <= space.tokens:
        space.tokens -= need
        return need, {}
    spaces = {one: other for one in may if one is not home and (other := one.space()) is not None}
    return need, {one: other for one, other in spaces.items() if need <= other.tokens}
