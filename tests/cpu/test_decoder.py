"""The decoder against Transformers: logits at every position, greedy continuations, every gradient, export."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.kernels.logprob import token_logprobs
from tandem.models.checkpoint import open_checkpoint, save_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.families import FAMILIES
from tandem.models.tokenizer import Tokenizer
from tandem.models.view import PackView
from tandem.numerics.compare import same_bits
from tandem.types import Message, Request, Sampling

SMALL = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {  # wavelengths 6 to 353: kept, interpolated and divided ones
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
MIXED = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
LLAMA4 = {  # the layer in the middle without rotation and over all positions, its queries hotter by 10 positions
    "intermediate_size_mlp": 72,
    "moe_layers": [],
    "no_rope_layer_interval": 2,
    "attention_chunk_size": 16,
    "attn_scale": 0.5,
    "floor_scale": 10,
    "rope_parameters": LLAMA3,
}
# Llama and Mistral: head_dim apart from hidden_size / heads.
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, rms_norm_eps=1e-5, tie_word_embeddings=True),
    "llama-untied": lambda: transformers.LlamaConfig(**SMALL, head_dim=16, tie_word_embeddings=False),
    "llama-llama3": lambda: transformers.LlamaConfig(**SMALL, head_dim=16, rope_parameters=LLAMA3),
    "llama-yarn": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=YARN),
    "llama-linear": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=LINEAR),
    "mistral": lambda: transformers.MistralConfig(**SMALL, head_dim=8, sliding_window=None),
    "mistral-window": lambda: transformers.MistralConfig(**SMALL, sliding_window=7),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2-yarn": lambda: transformers.Qwen2Config(**SMALL, rope_parameters=YARN),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=32),
    "qwen3-mixed": lambda: transformers.Qwen3Config(**SMALL, head_dim=16, **MIXED),
    "smollm3": lambda: transformers.SmolLM3Config(**SMALL, no_rope_layers=[1, 0, 0, 1], pad_token_id=0),
    "llama4": lambda: transformers.Llama4TextConfig(**SMALL, head_dim=16, **LLAMA4),
}
PROMPTS = (
    "What is 17 + 25? Answer with just the number.",
    "Write a haiku about the sea in winter.",
    "Explain to a child why the sky is blue.",
    "Translate into French: The cat sleeps on the warm roof.",
    "def fibonacci(n):\n    # return the n-th number\n",
    "List three differences between TCP and UDP.",
    "Who wrote 'Pride and Prejudice', and when was it published?",
    "If all bloops are razzies and all razzies are lazzies, are all bloops lazzies?",
    "Give me a recipe for pancakes with four ingredients.",
    "Summarise: The committee met on Tuesday, argued for three hours and decided nothing.",
    "2, 4, 8, 16, ... what comes next?",
    "SELECT name, COUNT(*) FROM orders GROUP BY",
    "Why do leaves change colour in autumn?",
    "Natalia sold clips to 48 of her friends in April, and half as many in May. How many did she sell altogether?",
    "The chemical symbol of gold is",
    "Write an e-mail that declines an invitation politely.",
    "¿Cuál es la capital de Perú? Répondez en français.",
    "Name the planets, from the Sun outwards.",
    "ROMEO: But, soft! what light through yonder window breaks?",
    "Fix the grammar: him and me goes to school yesterday.",
)
Pair = tuple[Any, Decoder]


def peer(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        ).eval()


def random_peer(name: str) -> Any:
    """Weights drawn so that no projection, bias or norm can be left out unseen."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if "norm" in key:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise * (0.3 if parameter.dim() == 1 else 1.5 / parameter.shape[1] ** 0.5))
    return model


def load(folder: Path, dtype: str = "float32") -> Decoder:
    source = open_checkpoint(str(folder))
    return Decoder(source.spec, dtype).load(source.tensors())


