"""Drafts on a real decoder: the tokens, log-probs and kept sets of a run without them, to the bit."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.batch import Sequence
from tandem.engine.config import EngineConfig
from tandem.engine.draft import Drafter
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.models.decoder import Decoder
from tandem.models.spec import LayerAttention
from tandem.types import Completion, Reach, Request, Sampling
from tests.drafting import Told, at_most

WINDOWS = {"layers": 4, "attention": (LayerAttention(Reach(window=9)), LayerAttention()) * 2}
CHUNKS = {"layers": 4, "attention": (LayerAttention(Reach(chunk=8)),) * 3 + (LayerAttention(),)}
SAMPLINGS = (
    Sampling(max_new_tokens=40),
    Sampling(temperature=0.0, max_new_tokens=33),
    Sampling(temperature=0.7, top_k=5, top_p=0.9, max_new_tokens=40),
    Sampling(temperature=1.3, min_p=0.05, max_new_tokens=21, stop_token_ids=tuple(range(0, 97, 7))),
)
ASKED = [
    Request(f"r{i}", f"r{i}", tuple((7 * j * j + 3) % 97 for j in range(5 + 9 * (i % 3))), SAMPLINGS[i % 4], seed=i)
    for i in range(8)
]


def generate(
    decoder: Decoder, drafter: Drafter | None, num_pages: int = 200, **changes: Any
) -> tuple[list[Completion], Engine]:
    settings = {"page_tokens": 4, "batch_tokens": 40, "max_sequences": 6, "lookahead_tokens": 0} | changes
    config = EngineConfig(**settings)
    runner = DecoderRunner(decoder, num_pages, 4, config)
    engine = Engine(runner, config, num_pages, decoder.spec.max_position, drafter=drafter)
    done = engine.generate(ASKED)
    engine.check_integrity()
    return done, engine


def of(plain: list[Completion], rights: list[int]) -> Drafter:
    """Drafts of which the first rights[i] of each turn are what was drawn without drafts, and the others are not."""
    known = {completion.request_id: completion.tokens for completion in plain}
    turns = cycle(rights)

    def drafts(sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        found = []
        for sequence, count in zip(sequences, most, strict=True):
            rest, right = known[sequence.request.id][sequence.num_drawn :], next(turns)
            guessed = [*rest, *range(count)][:count]
            found.append([token if i < right else (token + 1) % 97 for i, token in enumerate(guessed)])
        return found

    return Told(drafts)


def columns(done: list[Completion]) -> list[dict[str, list[Any]]]:
    """Of each completion every column, numbers as hexadecimal; and how it ended."""
    return [
        {"stop": [one.stop_reason]}
        | {
            name: [value.hex() if isinstance(value, float | bytes) else value for value in column.tolist()]
            for name, column in one.columns.arrays.items()
        }
        for one in done
    ]


@pytest.mark.parametrize("changes", [{}, WINDOWS, CHUNKS], ids=["whole", "windows", "chunks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=5, deadline=None)
@given(
    rights=st.lists(st.integers(0, 7), min_size=1, max_size=9),
    kept=st.sampled_from([{}, {}, {"kv_dtype": "int8"}, {"noise": 0.05}]),
    draft_tokens=st.integers(1, 7),
    room=st.sampled_from([25, 40, 200]),
)
def test_drafts_change_no_bit(kernel_path, make_decoder, changes, dtype, rights, kept, draft_tokens, room):
    """A row's bits or noise hang on the drafts beside it, a rejected key is read, a value is booked on another token,
    or a filter's kept set is a neighbour's."""
    decoder = make_decoder(dtype, **changes)
    plain, _ = generate(decoder, None, **kept)
    assert any("kept" in one.columns for one in plain) and len({one.stop_reason for one in plain}) > 1
    room *= 2 if changes else 1
    drafted, engine = generate(decoder, of(plain, rights), room, draft=at_most(draft_tokens), **kept)
    assert columns(drafted) == columns(plain)
    assert engine.stats.drafted_tokens and (engine.stats.accepted_tokens or not min(rights))


def test_a_text_that_goes_in_circles_takes_fewer_steps(make_decoder, kernel_path):
    """Prompt lookup drafts nothing, or not what followed the last tokens before."""
    decoder = make_decoder("bfloat16")
    silent = ("o_proj", "down_proj")  # without them a token hangs on the last one alone, so a greedy text comes back
    decoder.load((name, tensor * (not any(part in name for part in silent))) for name, tensor in decoder.export())
    plain, slow = generate(decoder, None)
    drafted, fast = generate(decoder, None, draft=at_most(4))
    assert columns(drafted) == columns(plain)
    greedy = [len(one.tokens) for one, asked in zip(plain, ASKED, strict=True) if asked.sampling.greedy]
    assert fast.stats.accepted_tokens > sum(greedy) / 4 and fast.stats.batches < slow.stats.batches
