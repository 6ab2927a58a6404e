"""Which layers share a page, and what a layer's queries still see.

Layers of one reach that keep as many bytes of a token form groups, all of the same number of layers. Where all layers
keep the same, a page of any group takes the same memory and one pool serves all (vLLM groups layers so: 12 full and 36
chunked layers are 1 + 3 groups of 12). A page holds `page_tokens` tokens of one group's layers; a sequence has a page
table a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import gcd
from typing import TYPE_CHECKING

from tandem.models.parts import kept_bytes
from tandem.numerics.names import code_bits, kv_parts, stored_kv
from tandem.types import Reach

if TYPE_CHECKING:
    from tandem.engine.config import EngineConfig
    from tandem.models.spec import ModelSpec


def pages_for(tokens: int, page_tokens: int) -> int:
    """Pages of one group that hold `tokens` tokens.

    >>> pages_for(0, 16), pages_for(16, 16), pages_for(17, 16)
    (0, 1, 2)
    """
    return -(-tokens // page_tokens)


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers that share pages, and which of its keys a query at a position sees."""

    reach: Reach
    sinks: int = 0  # leading positions that every query sees beside its window
    token_bytes: int = 0  # that its layers keep of a token

    def page_bytes(self, page_tokens: int) -> int:
        return self.token_bytes * page_tokens

    @property
    def limited(self) -> bool:
        """Whether some keys of a long context are seen no more."""
        return self.reach != Reach()

    def unseen_from(self, end: int) -> int:
        """The first position whose query, like all later ones, sees none of the positions before `end`, sinks aside.

        >>> KvGroup(Reach(window=4)).unseen_from(8), KvGroup(Reach(chunk=6)).unseen_from(8)
        (11, 12)
        """
        if self.reach.window is not None:
            return end + self.reach.window - 1
        assert self.reach.chunk is not None, "a query of this group sees every position before it"
        return -(-end // self.reach.chunk) * self.reach.chunk

    def first_block(self, position: int, page_tokens: int) -> int:
        """The first block past the sinks that a query at `position` sees some of."""
        return max(self.reach.first_seen(position) // page_tokens, pages_for(self.sinks, page_tokens))

    def most_pages(self, tokens: int, ahead: int, page_tokens: int) -> int:
        """Most pages held at once by a context that grows to `tokens`, run at most `ahead` tokens at a time.

        >>> KvGroup(Reach(window=9)).most_pages(100, 1, 4), KvGroup(Reach()).most_pages(100, 1, 4)
        (3, 25)
        """
        whole = pages_for(tokens, page_tokens)
        seen = self.reach.window or self.reach.chunk
        if seen is None:
            return whole
        span = seen - 1 + ahead  # tokens from the first that a batch sees to its last, anywhere on the pages
        return min(whole, (span + page_tokens - 2) // page_tokens + 1 + pages_for(self.sinks, page_tokens))


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The groups of a model's layers.

    >>> layout = KvLayout.of((Reach(chunk=8), Reach(chunk=8), Reach()))
    >>> [group.reach.chunk for group in layout.groups], layout.place_L, layout.depth
    ([8, 8, None], ((0, 0), (1, 0), (2, 0)), 1)
    """

    groups: tuple[KvGroup, ...]
    place_L: tuple[tuple[int, int], ...]  # of each layer: its group, and its pool, the place in a page of that group
    depth: int  # layers of each group: pools
    rounds_full: bool = False  # a page's tokens are rounded at once as it is full: a part of it serves nobody then
    open_bytes: int = 0  # of a token of a group's layers until then, where that lies elsewhere and goes with a sequence

    @classmethod
    def of(cls, reaches_L: Sequence[Reach], sinks: int = 0, bytes_L: Sequence[int] = ()) -> KvLayout:
        """Groups in the order of their first layers. `sinks` are of every window, `bytes_L` what a token takes."""
        layers: dict[tuple[Reach, int], list[int]] = {}
        for layer, kind in enumerate(zip(reaches_L, bytes_L or (0,) * len(reaches_L), strict=True)):
            layers.setdefault(kind, []).append(layer)
        depth = reduce(gcd, map(len, layers.values()))
        groups: list[KvGroup] = []
        place_L = [(0, 0)] * len(reaches_L)
        for (reach, layer_bytes), alike in layers.items():
            for index, layer in enumerate(alike):
                if index % depth == 0:
                    groups.append(KvGroup(reach, sinks if reach.window is not None else 0, depth * layer_bytes))
                place_L[layer] = (len(groups) - 1, index % depth)
        return cls(tuple(groups), tuple(place_L), depth)

    @classmethod
    def for_engine(cls, spec: ModelSpec, config: EngineConfig, dtype: str, kept: str = "same") -> KvLayout:
        """Of an engine that computes in `dtype`: of the model's reaches, or of engine.kv_window in every layer. kept:
        model.kv."""
        stored = stored_kv(config.kv_dtype, kept)
        wide_L = kept_bytes(spec, dtype)
        bytes_L = wide_L if stored == "same" else kept_bytes(spec, stored, dtype)
        reaches, sinks = spec.reaches, 0
        if config.kv_window:
            reaches, sinks = (Reach(window=config.kv_window),) * spec.layers, config.kv_sinks
        spans = any(kv_parts(name)[1] for name in (config.kv_dtype, kept))
        made = cls.of(reaches, sinks, bytes_L)
        return replace(made, rounds_full=spans, open_bytes=made.depth * wide_L[0] if code_bits(stored) else 0)

    def pages_in(self, nbytes: int, page_tokens: int, sequences: int) -> int:
        """Pages that fit in so many bytes beside those that `sequences` at once are filling, where these lie apart:
        one a group each, and no more than there are pages.

        >>> layout = replace(KvLayout.of((Reach(),), 0, (6,)), open_bytes=32)
        >>> layout.pages_in(1000, 4, 2), layout.pages_in(1000, 4, 20), WHOLE.of((Reach(),), 0, (6,)).pages_in(99, 4, 2)
        (31, 6, 4)
        """
        page, opened, most = (
            self.groups[0].page_bytes(page_tokens),
            self.open_bytes * page_tokens,
            self.most_open(sequences),
        )
        few = nbytes // (page + opened)
        return few if few <= most else (nbytes - most * opened) // page

    def most_open(self, sequences: int) -> int:
        """Pages that so many sequences fill at once, where they lie apart."""
        return sequences * len(self.groups) if self.open_bytes else 0

    @property
    def token_bytes(self) -> int:
        """That all layers keep of a token."""
        return sum(group.token_bytes for group in self.groups)

    def capacity_tokens(self, num_pages: int, page_tokens: int) -> int:
        """Tokens of which so many pages hold what all layers keep, where no group lets go of any."""
        return num_pages * page_tokens // len(self.groups)

    def most_pages(self, tokens: int, ahead: int, page_tokens: int) -> int:
        """KvGroup.most_pages over all groups."""
        return sum(group.most_pages(tokens, ahead, page_tokens) for group in self.groups)

    def longest_hit(self, most: int, page_tokens: int, present: Callable[[int, int], bool]) -> int:
        """The most leading blocks, up to `most`, after which every group has all blocks that the next query sees.

        present(group, block): whether there is a page of it. Each group takes the longest it accepts of what the one
        before left; the end is where all accept. O(groups x blocks) calls for a chain with few holes.
        """
        hit, accepting, turn = most, 0, 0
        while hit and accepting < len(self.groups):
            found = self._longest(turn % len(self.groups), hit, page_tokens, present)
            accepting = accepting + 1 if found == hit else 1
            hit, turn = found, turn + 1
        return hit

    def _longest(self, index: int, hit: int, page_tokens: int, present: Callable[[int, int], bool]) -> int:
        group = self.groups[index]
        if not group.limited:
            return next((block for block in range(hit) if not present(index, block)), hit)
        sinks = pages_for(group.sinks, page_tokens)
        while hit:
            # No longer hit leaves out a missing block: what a query sees begins no earlier for a later one.
            seen = range(hit - 1, group.first_block(hit * page_tokens, page_tokens) - 1, -1)
            missing = next((block for block in seen if not present(index, block)), None)
            if missing is None:
                missing = next((block for block in range(min(sinks, hit)) if not present(index, block)), None)
            if missing is None:
                return hit
            hit = missing
        return 0


WHOLE = KvLayout.of((Reach(),))  # one group, whose queries see everything
