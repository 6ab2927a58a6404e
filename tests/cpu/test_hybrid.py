"""Layers that attend differently: windows, chunks, layers without rotation, hotter queries, norms after rotation.

Two oracles: a dense mask written out position by position, and Transformers' own models.
"""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tandem.models.checkpoint import open_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.hf_config import from_hf_config, to_hf_config
from tandem.models.rope import query_factors, rope_tables
from tandem.models.spec import LayerAttention, ModelSpec, QueryTemperature
from tandem.models.view import Heads, PackView, turn_reference
from tandem.types import Reach, Request, Sampling

CHUNK, WINDOW, PAGE, VOCAB = 16, 21, 4, 97
CHUNKED, EVERYWHERE = LayerAttention(Reach(chunk=CHUNK)), LayerAttention(rotary=False)
LAYOUTS: dict[str, dict[str, Any]] = {
    "llama4": {
        "attention": (CHUNKED, CHUNKED, CHUNKED, EVERYWHERE),
        "query_temperature": QueryTemperature(0.5, 10),
        "rotated_norm": True,
    },
    "window, chunk, all": {"attention": (LayerAttention(Reach(window=WINDOW)), CHUNKED, LayerAttention())},
    "without rotation": {"attention": (LayerAttention(Reach(window=5), rotary=False), EVERYWHERE, LayerAttention())},
}
EDGES = (CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3, WINDOW - 1, WINDOW, WINDOW + 1)


def seen(reach: Reach, query: int, key: int) -> bool:
    """The definition, from the position of a query and a key."""
    if reach.window is not None and query - key >= reach.window:
        return False
    if reach.chunk is not None and query // reach.chunk != key // reach.chunk:
        return False
    return key <= query


@functools.cache
def mask_of(reach: Reach) -> Tensor:
    """[query, key] over the first 100 positions: whether it is seen."""
    return torch.tensor([[seen(reach, query, key) for key in range(100)] for query in range(100)])


