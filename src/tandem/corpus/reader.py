"""What a reader of something written gives: a row by its number, as the group that is learned from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Protocol

from tandem.errors import CorpusError
from tandem.types import Group, Prompt

UNTOLD = ("system", "developer")  # roles that say how to answer, not what is asked


class Reader(Protocol):
    """A source's rows. Nothing is drawn: the same number gives the same group, in any order, for as long as the source
    is as it was."""

    name: str  # of the source: what ids begin with
    digest: str  # of all that it was opened with: another one is another corpus

    @property
    def left_out(self) -> Mapping[str, int]:
        """Rows that it does not list, by why."""
        ...

    def __len__(self) -> int:
        """Rows, those that cannot be read included."""
        ...

    def place(self, number: int) -> str:
        """The file and the line of a row."""
        ...

    def group(self, number: int) -> Group:
        """A row: its prompt, and a trajectory for a chat or a document, two for a pair (the chosen one first), n for
        ratings. The columns `tokens` and `loss_mask`, whose first is False, and what else its objective needs.

        All of it, however long: what is done about length is the stream's (corpus/lengths.py). A prompt's
        `record["task"]` names its task where the row does. CorpusError for what cannot be learned from.
        """
        ...


def refused(fault: str, place: str, why: str) -> CorpusError:
    """The error for a row; `fault` is what it is counted under."""
    return CorpusError(fault, f"{place}: {why}")


def tasks_of(prompt: Prompt) -> frozenset[int]:
    """Hashes of what a prompt is known by: rows that share one are of one task, and on one side of the split.

    That is what is asked, whatever the white space and the system message, and the task that the row names.

    >>> from tandem.types import Message
    >>> asked = (Message("system", "Be short."), Message("user", "1 +  1?"))
    >>> tasks_of(Prompt("a", asked)) == tasks_of(Prompt("b", (Message("user", "1 + 1?"),)))
    True
    """
    told = [message for message in prompt.messages if message.role not in UNTOLD] or prompt.messages
    said = "\n".join(" ".join(message.content.split()) for message in told)
    named = prompt.record.get("task")
    keys = [f"asked {said}"] * bool(said) + [f"named {named}"] * (named is not None)
    return frozenset(hashed(key) for key in keys)


def hashed(text: str) -> int:
    """63 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little") >> 1
