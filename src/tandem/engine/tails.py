"""The end of a prompt, which siblings copy instead of running it again.

A group's siblings share the full blocks of their prompt through the prefix index. What is left before the prompt's last
token, at most page_tokens - 1 tokens, lies on a page that its owner goes on to write. A sibling that starts while the
owner holds that page takes a copy of it and runs the last token alone. Of 8 prompts of 512 tokens with 16 samples each,
this is 1,800 of 6,000 rows before the first decode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.engine.prefix import NULL, block_key

if TYPE_CHECKING:
    from tandem.engine.batch import Sequence


def tail_key(sequence: Sequence, page_tokens: int) -> bytes | None:
    """The name of the tokens between the last full block before the prompt's last token, and that token.

    None where there are none, or where the sequence has generated: what it runs again is nobody else's. Its `keys` must
    be complete. A name of fewer tokens than a block is no block's.
    """
    tokens = sequence.tokens
    block, rest = divmod(len(tokens) - 1, page_tokens)
    if rest == 0 or len(tokens) > len(sequence.request.tokens):
        return None
    return block_key(sequence.keys[block - 1] if block else sequence.root, tokens[block * page_tokens : -1])


class Tails:
    """Name of a tail -> the running sequences that have run it under the present weights, by when they had."""

    def __init__(self) -> None:
        self._owners: dict[bytes, dict[int, Sequence]] = {}

    def offer(self, owner: Sequence) -> None:
        """`owner` has run its prompt."""
        assert owner.tail is not None
        self._owners.setdefault(owner.tail, {})[owner.arrival] = owner

    def withdraw(self, owner: Sequence) -> None:
        """`owner` lets go of its pages."""
        if owner.tail is not None and owner.arrival in (owners := self._owners.get(owner.tail, {})):
            del owners[owner.arrival]
            if not owners:
                del self._owners[owner.tail]

    def clear(self) -> None:
        self._owners.clear()

    def pages(self, tail: bytes | None, block: int) -> list[int]:
        """The page of each group that holds a tail in its `block`; none where nobody has it in every group."""
        for owner in self._owners.get(tail, {}).values() if tail is not None else ():
            assert owner.pages is not None, f"sequence {owner.arrival} is copied from and holds no page"
            found = [table[block] for table in owner.pages.tables]
            if NULL not in found:
                return found
        return []

    def check_integrity(self, running: list[Sequence]) -> None:
        """AssertionError unless every owner runs, has run its prompt and goes by its name."""
        alive = {id(sequence) for sequence in running}
        for tail, owners in self._owners.items():
            for owner in owners.values():
                assert id(owner) in alive, f"sequence {owner.arrival} is copied from and does not run"
                assert owner.tail == tail and owner.computed >= len(owner.request.tokens), owner.arrival
