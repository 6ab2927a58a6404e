"""Which page holds a block of tokens that some earlier sequence has run.

A block is a full page's worth of tokens. Its keys and values depend on every token before it, so its name is a chain:
hash(name of the block before, its own tokens), starting from a root that names the weights. Two blocks of one name hold
the same keys and values. An update of the weights changes the root: nothing is flushed, and a block of other weights
cannot be found. (Zheng et al., SGLang, arXiv 2312.07104, share by radix tree; a hash chain, as in vLLM, needs no tree.)

A block has a page in each group of layers (engine/layout.py), and each is found apart: where a group's queries see a
block no longer, its page is let go, and may be evicted before those of other groups.

The names are 128-bit BLAKE2b digests, so a false hit is not a matter of luck or of an adversary's patience, and a name
is the same in every process.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b

from tandem.engine.layout import KvLayout, pages_for
from tandem.engine.pages import MOST_WORTH, PagePool
from tandem.types import WeightVersion

NULL = -1  # in a page table: no page, since no query sees the block; never named, shared or read


@lru_cache(maxsize=4096)
def root_key(version: WeightVersion, adapter: str = "", tenant: str = "") -> bytes:
    """The name before the first block: which weights, with which adapter, and whose.

    >>> root_key(WeightVersion(1, "9f2c")) == root_key(WeightVersion(1, "9f2c"), "lora")
    False
    """
    named = (version.step, version.digest, version.adapter, adapter, tenant)
    return blake2b(repr(named).encode(), digest_size=16).digest()


def block_key(parent: bytes, block: Sequence[int]) -> bytes:
    """The name of the block of token ids that follows the block named `parent`. About 1 us for 16 tokens."""
    return blake2b(parent + array("i", block).tobytes(), digest_size=16).digest()


def extend_keys(keys: list[bytes], root: bytes, tokens: Sequence[int], page_tokens: int) -> None:
    """Appends the names of the full blocks of `tokens` that `keys` does not have yet.

    >>> keys = []
    >>> extend_keys(keys, b"root", [5, 6, 7, 8, 9], 2)
    >>> len(keys), keys[0] == block_key(b"root", [5, 6]), keys[1] == block_key(keys[0], [7, 8])
    (2, True, True)
    """
    parent = keys[-1] if keys else root
    for start in range(len(keys) * page_tokens, len(tokens) - page_tokens + 1, page_tokens):
        parent = block_key(parent, tokens[start : start + page_tokens])
        keys.append(parent)


class PrefixIndex:
    """(group, block name) -> page, over a pool; decides what the pool forgets when it runs out.

    Worth of a page: what it saved lately tells what it will save. 1 for a block with generated tokens, 2 for one of a
    prompt, one more for every hit, up to MOST_WORTH. A sequence releases its last block first, and who hits a block
    of a group without limits hits its parents, so of a chain the far end goes before its beginning.
    """

    def __init__(self, pool: PagePool, layout: KvLayout) -> None:
        self.pool = pool
        self.layout = layout
        self.num_evicted = 0
        self._page: list[dict[bytes, int]] = [{} for _ in layout.groups]
        self._name: dict[int, tuple[int, bytes]] = {}
        self._worth = [1] * pool.num_pages

    def __len__(self) -> int:
        return len(self._name)

    def match(self, keys: Sequence[bytes], most: int) -> list[list[int]]:
        """Page tables, one a group, of the longest hit on keys[0], keys[1], ..., at most `most` blocks of them.

        All are of the hit's length; NULL where the group's queries see nothing from there on. Takes no reference.
        """
        groups, page_of, size = self.layout.groups, self._page, self.pool.page_tokens
        most = min(most, len(keys))
        if len(groups) == 1 and not groups[0].limited:
            pages: list[int] = []
            for key in keys[:most]:
                page = page_of[0].get(key)
                if page is None:
                    break
                pages.append(page)
            return [pages]
        hit = self.layout.longest_hit(most, size, lambda group, block: keys[block] in page_of[group])
        tables = []
        for group, named in zip(groups, page_of, strict=True):
            first, sinks = group.first_block(hit * size, size), pages_for(group.sinks, size)
            tables.append([named[keys[b]] if b >= first or b < sinks else NULL for b in range(hit)])
        return tables

    def pages(self, key: bytes) -> list[int]:
        """The page of each group that has the name; NULL where none has."""
        return [named.get(key, NULL) for named in self._page]

    def hit(self, pages: Iterable[int]) -> None:
        """One more holder of pages that `match` gave, each the more worth for it."""
        worth = self._worth
        for page in pages:
            self.pool.share(page)
            worth[page] = min(worth[page] + 1, MOST_WORTH)

    def insert(self, key: bytes, group: int, page: int, prompt: bool) -> bool:
        """Names a held page whose every slot is written and final. False: the name keeps the page it has."""
        assert self.pool.refs[page] > 0, f"page {page} is indexed but not held"
        if key in self._page[group]:
            return False
        assert page not in self._name, f"page {page} would have two names"
        self._page[group][key] = page
        self._name[page] = (group, key)
        self._worth[page] = 1 + prompt
        return True

    def unname(self, key: bytes) -> None:
        """Takes a name back: its pages are found no more, and free once nobody holds them."""
        for pages in self._page:
            page = pages.pop(key, None)
            if page is not None:
                del self._name[page]
                self.pool.forget(page)

    def take(self) -> int | None:
        """A page to write on, held once: a free one, else the one evicted; None where all are held."""
        page = self.pool.take()
        if page is None:
            evicted = self.pool.evict()
            if evicted is not None:
                group, key = self._name.pop(evicted)
                del self._page[group][key]
                self.num_evicted += 1
                page = self.pool.take()
        return page

    def release(self, page: int) -> None:
        """A sequence lets go of a page."""
        self.pool.release(page, self._worth[page] if page in self._name else None)

    def named(self, pages: Iterable[int]) -> list[int]:
        """Those of held pages that have a name."""
        return [page for page in pages if page in self._name]

    def names(self, pages: Iterable[int]) -> list[tuple[int, bytes]]:
        """(group, block name) of pages that have one."""
        return [self._name[page] for page in pages]

    def pin(self, pages: Iterable[int]) -> None:
        """One more holder, who has no use for them now: they are not worth more for it."""
        for page in pages:
            self.pool.share(page)

    def prize(self, pages: Iterable[int]) -> None:
        """As worth as can be: once nobody holds them, they are evicted last."""
        for page in pages:
            self._worth[page] = MOST_WORTH

    def retire(self) -> None:
        """Other weights serve from now on: what has a name stays findable, and is the first to be forgotten."""
        self.pool.devalue()
        self._worth = [1] * self.pool.num_pages

    def empty(self) -> None:
        """Nothing is held: no page has a name any more, and all are free."""
        self.pool.empty()
        self._page = [{} for _ in self.layout.groups]
        self._name.clear()

    def check_integrity(self, tables: Sequence[Sequence[int]]) -> None:
        """AssertionError unless names and pages are one to one, and named pages nobody holds are the cached ones.

        tables: of each sequence, the pages of all its groups.
        """
        self.pool.check_integrity(tables)
        named = {page: (group, key) for group, pages in enumerate(self._page) for key, page in pages.items()}
        assert named == self._name, (len(named), len(self._name))
        unheld = {page for page in self._name if self.pool.refs[page] == 0}
        assert unheld == set(self.pool.cached), (sorted(unheld ^ set(self.pool.cached))[:8], "named xor cached")
