"""Keys and values that are rounded a span of tokens at a time: against loops, over pages, and in the learner."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.algo.pack import count_prompts, pack
from tandem.config import override
from tandem.engine.admit import count_pages
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.layout import KvLayout
from tandem.engine.opened import OpenPages
from tandem.engine.runner import DecoderRunner
from tandem.errors import ConfigError
from tandem.kernels.rounding import kept_of
from tandem.models.config import ModelConfig
from tandem.models.decoder import Decoder
from tandem.models.view import Heads, PackView, turn_reference
from tandem.numerics.names import check_kv_name
from tandem.recipes.tiny_arithmetic import tiny_arithmetic
from tandem.sync.departures import check_engine, declaration, with_pages_of_spans
from tandem.sync.receive import serve_adapter
from tandem.types import Completion, Request, Sampling, StopReason
from tests.cpu.test_adapter import of_each, worn
from tests.cpu.test_draft import CHUNKS, WINDOWS, columns, of
from tests.cpu.test_tree import folded
from tests.cpu.test_turns import MOST, play
from tests.drafting import at_most

RULES = ["kivi2_r8", "kivi4_r8_sinks3", "kivi8_r32_sinks20", "fp8_head_r16_sinks4"]
PROMPTS = [[(7 * i * i + 3 * n) % 97 for i in range(13 + 20 * n)] for n in range(3)]


def parts(name: str) -> tuple[str, int, int]:
    """Rule, span and sinks, read another way than the package does."""
    rule, _, sinks = name.partition("_sinks")
    kind, _, span = rule.partition("_r")
    return kind, int(span or 128), int(sinks or 0)


def by_loops(x: list[list[float]], along: str, bits: int, first: int, sinks: int) -> list[list[float]]:
    """A head of one full span [tokens][D] as it is read back; a group of 32 numbers, or fewer, at a time."""
    made = [list(row) for row in x]
    stays = max(0, sinks - first)
    if along == "head":
        scale = torch.tensor(max((abs(v) for row in x[stays:] for v in row), default=0.0)) / 448
        for t in range(stays, len(x)):
            made[t] = ((torch.tensor(x[t]) / scale).to(torch.float8_e4m3fn).float() * scale).tolist()
        return made
    tokens, size = len(x), len(x[0])
    groups = []
    if along == "tokens":
        groups = [
            [(t, d) for t in range(g, min(g + 32, tokens)) if t >= stays]
            for d in range(size)
            for g in range(0, tokens, 32)
        ]
    else:
        groups = [[(t, d) for d in range(g, g + 16)] for t in range(stays, tokens) for g in range(0, size, 16)]
    for group in filter(None, groups):
        values = torch.tensor([x[t][d] for t, d in group])
        low = values.min()
        scale = (values.max() - low) / (2**bits - 1)
        for (t, d), value in zip(group, values, strict=True):
            made[t][d] = float(torch.round((value - low) / scale) * scale + low) if scale else float(low)
    return made


class Slow(PackView):
    """A whole text in fp32: each query over a list of keys and values made for it alone."""

    def __init__(self, length: int, name: str) -> None:
        super().__init__([0, length])
        self.name = name

    def attend(self, layer: int, qkv_TW: torch.Tensor, heads: Heads, tables: Any) -> torch.Tensor:
        kind, span, sinks = parts(self.name)
        query, key = turn_reference(qkv_TW, self.positions_T, heads, tables)
        value = heads.cut(qkv_TW)[2]
        length, group = len(query), heads.heads // heads.kv_heads
        axes = ("head", "head") if kind == "fp8_head" else ("tokens", "dimensions")
        bits = 0 if kind == "fp8_head" else int(kind[-1])
        out = torch.zeros(length, heads.heads, heads.size)
        for h in range(heads.kv_heads):
            kept = []
            for x, along in zip((key, value), axes, strict=True):
                rows = x[:, h].tolist()
                kept.append([by_loops(rows[a : a + span], along, bits, a, sinks) for a in range(0, length, span)])
            for p in range(length):
                exact, seen = p - p % span, []
                for x, full in zip((key, value), kept, strict=True):
                    old = [row for one in full[: exact // span] for row in one]
                    seen.append(torch.cat([torch.tensor(old).view(-1, heads.size), x[exact : p + 1, h]]))
                for q in range(h * group, (h + 1) * group):
                    share = (seen[0] @ query[p, q] / math.sqrt(heads.size)).softmax(-1)
                    out[p, q] = share @ seen[1]
        return out.flatten(1)


def rounding(plain: Decoder, name: str) -> Decoder:
    dtype = str(plain.dtype).removeprefix("torch.")
    return Decoder(plain.spec, dtype, kept=kept_of(name)).load(plain.export())


def engine_of(decoder: Decoder, pages: int, drafter: Any = None, **changes: Any) -> Engine:
    config = EngineConfig(**{"batch_tokens": 24, "max_sequences": 5, "lookahead_tokens": 0} | changes)
    runner = DecoderRunner(decoder, pages, config.page_tokens, config)
    return Engine(runner, config, pages, decoder.spec.max_position, drafter=drafter)


@pytest.mark.parametrize("name", RULES)
def test_hidden_states_against_loops(make_decoder, parity, by_reference, name: str) -> None:
    """A query sees its own span rounded, one before it as it was, a sink rounded or in a scale; a group runs over
    another axis; what a chunk fills is rounded late. In pages, chunk by chunk, and in the learner's pack."""
    plain = make_decoder("float32")
    context, span = [(11 * i * i + i) % 97 for i in range(44)], parts(name)[1]
    with torch.inference_mode():
        wanted_TM = plain.forward(torch.tensor(context), Slow(len(context), name))
        packed_TM = rounding(plain, name).forward(torch.tensor(context), PackView([0, len(context)]))
        other_TM = plain.forward(torch.tensor(context), PackView([0, len(context)]))
    chunks = [[(0, 0, 7)], *[[(0, t, t + 1)] for t in range(7, 20)], [(0, 20, 41)], [(0, 41, 44)]]
    runner = DecoderRunner(plain, 20, span, EngineConfig(page_tokens=span, kv_dtype=name))
    rows = parity.in_pages(runner, [context], [[*range(19, 19 - -(-44 // span), -1)]], chunks)
    paged_TM = torch.stack([rows[0, t] for t in range(44)])
    with by_reference():
        slow_TM = parity.alone(rounding(plain, name), context)
        runner = DecoderRunner(rounding(plain, "same"), 20, span, EngineConfig(page_tokens=span, kv_dtype=name))
        rows = parity.in_pages(runner, [context], [[*range(19, 19 - -(-44 // span), -1)]], chunks)
    for found_TM in (packed_TM, paged_TM, slow_TM, torch.stack([rows[0, t] for t in range(44)])):
        torch.testing.assert_close(found_TM, wanted_TM, rtol=2e-3, atol=2e-3)
    parity.same_rows(paged_TM, packed_TM, name)
    assert float((other_TM - wanted_TM)[span:].abs().max()) > (1e-4 if "kivi8" in name else 0.02)
    assert torch.equal(other_TM[:span], packed_TM[:span])


@settings(max_examples=4, deadline=None)
@given(
    changes=st.sampled_from([{}, {}, WINDOWS, CHUNKS]),
    seed=st.integers(0, 10**6),
    name=st.sampled_from(["kivi2_r8", "kivi4_r16_sinks4", "fp8_head_r8", "int4_sinks3"]),
    draft_tokens=st.sampled_from([0, 3]),
    room=st.sampled_from([1.1, 1.6, 6.0]),
)
def test_turns_have_the_bits_that_they_have_alone(make_decoder, changes, seed, name, draft_tokens, room) -> None:
    """A sibling or a next turn copies a part of a page that is rounded already; one that was preempted, or goes on
    behind a prefix, sees its own span rounded; a draft that does not stand filled a page."""
    decoder, page_tokens = make_decoder("bfloat16", **changes), parts(name)[1] if "_r" in name else 16
    pages = int(room * (2 if changes else 1) * (-(-(MOST + 14) // page_tokens) + 1))
    kept = {"page_tokens": page_tokens, "kv_dtype": name}
    played = play(engine_of(decoder, pages, draft=at_most(draft_tokens), **kept), seed)
    plain = engine_of(decoder, 400, share_prefixes=False, **kept)
    alone = plain.generate([request for request, _ in played.values()])
    for (_, one), wanted in zip(played.values(), alone, strict=True):
        (here,), (there,) = columns([one]), columns([wanted])
        if one.stop_reason is StopReason.ABORTED:
            there = {name: there[name][: len(one.columns)] for name in here} | {"stop": here["stop"]}
        assert here == there


@pytest.mark.parametrize(
    ("name", "dtype"), [(RULES[0], "bfloat16"), (RULES[0], "float32"), (RULES[1], "bfloat16"), (RULES[3], "bfloat16")]
)
def test_learner_equals_engine(make_decoder, parity, dtype: str, name: str) -> None:
    """A sample whose span crosses the end of its prompt is rounded with a sibling's tokens; the engine alone rounds."""
    decoder = rounding(make_decoder(dtype), name)
    asked = parity.groups(PROMPTS, 3, 1.0, 24)
    engine = engine_of(decoder, 40, batch_tokens=40, max_sequences=9, page_tokens=parts(name)[1])
    done: list[Completion] = engine.generate(asked)
    assert engine.stats.cached_tokens
    for share in (True, False):
        parity.check_learner(decoder, parity.samples(asked, done), 1.0, share=share)
    drafted = engine_of(decoder, 40, of(done, [2, 0, 7]), draft=at_most(5), page_tokens=parts(name)[1])
    assert columns(drafted.generate(asked)) == columns(done) and drafted.stats.accepted_tokens


def test_one_page_is_filled_at_a_time(make_decoder) -> None:
    """A branch fills a second page of its sequence, which has no place, or its codes are rounded with its sibling's."""
    with pytest.raises(ConfigError, match="engine.draft.branches to 1"):
        engine_of(rounding(make_decoder("bfloat16"), RULES[0]), 40, draft=at_most(4, 2), page_tokens=parts(RULES[0])[1])


@pytest.mark.parametrize("name", ["kivi2_r8", "fp8_head_r8"])
@pytest.mark.parametrize("length", [21, 24])
def test_tails_are_copied_while_they_are_as_made(make_decoder, length: int, name: str) -> None:
    """A late sibling takes a tail from a page that is rounded since, or no sibling takes any."""
    decoder = make_decoder("bfloat16")
    prompt = tuple((5 * i * i + 1) % 97 for i in range(length))
    found = {}
    for late in (0, 2, 12):
        engine = engine_of(decoder, 40, page_tokens=8, kv_dtype=name)
        first, second = (Request(f"r{i}", "p", prompt, Sampling(max_new_tokens=20), seed=i) for i in range(2))
        engine.submit(first)
        done = [one for _ in range(1 + late) for one in engine.step()]
        engine.submit(second)
        while engine.scheduler.live:
            done += engine.step()
        found[late] = columns(sorted(done, key=lambda one: one.request_id)), engine.stats.cached_tokens
    assert found[0] == found[2] and found[0][1] == (20 if length == 21 else 16)
    assert found[12] == (found[0][0], 16)  # the page of the prompt's end was filled by then


@pytest.mark.parametrize("name", ["kivi2_r8_sinks3", "fp8_head_r16"])
def test_gradients_are_those_of_what_was_seen(any_path: str, make_decoder, name: str) -> None:
    """A rounded span's gradient is lost, added to a sibling's row, or counted twice. In a tree of turns, against
    autograd through a mask of the whole of each sample."""
    decoder, samples = make_decoder(), folded()
    (tree,) = pack(samples, count_prompts(samples), 10_000, True)
    heads = Heads(4, 2, 16, kept=kept_of(name))
    view = PackView(tree.segments_S, tree.first_S, tree.parent_S)
    qkv_TW = torch.randn(len(tree.tokens_T), heads.width, generator=torch.Generator().manual_seed(5))
    found, wanted = qkv_TW.clone().requires_grad_(), qkv_TW.clone().requires_grad_()
    out_TW = view.attend(0, found * 1.0, heads, decoder.tables)
    table_SP, first = view.paths.table_SP.long(), view.paths.first_position_S.tolist()
    start = view.paths.row_start_S.tolist()
    slow = torch.zeros_like(out_TW)
    for s in range(len(first)):  # the whole path of a segment, alone
        rows = table_SP[s, : first[s] + start[s + 1] - start[s]]
        alone = Through(len(rows), name).attend(0, wanted[rows], heads, decoder.tables)
        slow = slow.index_add(0, rows[first[s] :], alone[first[s] :])
    torch.testing.assert_close(out_TW, slow, rtol=1e-4, atol=1e-4)
    upstream = torch.randn(out_TW.shape, generator=torch.Generator().manual_seed(3))
    for out in (out_TW, slow):
        out.backward(upstream)
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-3)


class Through(Slow):
    """The same, with gradients straight through the rounding: a mask says which of two keys a query sees."""

    def attend(self, layer: int, qkv_TW: torch.Tensor, heads: Heads, tables: Any) -> torch.Tensor:
        kind, span, sinks = parts(self.name)
        query, key = turn_reference(qkv_TW, self.positions_T, heads, tables)
        length, group = len(query), heads.heads // heads.kv_heads
        axes = ("head", "head") if kind == "fp8_head" else ("tokens", "dimensions")
        both = []
        for x, along in zip((key, heads.cut(qkv_TW)[2]), axes, strict=True):
            rough = x.detach().clone()
            for begin in range(0, length - span + 1, span):
                for h in range(heads.kv_heads):
                    rows = x[begin : begin + span, h].tolist()
                    bits = 0 if along == "head" else int(kind[-1])
                    rough[begin : begin + span, h] = torch.tensor(by_loops(rows, along, bits, begin, sinks))
            both.append([one.repeat_interleave(group, 1) for one in (x, x + (rough - x.detach()))])
        at = torch.arange(length)
        old = at < (at - at % span)[:, None]
        scores = torch.where(old[None], *(torch.einsum("qhd,khd->hqk", query, k) for k in (both[0][1], both[0][0])))
        share = (scores / math.sqrt(heads.size)).masked_fill(at > at[:, None], -math.inf).softmax(-1)
        pairs = (old, both[1][1]), (~old, both[1][0])
        return sum(torch.einsum("hqk,khd->qhd", share * seen, v) for seen, v in pairs).flatten(1)


def test_rows_of_several_adapters_fill_pages_of_their_own(make_decoder, parity) -> None:
    """A step that passes adapter by adapter begins a page twice, or in a place that another adapter's rows have."""
    decoder = make_decoder("bfloat16")

    def served(pages: int) -> Engine:
        engine = engine_of(decoder, pages, page_tokens=8, kv_dtype="kivi4_r8", max_sequences=9)
        for number, name in enumerate(("one", "two")):
            serve_adapter("the engine", engine, worn(decoder, 5 + number, name), 0)
        return engine

    asked = of_each(parity, ["", "one", "two"])
    done = served(60).generate(asked)
    assert columns(done[::4]) == [columns(served(60).generate([request]))[0] for request in asked[::4]]
    assert len({tuple(one.tokens) for one in done}) > 3


def test_places_of_pages_that_are_filled() -> None:
    """A place of a sequence that is gone is never found again, or one of a sequence that waits is taken from it."""
    opened = OpenPages(3, 4)
    assert opened.fill([(0, 3, [7]), (0, 2, [8]), (0, 1, [9])]) == [2, 1, 0]
    opened.held = lambda: {8}  # 7 ended, 9 was preempted
    opened.begin()
    first = opened.fill([(0, 1, [5]), (2, 6, [8, 7])])
    assert first[1] == 1 and first[0] in (0, 2)  # 8 goes on in its place, on another page that 7 has left
    opened.held = lambda: {5, 7}
    opened.begin()
    last = opened.fill([(6, 7, [8, 7]), (0, 4, [3]), (1, 2, [5])])
    assert last == [1, 3 - 1 - first[0], first[0]]
    opened.begin()
    with pytest.raises(AssertionError, match="page 6 is filled from 2 on, and was never begun"):
        opened.fill([(2, 3, [6])])
    opened.fill([(0, 1, [1])])
    opened.begin()
    opened.held = lambda: {1, 5, 7}
    with pytest.raises(AssertionError, match="3 pages are filled at once, and there is no place for another"):
        opened.fill([(0, 1, [2])])


@pytest.mark.parametrize(
    ("name", "code", "numbers"), [("kivi2_r32", 0.25, 1), ("kivi4_r32", 0.5, 1), ("kivi8_r8", 1, 4)]
)
def test_page_memory(make_decoder, name: str, code: float, numbers: int) -> None:
    """Pages of codes are counted in 16 bits, kept so, or counted without what is not full; they save nothing."""
    decoder, span = make_decoder("bfloat16", head_size=32), parts(name)[1]
    spec = decoder.spec
    config = EngineConfig(page_tokens=span, kv_dtype=name, max_sequences=3, kv_memory_bytes=1 << 20)
    layout = KvLayout.for_engine(spec, config, "bfloat16")
    pages = count_pages(layout, config)
    pool_bytes = sum(pool.nbytes for pool in DecoderRunner(decoder, pages, span, config).pools)
    per_head = 2 * 32 * code + 2 * 2 * numbers * 32 // 32 + 2 * 2  # keys' and values' codes, scales and minima
    wide = 2 * spec.kv_heads * 32 * 2 * spec.layers
    assert layout.token_bytes == spec.layers * spec.kv_heads * per_head and layout.open_bytes == wide
    assert pool_bytes == span * (pages * layout.token_bytes + 3 * wide)
    assert 0 <= (1 << 20) - pool_bytes < span * layout.token_bytes
    few = replace(config, kv_memory_bytes=2 * span * (layout.token_bytes + wide))
    assert count_pages(layout, few) == 2
    runner = DecoderRunner(decoder, 2, span, few)
    assert sum(pool.nbytes for pool in runner.pools) == few.kv_memory_bytes


def test_names_and_refusals() -> None:
    """A span that no page holds, a rule that is none, a page size that somebody chose is taken for another."""
    for name in ("kivi2", "kivi8_r16_sinks16", "fp8_head_sinks4", "nvfp4_sinks4", "int4_sinks1"):
        check_kv_name("model.kv", name)
    for name, said in (
        ("kivi3", "is no format of keys"), ("same_sinks4", "is no format of keys"), ("kivi2_r12", "power of two"),
        ("kivi2_r4", "power of two"), ("kivi2_r8_sinks9", "no more behind _sinks"), ("kivi2_sinks0", "is no format"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            EngineConfig(kv_dtype=name)
    model, engine = ModelConfig("m", kv="kivi4"), EngineConfig()
    assert with_pages_of_spans(model, engine).page_tokens == 128
    assert with_pages_of_spans(ModelConfig("m"), EngineConfig(kv_dtype="fp8_head_r32")).page_tokens == 32
    assert with_pages_of_spans(ModelConfig("m"), engine) is engine
    chosen = EngineConfig(page_tokens=32)
    assert with_pages_of_spans(model, chosen) is chosen
    with pytest.raises(ConfigError, match="128 tokens at a time, a page of the engine.s, and engine.page_tokens is 32"):
        check_engine(None, model, chosen)  # type: ignore[arg-type]
    said = declaration(override(tiny_arithmetic(), {"engine.kv_dtype": "kivi2_sinks4"}))
    assert "rounded to kivi2_sinks4 (engine.kv_dtype=kivi2_sinks4)" in said
