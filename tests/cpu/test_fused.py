"""The whole forward pass in one call against the same pass an operation at a time, bit for bit."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandem.engine.batch import Work
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.rows import StepRows
from tandem.engine.runner import DecoderRunner
from tandem.errors import ConfigError
from tandem.kernels.forward import KINDS
from tandem.kernels.sample import SamplingBatch
from tandem.models.decoder import Decoder
from tandem.models.fused import FusedForward
from tandem.models.spec import LayerAttention
from tandem.models.taps import Taps, layers_of
from tandem.models.view import PagedView
from tandem.numerics.quantise import Quantised, dequantise, quantise
from tandem.types import Reach, Request, Sampling


def both_ways(decoder: Decoder, stored: str = "same", **limits: int) -> Engine:
    """An engine whose every step runs both ways on the same pages, and fails where a bit differs."""
    limits = {"page_tokens": 4, "batch_tokens": 24, "max_sequences": 16, "lookahead_tokens": 4, **limits}
    config = EngineConfig(kv_dtype=stored, **limits)
    runner = DecoderRunner(decoder, 96, config.page_tokens, config)
    fused = runner.forward
    assert isinstance(fused, FusedForward)
    fused.seconds = torch.zeros(len(KINDS), dtype=torch.float64)

    def forward(tokens_T: torch.Tensor, view: PagedView, rows_N: torch.Tensor) -> torch.Tensor:
        expected = decoder.forward(tokens_T, view, rows_N)
        kept = [tensor.view(torch.uint8).clone() for pool in runner.pools for tensor in pool.tensors()]
        found = fused(tokens_T, view, rows_N)
        assert torch.equal(found, expected), (found.float() - expected.float()).abs().max()
        written = [tensor.view(torch.uint8) for pool in runner.pools for tensor in pool.tensors()]
        assert all(torch.equal(a, b) for a, b in zip(kept, written, strict=True)), "other keys or values"
        return found

    runner.forward = forward
    return Engine(runner, config, 96, decoder.spec.max_position)


def requests(count: int) -> list[Request]:
    """Prompts of 1 to 40 tokens, two of them alike."""
    lengths = [1 + (17 * i) % 40 for i in range(count)]
    lengths[-1] = lengths[0]
    return [
        Request(f"r{i}", f"r{i}", tuple((7 * i % 3 + 5 * j) % 97 for j in range(n)), Sampling(max_new_tokens=3 + i), i)
        for i, n in enumerate(lengths)
    ]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "feed-forward of no whole panels": {"ff_width": 70},
    "feed-forward of whole panels": {"ff_width": 128},
    "biases": {"attention_bias": True},
    "normed heads": {"qk_norm": True},
    "window": {"attention": (LayerAttention(Reach(window=9)),)},
    "chunks and no rotation": {"attention": (LayerAttention(Reach(chunk=8)), LayerAttention(rotary=False))},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_is_the_pass_an_operation_at_a_time(changes, dtype, make_decoder: Callable[..., Decoder], kernel_path) -> None:
    """An operation left out, another layer's weights, another group's pages, a row that was not waited for."""
    engine = both_ways(make_decoder(dtype, **changes))
    done = engine.generate(requests(9))
    assert [len(completion.tokens) for completion in done] == [3 + i for i in range(9)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("stored", ["float8_e4m3", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_and_narrow_pages(dtype, stored, threads, make_decoder: Callable[..., Decoder]) -> None:
    """Shares that depend on the number of threads; pages in 8 bits, with a window and sinks."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        both_ways(make_decoder(dtype, ff_width=192), stored, kv_window=9, kv_sinks=2).generate(requests(7))
    finally:
        torch.set_num_threads(before)


def test_a_long_path_of_few_sequences(make_decoder: Callable[..., Decoder]) -> None:
    """The splits of a path are joined in the first layer alone, or before all of them are there."""
    engine = both_ways(make_decoder("bfloat16", max_position=1200, layers=3), batch_tokens=1100, page_tokens=16)
    prompt = tuple(7 * i % 97 for i in range(1090))
    (done,) = engine.generate([Request("long", "long", prompt, Sampling(max_new_tokens=4), 0)])
    assert len(done.tokens) == 4


def test_weights_that_change_and_codes(make_decoder: Callable[..., Decoder]) -> None:
    """An update, new biases, or codes in place of values, and the pass still multiplies by what was."""
    decoder = make_decoder("bfloat16", **CASES["biases"])
    engine = both_ways(decoder)
    engine.generate(requests(3))
    for _, weight in decoder.weights():
        weight.value.mul_(0.75)
        weight.repack()
    engine.generate(requests(3))
    for layer in decoder.layers:
        gate_up, out = layer.feed.gate_up, layer.mix.out
        assert gate_up.hold(quantise(gate_up.value, 4, 16)) and out.hold(quantise(out.value, 8, 16))
    engine.generate(requests(9))


