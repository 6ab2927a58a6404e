"""The end of a context, which is no full block, and which others copy instead of running it again.

A group's siblings share the full blocks of their prompt through the prefix index. What is left before the prompt's last
token, at most page_tokens - 1 tokens, lies on a page that its owner goes on to write. A sibling that starts while the
owner holds that page takes a copy of it and runs the last token alone. Of 8 prompts of 512 tokens with 16 samples each,
this is 1,800 of 6,000 rows before the first decode.

Where pages are rounded as they are full (engine/layout.py: rounds_full), nothing is copied of a full one.

A program's next turn goes on where the last one ended, in the midst of a page. That page gets a name as its sequence
ends, like a block's; who starts behind the same blocks copies it and goes on after the tokens that are its own too.
Over six turns of 32 tokens this was 2.3 % of the prefixes.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING

from tandem.engine.batch import MIXED
from tandem.engine.prefix import NULL, PrefixIndex, block_key, extend_keys

if TYPE_CHECKING:
    from tandem.engine.batch import Sequence


def tail_key(sequence: Sequence, page_tokens: int, rounds_full: bool = False) -> bytes | None:
    """The name of the tokens between the last full block before the prompt's last token, and that token.

    None where there are none, or where the sequence has generated: what it runs again is nobody else's; or where that
    token fills a page that is then rounded. Its `keys` must be complete. A name of fewer tokens than a block is no
    block's.
    """
    tokens = sequence.tokens
    block, rest = divmod(len(tokens) - 1, page_tokens)
    if rest == 0 or len(tokens) > len(sequence.request.tokens) or (rounds_full and rest == page_tokens - 1):
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


class Ends:
    """Name of a block, or root -> ends of contexts that follow it: their tokens, and the name of their page.

    Names whose pages were evicted go as they are met, and the oldest as there are more than pages.
    """

    MOST = 8  # that follow one block, the latest

    def __init__(self, index: PrefixIndex) -> None:
        self.index = index
        self.borrowed: dict[int, list[int]] = {}  # arrival -> pages held until the next batch has copied them
        self._after: OrderedDict[bytes, dict[bytes, array[int]]] = OrderedDict()

    def leave(self, sequence: Sequence) -> list[int]:
        """Names the page that an ending sequence wrote last; the pages, one a group, that got a name."""
        size = self.index.pool.page_tokens
        block = (sequence.computed - 1) // size
        if block < 0 or sequence.pages is None or sequence.root == MIXED:
            return []
        whole = sequence.computed == (block + 1) * size  # it has its name already, and siblings want all but its end
        if self.index.layout.open_bytes or (whole and self.index.layout.rounds_full):
            return []
        extend_keys(sequence.keys, sequence.root, sequence.tokens[: block * size], size)
        parent = sequence.keys[block - 1] if block else sequence.root
        tokens = array("i", sequence.tokens[block * size : sequence.computed])
        key, pages = block_key(parent, tokens), [table[block] for table in sequence.pages.tables]
        places = () if whole else enumerate(pages)
        named = [page for group, page in places if self.index.insert(key, group, page, prompt=False)]
        ends = self._after.setdefault(parent, {})
        self._after.move_to_end(parent)
        ends[key] = tokens
        if len(ends) > self.MOST:
            del ends[next(iter(ends))]
        if len(self._after) > self.index.pool.num_pages:
            self._after.popitem(last=False)
        return named

    def borrow(self, sequence: Sequence) -> tuple[int, list[int]]:
        """(tokens of a starting sequence behind its hits that an end has too, the end's page of each group).

        The pages are held until `give_back`. 0 where nobody has one, or pages are scarce.
        """
        assert sequence.pages is not None
        blocks, pool, size = sequence.pages.blocks, self.index.pool, self.index.pool.page_tokens
        parent = sequence.keys[blocks - 1] if blocks else sequence.root
        ends = self._after.get(parent)
        if ends is None or pool.num_available < 2 * len(sequence.pages.tables):
            return 0, []
        ours = sequence.tokens[blocks * size : min((blocks + 1) * size, len(sequence.tokens) - 1)]
        best, found = 0, list[int]()
        for key, theirs in list(ends.items()):
            pages = self.index.pages(key)
            if NULL in pages:
                del ends[key]
                continue
            pairs = enumerate(zip(ours, theirs, strict=False))
            same = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            if same > best:
                best, found = same, pages
        if not ends:
            del self._after[parent]
        if best:
            self.index.hit(found)
            self.borrowed[sequence.arrival] = found
        return best, found

    def give_back(self, sequence: Sequence | None = None) -> None:
        """Pages borrowed for a sequence, or for all, are held no more."""
        for arrival in list(self.borrowed) if sequence is None else [sequence.arrival]:
            for page in self.borrowed.pop(arrival, ()):
                self.index.release(page)

    def clear(self) -> None:
        self._after.clear()
