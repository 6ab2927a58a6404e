"""The whole forward pass in one call against the same pass an operation at a time, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.kernels.forward import KINDS
from tandem.models.decoder import Decoder
from tandem.models.fused import FusedForward
from tandem.models.spec import LayerAttention
from tandem.models.view import PagedView
from tandem.numerics.quantise import quantise
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
@pytest.mark.parametrize("stored", ["float8_e4m3", "int8"])
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
        assert layer.gate_up.hold(quantise(layer.gate_up.value, 4, 16)) and layer.out.hold(
            quantise(layer.out.value, 8, 16)
        )
    engine.generate(requests(9))


def test_takes_time_by_operation(make_decoder: Callable[..., Decoder]) -> None:
    """A kind of operation whose time the profile would lose."""
    engine = both_ways(make_decoder("bfloat16"))
    engine.generate(requests(2))
    fused = engine.runner.forward.__closure__
    seconds = next(cell.cell_contents for cell in fused if isinstance(cell.cell_contents, FusedForward)).seconds
    assert seconds is not None and bool((seconds > 0).all())
