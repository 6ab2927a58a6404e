"""Which page holds a block of tokens that some earlier sequence has run.

A block is a full page's worth of tokens. Its keys and values depend on every token before it, so its name is a chain:
hash(name of the block before, its own tokens), starting from a root that names the weights. Two blocks of one name hold
the same keys and values. An update of the weights changes the root: nothing is flushed, and a block of other weights
cannot be found. (Zheng et al., SGLang, arXiv 2312.07104, share by radix tree; a hash chain, as in vLLM, needs no tree.)

The names are 128-bit BLAKE2b digests, so a false hit is not a matter of luck or of an adversary's patience, and a name
is the same in every process.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from tandem.engine.pages import PagePool
from tandem.types import WeightVersion


def root_key(version: WeightVersion) -> bytes:
    """The name before the first block: which weights, which adapter.

    >>> root_key(WeightVersion(1, "9f2c")) == root_key(WeightVersion(1, "9f2c", "lora"))
    False
    """
    return blake2b(repr((version.step, version.digest, version.adapter)).encode(), digest_size=16).digest()


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
    """Block name -> page, over a pool; decides what the pool forgets when it runs out.

    Eviction takes the page released longest ago. A sequence releases its last block first, so of a chain the far
    end goes before its beginning.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.num_evicted = 0
        self._page: dict[bytes, int] = {}
        self._key: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._page)

    def match(self, keys: Sequence[bytes], most: int) -> list[int]:
        """Pages of the longest indexed run of keys[0], keys[1], ..., at most `most` of them. Takes no reference."""
        pages: list[int] = []
        page_of = self._page
        for key in keys[:most]:
            page = page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def insert(self, key: bytes, page: int) -> bool:
        """Names a held page whose every slot is written and final. False: the name keeps the page it has."""
        assert self.pool.refs[page] > 0, f"page {page} is indexed but not held"
        if key in self._page:
            return False
        assert page not in self._key, f"page {page} would have two names"
        self._page[key] = page
        self._key[page] = key
        return True

    def take(self) -> int | None:
        """A page to write on, held once: a free one, else the one evicted; None where all are held."""
        page = self.pool.take()
        if page is None:
            evicted = self.pool.evict()
            if evicted is not None:
                del self._page[self._key.pop(evicted)]
                self.num_evicted += 1
                page = self.pool.take()
        return page

    def release(self, pages: Sequence[int]) -> None:
        """A sequence lets go of its page table."""
        for page in reversed(pages):
            self.pool.release(page, keep=page in self._key)

    def check_integrity(self, tables: Sequence[Sequence[int]]) -> None:
        """AssertionError unless names and pages are one to one, and named pages nobody holds are the cached ones."""
        self.pool.check_integrity(tables)
        assert {page: key for key, page in self._page.items()} == self._key, (len(self._page), len(self._key))
        unheld = {page for page in self._key if self.pool.refs[page] == 0}
        assert unheld == set(self.pool.cached), (sorted(unheld ^ set(self.pool.cached))[:8], "named xor cached")
