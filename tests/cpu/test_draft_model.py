"""A small model that drafts: what stands, what it finds of its own on others' pages, what it is refused for."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.batch import Batch, Sequence, Work
from tandem.engine.config import DraftConfig, EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.errors import ConfigError
from tandem.kernels.sample import SamplingBatch, sample_reference
from tandem.models.decoder import Decoder
from tandem.models.spec import LayerAttention
from tandem.models.view import PackView
from tandem.speculate.model import ModelDrafter
from tandem.speculate.pages import FeatureSlab
from tandem.speculate.vocabulary import DraftHead, Ranking
from tandem.types import Completion, Reach, Request, Sampling, WeightVersion
from tests.cpu.test_draft import ASKED, CHUNKS, WINDOWS, columns

SMALL = {"layers": 1, "width": 16, "ff_width": 24, "heads": 2, "kv_heads": 1, "head_size": 8}


class Noted(ModelDrafter):
    """Remembers what it drafted: (request, tokens it had) -> drafts."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.said: dict[tuple[str, int], list[int]] = {}

    def draft(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        found = super().draft(sequences, most)
        for sequence, drafts in zip(sequences, found, strict=True):
            self.said[sequence.request.id, len(sequence.tokens)] = drafts
        return found


def plain(decoder: Decoder, num_pages: int = 200, **changes: Any) -> Engine:
    """An engine on pages of 4 tokens."""
    limits = {"page_tokens": 4, "batch_tokens": 40, "max_sequences": 6, "lookahead_tokens": 0} | changes
    config = EngineConfig(**limits)
    runner = DecoderRunner(decoder, num_pages, 4, config)
    return Engine(runner, config, num_pages, decoder.spec.max_position)


def drafted(
    decoder: Decoder, small: Decoder, most: int = 4, num_pages: int = 200, kept: int = 0, **changes: Any
) -> tuple[Engine, Noted]:
    """The same with a small model that drafts, at most so many tokens a step, and that."""
    limits = {"page_tokens": 4, "batch_tokens": 40, "max_sequences": 6, "lookahead_tokens": 0} | changes
    config = EngineConfig(**limits, draft=DraftConfig("model", most, "fixed", model="of a test"))
    runner = DecoderRunner(decoder, num_pages, 4, config)
    head = DraftHead(small.head, decoder.spec.vocab_size, kept, Ranking(97, 1000, [0]) if kept else None)
    runner.drafter = drafter = Noted(small, head, runner.layout, num_pages, config)
    return Engine(runner, config, num_pages, decoder.spec.max_position), drafter


def generate(engine: Engine, asked: list[Request] = ASKED) -> list[Completion]:
    done = engine.generate(asked)
    engine.check_integrity()
    assert not engine.scheduler.drafting.off, engine.scheduler.drafting.off
    return done


@pytest.mark.parametrize("changes", [{}, WINDOWS, CHUNKS], ids=["whole", "windows", "chunks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_drafter_equal_to_the_target_is_always_right(make_decoder, changes, dtype):
    """Drafts are drawn with other noise, filters or positions than the target's, or from keys and values that are not
    those of the tokens before: of a tail that was copied, a block that was hit, or drafts that did not stand."""
    decoder = make_decoder(dtype, **changes)
    wanted = columns(generate(plain(decoder)))
    for most, pages in ((3, 400), (7, 36 if changes else 30)):
        engine, _ = drafted(decoder, decoder, most, pages)
        assert columns(generate(engine)) == wanted
        stats = engine.stats
        assert stats.accepted_tokens == stats.drafted_tokens > 100, (stats.accepted_tokens, stats.drafted_tokens)
        assert stats.preemptions > 0 or pages == 400 or changes


@pytest.mark.parametrize("changes", [{}, CHUNKS], ids=["whole", "chunks"])
@settings(max_examples=2, deadline=None)
@given(
    most=st.integers(1, 15),
    room=st.sampled_from([25, 40, 200]),
    batch_tokens=st.sampled_from([11, 40]),
    shape=st.sampled_from([SMALL, {"layers": 1}, SMALL | {"attention": (LayerAttention(Reach(window=5)),)}]),
    kept=st.sampled_from([0, 30]),
    kv_dtype=st.sampled_from(["same", "int8"]),
)
def test_a_small_model_changes_no_bit(make_decoder, changes, most, room, batch_tokens, shape, kept, kv_dtype):
    """Drafts of another model than the target change a token or a log-prob, or what it remembers breaks with pages that
    went to others, in one length of drafts, chunk or company."""
    decoder, small = make_decoder("bfloat16", **changes), make_decoder("bfloat16", seed=3, **shape)
    wanted = columns(generate(plain(decoder, kv_dtype=kv_dtype)))
    room *= 2 if changes else 1
    engine, drafter = drafted(decoder, small, most, room, kept, batch_tokens=batch_tokens, kv_dtype=kv_dtype)
    for _ in range(2):  # the second time on pages of the first
        assert columns(generate(engine)) == wanted
    assert any(drafter.said.values()) or batch_tokens < 40


def by_hand(small: Decoder, request: Request, tokens: list[int], most: int) -> list[int]:
    """What a model drafts behind these tokens: each from its own forward pass over all that is before."""
    found: list[int] = []
    for _ in range(most):
        context = torch.tensor([*tokens, *found])
        with torch.no_grad():
            hidden_TM = small.forward(context, PackView([0, len(context)]))
        batch = SamplingBatch.stack([request.sampling], [request.seed], [len(context)])
        (token,) = sample_reference(small.logits(hidden_TM[-1:]), batch)[0].tolist()
        if token in request.sampling.stop_token_ids:
            break
        found.append(token)
    return found


def check_said(drafter: Noted, small: Decoder, asked: list[Request], done: list[Completion]) -> int:
    """Every draft is that of the tokens before it; of how many steps of a sequence there were some."""
    texts = {one.id: (one, [*one.tokens, *ended.tokens]) for one, ended in zip(asked, done, strict=True)}
    for (name, known), drafts in drafter.said.items():
        request, tokens = texts[name]
        assert drafts == by_hand(small, request, tokens[:known], len(drafts)), (name, known)
    some = sum(map(bool, drafter.said.values()))
    drafter.said.clear()
    return some


def group(of: int) -> list[Request]:
    """So many siblings of each of three prompts."""
    prompts = [tuple((5 * j * j + 3 * p) % 97 for j in range(6 + 5 * p)) for p in range(3)]
    return [
        Request(f"p{p}/{i}", f"p{p}", prompt, Sampling(max_new_tokens=7 + 3 * i), seed=9 * p + i)
        for p, prompt in enumerate(prompts)
        for i in range(of)
    ]


@pytest.mark.parametrize(("room", "batch_tokens"), [(400, 40), (16, 7)])
def test_drafts_are_those_of_the_tokens_alone(make_decoder, room, batch_tokens):
    """What is drafted hangs on whether pages were hit, copied, taken from others, preempted or written in pieces: a
    slot is read that was not written, or that a rejected draft wrote."""
    decoder, small = make_decoder("float32"), make_decoder("float32", seed=3, layers=1)
    asked = group(3)
    engine, drafter = drafted(decoder, small, 3, room, batch_tokens=batch_tokens)
    for turn in ("first", "again", "further"):
        done = generate(engine, asked)
        assert check_said(drafter, small, asked, done) > 4, turn
        if turn == "again":  # turns go on where these ended
            ends = [(*a.tokens, *d.tokens, 4, 2) for a, d in zip(asked, done, strict=True)]
            asked = [replace(one, tokens=end) for one, end in zip(asked, ends, strict=True)]
    assert engine.stats.cached_tokens > 100
    assert (engine.stats.preemptions > 0) == (room == 16)


def test_a_hit_costs_a_drafter_what_is_new(make_decoder):
    """On a hit a drafter runs the prompt again, or each sibling all of what they share; or drafts otherwise."""
    small = make_decoder("float32", seed=3, layers=1)
    engine, drafter = drafted(make_decoder("float32"), small, 1)
    asked = Request("a", "g", tuple(range(41)), Sampling(max_new_tokens=3), seed=1)
    first = generate(engine, [asked])
    miss = drafter.said.copy()
    assert (drafter.ingested_tokens, drafter.found_tokens) == (42, 0) and miss  # the prompt and its first token
    generate(engine, [asked])
    assert (drafter.ingested_tokens, drafter.found_tokens) == (42 + 2, 40) and drafter.said == miss  # no others
    check_said(drafter, small, [asked], first)
    siblings = [replace(asked, id=f"s{i}", tokens=tuple(range(50, 91)), seed=i) for i in range(4)]
    done = generate(engine, siblings)
    assert (drafter.ingested_tokens, drafter.found_tokens) == (42 + 2 + 42 + 3 * 2, 40 + 3 * 40)
    assert check_said(drafter, small, siblings, done) >= 4


def test_other_weights_of_the_target_change_no_draft(make_decoder):
    """After an update keys have no name: drafts read what another sequence wrote, or pages under an old name."""
    decoder, small = make_decoder("float32"), make_decoder("float32", seed=3, layers=1)
    engine, drafter = drafted(decoder, small, 3, 18)
    for step in (1, 2):
        asked = group(3)
        for one in asked:
            engine.submit(one)
        done = engine.step() + engine.step() + engine.step()
        decoder.load(dict(make_decoder("float32", seed=10 + step).export()).items())
        engine.receive(WeightVersion(step, f"digest {step}"))
        while engine.has_work:
            done += engine.step()
        found = {one.request_id: one for one in done}
        assert check_said(drafter, small, asked, [found[one.id] for one in asked]) > 20
    assert engine.stats.preemptions and not engine.scheduler.drafting.off


def test_memory_that_is_released_is_not_read(make_decoder):
    """Between the phases of a run pages are given back, and drafts are made of what is zero then."""
    small = make_decoder("float32", seed=3, layers=1)
    engine, drafter = drafted(make_decoder("float32"), small, 3)
    for _ in range(2):
        asked = group(2)
        assert check_said(drafter, small, asked, generate(engine, asked)) > 10
        engine.release_memory()
        for pool in drafter.paged.pools:
            pool.keys.fill_(float("nan")), pool.values.fill_(float("nan"))  # large memory would be zeros


def test_features_go_where_keys_and_values_go(make_decoder):
    """A tail that is copied, or a page that is parked, leaves behind what is attached to it; or its sum misses it."""
    config = EngineConfig(page_tokens=4)
    runner = DecoderRunner(make_decoder("float32"), 6, 4, config)
    slab = FeatureSlab(6, 4, 3, torch.bfloat16)
    runner.attach(slab.pages)
    slots_T = torch.arange(24)
    slab.write(slots_T, torch.arange(72).view(24, 3).bfloat16())
    assert slab.read(torch.tensor([7])).tolist() == [[21, 22, 23]]
    batch = Batch([Work(0, 0, [5], (array("i", [2]),), 1, group(1)[0])], WeightVersion(0, ""), 1, copies={3: 1, 5: 0})
    runner.run(batch)
    assert slab.read(slots_T[12:16]).equal(slab.read(slots_T[4:8])) and slab.read(slots_T[20:]).equal(
        slab.read(slots_T[:4])
    )
    before, sums = runner.read_pages([1, 4])
    assert runner.write_pages([0, 2], before) == sums
    assert slab.read(slots_T[:4]).equal(slab.read(slots_T[4:8])) and slab.read(slots_T[8:12]).equal(
        slab.read(slots_T[16:20])
    )
    slab.write(slots_T[1:2], torch.zeros(1, 3).bfloat16())
    assert runner.read_pages([0])[1] != sums[:1]


@given(tokens=st.lists(st.lists(st.integers(0, 8), max_size=6), max_size=8), count=st.integers(0, 11))
@settings(max_examples=50, deadline=None)
def test_a_ranking_has_the_most_frequent_of_the_latest(tokens, count):
    """An old text counts for ever, a stop token is not kept, or rarer tokens are kept than some that are not."""
    ranking = Ranking(9, 12, [7])
    for one in tokens:
        ranking.add(one)
    latest = tokens.copy()
    while sum(map(len, latest)) > 12:
        latest.pop(0)
    counts = Counter(token for one in latest for token in one)
    order = sorted((token for token in range(9) if token != 7), key=lambda token: (-counts[token], token))
    assert ranking.most(count).tolist() == sorted([7, *order[: max(0, count - 1)]])


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.0), Sampling(temperature=0.8, top_k=9, top_p=0.9)]
)
def test_a_pruned_head_draws_what_the_whole_one_would_of_its_tokens(make_decoder, sampling):
    """A kept token gets the noise of its row in the smaller head, an id is another's, or filters count what is not
    kept."""
    small = make_decoder("float32", seed=3)
    hidden_NM = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    batch = SamplingBatch.stack([sampling] * 40, list(range(40)), [7] * 40)
    head = DraftHead(small.head, 97, 20, Ranking(97, 100, [90]))
    assert head.ids is None
    wanted = sample_reference(small.logits(hidden_NM), batch)[0].tolist()
    assert head.draw(hidden_NM, batch) == wanted
    head.drawn(list(range(3, 60, 3)) * 2)
    assert head.ids == [*range(3, 60, 3), 90]
    dropped = torch.ones(97, dtype=torch.bool)
    dropped[head.ids] = False
    wanted = sample_reference(small.logits(hidden_NM).masked_fill(dropped, -torch.inf), batch)[0].tolist()
    assert head.draw(hidden_NM, batch) == wanted and len(set(wanted)) > 3
    head.drawn([3, 4, 90])
    assert (head.seen, head.covered) == (3, 2)


