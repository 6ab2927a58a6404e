"""What the engine and the renderer did for a step's rollouts, counted for its row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tandem.run.parts import Parts
from tandem.trace import Trace

# Of engine.stats, in a step's row.
SCHEDULED = ("run_tokens", "cached_tokens", "recomputed_tokens", "repeated_tokens", "preemptions", "evicted_pages")
DRAFTED = ("drafted_tokens", "accepted_tokens")
PASSES = ("prefill_s", "decode_s", "recomputed_s")  # of the seconds of "rollout"
COUNTED = ("spelt_tokens", *SCHEDULED, *DRAFTED)


@contextmanager
def counted(parts: Parts, trace: Trace, drafts: bool) -> Iterator[None]:
    """Counts what happens meanwhile, rollouts that are stopped included."""
    names = (*SCHEDULED, *PASSES, *(DRAFTED if drafts else ()))
    before, spelt = [engine.stats for engine in parts.sampling], parts.renderer.spelt_tokens
    try:
        yield
    finally:
        trace.count("spelt_tokens", parts.renderer.spelt_tokens - spelt)
        after = [engine.stats for engine in parts.sampling]
        for name in names:
            trace.count(name, sum(getattr(one, name) for one in after) - sum(getattr(one, name) for one in before))
