"""The prefix index against brute force over the token sequences that were indexed."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.layout import WHOLE
from tandem.engine.pages import PagePool
from tandem.engine.prefix import PrefixIndex, block_key, extend_keys, root_key
from tandem.types import WeightVersion

PAGE = 2
VERSIONS = [WeightVersion(0, "a"), WeightVersion(1, "a"), WeightVersion(0, "b"), WeightVersion(0, "a", "lora")]


def keys_of(tokens: list[int], version: WeightVersion) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, root_key(version), tokens, PAGE)
    return keys


@given(
    indexed=st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=9), st.sampled_from(VERSIONS)), max_size=6),
    asked=st.lists(st.integers(0, 1), max_size=9),
    version=st.sampled_from(VERSIONS),
    most=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_match_is_the_longest_block_prefix_of_the_same_weights(
    indexed: list[tuple[list[int], WeightVersion]], asked: list[int], version: WeightVersion, most: int
) -> None:
    """A block found under other weights, under another adapter, after other tokens, or not found at all."""
    pool = PagePool(64, PAGE)
    index = PrefixIndex(pool, WHOLE)
    contents: dict[int, tuple[tuple[int, ...], WeightVersion]] = {}
    for tokens, under in indexed:
        for block, key in enumerate(keys_of(tokens, under)):
            page = index.take()
            assert page is not None
            contents[page] = (tuple(tokens[: (block + 1) * PAGE]), under)
            index.insert(key, 0, page, prompt=True)
    (pages,) = index.match(keys_of(asked, version), most)
    known = set(contents.values())
    wanted = 0
    while wanted < min(most, len(asked) // PAGE) and (tuple(asked[: (wanted + 1) * PAGE]), version) in known:
        wanted += 1
    assert [contents[page] for page in pages] == [(tuple(asked[: (n + 1) * PAGE]), version) for n in range(wanted)]


def test_block_key_is_blake2b_of_parent_and_little_endian_ids() -> None:
    """A name that differs between processes, or by Python's hash seed, or that drops the parent."""
    parent = bytes(range(16))
    by_hand = hashlib.blake2b(parent + struct.pack("<3i", 5, 70000, 0), digest_size=16).digest()
    assert block_key(parent, [5, 70000, 0]) == by_hand
    assert len({root_key(version) for version in VERSIONS}) == len(VERSIONS)
    assert root_key(WeightVersion(1, "2", "3")) != root_key(WeightVersion(1, "23", ""))


def test_keys_extended_in_pieces_equal_keys_at_once() -> None:
    """A chain continued from the wrong parent when a sequence grows."""
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    keys: list[bytes] = []
    for length in range(len(tokens) + 1):
        extend_keys(keys, b"root", tokens[:length], PAGE)
    whole: list[bytes] = []
    extend_keys(whole, b"root", tokens, PAGE)
    assert keys == whole and len(keys) == 4


def test_eviction_takes_the_oldest_chain_from_its_far_end() -> None:
    """The beginning of a chain evicted first, which leaves its rest cached but unreachable."""
    pool = PagePool(4, PAGE)
    index = PrefixIndex(pool, WHOLE)
    old, new = keys_of([1, 1, 2, 2], VERSIONS[0]), keys_of([3, 3, 4, 4], VERSIONS[0])
    for keys in (old, new):
        pages = [index.take(), index.take()]
        for key, page in zip(keys, pages, strict=True):
            assert page is not None
            index.insert(key, 0, page, prompt=True)
        for page in reversed(pages):
            assert page is not None
            index.release(page)
    lengths = []
    for taken in range(4):
        assert index.take() is not None and index.num_evicted == taken + 1
        lengths.append((len(index.match(old, 2)[0]), len(index.match(new, 2)[0])))
    assert lengths == [(1, 2), (0, 2), (0, 1), (0, 0)]
    assert index.take() is None and len(index) == 0


def test_a_hit_keeps_a_chain_from_eviction() -> None:
    """Eviction by first use instead of by last: the prompt every request shares is the first to go."""
    pool = PagePool(2, PAGE)
    index = PrefixIndex(pool, WHOLE)
    pages = []
    for token in (1, 2):
        page = index.take()
        assert page is not None
        index.insert(keys_of([token, token], VERSIONS[0])[0], 0, page, prompt=True)
        pages.append(page)
    for page in pages:
        index.release(page)
    index.hit([pages[0]])
    index.release(pages[0])
    assert index.take() == pages[1]
    assert index.match(keys_of([1, 1], VERSIONS[0]), 1) == [[pages[0]]]


def test_blocks_of_earlier_weights_go_first_however_often_they_were_hit() -> None:
    """After an update the pool stays full of pages that no request can find, and what is new is evicted instead."""
    index = PrefixIndex(PagePool(2, PAGE), WHOLE)
    pages = []
    for token in (1, 2):
        page = index.take()
        assert page is not None
        index.insert(keys_of([token, token], VERSIONS[token - 1])[0], 0, page, prompt=token == 1)
        pages.append(page)
        if token == 1:
            for _ in range(5):
                index.hit([page])
                index.release(page)
            index.release(page)
            index.retire()
    index.release(pages[1])
    assert index.take() == pages[0]


def test_integrity_finds_a_cached_page_without_a_name() -> None:
    """A page kept for contents that no request can ever find: memory lost for good."""
    pool = PagePool(2, PAGE)
    index = PrefixIndex(pool, WHOLE)
    page = pool.take()
    assert page is not None
    pool.release(page, worth=1)
    with pytest.raises(AssertionError):
        index.check_integrity([])
