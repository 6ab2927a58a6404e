"""What the engine and the renderer did for a step's rollouts, counted for its row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tandem.engine.tally import HIT_NAMES, UNDRAFTED, Tally
from tandem.run.parts import Parts
from tandem.trace import Trace

# Of engine.stats, in a step's row.
SCHEDULED = ("run_tokens", "cached_tokens", "recomputed_tokens", "repeated_tokens", "preemptions", "evicted_pages")
DRAFTED = (
    *("drafted_tokens", "accepted_tokens", "offered_tokens", "invalid_drafts", "draft_s"),
    *("draft_found_tokens", "draft_ingested_tokens", "draft_seen_tokens", "draft_covered_tokens"),
)
PLACES = {  # of tallies: what their places are called in a row; None: by number, from 1 on
    "drafted_at": None,
    "accepted_at": None,
    "drafted_found": HIT_NAMES,
    "accepted_found": HIT_NAMES,
    "undrafted": UNDRAFTED,
}
PASSES = ("prefill_s", "decode_s", "recomputed_s")  # of the seconds of "rollout"
COUNTED = ("spelt_tokens", *SCHEDULED, *DRAFTED)


@contextmanager
def counted(parts: Parts, trace: Trace, drafts: bool) -> Iterator[None]:
    """Counts what happens meanwhile, rollouts that are stopped included."""
    names = (*SCHEDULED, *PASSES, *((*DRAFTED, *PLACES) if drafts else ()))
    before, spelt = [engine.stats for engine in parts.sampling], parts.renderer.spelt_tokens
    try:
        yield
    finally:
        trace.count("spelt_tokens", parts.renderer.spelt_tokens - spelt)
        after = [engine.stats for engine in parts.sampling]
        for name in names:
            since = sum(getattr(one, name) for one in after) - sum(getattr(one, name) for one in before)
            if not isinstance(since, Tally):
                trace.count(name, since)
                continue
            places = PLACES[name] or range(1, 1 + len(since))
            for place, count in zip(places, since, strict=False):
                trace.count(f"{name}/{place}", count)


def by_part(counts: Mapping[str, float]) -> dict[str, Any]:
    """Counts of `part/key` as an object `part`.

    >>> by_part({"tokens": 3, "at/1": 2, "at/2": 1})
    {'tokens': 3, 'at': {'1': 2, '2': 1}}
    """
    found: dict[str, Any] = {}
    for name, count in counts.items():
        part, _, key = name.partition("/")
        if key:
            found.setdefault(part, {})[key] = count
        else:
            found[part] = count
    return found
