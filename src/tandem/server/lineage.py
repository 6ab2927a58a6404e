"""Which program a call is a step of, where it does not say: the one whose last context and answer it begins with.

A conversation is a chain of units: messages of a chat, blocks of token ids of a plain prompt. What has been said so far
is known by the hash of the chain up to there; who comes with a longer chain over a known one goes on with its program.
"""

from __future__ import annotations

import secrets
from array import array
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
    >>> first = lineage.program("", [b"question"])
    >>> lineage.answered("", [b"question", b"answer"], first)
    >>> lineage.program("", [b"question", b"answer", b"more"]) == first, lineage.program("", [b"question"]) == first
    (True, False)
    """

    def __init__(self) -> None:
        self._ends: OrderedDict[bytes, str] = OrderedDict()
        self._numbers = count(1)
        self._own = secrets.token_hex(3)  # several servers name programs, behind one router

    def program(self, tenant: str, units: Sequence[bytes]) -> str:
        """Its name: of the longest context that is known, or a new one."""
        for end in reversed(list(chain(tenant, units))):
            if end in self._ends:
                self._ends.move_to_end(end)
                return self._ends[end]
        return f"inferred-{self._own}-{next(self._numbers)}"

    def answered(self, tenant: str, units: Sequence[bytes], program: str) -> None:
        """A call of `program` had these units, and its answer is the last of them."""
        *_, end = chain(tenant, units)
        self._ends.pop(end, None)
        self._ends[end] = program
        if len(self._ends) > REMEMBERED:
            self._ends.popitem(last=False)


def chain(tenant: str, units: Iterable[bytes]) -> Iterable[bytes]:
    """The hash of all up to each unit."""
    end = blake2b(tenant.encode("utf-8", "replace"), digest_size=16).digest()
    for unit in units:
        end = blake2b(end + unit, digest_size=16).digest()
        yield end


def of_messages(messages: Sequence[Message]) -> list[bytes]:
    """Units of a chat. What clients change on the way back is left out: white space around, reasoning, ids of calls."""
    return [
        repr(
            (
                one.role,
                one.content.strip(),
                [(call.name, sorted(map(repr, call.arguments.items()))) for call in one.calls],
            )
        ).encode("utf-8", "replace")
        for one in messages
    ]


def arguments_of(messages: Sequence[Message]) -> str:
    """A hash of the calls whose results a conversation ends with; "" where it ends otherwise.

    >>> from tandem.types import ToolCall
    >>> call = Message("assistant", "", (ToolCall("add", {"a": 1}),))
    >>> len(arguments_of([call, Message("tool", "1")])), arguments_of([call])
    (16, '')
    """
    before = next((one for one in reversed(messages) if one.role != "tool"), None)
    if before is None or not before.calls or messages[-1].role != "tool":
        return ""
    return blake2b(b"".join(of_messages([Message("assistant", "", before.calls)])), digest_size=8).hexdigest()


def of_tokens(tokens: Sequence[int]) -> list[bytes]:
    """Units of a plain prompt: its whole blocks. A million tokens take a moment: they are refused later."""
    ids = array("i", tokens)
    size = BLOCK * ids.itemsize
    content = ids.tobytes()
    return [content[start : start + size] for start in range(0, len(content) - len(content) % size, size)]
