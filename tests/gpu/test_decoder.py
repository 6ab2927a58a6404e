"""A whole decoder on Triton's kernels: the learner's log-probs are the engine's bits, and its gradients are right."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tandem.algo.config import AlgoConfig
from tandem.algo.objective import PolicyGradient
from tandem.algo.pack import count_prompts, pack
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.errors import ConfigError
from tandem.kernels import choice
from tandem.models.config import ModelConfig
from tandem.models.decoder import Decoder
from tandem.models.spec import LayerAttention, QueryTemperature
from tandem.train.config import LearnerConfig
from tandem.train.step import Learner, score
from tandem.types import Reach, Request, Sample, Sampling
from tests.samples import sample_of

VOCABULARY = 67
TEMPERATURE = 0.8
EVERYTHING = {
    "attention": (LayerAttention(Reach(window=9)), LayerAttention(Reach(chunk=12), rotary=False)),
    "query_temperature": QueryTemperature(0.5, 5),
    "rotated_norm": True,
    "qk_norm": True,
    "attention_bias": True,
    "tied_embeddings": False,
}


def engine_of(decoder: Decoder, num_pages: int = 64, **settings: Any) -> Engine:
    config = EngineConfig(
        **{"page_tokens": 4, "batch_tokens": 128, "max_sequences": 16, "lookahead_tokens": 4, **settings}
    )
    return Engine(DecoderRunner(decoder, num_pages, config.page_tokens), config, num_pages, decoder.spec.max_position)


def asked() -> list[Request]:
    """Two prompts, one that grows beyond a block of 64 keys, two siblings each."""
    requests = []
    for prompt, length in enumerate((5, 62)):
        tokens = tuple((11 * prompt + 5 * i * i) % VOCABULARY for i in range(length))
        for sibling in range(2):
            how = Sampling(temperature=TEMPERATURE, max_new_tokens=7)
            requests.append(Request(f"p{prompt}/{sibling}", f"p{prompt}", tokens, how, seed=100 * prompt + sibling))
    return requests


@functools.cache
def rollouts(make_decoder: Callable[..., Decoder], dtype: str, **changes: Any) -> list[Sample]:
    """In company: prompts in chunks of 24 rows, shared prefixes, and too few pages where every layer sees all."""
    engine = engine_of(make_decoder(dtype, **changes), 22, batch_tokens=24, max_sequences=6, lookahead_tokens=0)
    completions = engine.generate(asked())
    engine.check_integrity()
    assert engine.stats.cached_tokens and (engine.stats.preemptions or "attention" in changes)
    return [
        sample_of(request, completion, (1.0 if request.seed % 2 else -0.5,) * len(completion.tokens))
        for request, completion in zip(asked(), completions, strict=True)
    ]


def hexes(values: Any) -> list[str]:
    return [float(value).hex() for value in values]


@pytest.mark.parametrize(("dtype", "changes"), [("bfloat16", {}), ("float32", {}), ("float32", EVERYTHING)])
def test_the_learner_scores_with_the_engines_bits(make_decoder, dtype, changes):
    """The policy that is trained is not the one that sampled: chunks, hits, preemption or the pack change some bit."""
    samples = rollouts(make_decoder, dtype, **changes)
    for budget, share_prefix in ((90, True), (2000, False)):
        for microbatch in pack(samples, count_prompts(samples), budget, share_prefix):
            scored = score(make_decoder(dtype, **changes), microbatch, TEMPERATURE)
            assert hexes(scored) == hexes(microbatch.predictions["logprobs"])


def test_a_request_generates_what_it_does_alone(make_decoder):
    """A neighbour, the chunk or the page size changes a request's tokens or the bits of its log-probs."""
    together, request = rollouts(make_decoder, "bfloat16")[3], asked()[3]
    alone = engine_of(make_decoder("bfloat16"), page_tokens=16).generate([request])[0]
    drawn = together.columns.slice(len(request.tokens))
    assert drawn["tokens"].tolist() == list(alone.tokens) and hexes(drawn["logprobs"]) == hexes(alone.logprobs)


def gradients(decoder: Decoder, samples: list[Sample]) -> tuple[float, dict[str, torch.Tensor], list[torch.Tensor]]:
    """Loss, gradients and updated master weights of one step on the first microbatch."""
    learner = Learner(decoder, LearnerConfig(lr=1e-2), PolicyGradient(AlgoConfig(), TEMPERATURE), total_updates=1)
    microbatch = pack(samples, count_prompts(samples), 2000, True)[0]
    loss = float(learner.backward(microbatch).loss.detach())
    found = {name: weight.grad.double().cpu() for name, weight in decoder.weights() if weight.grad is not None}
    norm = learner.optimiser.grad_norm()
    assert norm == pytest.approx(sum(float(grad.square().sum()) for grad in found.values()) ** 0.5, rel=1e-6)
    learner.optimiser.step(1e-2, norm)
    return loss, found, [master.double().cpu() for master, _, _ in learner.optimiser.state.values()]


@pytest.mark.parametrize("changes", [{}, EVERYTHING])
def test_a_step_is_the_cpus(make_decoder, monkeypatch, changes):
    """A backward pass misses a term, a head, a shared row or a weight; or AdamW differs on the device."""
    samples = rollouts(make_decoder, "float32", **changes)
    loss, found, updated = gradients(make_decoder(**changes), samples)
    monkeypatch.setattr(choice, "_asked", lambda: "")
    cpu_loss, expected, cpu_updated = gradients(make_decoder(device="cpu", **changes), samples)
    assert loss == pytest.approx(cpu_loss, rel=1e-4)
    assert found.keys() == expected.keys() and any(bool(grad.any()) for grad in expected.values())
    for name, grad in found.items():
        # fp32 on both sides: some 1e3 roundings a sum, of terms a few times larger than the largest result.
        assert (grad - expected[name]).abs().max() <= 1e-3 * expected[name].abs().max(), name
    # Adam's first step is lr times the gradient's sign, so one that is 0 up to rounding may go either way; few do.
    different = sum(int(((new - old).abs() > 1e-4).sum()) for new, old in zip(updated, cpu_updated, strict=True))
    assert different <= 0.02 * sum(new.numel() for new in updated)


def test_a_device_that_is_not_there(make_decoder):
    """A run asks for a GPU where there is none and fails late, or with a traceback."""
    with pytest.raises(ConfigError, match="gpu"):
        ModelConfig("somewhere", device="gpu")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            make_decoder(device="cuda")
