"""Programs of several turns on a real decoder: each turn gives what it gives alone, to the bit."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.models.decoder import Decoder
from tandem.types import Completion, Request, Sampling, StopReason
from tests.cpu.test_draft import CHUNKS, WINDOWS, columns
from tests.drafting import at_most

SAMPLINGS = (
    Sampling(max_new_tokens=9),
    Sampling(temperature=0.0, max_new_tokens=7),
    Sampling(temperature=0.7, top_k=5, top_p=0.9, max_new_tokens=11),
    Sampling(temperature=1.3, min_p=0.05, max_new_tokens=12, stop_token_ids=tuple(range(0, 97, 7))),
)
MOST = 90  # tokens of a context


def engine_of(decoder: Decoder, num_pages: int, **settings: Any) -> Engine:
    config = EngineConfig(**{"batch_tokens": 24, "max_sequences": 5, "lookahead_tokens": 0} | settings)
    runner = DecoderRunner(decoder, num_pages, config.page_tokens, config)
    return Engine(runner, config, num_pages, decoder.spec.max_position)


def play(engine: Engine, seed: int) -> dict[str, tuple[Request, Completion]]:
    """Programs that begin, go on from the midst of a page, fork, are withdrawn and go on from what they had."""
    rng, waiting = Random(seed), list[Request]()
    found, begun = dict[str, tuple[Request, Completion]](), 0
    asked: dict[str, Request] = {}

    def ask(tokens: tuple[int, ...]) -> None:
        nonlocal begun
        if len(tokens) < MOST:
            waiting.append(Request(f"r{begun}", "p", tokens, rng.choice(SAMPLINGS), seed=rng.randrange(1 << 40)))
            begun += 1

    start = tuple(rng.randrange(97) for _ in range(rng.randrange(1, 20)))
    for _ in range(3):
        ask(start[: rng.randrange(1, len(start) + 1)])
    while waiting or asked:
        while waiting and rng.random() < 0.7:
            request = waiting.pop()
            asked[request.id] = request
            engine.submit(request)
        done = engine.step() if asked else []
        if asked and rng.random() < 0.1 and (live := list(engine.scheduler.live)):
            engine._land()
            done += [one for name in [rng.choice(live)] if (one := engine.abort(name)) is not None]
        engine.check_integrity()
        for one in done:
            request = asked.pop(one.request_id)
            found[request.id] = request, one
            for _ in range(rng.choice((0, 1, 1, 2, 3)) if begun < 30 else 0):
                cut = rng.choice((len(one.tokens), len(one.tokens), rng.randrange(len(one.tokens) + 1)))
                ask((*request.tokens, *one.tokens[:cut], *(rng.randrange(97) for _ in range(rng.randrange(4)))))
    return found


@pytest.mark.parametrize("changes", [{}, WINDOWS, CHUNKS], ids=["whole", "windows", "chunks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    page_tokens=st.sampled_from([2, 4, 8, 16, 32]),
    kept=st.sampled_from([{}, {}, {"kv_dtype": "int8"}, {"kv_dtype": "float8_e4m3"}, {"draft": at_most(3)}]),
    room=st.sampled_from([1.1, 1.6, 6.0]),
)
def test_a_turn_that_goes_on_in_a_page_has_its_bits(make_decoder, changes, dtype, seed, page_tokens, kept, room):
    """A turn that goes on from another's page reads keys of other tokens, or a copy without its scales; one that was
    withdrawn, preempted or forked leaves a page under a name of what it does not hold."""
    decoder = make_decoder(dtype, **changes)
    groups = 2 if changes else 1
    pages = int(room * groups * (-(-(MOST + 14) // page_tokens) + 1))
    engine = engine_of(decoder, pages, page_tokens=page_tokens, **kept)
    played = play(engine, seed)
    plainly = {name: value for name, value in kept.items() if name != "draft"}
    plain = engine_of(decoder, 400, page_tokens=16, share_prefixes=False, **plainly)
    alone = plain.generate([request for request, _ in played.values()])
    for (_, one), wanted in zip(played.values(), alone, strict=True):
        (here,), (there,) = columns([one]), columns([wanted])
        if one.stop_reason is StopReason.ABORTED:
            there = {name: there[name][: len(one.columns)] for name in here} | {"stop": here["stop"]}
        assert here == there
    assert engine.scheduler.pool.num_available == pages and not engine.scheduler.ends.borrowed