def test_ids_of_padding_are_never_drafted(make_decoder):
    """A drafter with more rows in its head than the target drafts a token that the target cannot read."""
    decoder, small = make_decoder("float32"), make_decoder("float32", seed=3, layers=1, vocab_size=130)
    engine, drafter = drafted(decoder, small, 4)
    wanted = columns(generate(plain(decoder)))
    assert columns(generate(engine)) == wanted
    assert max(max(drafts, default=0) for drafts in drafter.said.values()) < 97
    engine, drafter = drafted(decoder, make_decoder("float32", seed=3, layers=1, vocab_size=60), 4)
    drafter.head = DraftHead(drafter.paged.decoder.head, 60)
    assert columns(generate(engine)) == wanted and any(drafter.said.values())  # tokens from 60 on are read as the last


def test_a_drafter_of_fewer_positions_stops_there(make_decoder):
    """A context longer than the small model knows ends the drafts of all, or reads beyond its rotations."""
    decoder, small = make_decoder("float32"), make_decoder("float32", seed=3, layers=1, max_position=20)
    engine, drafter = drafted(decoder, small, 6)
    assert columns(generate(engine)) == columns(generate(plain(decoder)))
    ends = {known + len(drafts) for (_, known), drafts in drafter.said.items() if drafts}
    assert max(ends) == 21 and max(known for _, known in drafter.said) > 30


def test_layers_that_see_all_are_needed(make_decoder):
    """A window's pages, which are let go, are taken for pages that keep what a drafter knows."""
    with pytest.raises(ConfigError, match=r"kv_window"):
        drafted(make_decoder("float32"), make_decoder("float32", seed=3), kv_window=8)
