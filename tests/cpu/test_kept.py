"""Keys and values that are rounded as they are made, of engine and learner alike (`model.kv`)."""

from __future__ import annotations

import pytest
import torch

from tandem.config import override
from tandem.engine.config import EngineConfig
from tandem.engine.runner import DecoderRunner
from tandem.errors import ConfigError
from tandem.kernels.attention import attention_reference
from tandem.kernels.head import draw
from tandem.kernels.linear import logits
from tandem.kernels.logprob import token_logprobs
from tandem.kernels.rounding import kept_of
from tandem.kernels.sample import SamplingBatch, sample
from tandem.kernels.weight import Weight
from tandem.models.config import ModelConfig
from tandem.models.decoder import Decoder
from tandem.models.fused import FusedForward
from tandem.models.view import Heads, PackView, turn_reference
from tandem.numerics.blocks import format_of, rounded
from tandem.numerics.compare import same_bits
from tandem.recipes.tiny_arithmetic import tiny_arithmetic
from tandem.sync.departures import check_engine, declaration
from tandem.types import Sampling

HEADS, KV_HEADS, SIZE, TOKENS = 4, 2, 32, 21


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", ["float8_e4m3", "nvfp4", "int4_row_asym"])
def test_a_gradient_passes_straight_through(any_path: str, name: str, normed: bool) -> None:
    """Keys that are rounded before they are turned, values that are not, a gradient of zero or of the rounded norm."""
    generator = torch.Generator().manual_seed(7)
    heads = Heads(HEADS, KV_HEADS, SIZE, norm_eps=1e-5 if normed else None, kept=kept_of(name))
    qkv_TW = torch.randn(TOKENS, heads.width, generator=generator)
    angle_PD = torch.randn(64, SIZE // 2, generator=generator)
    tables = angle_PD.cos(), angle_PD.sin()
    view = PackView([0, 13, TOKENS])
    upstream_TW = torch.randn(TOKENS, HEADS * SIZE, generator=generator)

    def nearest(x_TKD: torch.Tensor) -> torch.Tensor:
        if name == "float8_e4m3":
            near = x_TKD.detach().to(torch.float8_e4m3fn).float()
        else:
            rows = x_TKD.detach().reshape(-1, SIZE)
            near = torch.stack([rounded(row, format_of(name)) for row in rows]).view(x_TKD.shape)
        return x_TKD + (near - x_TKD.detach())  # within a unit of the rounding of this sum

    found, wanted = qkv_TW.clone().requires_grad_(), qkv_TW.clone().requires_grad_()
    out_TW = view.attend(0, found * 1.0, heads, tables)
    query, key = turn_reference(wanted, view.positions_T, heads, tables)
    expected_TW = attention_reference(query, nearest(key), nearest(heads.cut(wanted)[2]), view.paths).flatten(1)
    torch.testing.assert_close(out_TW, expected_TW, rtol=1e-4, atol=1e-4)
    for out in (out_TW, expected_TW):
        out.backward(upstream_TW)
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-3)


def test_vectors_are_rounded_alone() -> None:
    """A key that hangs on another head or token; a vector with an infinity that spoils its neighbours."""
    x_TKD = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(1)).mul(3).bfloat16()
    for name in ("int8", "int4_g32", "fp8_tensor", "nvfp4_inference", "mxfp4", "float8_e4m3"):
        kept = kept_of(name)
        assert kept is not None
        whole = kept.rounded(x_TKD)
        assert same_bits(whole[2:4, 1], kept.rounded(x_TKD[2:4, 1:2].contiguous())[:, 0]), name
        assert not same_bits(whole, x_TKD), name
        spoilt = x_TKD.clone()
        spoilt[1, 1, 7] = torch.nan
        again = kept.rounded(spoilt)
        assert bool(again[1, 1, 7].isnan()), name
        again[1, 1] = whole[1, 1]
        assert same_bits(again, whole), name


