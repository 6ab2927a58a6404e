"""How many bytes a model that drafts takes, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from tandem.engine.layout import pages_for
from tandem.models.parts import SIZES, expected_shapes, kept_bytes
from tandem.models.spec import ModelSpec
from tandem.plan.footprint import (
    ALL,
    Asked,
    Phase,
    activation_bytes,
    answering_bytes,
    kept_numbers,
    microbatch_rows,
    num_pools,
    page_bytes,
)
from tandem.speculate.eagle import EagleSpec
from tandem.speculate.losses import ROWS
from tandem.speculate.mixed import MixedSpec


def for_pages(asked: Asked, room_bytes: int) -> int:
    """Of so many bytes, those that go to the engine's own pages, and not to a drafter's beside them."""
    own = page_bytes(asked)
    return room_bytes * own // (own + _beside_bytes(asked))


def _beside_bytes(asked: Asked) -> int:
    """Of what a drafter keeps on each page, of whatever group: keys and values, and the target's states."""
    made, dtype, tokens = asked.drafter, asked.dtype, asked.engine.page_tokens
    if made is None:
        return 0
    if isinstance(made, ModelSpec):
        return sum(kept_bytes(made, dtype)) * tokens
    states = len(made.layers) * asked.spec.width * SIZES[dtype]
    return (sum(kept_bytes(made.model, dtype)[: made.kept_layers]) + states) * tokens + 4 * sum(made.state_numbers)


def learning_parts(asked: Asked) -> tuple[int, list[tuple[str, int, tuple[Phase, ...]]]]:
    """Numbers of a drafter that is trained, and what it adds to the model: how much, and when."""
    assert asked.run is not None
    rows, size, own = microbatch_rows(asked), SIZES[asked.model.dtype], asked.run.drafter
    vocab, made = own.vocabulary or asked.spec.vocab_size, EagleSpec.of(asked.spec, vocab_size=own.vocabulary)
    if own.kind == "mixed" and own.mixers:
        made = MixedSpec.new(asked.spec, own.mixers, vocab_size=own.vocabulary)
    numbers = sum(slot.size for slot in made.all_slots())
    said = 4 * (rows * vocab + 8 * ROWS * asked.spec.vocab_size)
    kept = own.steps * (activation_bytes(made.model, rows, size, False) + 3 * 4 * rows * sum(made.state_numbers))
    return numbers, [
        ("drafter", 2 * numbers * size, ALL),
        ("what the model says of a microbatch, and the drafter", said, ("learn",)),
        ("drafter's activations of a microbatch", kept, ("learn",)),
    ]


def drafter_parts(
    asked: Asked, pool_bytes: int, steps: tuple[Phase, ...]
) -> Iterator[tuple[str, int, tuple[Phase, ...]]]:
    """What is held, how much, and when; nothing where no model drafts. pool_bytes: of the engine's own pages. steps:
    when an engine's steps run."""
    made, engine, each, size = asked.drafter, asked.engine, 1, SIZES[asked.dtype]
    if made is None:
        return
    spec = made if isinstance(made, ModelSpec) else made.model
    if asked.apart and asked.run is not None:  # engines of one process share its weights
        each = engine.replicas + int(asked.two_engines)
    pruned = 2 * engine.draft.vocabulary * spec.width * size  # rows of the head, which products read in another form
    if isinstance(made, EagleSpec):
        loaded = size * sum(slot.size for slot in made.all_slots())
        weights = 2 * loaded  # as they are, for the next update, and as products read them
    else:
        loaded = size * sum(map(prod, expected_shapes(spec).values()))
        weights = answering_bytes(asked, spec, asked.drafter_coded_bytes, asked.dtype) + pruned
    yield "drafter", each * weights, ALL
    yield "drafter's weights, until they are packed", each * loaded, ("load",)
    spare = engine.max_sequences * pages_for(engine.draft.most, engine.page_tokens)
    pages = pool_bytes // page_bytes(asked) + spare
    yield "drafter's keys and values", pages * _beside_bytes(asked) * num_pools(asked), asked.page_phases
    logits = 2 * 4 * engine.max_sequences * spec.vocab_size if engine.draft.vocabulary else 0
    layer = engine.batch_tokens * (kept_numbers(spec) + spec.ff_width) * size
    yield "drafter's activations", each * (layer + logits), steps
