"""Groups of layers, what they see, prefix hits over them and pages let go, against brute force over positions."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.config import EngineConfig
from tandem.engine.layout import WHOLE, KvGroup, KvLayout, pages_for
from tandem.engine.pages import PagePool
from tandem.engine.prefix import NULL, PrefixIndex, extend_keys
from tandem.engine.tables import PageTables
from tandem.models.spec import ModelSpec
from tandem.types import Reach

REACHES = st.one_of(
    st.just(Reach()), st.integers(1, 9).map(lambda n: Reach(window=n)), st.integers(1, 9).map(lambda n: Reach(chunk=n))
)
LAYOUTS = st.builds(KvLayout.of, st.lists(REACHES, min_size=1, max_size=4), st.integers(0, 3))


def sees(group: KvGroup, query: int, key: int) -> bool:
    """Whether a query sees a key, from the words and not from Reach.first_seen."""
    if key > query:
        return False
    if group.reach.window is not None:
        return query - key < group.reach.window or key < group.sinks
    return group.reach.chunk is None or query // group.reach.chunk == key // group.reach.chunk


def later_sees(group: KvGroup, position: int, block: int, page: int) -> bool:
    """Whether a query at `position` or later sees some of a block."""
    queries = range(position, position + 60)
    return any(sees(group, query, key) for query in queries for key in range(block * page, (block + 1) * page))


def test_groups_are_equal_and_hold_every_layer_once() -> None:
    """Layers of several reaches in a group, groups of two sizes in one pool, or two layers in one place of a page."""
    three_to_one = [Reach(chunk=8192), Reach(chunk=8192), Reach(chunk=8192), Reach()] * 12
    layout = KvLayout.of(three_to_one)
    assert (len(layout.groups), layout.depth) == (4, 12)
    assert [group.limited for group in layout.groups].count(False) == 1
    assert len(set(layout.place_L)) == 48 and {pool for _, pool in layout.place_L} == set(range(12))
    for (group, _), reach in zip(layout.place_L, three_to_one, strict=True):
        assert layout.groups[group].reach == reach
    assert KvLayout.of((Reach(window=7),) * 5).place_L == tuple((0, pool) for pool in range(5))
    assert KvLayout.of((Reach(),) * 4 + (Reach(window=3),) * 6).depth == 2
    spec = ModelSpec("llama", 8, 8, 8, 3, 1, 1, 4)
    windowed = KvLayout.for_engine(spec, EngineConfig(kv_window=9, kv_sinks=2), "bfloat16")
    assert windowed.groups == (KvGroup(Reach(window=9), sinks=2, token_bytes=3 * 2 * 4 * 2),) and windowed.depth == 3
    narrow = KvLayout.for_engine(spec, EngineConfig(kv_dtype="int8"), "bfloat16")
    assert narrow.groups[0].page_bytes(16) == 16 * 3 * 2 * (4 + 4) == 16 * narrow.token_bytes


def test_layers_that_keep_other_bytes_share_no_page() -> None:
    """A layer whose pages are of another size gets those of its neighbours."""
    layout = KvLayout.of((Reach(),) * 5, bytes_L=(8, 8, 8, 8, 100))
    assert [group.token_bytes for group in layout.groups] == [8, 8, 8, 8, 100] and layout.token_bytes == 132
    layout = KvLayout.of((Reach(),) * 4, bytes_L=(100, 8, 100, 8))
    assert [group.page_bytes(4) for group in layout.groups] == [800, 64]
    assert layout.place_L == ((0, 0), (1, 0), (0, 1), (1, 1))


@given(reach=REACHES, sinks=st.integers(0, 3), end=st.integers(1, 40))
def test_unseen_from_is_the_first_query_that_sees_nothing_before(reach: Reach, sinks: int, end: int) -> None:
    """A page let go a token early, or kept a token too long."""
    group = KvGroup(reach, sinks if reach.window else 0)
    if group.limited:
        blind = [q for q in range(60) if not any(sees(group, q, key) for key in range(group.sinks, end))]
        blind = [q for q in blind if q >= end]
        assert group.unseen_from(end) == blind[0] or end <= group.sinks
        assert blind == list(range(blind[0], 60))


@settings(max_examples=300, deadline=None)
@given(
    layout=LAYOUTS,
    page=st.integers(1, 5),
    blocks=st.integers(0, 8),
    holes=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 7))),
)
def test_the_longest_hit_is_that_of_brute_force(
    layout: KvLayout, page: int, blocks: int, holes: set[tuple[int, int]]
) -> None:
    """A hit that lacks a page which the next query sees in some group, or one that could have been longer."""

    def accepted(hit: int) -> bool:
        return all(
            (index, block) not in holes or not later_sees(group, hit * page, block, page)
            for index, group in enumerate(layout.groups)
            for block in range(hit)
        )

    wanted = max(hit for hit in range(blocks + 1) if accepted(hit))
    assert layout.longest_hit(blocks, page, lambda group, block: (group, block) not in holes) == wanted


@settings(max_examples=200, deadline=None)
@given(
    layout=LAYOUTS,
    page=st.sampled_from([1, 2, 4]),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    shared=st.integers(0, 5),
)
def test_a_page_is_held_if_and_only_if_a_later_query_sees_it(
    layout: KvLayout, page: int, chunks: list[int], shared: int
) -> None:
    """Memory kept for keys that nobody will read, or keys let go that somebody will; on a prefix hit too."""
    pool = PagePool(200, page)
    index = PrefixIndex(pool, layout)
    keys: list[bytes] = []
    extend_keys(keys, b"root", list(range(shared * page)), page)
    for key in keys:
        for group in range(len(layout.groups)):
            taken = index.take()
            assert taken is not None
            index.insert(key, group, taken, prompt=True)
            index.release(taken)
    tables = PageTables(index, index.match(keys, shared))
    computed, most, ahead = tables.blocks * page, 0, max(chunks)
    assert tables.blocks == shared
    for chunk in [0, *chunks]:
        tables.extend(max(0, pages_for(computed + chunk, page) - tables.blocks))
        most = max(most, tables.num_held)
        computed += chunk
        if computed >= tables.frees_at:
            tables.free_unseen(computed)
        tables.check_integrity(computed)
        index.check_integrity([list(tables.pages())])
        for group, table in zip(layout.groups, tables.tables, strict=True):
            for block, held in enumerate(table):
                assert (held != NULL) == later_sees(group, computed, block, page), (group, computed, block)
    assert tables.num_held == sum(1 for _ in tables.pages())
    assert most <= layout.most_pages(computed, ahead, page)
    tables.release()
    index.check_integrity([])


def trace(length: int, seed: int) -> list[list[int]]:
    """Chains of block ids: 6 system prompts of 8 blocks (some far more in use than others) with a user's own 4 blocks,
    and 3 in 5 requests that are nobody's again."""
    rng = random.Random(seed)
    popular = [[1000 * k + b for b in range(8)] for k in range(6)]
    chains = []
    for number in range(length):
        noise = [10**6 + 100 * number + b for b in range(12)]
        chains.append(rng.choices(popular, [6, 4, 3, 2, 1, 1])[0] + noise[:4] if rng.random() < 0.4 else noise)
    return chains