def dense_logits(spec: ModelSpec, weights: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """[T, V] in fp64 by loops over layers and heads, from the exported weights alone."""
    count = len(tokens)
    cos_PD, sin_PD = (table.double() for table in rope_tables(spec, count))

    def unit(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt()

    def turned(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return torch.cat((low * cos_PD - high * sin_PD, high * cos_PD + low * sin_PD), -1)

    hidden_TM = weights["model.embed_tokens.weight"][tokens]
    for index, layer in enumerate(spec.layer_attention):
        own = {
            name.removeprefix(f"model.layers.{index}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"model.layers.{index}.")
        }
        x_TM = unit(hidden_TM) * own["input_layernorm.weight"]
        query, key, value = (x_TM @ own[f"self_attn.{kind}_proj.weight"].T for kind in "qkv")
        heads = []
        for head in range(spec.heads):
            group = head * spec.kv_heads // spec.heads
            q = query[:, head * spec.head_size : (head + 1) * spec.head_size]
            k, v = (x[:, group * spec.head_size : (group + 1) * spec.head_size] for x in (key, value))
            if layer.rotary:
                q, k = (unit(turned(x)) if spec.rotated_norm else turned(x) for x in (q, k))
            elif spec.query_temperature is not None:
                heat = spec.query_temperature
                q = torch.stack([q[p] * (1 + heat.scale * math.log(1 + (p + 1) // heat.floor)) for p in range(count)])
            scores = (q @ k.T / math.sqrt(spec.head_size)).masked_fill(~mask_of(layer.reach)[:count, :count], -math.inf)
            heads.append(scores.softmax(-1) @ v)
        hidden_TM = hidden_TM + torch.cat(heads, -1) @ own["self_attn.o_proj.weight"].T
        x_TM = unit(hidden_TM) * own["post_attention_layernorm.weight"]
        gate, up = (x_TM @ own[f"mlp.{kind}_proj.weight"].T for kind in ("gate", "up"))
        hidden_TM = hidden_TM + (torch.nn.functional.silu(gate) * up) @ own["mlp.down_proj.weight"].T
    return (unit(hidden_TM) * weights["model.norm.weight"]) @ weights["lm_head.weight"].T


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_mask_at_every_length(kernel_path: str, make_decoder: Callable[..., Decoder], parity, layout: str):
    """A layer sees a position too many or too few at some length, chunk of a prefill or prefix hit.

    Engine and learner have the same bits; both are within fp32's rounding of the oracle, whose logits are near 1.
    """
    decoder = make_decoder(layers=4, **LAYOUTS[layout])
    rng = random.Random(layout)
    stem = [rng.randrange(VOCAB) for _ in range(80)]
    asked = []
    for length in range(1, 81):
        shared = rng.choice([0, length // 2, length - 1])
        tokens = stem[:shared] + [rng.randrange(VOCAB) for _ in range(length - shared)]
        asked.append(Request(f"r{length}", f"r{length}", tuple(tokens), Sampling(max_new_tokens=3), length))
    rng.shuffle(asked)
    limits = {"page_tokens": PAGE, "max_sequences": 6}
    with parity.threads(1):
        engine = parity.engine(decoder, 400, batch_tokens=7, **limits)
        done = engine.generate(asked)
        assert engine.stats.cached_tokens
        without = parity.engine(decoder, 400, batch_tokens=23, share_prefixes=False, **limits)
        for again, completion in zip(without.generate(asked), done, strict=True):
            parity.same(again, completion, "other chunks, no hits")
        parity.check_learner(decoder, parity.samples(asked, done), 1.0, 400)
        weights = {name: tensor.double() for name, tensor in decoder.export()}
        for request, completion in zip(asked, done, strict=True):
            tokens, first = completion.tokens, len(request.tokens) - 1
            logits_TV = dense_logits(decoder.spec, weights, [*request.tokens, *tokens])
            logprobs_NV = logits_TV[first : first + len(tokens)].log_softmax(-1)
            wanted = logprobs_NV.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
            assert completion.logprobs == pytest.approx(wanted, abs=1e-4), request.id


def heads_of(layer: LayerAttention, norm: bool, heat: QueryTemperature | None) -> Heads:
    factors = None if heat is None or layer.rotary else query_factors(heat, 256)
    return Heads(4, 2, 16, layer.reach, layer.rotary, 1e-5 if norm and layer.rotary else None, factors)


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("reach", [Reach(), Reach(window=WINDOW), Reach(chunk=CHUNK)])
def test_gradients_of_a_layer(any_path: str, reach: Reach, rotary: bool):
    """The backward pass of a window, a chunk, the norm after rotation or the hotter queries is another function's.

    Two samples share the rows of a prompt, a third has its own. The reference is autograd in fp64, so what remains is
    fp32's rounding of sums of some hundred terms near 1.
    """
    generator = torch.Generator().manual_seed(1)
    positions = [*range(40), *range(40, 75), *range(40, 58), *range(50)]
    view = PackView([0, 40, 75, 93, 143], first_S=[0, 40, 40, 0], parent_S=[-1, 0, 0, -1])
    assert view.positions_T.tolist() == positions
    tables = rope_tables(ModelSpec("llama", 8, 64, 8, 1, 4, 2, 16), 256)
    for norm in (False, True):
        heads = heads_of(LayerAttention(reach, rotary), norm, QueryTemperature(0.5, 10))
        qkv_TW = torch.randn(len(positions), heads.width, generator=generator)
        dout_TW = torch.randn(len(positions), heads.heads * heads.size, generator=generator)
        leaf = qkv_TW.clone().requires_grad_()
        out = view.attend(0, leaf * 1.0, heads, tables)
        (grad,) = torch.autograd.grad(out, leaf, dout_TW)

        exact = qkv_TW.double().requires_grad_()
        wanted = dense_attend(exact, view, heads, tables)
        (wanted_grad,) = torch.autograd.grad(wanted, exact, dout_TW.double())
        torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(grad.double(), wanted_grad, atol=2e-5, rtol=0)


def dense_attend(qkv_TW: Tensor, view: PackView, heads: Heads, tables: tuple[Tensor, Tensor]) -> Tensor:
    """What `PackView.attend` gives, segment by segment under a mask written out."""
    query, key = turn_reference(qkv_TW, view.positions_T, heads, tables)
    value = heads.cut(qkv_TW)[2]
    outs = []
    paths = view.paths
    for s, first in enumerate(paths.first_position_S.tolist()):
        begin, end = paths.row_start_S[s : s + 2].tolist()
        path = paths.table_SP[s, : first + end - begin].long()
        mask = torch.tensor([[seen(heads.reach, first + i, k) for k in range(len(path))] for i in range(end - begin)])
        k, v = (x[path].repeat_interleave(heads.heads // heads.kv_heads, 1).transpose(0, 1) for x in (key, value))
        scores = query[begin:end].transpose(0, 1) @ k.transpose(1, 2) / math.sqrt(heads.size)
        outs.append((scores.masked_fill(~mask, -math.inf).softmax(-1) @ v).transpose(0, 1).flatten(1))
    return torch.cat(outs)


def test_temperature_by_hand():
    """The temperature's steps begin a position early or late, or its table is rounded twice."""
    table_P = query_factors(QueryTemperature(0.1, 8192), 20_000)
    assert table_P.dtype == torch.float32 and table_P.shape == (20_000,)
    assert table_P[:8191].eq(1).all()
    for start, end, steps in ((8191, 16383, 1), (16383, 20_000, 2)):
        assert table_P[start:end].eq(torch.tensor(1 + 0.1 * math.log(1 + steps))).all()


SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MIXED = {"use_sliding_window": True, "sliding_window": WINDOW}
LLAMA4 = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "intermediate_size_mlp": 40,
    "moe_layers": [],
    "attention_chunk_size": CHUNK,
}
TYPES = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
PEERS: dict[str, Callable[[], Any]] = {
    "mistral": lambda: transformers.MistralConfig(**SMALL, num_hidden_layers=2, sliding_window=WINDOW),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, num_hidden_layers=4, max_window_layers=2, **MIXED),
    "qwen3": lambda: transformers.Qwen3Config(
        **SMALL, num_hidden_layers=4, head_dim=16, layer_types=TYPES, max_window_layers=0, **MIXED
    ),
    "smollm3": lambda: transformers.SmolLM3Config(
        **SMALL, num_hidden_layers=4, no_rope_layer_interval=3, pad_token_id=None, **MIXED
    ),
    "llama4": lambda: transformers.Llama4TextConfig(**SMALL, **LLAMA4, attn_scale=0.5, floor_scale=10),
    "llama4-plain": lambda: transformers.Llama4TextConfig(
        **SMALL, **LLAMA4, use_qk_norm=False, attn_temperature_tuning=False, no_rope_layers=[0, 1, 1, 0]
    ),
}
COMPARED = (
    "vocab_size hidden_size intermediate_size_mlp num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings hidden_act attention_bias model_type "
    "architectures sliding_window use_sliding_window layer_types attention_chunk_size no_rope_layers moe_layers "
    "attn_temperature_tuning attn_scale floor_scale use_qk_norm bos_token_id eos_token_id pad_token_id"
).split()


def make_peer(config: Any) -> Any:
    """Random weights under which attention decides what comes next."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else noise * (1.5 / parameter.shape[-1] ** 0.5))
    return model


@pytest.mark.parametrize("name", PEERS)
def test_transformers_continues_alike(make_decoder, parity, name: str, tmp_path: Path):
    """The engine's tokens leave Transformers' path where a prompt ends at a window or chunk, or goes on across it."""
    model = make_peer(PEERS[name]())
    model.save_pretrained(tmp_path)
    source = open_checkpoint(str(tmp_path))
    decoder = Decoder(source.spec, "float32").load(source.tensors())
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(VOCAB, (length,), generator=generator) for length in EDGES]
    sampling = Sampling(temperature=0.0, max_new_tokens=20)
    asked = [Request(str(i), str(i), tuple(prompt.tolist()), sampling, seed=i) for i, prompt in enumerate(prompts)]
    done = parity.engine(decoder, 200, batch_tokens=24).generate(asked)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    for prompt, completion in zip(prompts, done, strict=True):
        with torch.no_grad():
            out = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **options)[0]
            wanted = model(out[None]).logits[0]
        assert list(completion.tokens) == out[len(prompt) :].tolist() and len(set(completion.tokens)) > 3
        logits = decoder.logits(parity.alone(decoder, out.tolist()))
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", PEERS)
def test_transformers_reads_the_config_alike(name: str):
    """A saved config.json says another layout to Transformers than the one read."""
    config = PEERS[name]()
    config.architectures = [type(config).__name__.removesuffix("Config").removesuffix("Text") + "ForCausalLM"]
    spec = from_hf_config(json.loads(config.to_json_string(use_diff=False)))
    assert spec == from_hf_config(json.loads(config.to_json_string(use_diff=True)))
    back = transformers.AutoConfig.for_model(**to_hf_config(spec, "float32"))
    for field in COMPARED:
        assert getattr(back, field, None) == getattr(config, field, None), field
    assert from_hf_config(back.to_dict()) == spec


def test_llama4_with_images(tmp_path: Path):
    """The text model of a checkpoint that has images too is refused, or read from the wrong tensors."""
    model = make_peer(PEERS["llama4"]())
    vision = transformers.Llama4VisionConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        vision_output_dim=16,
        image_size=28,
        patch_size=14,
        projector_input_dim=16,
        projector_output_dim=16,
    )
    both = transformers.Llama4Config(text_config=model.config.to_dict(), vision_config=vision.to_dict())
    whole = transformers.Llama4ForConditionalGeneration(both)
    whole.language_model.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path / "text")
    whole.save_pretrained(tmp_path / "both")
    text, found = (open_checkpoint(str(tmp_path / kind)) for kind in ("text", "both"))
    assert found.spec == text.spec
    wanted = dict(text.tensors())
    for name, tensor in found.tensors():
        assert torch.equal(tensor, wanted.pop(name)), name
    assert not wanted