def test_pages_hold_what_they_can(make_decoder) -> None:  # type: ignore[no-untyped-def]
    """e4m3 pages of twice the bytes, an engine that rounds twice, or runs an operation at a time needlessly."""
    plain = make_decoder("bfloat16")
    config = EngineConfig(page_tokens=4)
    sizes = {}
    for name in ("same", "float8_e4m3", "int4", "mxfp4"):
        decoder = Decoder(plain.spec, "bfloat16", kept=kept_of(name)).load(plain.export())
        runner = DecoderRunner(decoder, 6, 4, config)
        sizes[name] = sum(pool.nbytes for pool in runner.pools)
        assert sizes[name] == 6 * 4 * runner.layout.token_bytes
        assert isinstance(runner.forward, FusedForward) == (plain.compiled and name != "mxfp4"), name
    size = plain.spec.head_size
    assert sizes["int4"] * 2 * size == sizes["same"] * (size // 2 + 5 * -(-size // 32))
    assert sizes["same"] == sizes["mxfp4"] == 2 * sizes["float8_e4m3"]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_are_those_of_bf16(any_path: str, temperature: float) -> None:
    """A log-prob of one side whose logits are not rounded, or after the temperature; a gradient that is lost."""
    generator = torch.Generator().manual_seed(3)
    hidden_NM = torch.randn(9, 48, generator=generator)
    made = Weight(torch.randn(300, 48, generator=generator), matrix=True)
    made.narrow = True
    sampling = SamplingBatch.stack([Sampling(temperature=temperature)] * 9, [*range(9)], [5] * 9)
    tokens_N, logprobs_N = draw(hidden_NM, made, sampling)
    narrow_NV = logits(hidden_NM, made)
    assert same_bits(narrow_NV, narrow_NV.bfloat16().float())
    again_N, others_N = sample(narrow_NV, sampling)
    assert torch.equal(tokens_N, again_N) and same_bits(logprobs_N, others_N)

    made.grad = torch.zeros(300, 48)
    found_NM, wanted_NM = hidden_NM.clone().requires_grad_(), hidden_NM.clone().requires_grad_()
    weight_VM = made.value.clone().requires_grad_()
    learned_N, _ = token_logprobs(found_NM, made, tokens_N, temperature)
    assert same_bits(learned_N.detach(), logprobs_N)
    exact_NV = wanted_NM @ weight_VM.T
    through_NV = exact_NV + (narrow_NV - exact_NV).detach()
    expected_N = (through_NV / temperature).log_softmax(-1).gather(1, tokens_N[:, None])[:, 0]
    torch.testing.assert_close(learned_N, expected_N, rtol=1e-5, atol=1e-5)
    upstream_N = torch.randn(9, generator=generator)
    for one in (learned_N, expected_N):
        one.backward(upstream_N)
    torch.testing.assert_close(found_NM.grad, wanted_NM.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(made.grad, weight_VM.grad, rtol=1e-3, atol=1e-3)


def test_refused_and_declared() -> None:
    """A format of tiles, a name that is none, both settings at once, a GPU: found when weights are loaded."""
    spec = None  # not looked at before these are refused
    for model, engine, said in (
        ("fp8_128x128", "same", "tiles of 128 rows"),
        ("same", "fp8_128x128", "tiles of 128 rows"),
        ("nvfp4", "int8", "model.kv is nvfp4 and engine.kv_dtype is int8"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_engine(spec, ModelConfig("m", kv=model), EngineConfig(kv_dtype=engine))  # type: ignore[arg-type]
    for wrong in ({"model.kv": "w8a8"}, {"engine.kv_dtype": "int9"}, {"model.kv": "nvfp4", "model.device": "cuda"}):
        with pytest.raises(ConfigError, match="is no format of keys and values|on the CPU alone"):
            override(tiny_arithmetic(), wrong)
    assert declaration(override(tiny_arithmetic(), {"model.kv": "nvfp4"})).endswith(
        "both keep keys and values in nvfp4"
    )
    assert "rounded to nvfp4 (engine.kv_dtype=nvfp4)" in declaration(
        override(tiny_arithmetic(), {"engine.kv_dtype": "nvfp4"})
    )