def hits_of_lru(chains: list[list[int]], size: int) -> int:
    """Blocks found by a cache that forgets what was released longest ago, the far end of a chain first."""
    cached: OrderedDict[tuple[int, ...], None] = OrderedDict()
    found = 0
    for chain in chains:
        names = [tuple(chain[: b + 1]) for b in range(len(chain))]
        while names and names[0] in cached:
            found += 1
            del cached[names[0]]
            names.pop(0)
        for name in reversed([tuple(chain[: b + 1]) for b in range(len(chain))]):
            cached[name] = None
        while len(cached) > size:
            cached.popitem(last=False)
    return found


def hits_of_index(chains: list[list[int]], size: int) -> int:
    """The same on PrefixIndex. The last 4 blocks of a chain were generated."""
    index = PrefixIndex(PagePool(size, 1), WHOLE)
    found = 0
    for chain in chains:
        keys: list[bytes] = []
        extend_keys(keys, b"root", chain, 1)
        (pages,) = index.match(keys, len(keys))
        found += len(pages)
        index.hit(pages)
        for block in range(len(pages), len(keys)):
            page = index.take()
            assert page is not None
            index.insert(keys[block], 0, page, prompt=block < 8)
            pages.append(page)
        for page in reversed(pages):
            index.release(page)
    return found


@pytest.mark.parametrize("size", [40, 60, 100])
def test_eviction_by_value_finds_more_than_lru(size: int) -> None:
    """Prompts that all requests share are flushed by requests that share nothing."""
    chains = trace(1500, seed=size)
    lru, value = hits_of_lru(chains, size), hits_of_index(chains, size)
    assert value > 1.1 * lru, (value, lru)


def test_a_page_that_was_worth_much_is_forgotten_in_the_end() -> None:
    """What was hit long ago stays for ever, and leaves no room for what is in use now."""
    yesterday = [[9, 8, 7, 6]] * 20
    today = [[10**6 + 10 * n + b for b in range(4)] for n in range(40)]
    index = PrefixIndex(PagePool(8, 1), WHOLE)
    for chain in [*yesterday, *today]:
        keys: list[bytes] = []
        extend_keys(keys, b"root", chain, 1)
        (pages,) = index.match(keys, 4)
        index.hit(pages)
        for block in range(len(pages), 4):
            page = index.take()
            assert page is not None
            index.insert(keys[block], 0, page, prompt=False)
            pages.append(page)
        for page in reversed(pages):
            index.release(page)
    keys = []
    extend_keys(keys, b"root", yesterday[0], 1)
    assert index.match(keys, 4) == [[]]