def test_takes_time_by_operation(make_decoder: Callable[..., Decoder]) -> None:
    """A kind of operation whose time the profile would lose, or one that the C++ writes behind the last of KINDS."""
    decoder = make_decoder("bfloat16")
    config = EngineConfig(page_tokens=4, batch_tokens=24, max_sequences=16, lookahead_tokens=4)
    runner = DecoderRunner(decoder, 96, config.page_tokens, config)
    assert isinstance(runner.forward, FusedForward)
    engine = Engine(runner, config, 96, decoder.spec.max_position)
    clock = runner.forward.seconds = torch.full((len(KINDS) + 1,), 8.0, dtype=torch.float64)
    engine.generate(requests(2))
    moved = [kind for kind, seconds in zip((*KINDS, "none"), clock.tolist(), strict=True) if seconds != 8.0]
    assert moved == list(KINDS)


# Bits, fp16 scales as files have them, minima; None: the values themselves.
FORMATS = {
    "values": None,
    "int4": (4, False, False),
    "int8": (8, False, False),
    "Q4_0": (4, True, False),
    "Q4_1": (4, True, True),
    "Q8_0": (8, True, False),
}
SHAPES = st.fixed_dictionaries(
    {
        "width": st.sampled_from([8, 16, 33, 40, 66, 72]),
        "ff_width": st.sampled_from([8, 35, 64, 70, 128]),
        "layers": st.integers(1, 2),
        "qk_norm": st.booleans(),
        "attention_bias": st.booleans(),
        "tied_embeddings": st.booleans(),
        "vocab_size": st.sampled_from([97, 300]),
    }
)
HEADS = st.sampled_from([(4, 2, 16), (3, 3, 8), (2, 1, 32), (1, 1, 2)])


def in_format(matrix_NK: Tensor, name: str, group: int) -> Quantised | None:
    """Codes whose values are near the matrix."""
    if FORMATS[name] is None:
        return None
    bits, half, minima = FORMATS[name]
    own = quantise(matrix_NK, bits, group)
    scales_NG = own.scales_NG.half() if half else own.scales_NG
    return Quantised(own.codes_NK + 8 * minima, scales_NG, bits, group, -8 * scales_NG if minima else None)


def hold_formats(held: Decoder, plain: Decoder, formats: list[str], group: int) -> None:
    """Each matrix of `held` in one of the formats where it has one, and their values in `plain`."""
    names = [name for name, weight in held.weights() if weight.packed is not None]
    weights, values = dict(held.weights()), dict(plain.weights())
    for index, name in enumerate(names):
        codes = in_format(weights[name].value, formats[index % len(formats)], group)
        if codes is not None:
            for weight in (weights[name], values[name]):
                weight.value.copy_(dequantise(codes, weight.value.dtype))
                weight.repack()
            fits = codes.codes_NK.shape[1] % 8 == 0 and held.dtype == torch.bfloat16
            assert weights[name].hold(codes, rows=name == "embed") == fits


def step(runner: DecoderRunner, works: list[Work], rows_N: Tensor, one_at_a_time: bool = False) -> Tensor:
    with torch.inference_mode():
        view = runner._view(StepRows.of(works, runner.page_tokens))
        tokens_T = torch.tensor([token for work in works for token in work.tokens])
        forward = runner.decoder.forward if one_at_a_time else runner.forward
        return forward(tokens_T, view, rows_N)


@dataclass(frozen=True)
class Case:
    """A model, what its matrices, keys and values are kept as, prompts, and how they are cut."""

    shape: dict[str, Any]
    heads: tuple[int, int, int]  # of queries, of keys, size
    dtype: str
    formats: list[str]  # of the matrices in turn
    group: int
    kept: tuple[str, int, int]  # kv_dtype, kv_window, kv_sinks
    lengths: list[int]
    chunks: list[int]  # tokens of a work, in turn
    asked: list[str]  # rows of a step, in turn


CASES_DRAWN = st.builds(
    Case,
    shape=SHAPES,
    heads=HEADS,
    dtype=st.sampled_from(["bfloat16", "bfloat16", "float32"]),
    formats=st.lists(st.sampled_from(list(FORMATS)), min_size=1, max_size=4),
    group=st.sampled_from([8, 32]),
    kept=st.sampled_from(
        [("same", 0, 0), ("int8", 0, 0), ("float8_e4m3", 0, 0), ("int4", 0, 0), ("same", 5, 2), ("int8", 5, 0)]
    ),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    chunks=st.lists(st.sampled_from([1, 2, 5, 7, 16, 40]), min_size=1, max_size=4),
    asked=st.lists(st.sampled_from(["none", "none", "last", "odd", "all"]), min_size=1, max_size=4),
)