@pytest.fixture(params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    """A random small model of Transformers and ours, read from its folder."""
    model = random_peer(request.param)
    model.save_pretrained(tmp_path / "model")
    return model, load(tmp_path / "model")


def pack_of(contexts: list[list[int]]) -> tuple[Tensor, PackView]:
    ends = list(itertools.accumulate(map(len, contexts), initial=0))
    return torch.tensor([token for context in contexts for token in context]), PackView(ends)


def logits_of(decoder: Decoder, contexts: list[list[int]]) -> list[Tensor]:
    """Of each context at each position, all in one pack."""
    tokens, view = pack_of(contexts)
    with torch.no_grad():
        return list(decoder.logits(decoder.forward(tokens, view)).split([len(context) for context in contexts]))


def peer_logits(model: Any, context: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([context])).logits[0].float()


def random_contexts(vocab: int, lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


def test_small_models(any_path, pair: Pair):
    """A bias, a q/k norm, a head's size, the window or a stretching of the rotation is left out or off by one."""
    model, decoder = pair
    contexts = random_contexts(101, (1, 40, 7, 130))
    for context, logits in zip(contexts, logits_of(decoder, contexts), strict=True):
        wanted = peer_logits(model, context)
        assert float(wanted.std()) > 0.5
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


def test_export(pair: Pair, tmp_path: Path):
    """A saved model gives Transformers other logits than the one it was read from."""
    model, decoder = pair
    save_checkpoint(tmp_path / "out", decoder.spec, dict(decoder.export()), None, "float32")
    again = peer(tmp_path / "out")
    (context,) = random_contexts(101, (60,))
    assert same_bits(peer_logits(again, context), peer_logits(model, context))


def named_gradients(decoder: Decoder) -> dict[str, Tensor]:
    """Gradients by Hugging Face's names: the decoder's own translation, with gradients in place of the values."""
    weights = [weight for _, weight in decoder.weights()]
    values = [weight.value for weight in weights]
    for weight in weights:
        assert weight.grad is not None
        weight.value = weight.grad
    named = {name: tensor.clone() for name, tensor in decoder.export()}
    renaming = FAMILIES[decoder.spec.architecture].renaming
    if renaming is not None:
        named = {renaming.write_name(name): renaming.write(decoder.spec, name, g) for name, g in named.items()}
    for weight, value in zip(weights, values, strict=True):
        weight.value = value
        weight.grad = None
    return named


def our_gradients(
    decoder: Decoder, contexts: list[list[int]], weights: Tensor, checkpointing: bool
) -> dict[str, Tensor]:
    """Of sum over predictions of weight x log-prob."""
    for _, weight in decoder.weights():
        weight.grad = torch.zeros(weight.value.shape)
    tokens, view = pack_of(contexts)
    ends = torch.tensor(list(itertools.accumulate(map(len, contexts))))
    rows = torch.tensor([row for row in range(len(tokens)) if row + 1 not in ends])
    hidden = decoder.forward(tokens, view, rows, checkpointing=checkpointing)
    logprobs, _ = token_logprobs(hidden, decoder.head, tokens[rows + 1], 1.0)
    (logprobs * weights).sum().backward()
    return named_gradients(decoder)


def test_gradients(any_path, pair: Pair):
    """A weight's gradient misses a path through the model, or another layer's is added to it.

    Transformers runs in fp64 here; ours is fp32 through three layers: sums of at most 180 rows or 101 tokens and values
    near 1, so an error of a few hundred times 2^-24 = 6e-8 of the largest gradient.
    """
    model, decoder = pair
    contexts = random_contexts(101, (70, 11, 99))
    weights = torch.randn(sum(map(len, contexts)) - len(contexts), generator=torch.Generator().manual_seed(2))
    grads = our_gradients(decoder, contexts, weights, checkpointing=False)
    again = our_gradients(decoder, contexts, weights, checkpointing=True)

    model = model.double()
    wanted, start = torch.zeros((), dtype=torch.float64), 0
    for context in contexts:
        tokens = torch.tensor(context)
        logprobs = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        wanted = wanted + (logprobs * weights[start : start + len(logprobs)]).sum()
        start += len(logprobs)
    wanted.backward()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == grads.keys()
    for name, parameter in parameters.items():
        top = float(parameter.grad.abs().max())
        # The keys' bias shifts all scores of a query alike: its exact gradient is that of rotation alone, and small.
        torch.testing.assert_close(grads[name].double(), parameter.grad, atol=5e-5 * top, rtol=0, msg=name)
        if any_path != "reference":  # PyTorch's products may differ between two calls of other sizes
            assert same_bits(grads[name], again[name]), name
        torch.testing.assert_close(again[name], grads[name], atol=1e-6 * top, rtol=0, msg=name)


@pytest.mark.parametrize(("dtype", "unit"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_narrow_dtypes(make_decoder: Callable[..., Decoder], dtype: str, unit: float):
    """bf16 or fp16 fails, or computes something else than fp32, beyond its rounding, forward or backward.

    Weights and some ten results a layer are rounded, each by half a `unit` in the root mean square; over two layers
    and a head the errors add in squares to sqrt(25) / 2 = 2.5 units of the logits' size, and three times that is
    allowed. Gradients go back through the same roundings, amplified by probabilities that are off: 30 units.
    """
    full, narrow = make_decoder(), make_decoder(dtype)
    contexts = random_contexts(97, (60, 30))
    for wide, rounded in zip(logits_of(full, contexts), logits_of(narrow, contexts), strict=True):
        assert rounded.dtype == torch.float32
        assert float((wide - rounded).std() / wide.std()) < 7.5 * unit
    wanted, grads = (our_gradients(decoder, contexts, torch.ones(88), False) for decoder in (full, narrow))
    for name, grad in grads.items():
        assert float((grad - wanted[name]).norm() / wanted[name].norm()) < 30 * unit, name


@pytest.fixture(scope="module")
def smollm2(smollm2_folder: Path) -> tuple[Any, Decoder, Tokenizer]:
    source = open_checkpoint(str(smollm2_folder))
    return peer(smollm2_folder), load(smollm2_folder), source.load_tokenizer()


def test_smollm2_logits(smollm2):
    """The real model's logits drift from Transformers' at some position of a real prompt."""
    model, decoder, tokenizer = smollm2
    assert len(PROMPTS) == 20
    contexts = [
        tokenizer.render_messages((Message("user", text),), add_generation_prompt=True) for text in PROMPTS[:10]
    ]
    contexts += [tokenizer.encode(text) for text in PROMPTS[10:]]
    for context, logits in zip(contexts, logits_of(decoder, contexts), strict=True):
        torch.testing.assert_close(logits, peer_logits(model, context), atol=1e-3, rtol=0)


def test_smollm2_greedy_continuations(smollm2):
    """64 greedy tokens of the engine, over pages and in company, leave Transformers' path."""
    model, decoder, tokenizer = smollm2
    picked = [PROMPTS[1], PROMPTS[2]]
    contexts = [tokenizer.render_messages((Message("user", text),), add_generation_prompt=True) for text in picked]
    config = EngineConfig(batch_tokens=32, max_sequences=4)
    engine = Engine(DecoderRunner(decoder, 40, config.page_tokens), config, 40)
    sampling = Sampling(temperature=0.0, max_new_tokens=64)
    asked = [Request(str(i), str(i), tuple(context), sampling, seed=i) for i, context in enumerate(contexts)]
    for context, completion in zip(contexts, engine.generate(asked), strict=True):
        tokens = torch.tensor([context])
        options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 2}
        with torch.no_grad():
            wanted = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        assert list(completion.tokens) == wanted[0, len(context) :].tolist()
        assert len(completion.tokens) == 64


def test_smollm2_in_bf16(smollm2, smollm2_folder: Path):
    """The dtype of the demo: bf16 moves the real model's choices, not just its last digits."""
    _, full, tokenizer = smollm2
    contexts = [tokenizer.encode(text) for text in PROMPTS[:8]]
    narrow = load(smollm2_folder, "bfloat16")
    wide, rounded = (torch.cat(logits_of(decoder, contexts)) for decoder in (full, narrow))
    assert float((wide.argmax(-1) == rounded.argmax(-1)).float().mean()) > 0.9
    divergence = (wide.softmax(-1) * (wide.log_softmax(-1) - rounded.log_softmax(-1))).sum(-1)
    assert float(divergence.mean()) < 0.01
