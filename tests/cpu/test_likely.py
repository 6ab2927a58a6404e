"""Log-probs that are told beside those of what is drawn: of the likeliest tokens, and of a prompt's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.kernels.sample import SamplingBatch, likeliest, sample
from tandem.models.decoder import Decoder
from tandem.models.view import PackView
from tandem.types import Completion, Request, Sampling, likely_tokens
from tests.drafting import at_most

MakeDecoder = Callable[..., Decoder]
KINDS = {
    "plain": Sampling(),
    "warm": Sampling(temperature=0.7),
    "greedy": Sampling(temperature=0.0),
    "one": Sampling(temperature=0.7, top_k=1),
    "few": Sampling(top_k=3),
    "nucleus": Sampling(temperature=1.3, top_p=0.6, min_p=0.02),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_are_those_of_a_sorted_softmax(kind: str) -> None:
    """Of another distribution than tokens are drawn from, in another order, or with what a filter dropped."""
    sampling = KINDS[kind]
    logits = torch.round(4 * torch.randn(6, 40, generator=torch.Generator().manual_seed(3)))  # many ties
    batch = SamplingBatch.stack([sampling] * 6, range(6), [9] * 6, likely=[0, 1, 2, 5, 40, 1000])
    tokens, logprobs = sample(logits, batch)
    for row, told in enumerate(map(likely_tokens, likeliest(logits, batch))):
        x = logits[row].double() / (sampling.temperature or 1.0)
        order = sorted(range(40), key=lambda token: (-x[token].item(), token))
        if sampling.top_k > 1:
            order = order[: sampling.top_k]
        mass = [math.exp(x[token] - x.max()) for token in order]
        if sampling.top_p < 1:
            total = np.cumsum(mass)
            order = order[: int(np.argmax(total >= 0.6 * total[-1])) + 1]
            order = [token for token in order if x[token] - x.max() >= math.log(0.02)]
        norm = math.log(sum(math.exp(x[token]) for token in order))
        wanted = [(token, (x[token] - norm).item()) for token in order][: int(batch.likely_S[row])]
        assert [token for token, _ in told] == [token for token, _ in wanted]
        assert [value for _, value in told] == pytest.approx([value for _, value in wanted], abs=2e-6)
        if kind not in ("greedy", "one") and int(tokens[row]) in dict(told):
            assert dict(told)[int(tokens[row])] == logprobs[row], "to the last bit"


def engine_of(decoder: Decoder, **settings: Any) -> Engine:
    config = EngineConfig(**{"page_tokens": 4, "batch_tokens": 64, "max_sequences": 16, **settings})
    return Engine(DecoderRunner(decoder, 64, config.page_tokens, config), config, 64, decoder.spec.max_position)


def requests(decoder: Decoder, **more: Any) -> list[Request]:
    """Of all kinds, two of each prompt; of lengths that end in a page and at its end."""
    made = []
    for number, (kind, sampling) in enumerate(KINDS.items()):
        prompt = tuple((7 * place + number // 2) % decoder.spec.vocab_size for place in range(11 + number // 2))
        asked = replace(sampling, max_new_tokens=6)
        made += [Request(f"{kind}/{copy}", kind, prompt, asked, seed=5 * number + copy, **more) for copy in range(2)]
    return made


def own(decoder: Decoder, tokens: tuple[int, ...]) -> torch.Tensor:
    """log softmax [T, V] of a context run alone, in one pass and without pages."""
    with torch.inference_mode():
        hidden = decoder.forward(torch.tensor(tokens), PackView([0, len(tokens)]))
        return torch.log_softmax(decoder.logits(hidden).float(), -1)


@pytest.mark.parametrize("settings", [{}, {"batch_tokens": 16}, {"draft": at_most(3)}, {"order": "shares"}])
def test_what_is_told_changes_no_bit_of_what_is_drawn(make_decoder: MakeDecoder, settings: dict[str, Any]) -> None:
    """Another token or log-prob is drawn where more is told, or it is told of another place."""
    decoder = make_decoder("float32")
    plain = engine_of(decoder, **settings).generate(requests(decoder))
    some = [replace(one, likely=4) if place % 3 else one for place, one in enumerate(requests(decoder))]
    told = engine_of(decoder, **settings).generate(some)
    scored = engine_of(decoder, **settings).generate(requests(decoder, likely=2, scored=True))
    for request, one, other, whole in zip(some, plain, told, scored, strict=True):
        assert one.tokens == other.tokens == whole.tokens
        assert one.logprobs == other.logprobs == whole.logprobs
        assert one.prompt is None and ("likely" in other.columns) == bool(request.likely)
        _check(request, other, whole, own(decoder, (*request.tokens, *one.tokens)))


def _check(request: Request, told: Completion, scored: Completion, own_TV: torch.Tensor) -> None:
    length, sampling = len(request.tokens), request.sampling
    if request.likely:
        for place, likely in enumerate(told.columns["likely"].tolist()):
            rows = likely_tokens(likely)
            if not sampling.top_p < 1 and sampling.top_k <= 1 and (sampling.temperature or 1.0) == 1.0:
                best = own_TV[length - 1 + place].topk(4)
                assert [token for token, _ in rows] == best.indices.tolist()
                assert [value for _, value in rows] == pytest.approx(best.values.tolist(), abs=1e-5)
            drawn = int(told.columns["tokens"][place])
            if drawn in dict(rows) and not (sampling.greedy or sampling.top_k == 1):
                assert dict(rows)[drawn] == told.logprobs[place]
    prompt = scored.prompt
    assert prompt is not None and tuple(prompt["tokens"].tolist()) == request.tokens
    first, *others = prompt["logprobs"].tolist()
    wanted = [own_TV[place - 1, request.tokens[place]].item() for place in range(1, length)]
    assert math.isnan(first) and others == pytest.approx(wanted, abs=1e-5)
    for place in range(1, length):
        rows = likely_tokens(prompt["likely"][place])
        assert [token for token, _ in rows] == own_TV[place - 1].topk(2).indices.tolist()
    assert scored.cached_tokens == 0


def test_a_scored_prompt_survives_preemption_and_new_weights(make_decoder: MakeDecoder) -> None:
    """Log-probs of a part of the prompt are lost where it is run again, or are of another request's."""
    decoder = make_decoder("float32")
    asked = requests(decoder, scored=True)
    wanted = {one.request_id: one for one in engine_of(decoder).generate(asked)}
    engine = engine_of(decoder, batch_tokens=16)
    for request in asked:
        engine.submit(request)
    done: list[Completion] = []
    for step in range(1000):
        if not engine.has_work:
            break
        if step in (1, 3, 6):
            engine.retract()
        done += engine.step()
    assert len(done) == len(asked) and engine.stats.preemptions > 0
    for one in done:
        assert one.prompt == wanted[one.request_id].prompt and one.tokens == wanted[one.request_id].tokens
