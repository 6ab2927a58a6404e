"""Triton's products of few bits: the references' bits, whatever rows ride along, and what engine and learner make of
them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tandem.algo.pack import count_prompts, pack
from tandem.engine.config import EngineConfig
from tandem.kernels import eights
from tandem.kernels.blocks import rounded_rows
from tandem.kernels.linear import linear
from tandem.kernels.rounding import EIGHTS, rounding_of
from tandem.kernels.weight import Weight
from tandem.models.checkpoint import open_checkpoint
from tandem.models.codes import described, hold_codes
from tandem.models.config import ModelConfig
from tandem.models.decoder import Decoder
from tandem.models.quantised.write import kind_of, write
from tandem.numerics import blocks
from tandem.numerics.blocks import FORMATS, Blocks, Fp4, format_of
from tandem.numerics.compare import same_bits
from tandem.numerics.quantise import Quantised, dequantise, quantise, to_int8
from tandem.surgery.quantise import Method, quantised
from tandem.sync.publish import Publisher
from tandem.sync.receive import Copied, integers_of, serving_decoder
from tandem.train.step import score
from tandem.types import Request, Sampling
from tests.gpu.test_decoder import TEMPERATURE, asked, engine_of, hexes
from tests.samples import sample_of

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
CASES = [
    (torch.bfloat16, 1, 8, 5),
    (torch.bfloat16, 70, 100, 66),
    (torch.float32, 66, 300, 33),
    (torch.float16, 7, 100, 9),
]


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The same bits, signs of zeros among them, where NaN are the same."""
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    return torch.equal(one.isnan(), other.isnan()) and same_bits(one.nan_to_num(7.0), other.nan_to_num(7.0))


