"""Drafts on a real decoder: the tokens, log-probs and kept sets of a run without them, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from itertools import cycle
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandem.engine.batch import INITIAL
from tandem.engine.batch import Sequence as LiveSequence
from tandem.engine.config import By, DraftConfig, EngineConfig
from tandem.engine.draft import Drafter
from tandem.engine.drafters import drafter_of
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.models.decoder import Decoder
from tandem.models.spec import LayerAttention
from tandem.types import Completion, Constraint, Reach, Request, Sampling, StopReason, WeightVersion
from tests.cpu.test_adapter import worn
from tests.drafting import Told, at_most
from tests.grammars import END, OTHER_END, grammars_of

WINDOWS = {"layers": 4, "attention": (LayerAttention(Reach(window=9)), LayerAttention()) * 2}
CHUNKS = {"layers": 4, "attention": (LayerAttention(Reach(chunk=8)),) * 3 + (LayerAttention(),)}
# A model's dtype and shape, what its engine is given, and whether it multiplies in 8 bits.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    "float32": ("float32", {}, {"noise": 0.05, "share_prefixes": False}, False),
    "bfloat16": ("bfloat16", {}, {}, False),
    "windows": ("bfloat16", WINDOWS, {"kv_dtype": "int4"}, False),
    "chunks": ("float32", CHUNKS, {}, False),
    "w8a8": ("bfloat16", {}, {"kv_dtype": "int8"}, True),
}
TOKENS = (*map(chr, range(33, 127)), '",', END, OTHER_END)  # 97
SAMPLINGS = (
    Sampling(max_new_tokens=30),
    Sampling(temperature=0.0, max_new_tokens=23),
    Sampling(temperature=0.7, top_k=5, top_p=0.9, max_new_tokens=30),
    Sampling(temperature=1.3, min_p=0.05, max_new_tokens=21, stop_token_ids=tuple(range(0, 97, 7))),
)
ASKED = [
    Request(f"r{i}", f"r{i}", tuple((7 * j * j + 3) % 97 for j in range(5 + 9 * (i % 3))), SAMPLINGS[i % 4], seed=i)
    for i in range(8)
]
HELD = Sampling(max_new_tokens=24, stop_token_ids=(95, 96))
CONSTRAINTS = (Constraint("json_object"), Constraint("regex", "[^x]{3,9}(ab|cd)*")) if find_spec("llguidance") else ()
MIXED = [
    *ASKED,
    replace(ASKED[0], id="string", sampling=Sampling(max_new_tokens=40, stop_strings=tuple("aeiouAEIOU"))),
    replace(ASKED[1], id="worn", adapter="a", seed=71),
    replace(ASKED[2], id="scored", scored=True, likely=2, seed=72),
    replace(ASKED[5], id="told", likely=3, seed=73),
    *(replace(ASKED[2], id=c.kind, constraint=c, sampling=HELD, seed=74) for c in CONSTRAINTS),
]

Of = Callable[[list[Completion], list[int]], Drafter]  # what is drawn without drafts -> who drafts it


def of(plain: list[Completion], rights: list[int]) -> Drafter:
    """Drafts of which the first rights[i] of each turn are what was drawn without drafts, and the others are not; of
    several side by side each has a turn."""
    known = {completion.request_id: completion.tokens for completion in plain}
    turns = cycle(rights)

    def drafts(sequence: LiveSequence, count: int, off: int) -> list[int]:
        rest, right = known[sequence.request.id][sequence.num_drawn :], next(turns)
        guessed = [*rest, *range(count)][:count]
        return [token if i < right else (token + off) % 97 for i, token in enumerate(guessed)]

    def branches(sequences: list[LiveSequence], most: list[int], width: list[int]) -> list[list[list[int]]]:
        asked = zip(sequences, most, width, strict=True)
        return [[drafts(sequence, count, 1 + i) for i in range(wide)] for sequence, count, wide in asked]

    return Told(lambda s, most: [drafts(one, count, 1) for one, count in zip(s, most, strict=True)], branches)


# By what name it is set, and how it is made where tests make it. One more drafter is one more line.
DRAFTERS: dict[str, tuple[By, Of | None]] = {
    "lookup": ("lookup", None),
    "suffix": ("suffix", None),
    "told": ("lookup", of),
}


def engine_of(decoder: Decoder, drafter: Drafter | None, num_pages: int = 200, **changes: Any) -> Engine:
    settings = {"page_tokens": 4, "batch_tokens": 60, "max_sequences": 6, "lookahead_tokens": 0} | changes
    config = EngineConfig(**settings)
    runner = DecoderRunner(decoder, num_pages, 4, config)
    text = lambda tokens: "".join(TOKENS[token] for token in tokens)  # noqa: E731
    engine = Engine(runner, config, num_pages, decoder.spec.max_position, decode=text, drafter=drafter)
    if not in_codes(decoder):
        runner.adapters["a"] = worn(decoder, name="a")
        engine.receive_adapter(WeightVersion(0, "d", "a"))
    engine.grammars = grammars_of(TOKENS)
    return engine


def in_codes(decoder: Decoder) -> bool:
    return decoder.layers[0].mix.qkv.codes is not None


def generate(
    decoder: Decoder, drafter: Drafter | None, num_pages: int = 200, asked: Sequence[Request] = ASKED, **changes: Any
) -> tuple[list[Completion], Engine]:
    engine = engine_of(decoder, drafter, num_pages, **changes)
    done = engine.generate(asked)
    engine.check_integrity()
    return done, engine


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


@pytest.fixture
def plainly(kernel_path: str, make_decoder: Callable[..., Decoder]) -> Callable[[str], tuple[Decoder, Any]]:
    """A model by its name, and what it draws without drafts: once for all drafters."""
    return lambda model: _plainly(kernel_path, make_decoder, model)


@lru_cache
def _plainly(path: str, make: Callable[..., Decoder], model: str) -> tuple[Decoder, list[Completion]]:
    dtype, changes, kept, codes = MODELS[model]
    decoder = make(dtype, **changes)
    for layer in decoder.layers if codes else ():
        for slot, weight in layer.weights():
            if slot.columns is not None:
                weight.multiply_in_codes(weight.value)
    asked = [one for one in MIXED if not one.adapter or not in_codes(decoder)]
    done, engine = generate(decoder, None, asked=asked, **kept)
    assert any("kept" in one.columns for one in done) and bool(engine.stats.cached_tokens) == ("noise" not in kept)
    assert {one.stop_reason for one in done} >= {StopReason.STOP_TOKEN, StopReason.STOP_STRING, StopReason.LENGTH}
    return decoder, done


def same(drafted: list[Completion], plain: list[Completion]) -> None:
    assert columns(drafted) == columns(plain)
    for one, other in zip(drafted, plain, strict=True):
        assert (one.prompt is None) == (other.prompt is None)
        if one.prompt is not None and other.prompt is not None:
            assert one.prompt.arrays.keys() == other.prompt.arrays.keys()
            for name, array in one.prompt.arrays.items():
                assert list(map(str, array)) == list(map(str, other.prompt[name])), name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("drafter", DRAFTERS)
@settings(max_examples=1, deadline=None)
@example(rights=[0, 5, 15], draft_tokens=15, branches=3, room=200, order=range(len(MIXED)))  # the last branch stands
@given(
    rights=st.lists(st.integers(0, 15), min_size=1, max_size=9),
    draft_tokens=st.integers(1, 15),
    branches=st.sampled_from([1, 1, 2, 3]),
    room=st.sampled_from([25, 40, 200]),
    order=st.permutations(range(len(MIXED))),
)
def test_drafts_change_no_bit(plainly, drafter, model, rights, draft_tokens, branches, room, order):
    """A row's bits or noise hang on the drafts beside it, a rejected key is read, a value is booked on another token, a
    filter's kept set, a mask or an adapter is a neighbour's, or a text ends elsewhere."""
    decoder, plain = plainly(model)
    by, made = DRAFTERS[drafter]
    ours = made(plain, rights) if made is not None else None
    wanted = {one.request_id: one for one in plain}
    asked = [MIXED[i] for i in order if MIXED[i].id in wanted]
    room *= 2 if decoder.spec.layers > 2 else 1
    config = DraftConfig(by, draft_tokens, "fixed", branches=branches)
    drafted, engine = generate(decoder, ours, room, asked, draft=config, **MODELS[model][2])
    same(drafted, [wanted[one.id] for one in asked])
    stats = engine.stats
    assert stats.drafted_tokens or made is None
    assert stats.accepted_tokens or made is None or not min(rights)
    assert stats.cached_tokens or not engine.scheduler.config.share_prefixes


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("when", [1, 9, 14])
def test_weights_that_change_in_the_middle(make_decoder, kernel_path, drafter, when):
    """What was drafted, or known of a text, under the weights before is drawn from; or a block of two versions is
    found, under either."""
    request = replace(ASKED[2], sampling=replace(SAMPLINGS[0], max_new_tokens=24))
    first = [(name, tensor.clone()) for name, tensor in make_decoder("bfloat16").export()]
    other = [(name, tensor.clone()) for name, tensor in make_decoder("bfloat16", 1).export()]
    texts: list[list[Completion]] = []
    by, made = DRAFTERS[drafter]
    for drafts in (False, True):
        decoder = make_decoder("bfloat16")
        ours = None
        if drafts:
            ours = drafter_of(DraftConfig(by)) if made is None else made(texts[0], [3, 0, 5])
        config = {"draft": DraftConfig(by, 5, "fixed", branches=2)} if drafts else {}
        engine = engine_of(decoder, None if ours is None else Until(ours, when), **config)
        engine.submit(request)
        while len(engine.drawn("r2", 0)["tokens"]) < when:
            engine.step()
        assert len(engine.drawn("r2", 0)["tokens"]) == when
        decoder.load(other)
        engine.receive(WeightVersion(1, "other"))
        if isinstance(engine.scheduler.drafting.drafter, Until):
            engine.scheduler.drafting.drafter.when = 1000
        done = next(one for _ in range(30) for one in engine.step())
        (again,) = engine.generate([replace(request, id="again", tokens=(*request.tokens, *done.tokens))])
        assert again.cached_tokens == 0
        decoder.load(first)
        engine.receive(INITIAL)
        back_to = replace(request, id="back", tokens=(*request.tokens, *done.tokens))
        (back,) = engine.generate([back_to])
        assert back.cached_tokens
        engine.check_integrity()
        texts.append([done, again, back])
    same(texts[1], texts[0])
    same(engine_of(make_decoder("bfloat16"), None).generate([back_to]), [texts[0][2]])
    assert texts[0][0].columns["versions"].tolist() == [0] * when + [1] * (24 - when)


class Until(Drafter):
    """Another's drafts, as far as a text of so many tokens."""

    def __init__(self, drafter: Drafter, when: int) -> None:
        self.drafter, self.when = drafter, when

    def draft(self, sequences: list[LiveSequence], most: list[int]) -> list[list[int]]:
        return self.drafter.draft(sequences, self.room(sequences, most))

    def branches(self, sequences: list[LiveSequence], most: list[int], width: list[int]) -> list[list[list[int]]]:
        return self.drafter.branches(sequences, self.room(sequences, most), width)

    def room(self, sequences: list[LiveSequence], most: list[int]) -> list[int]:
        return [max(0, min(m, self.when - s.num_drawn - 1)) for s, m in zip(sequences, most, strict=True)]


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
