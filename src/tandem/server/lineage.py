"""Which program a call is a step of, where it does not say: the one whose last context and answer it begins with.

A conversation is a chain of units: messages of a chat, blocks of token ids of a plain prompt. What has been said so far
is known by the hash of the chain up to there; who comes with a longer chain over a known one goes on with its program.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import count

from tandem.types import Message

REMEMBERED = 1 << 16  # ends of contexts; those that were met longest ago are forgotten
BLOCK = 16  # token ids a unit


class Lineage:
    """The programs that nobody named.

    >>> lineage = Lineage()
    >>> first = lineage.program("", ["question"])
    >>> lineage.answered("", ["question", "answer"], first)
    >>> lineage.program("", ["question", "answer", "more"]) == first, lineage.program("", ["question"]) == first
    (True, False)
    """

    def __init__(self) -> None:
        self._ends: OrderedDict[bytes, str] = OrderedDict()
        self._numbers = count(1)

    def program(self, tenant: str, units: Sequence[str]) -> str:
        """Its name: of the longest context that is known, or a new one."""
        for end in reversed(list(_chain(tenant, units))):
            if end in self._ends:
                self._ends.move_to_end(end)
                return self._ends[end]
        return f"inferred-{next(self._numbers)}"

    def answered(self, tenant: str, units: Sequence[str], program: str) -> None:
        """A call of `program` had these units, and its answer is the last of them."""
        *_, end = _chain(tenant, units)
        self._ends.pop(end, None)
        self._ends[end] = program
        if len(self._ends) > REMEMBERED:
            self._ends.popitem(last=False)


def _chain(tenant: str, units: Sequence[str]) -> Iterable[bytes]:
    end = blake2b(tenant.encode("utf-8", "replace"), digest_size=16).digest()
    for unit in units:
        end = blake2b(end + unit.encode("utf-8", "replace"), digest_size=16).digest()
        yield end


def of_messages(messages: Sequence[Message]) -> list[str]:
    """Units of a chat. What clients change on the way back is left out: white space around, reasoning, ids of calls."""
    return [
        repr(
            (
                one.role,
                one.content.strip(),
                [(call.name, sorted(map(repr, call.arguments.items()))) for call in one.calls],
            )
        )
        for one in messages
    ]


def of_tokens(tokens: Sequence[int]) -> list[str]:
    """Units of a plain prompt: its whole blocks."""
    whole = len(tokens) - len(tokens) % BLOCK
    return [repr(tuple(tokens[start : start + BLOCK])) for start in range(0, whole, BLOCK)]