def hard_rows(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows with ties, zeros, denormals, NaN, infinities, and one large number."""
    x = draw(0, rows, width, dtype=dtype)
    ties = torch.arange(width) - width / 2 + 0.5
    ties[0] = 127.0
    hard = [ties, torch.zeros(width), x[0].float() * 2.0**-140, x[0].float(), x[0].float(), x[0].float()]
    hard[3][-1], hard[4][0], hard[5][1] = torch.nan, -torch.inf, 2.0**15
    for row, values in zip(range(1, rows), hard, strict=False):
        x[row] = values.to(dtype)
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 300])
def test_rows_are_rounded_as_the_reference_rounds_them(device, dtype, width):
    """A row's scale is a reciprocal's, a tie goes up, a denormal is flushed, or a NaN spoils nothing or another row."""
    from tandem.kernels.gpu.eights import FP8, round_rows
    from tandem.kernels.gpu.eights import rounded_rows as gpu

    x = hard_rows(9, width, dtype)
    codes, scales = (part.cpu() for part in round_rows(x.to(device)))
    expected, by = to_int8(x)
    assert torch.equal(codes, expected) and same(scales, by)
    assert same(gpu(x.to(device)).cpu(), rounded_rows(x, EIGHTS))
    strided = torch.cat((x, x), 1).to(device)[:, :width]
    assert torch.equal(round_rows(strided)[0].cpu(), codes)
    finite = x[x.isfinite().all(1)]
    codes, scales = (part.cpu() for part in round_rows(finite.to(device), FP8))
    expected, by, *_ = blocks.quantise(finite, FORMATS["fp8_row"])
    assert torch.equal(codes.view(torch.uint8), expected) and same(scales, by[:, 0])
    assert bool(round_rows(x.to(device), FP8)[1][~x.isfinite().all(1)].isnan().all())


@pytest.mark.parametrize(("dtype", "rows", "depth", "columns"), CASES)
def test_integer_products_are_the_cpus(device, dtype, rows, depth, columns):
    """A product of int8 leaves a tile's edge out, contracts a product with the bias, rounds a residual's sum once, or
    has other bits than the CPU's."""
    from tandem.kernels.gpu.eights import DeviceEights

    x, value = hard_rows(rows, depth, dtype), draw(1, columns, depth, dtype=dtype)
    value[0] = 0
    bias, residual = draw(2, columns, dtype=dtype), draw(3, rows, columns, dtype=dtype)
    matrix = DeviceEights(value.to(device))
    assert matrix.is_of(value.to(device)) and not matrix.is_of(value.to(device).roll(1, 1))
    quantised = quantise(value, 8, depth)
    assert same(matrix.values(dtype).cpu(), dequantise(quantised, dtype))
    there = [part.to(device) for part in (x, bias, residual)]
    for given in ((bias,), (bias, residual)):
        got = matrix.product(there[0], *(one if one is None else one.to(device) for one in given))
        assert same(got.cpu(), eights.product_reference(x, quantised, *given)), given
    wide = matrix.product(there[0], out_dtype=torch.float32).cpu()
    assert same(wide, eights.product_reference(x, quantised, out_dtype=torch.float32))


def test_products_of_e4m3_are_of_what_is_rounded(device):
    """A product of e4m3 takes another row's scale or is not of the format's numbers, a row hangs on its company, or a
    NaN reaches another row."""
    from tandem.kernels.gpu.eights import FP8, DeviceEights

    x, value = draw(0, 66, 300), draw(1, 33, 300)
    matrix = DeviceEights(value.to(device), FP8)
    assert same(matrix.values().cpu(), blocks.rounded(value, FORMATS["fp8_row"]))
    got = matrix.product(x.to(device), out_dtype=torch.float32).cpu()
    rows, columns = (blocks.rounded(one.float(), FORMATS["fp8_row"]).double() for one in (x, value))
    # Hopper adds 128 products at a time in 14 bits of the largest; elsewhere in fp32.
    error = (2.0**-12 if device == "cuda" else 2.0**-16) * (rows.abs() @ columns.abs().T)
    assert bool(((got.double() - rows @ columns.T).abs() <= error).all())
    alone = matrix.product(x[41:42].to(device), out_dtype=torch.float32).cpu()
    assert torch.equal(alone, got[41:42])
    x[3, 7] = torch.nan
    broken = matrix.product(x.to(device), out_dtype=torch.float32).cpu()
    assert bool(broken[3].isnan().all()) and torch.equal(broken[4:], got[4:])


def quantised_of(name: str, value: torch.Tensor) -> Quantised | Fp4:
    kind, _, group = name.partition("/")
    if group:
        return quantise(value, int(kind), int(group))
    if kind == "q4_1":  # as GGUF has them
        groups = value.shape[1] // 4
        codes = torch.randint(0, 16, value.shape, generator=torch.Generator().manual_seed(1)).to(torch.int8)
        scales, minima = draw(2, len(value), groups, dtype=torch.float16), draw(3, len(value), groups).half()
        return Quantised(codes, scales, 4, 4, minima)
    return Fp4(blocks.quantise(value, format_of(kind)), format_of(kind))


KINDS = ["4/32", "4/100", "8/24", "8/300", "q4_1", "mxfp4", "mxfp4_even", "nvfp4", "nvfp4_inference", "nvfp4_divided"]


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_opened_in_the_tile(device, kind):
    """A code, its scale or its minimum is another's, a ragged last block is read wrong, a value is rounded twice, or a
    product has other bits than that of the values."""
    from tandem.kernels.gpu.codes import DeviceCodes
    from tandem.kernels.gpu.linear import product

    depth = 100
    x, value = hard_rows(66, depth, torch.bfloat16).to(device), draw(1, 33, depth).to(device)
    bias, residual = draw(2, 33).to(device), draw(3, 66, 33).to(device)
    matrix = quantised_of(kind, value.cpu())
    expected = matrix.values(torch.bfloat16) if isinstance(matrix, Fp4) else dequantise(matrix, torch.bfloat16)
    held = DeviceCodes(on(matrix, device))
    assert same(held.values().cpu(), expected)
    got = held.product(x, bias, residual)
    assert same(got, product(x, expected.to(device), bias, residual))
    assert torch.equal(held.product(x[65:], bias, residual[65:]), got[65:])
    other = on(quantised_of(kind, 2 * value.cpu().roll(1, 0)), device)
    memory = held.packed.data_ptr()
    assert held.take(other) and held.packed.data_ptr() == memory
    assert same(held.values(), DeviceCodes(other).values())
    assert not held.take(on(quantised_of("8/10" if kind != "8/10" else "mxfp4", value.cpu()), device))


def on(matrix: Quantised | Fp4, device: str) -> Quantised | Fp4:
    def moved(parts: Any) -> list[Any]:
        return [part.to(device) if isinstance(part, torch.Tensor) else part for part in parts]

    if isinstance(matrix, Fp4):
        return Fp4(Blocks(*moved(matrix.blocks)), matrix.form)
    codes, scales, minima = moved((matrix.codes_NK, matrix.scales_NG, matrix.minima_NG))
    return Quantised(codes, scales, matrix.bits, matrix.group, minima)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "nvfp4_divided"])
