"""An engine that departs from the learner's forward: by what it declares, and by nothing else.

Within such an engine the bits of a token still depend on its request and position alone.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner, with_noise
from tandem.kernels.attention import attention
from tandem.kernels.attention_int8 import int8_attention_reference
from tandem.kernels.rotary import rotate_
from tandem.kernels.sample import SamplingBatch
from tandem.models.decoder import Decoder
from tandem.models.view import Heads, PackView
from tandem.numerics import blocks, random
from tandem.numerics.blocks import FORMATS
from tandem.numerics.compare import same_bits
from tandem.numerics.quantise import to_int8
from tandem.types import Completion, Reach, Sampling

DEPARTURES: dict[str, dict[str, Any]] = {
    "none": {},
    "e4m3": {"kv_dtype": "float8_e4m3"},
    "int8": {"kv_dtype": "int8"},
    "int4": {"kv_dtype": "int4"},
    "nvfp4": {"kv_dtype": "nvfp4"},
    "window": {"kv_window": 9, "kv_sinks": 3},
    "window alone": {"kv_window": 9, "kv_sinks": 0},
    "noise": {"noise": 0.3},
    "all": {"kv_dtype": "float8_e4m3", "kv_window": 17, "kv_sinks": 1, "noise": 0.1},
    "all, int8": {"kv_dtype": "int8", "kv_window": 17, "kv_sinks": 1, "noise": 0.1},
}
PROMPTS = [[(7 * i * i + 3 * n) % 97 for i in range(13 + 20 * n)] for n in range(3)]


def engine_of(decoder: Decoder, num_pages: int = 64, **settings: Any) -> Engine:
    limits = {"page_tokens": 4, "batch_tokens": 64, "max_sequences": 16, "lookahead_tokens": 4}
    config = EngineConfig(**{**limits, **settings})
    runner = DecoderRunner(decoder, num_pages, config.page_tokens, config)
    return Engine(runner, config, num_pages, decoder.spec.max_position)


@pytest.mark.parametrize("departure", DEPARTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_company_does_not_matter(kernel_path, make_decoder, parity, dtype, departure):
    """A token's bits depend on its chunk, a prefix hit, a preemption or the batch: keys of its own step are attended to
    as they were before they were rounded, noise is drawn by the row."""
    decoder = make_decoder(dtype)
    settings = DEPARTURES[departure]
    asked = parity.groups([*PROMPTS, PROMPTS[2][:30]], 3, 1.0, 18)
    engine = engine_of(decoder, 18, batch_tokens=20, lookahead_tokens=0, **settings)
    done = engine.generate(asked)
    # with a window, admission has counted all pages that a sequence ever holds
    assert bool(engine.stats.preemptions) != bool(settings.get("kv_window")) and engine.stats.cached_tokens
    for request, completion in zip(asked, done, strict=True):
        alone = engine_of(decoder, 64, share_prefixes=False, page_tokens=16, **settings).generate([request])[0]
        parity.same(completion, alone, departure)


@pytest.mark.parametrize("departure", DEPARTURES)
def test_a_departure_departs(any_path, make_decoder, parity, departure):
    """A setting that the run declares reaches no kernel; or the default engine is not the exact one."""
    decoder = make_decoder("bfloat16")
    asked = parity.groups(PROMPTS, 2, 1.0, 12)
    drawn: list[list[Completion]] = []
    for config in ({}, DEPARTURES[departure]):
        drawn.append(engine_of(decoder, **config).generate(asked))
    plain, departed = ([list(map(float.hex, c.logprobs)) for c in done] for done in drawn)
    assert (plain == departed) == (departure == "none")
    if departure == "none" and any_path != "reference":
        parity.check_learner(decoder, parity.samples(asked, drawn[1]), 1.0)


def rounded(x: torch.Tensor, kind: str) -> torch.Tensor:
    """What a pool of `kind` keeps of x [T, K, D], by ml_dtypes or by hand."""
    if kind in ("int4", "nvfp4"):
        form = FORMATS["int4_g32_asym" if kind == "int4" else kind]
        return torch.stack([blocks.rounded(row, form) for row in x.reshape(-1, x.shape[-1])]).view(x.shape)
    wide = x.float().numpy()
    if kind == "float8_e4m3":
        wide = wide.clip(-448, 448).astype(pytest.importorskip("ml_dtypes").float8_e4m3fn).astype(np.float32)
    return torch.from_numpy(wide).to(x.dtype)


class Lossy(PackView):
    """Whole contexts, whose keys and values are rounded before anything attends to them."""

    def __init__(self, length: int, kind: str, window: int | None, sinks: int) -> None:
        super().__init__([0, length])
        self.kind, self.window, self.sinks = kind, window, sinks

    def attend(self, layer: int, qkv_TW: torch.Tensor, heads: Heads, tables: Any) -> torch.Tensor:
        query, key, value = heads.cut(qkv_TW)
        for rotated in (query, key):
            rotate_(rotated, self.positions_T, *tables)
        reach = Reach(window=self.window)
        if self.kind == "int8":
            codes = to_int8(key), to_int8(value)
            return int8_attention_reference(query, *codes, self.paths, reach, self.sinks).flatten(1)
        key, value = (rounded(x, self.kind) for x in (key, value))
        return attention(query, key, value, self.paths, reach, sinks=self.sinks).flatten(1)


@pytest.mark.parametrize(
    "departure", ["none", "e4m3", "int8", "int4", "nvfp4", "window", "window alone", "all", "all, int8"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_states_are_those_of_lossy_keys(kernel_path, make_decoder, parity, dtype, departure):
    """Keys are rounded before they are rotated, values are not rounded, or window and sinks change places."""
    decoder, settings = make_decoder(dtype), DEPARTURES[departure]
    config = EngineConfig(page_tokens=4, **settings)
    runner = DecoderRunner(decoder, 20, 4, config)
    context = PROMPTS[2]
    chunks = [[(0, 0, 7)], *[[(0, t, t + 1)] for t in range(7, 20)], [(0, 20, len(context))]]
    rows = parity.in_pages(runner, [context], [list(range(19, -1, -1))], chunks)
    view = Lossy(len(context), settings.get("kv_dtype", "same"), settings.get("kv_window"), settings.get("kv_sinks", 0))
    with torch.inference_mode():
        wanted_TM = decoder.forward(torch.tensor(context), view)
    parity.same_rows(torch.stack([rows[0, t] for t in range(len(context))]), wanted_TM, departure)


@pytest.mark.parametrize("width", [33, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_by_hand(width, dtype):
    """Noise of another size than sigma rms(h), of another position or seed, or one that depends on the rows beside."""
    seeds, positions = [5, 2**63 + 11, 5], [9, 9, 10]
    sampling = SamplingBatch.stack([Sampling()] * 3, seeds, positions)
    hidden_SM = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).mul(4).to(dtype)
    noisy_SM = with_noise(hidden_SM, sampling, 0.25)
    assert noisy_SM.dtype == dtype
    for row in range(3):
        h = hidden_SM[row].double().tolist()
        rms = math.sqrt(math.fsum(x * x for x in h) / width)
        words = [int(random.words(seeds[row], positions[row], c, random.Stream.NOISE)) for c in range(width + 1)]
        for c in range(width):
            radius = math.sqrt(-2 * math.log((words[c - c % 2] + 0.5) / 2**32))
            turn = 2 * math.pi * (words[c - c % 2 + 1] + 0.5) / 2**32
            eps = radius * (math.sin(turn) if c % 2 else math.cos(turn))
            assert float(noisy_SM[row, c]) == pytest.approx(h[c] + 0.25 * rms * eps, rel=2.0**-8, abs=1e-6)
        lone = with_noise(hidden_SM[row : row + 1], sampling.rows(np.array([row])), 0.25)
        assert same_bits(lone[0], noisy_SM[row])
    assert torch.equal(
        with_noise(torch.zeros(3, width, dtype=dtype), sampling, 1.0), torch.zeros(3, width, dtype=dtype)
    )


@pytest.mark.parametrize(
    ("kv_dtype", "code", "scale"), [("same", 2, 0), ("float8_e4m3", 1, 0), ("int8", 1, 4), ("int4", 0.5, 5)]
)
def test_page_memory(make_decoder, kv_dtype, code, scale):
    """Pages in 8 bits are counted, or kept, in 16; or without their scales."""
    decoder = make_decoder("bfloat16")
    runner = DecoderRunner(decoder, 10, 4, EngineConfig(page_tokens=4, kv_dtype=kv_dtype))
    taken = sum(pool.nbytes for pool in runner.pools)
    assert taken == 10 * 4 * runner.layout.token_bytes
    spec = decoder.spec
    assert taken == 10 * 4 * 2 * spec.layers * spec.kv_heads * (spec.head_size * code + scale)


def test_runs_without_a_compiled_kernel(any_path, make_decoder, parity):
    """A compute dtype without kernels, or no compiler: float8 tensors fail in an operation of PyTorch's."""
    asked = parity.groups(PROMPTS, 1, 1.0, 6)
    for dtype, departure in itertools.product(("float16", "float32"), ("all", "all, int8")):
        done = engine_of(make_decoder(dtype), **DEPARTURES[departure]).generate(asked)
        assert all(completion.tokens for completion in done)