@settings(max_examples=150)
@given(case=CASES_DRAWN, threads=st.integers(1, 3))
def test_any_chunk_of_any_format_asked_for_any_rows(make_decoder, parity, kernel_path, case, threads) -> None:
    """A chunk that draws nothing reads rows that are not there; a format, an odd width or narrow pages whose bits hang
    on how a prompt was cut."""
    lengths, (kv_dtype, window, sinks) = case.lengths, case.kept
    sizes = dict(zip(("heads", "kv_heads", "head_size"), case.heads, strict=True))
    held, plain = (make_decoder(case.dtype, **case.shape, **sizes) for _ in range(2))
    hold_formats(held, plain, case.formats, case.group)
    config = EngineConfig(page_tokens=4, kv_dtype=kv_dtype, kv_window=window, kv_sinks=sinks)
    pages = 10 * len(lengths)
    runner, reference = (DecoderRunner(decoder, pages, 4, config) for decoder in (held, plain))
    tables = [
        tuple(array("i", range(i, pages, len(lengths))) for _ in runner.layout.groups) for i in range(len(lengths))
    ]
    contexts = [[(7 * i + 5 * j) % 97 for j in range(length)] for i, length in enumerate(lengths)]
    request = Request("", "", (), Sampling(), 0)
    whole = [Work(i, 0, context, tables[i], True, request) for i, context in enumerate(contexts)]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    wanted_TM = step(reference, whole, torch.arange(int(starts[-1])), one_at_a_time=True)
    done, turn = [0] * len(lengths), 0
    with parity.threads(threads):
        while done != lengths:
            works, places = [], []
            for i, context in enumerate(contexts):
                begin, end = done[i], min(done[i] + case.chunks[(turn + i) % len(case.chunks)], lengths[i])
                if begin < end:
                    works.append(Work(i, begin, context[begin:end], tables[i], False, request))
                    places += range(int(starts[i]) + begin, int(starts[i]) + end)
                done[i] = end
            rows = range(len(places))
            choices = {"none": rows[:0], "last": rows[-1:], "odd": rows[1::2], "all": rows}
            chosen = choices[case.asked[turn % len(case.asked)]]
            turn += 1
            hidden_NM = step(runner, works, torch.tensor(chosen, dtype=torch.int64))
            parity.same_rows(hidden_NM, wanted_TM[[places[row] for row in chosen]], f"chunk {turn}")
            sampling = SamplingBatch.stack([request.sampling] * len(chosen), chosen, chosen)
            drawn = [one.drawn(hidden_NM, sampling) for one in (runner, reference)]
            assert drawn[0] == drawn[1]
    slots_N = [
        torch.tensor(table[0])[torch.arange(length) // 4] * 4 + torch.arange(length) % 4
        for table, length in zip(tables, lengths, strict=True)
    ]
    for own, other in zip(runner.pools, reference.pools, strict=True):
        for got, wanted in zip(own.rows(torch.cat(slots_N)), other.rows(torch.cat(slots_N)), strict=True):
            parity.same_rows(got, wanted, "keys or values")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_taps_are_the_states_that_a_watcher_sees(dtype, make_decoder: Callable[..., Decoder], kernel_path) -> None:
    """A tapped state of another layer or row, of one that is not finished, or of no row where nothing is drawn."""
    decoder = make_decoder(dtype, layers=4)
    layers_L = layers_of(decoder.spec, (0, 2))
    config = EngineConfig(page_tokens=4, batch_tokens=24, max_sequences=16, lookahead_tokens=4)
    runner = DecoderRunner(decoder, 96, 4, config)
    fused = runner.forward
    assert isinstance(fused, FusedForward)
    found, seen = (torch.zeros(96 * 4, 2, decoder.spec.width, dtype=decoder.dtype) for _ in range(2))
    steps = []

    def forward(tokens_T: torch.Tensor, view: PagedView, rows_N: torch.Tensor) -> torch.Tensor:
        slots_T = view.slots_G[0]
        expected = decoder.forward(tokens_T, view, rows_N, watch=Taps(layers_L, seen, slots_T).see)
        drawn = fused(tokens_T, view, rows_N, taps=Taps(layers_L, found, slots_T))
        assert torch.equal(drawn, expected) and torch.equal(found, seen) and bool(seen[slots_T].any(-1).all())
        steps.append(len(rows_N) < len(tokens_T))
        return drawn

    runner.forward = forward
    Engine(runner, config, 96, decoder.spec.max_position).generate(requests(9))
    assert True in steps and False in steps
    with pytest.raises(ConfigError, match=r"allowed are 0 to 2, each once"):
        layers_of(decoder.spec, (0, 3))