def test_every_byte_of_a_scale(device, name):
    """Some byte of a scale (0, NaN, a denormal, a sign) or some code of e2m1 is not the number that it stands for."""
    from tandem.kernels.gpu.codes import DeviceCodes

    form = FORMATS[name]
    codes = torch.arange(16, dtype=torch.uint8).repeat(256, form.block // 16)
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    whole = None if name == "mxfp4" else torch.tensor(0.0003)
    matrix = Fp4(Blocks(codes, scales, whole), form)
    held = DeviceCodes(on(matrix, device))
    units = torch.eye(form.block, dtype=torch.bfloat16)[:16].to(device)
    got = held.product(units, out_dtype=torch.float32).cpu().T
    expected = matrix.values(torch.bfloat16)[:, :16].float()
    finite = expected.isfinite().all(1)  # not where a scale is NaN, or 6 times it beyond fp32
    assert int(finite.sum()) == (253 if whole is None else 254)
    assert torch.equal(got[finite], expected[finite])
    assert bool(got[expected.isnan().any(1)].isnan().all()) and not bool(got[~finite].isfinite().all(1).any())


def test_a_device_of_other_bits_opens_codes(device, monkeypatch):
    """Codes are multiplied where that gives other bits than their values do."""
    from tandem.kernels.gpu import codes as gpu

    weight = Weight(draw(0, 20, 64).to(device), matrix=True)
    wrong = gpu.DeviceCodes.tiled_product
    monkeypatch.setattr(gpu.DeviceCodes, "tiled_product", lambda *given: wrong(*given).add_(1))
    with pytest.warns(UserWarning, match="opened when they are loaded"):
        found = gpu.agreed.__wrapped__(torch.device(device))
    assert found == ()
    monkeypatch.setattr(gpu, "agreed", lambda place: found)
    assert not weight.hold(quantise(weight.value, 4, 32)) and weight.codes is None


@pytest.mark.parametrize("name", ["w8a8", "fp8_row+fp8_row", "mxfp4", "nvfp4", "nvfp4+nvfp4", "int8_g128"])
def test_a_rounded_matrix_learns_straight_through(device, name):
    """A gradient is not that of the rounded product, an update is not read, or what products read moves, so that a
    captured step reads the old."""
    weight = Weight(draw(1, 20, 64).to(device), matrix=True)
    weight.grad = torch.zeros(20, 64, device=device)
    weight.multiply_rounded(rounding := rounding_of(name))
    assert weight.follows(weight.value) and (weight.codes is None) == (name == "int8_g128")
    x = draw(0, 7, 64).to(device).requires_grad_()
    dy = draw(2, 7, 20).to(device)
    linear(x, weight).backward(dy)
    rows, matrix = rounding.multiplied(x.detach()).float(), rounding.matrix(weight.value).float()
    torch.testing.assert_close(x.grad, (dy.float() @ matrix).bfloat16())
    torch.testing.assert_close(weight.grad, dy.float().T @ rows)
    before = weight.addresses
    weight.value.mul_(-2)
    assert not weight.follows(weight.value)
    weight.repack()
    assert weight.follows(weight.value) and weight.addresses == before
    y = linear(x.detach(), weight)
    torch.testing.assert_close(y.float(), rows @ rounding.matrix(weight.value).float().T, rtol=0.01, atol=0.1)


@pytest.mark.parametrize("name", ["w8a8"])
def test_engine_and_learner_share_the_rounded_policy(make_decoder, name):
    """The learner's forward rounds rows or matrices otherwise than the engine's, or a row's log-prob hangs on its pack,
    chunk or batch."""
    made = functools.partial(make_decoder, rounding=rounding_of(name))
    requests = asked()[:2]
    completions = engine_of(made("bfloat16"), batch_tokens=4, max_sequences=4, lookahead_tokens=0).generate(requests)
    samples = [sample_of(*pair, (1.0,) * 7) for pair in zip(requests, completions, strict=True)]
    assert made("bfloat16").layers[0].mix.qkv.codes is not None
    for microbatch in pack(samples, count_prompts(samples), 90, True):
        assert hexes(score(made("bfloat16"), microbatch, TEMPERATURE)) == hexes(microbatch.predictions["logprobs"])


@pytest.mark.parametrize("name", ["w8a8", "int4"])
def test_an_engine_of_its_own_is_served_codes(make_decoder, device, name):
    """engine.weights is refused on a GPU, opened into bf16, checked against nothing, or moved at an update."""
    learner = make_decoder("bfloat16")
    config = EngineConfig(weights=name, weight_group=8, page_tokens=4)
    serving = serving_decoder(learner.spec, ModelConfig("x", device=device), config)
    engine = engine_of(serving)
    publisher = Publisher(learner, [Copied("the engine", serving, engine, rounding=integers_of(config))])
    publisher.publish(0)
    matrices = [weight for layer in serving.layers for slot, weight in layer.weights() if slot.columns is not None]
    assert all(weight.codes is not None for weight in matrices)
    request = Request("p", "p", tuple(range(9)), Sampling(max_new_tokens=2), seed=1)
    first = engine.generate([request])[0]
    before = [weight.addresses for weight in matrices]
    for _, weight in learner.weights():
        weight.value.mul_(1.3)
    publisher.publish(1)
    assert [weight.addresses for weight in matrices] == before
    second = engine.generate([request])[0]
    assert first.columns["logprobs"].tolist() != second.columns["logprobs"].tolist()
    twin = serving_decoder(learner.spec, ModelConfig("x", device=device), config)
    other = engine_of(twin)
    Publisher(learner, [Copied("the engine", twin, other, rounding=integers_of(config))]).publish(1)
    assert hexes(other.generate([request])[0].columns["logprobs"]) == hexes(second.columns["logprobs"])


@pytest.mark.parametrize("text", ["modelopt:nvfp4", "compressed-tensors:nvfp4", "gptq:int4_g32"])
def test_a_file_is_served_as_its_codes(device, tmp_path, text):
    """A quantised file is opened into bf16 on a GPU, its matrices are joined in another order or each with another's
    scale of the tensor, or its codes give other log-probs than its values."""
    source = open_checkpoint("new:width=64,layers=1,heads=4,kv_heads=2,ff_width=96,max_position=64")
    kind, tensors = kind_of(text), {name: tensor.bfloat16() for name, tensor in source.tensors()}
    codes = quantised(source.spec, tensors, Method(), kind.form).blocks
    tensors = {name: one for name, one in tensors.items() if name not in codes}
    write(tmp_path / "m", source.spec, tensors, kind, codes, source.load_tokenizer())
    checkpoint = open_checkpoint(str(tmp_path / "m"))
    held, opened = (Decoder(checkpoint.spec, "bfloat16", device) for _ in "of")
    held.load(checkpoint.tensors(hold_codes(held, checkpoint)))
    opened.load(checkpoint.tensors())
    assert described(held) == "4 matrices of 4 bits" and held.embed.codes is None
    request = Request("p", "p", tuple(range(20)), Sampling(max_new_tokens=2), seed=1)
    got, expected = (engine_of(one).generate([request])[0] for one in (held, opened))
    assert hexes(got.columns["logprobs"]) == hexes(expected.columns["logprobs"])
    for (name, one), (_, other) in zip(held.weights(), opened.weights(), strict=True):
        assert torch.equal(one.served(), other.served()), name
