"""Regression caught: log-probs of the likeliest tokens, or of a prompt, are of other tokens or another model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from tandem.models.view import PackView
from tests.serving import Server, serving

ASK: list[Any] = [{"role": "user", "content": "What is 1 + 2?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("served")
    write_model(path, scale=10.0)
    with serving(path) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def own(server: Server, tokens: list[int]) -> torch.Tensor:
    """log softmax [T, V] of a context run in one pass, without the engine."""
    decoder = server.parts.engine.runner.decoder  # type: ignore[attr-defined]
    with torch.inference_mode():
        hidden = decoder.forward(torch.tensor(tokens), PackView([0, len(tokens)]))
        return torch.log_softmax(decoder.logits(hidden).float(), -1)


def test_the_likeliest_tokens_of_a_chat(server: Server, client: openai.OpenAI) -> None:
    """Other tokens, another order, or none where the answer streams."""
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "seed": 4, "max_tokens": 10, "logprobs": True}
    plain = client.chat.completions.create(**asked, extra_body={"return_token_ids": True})
    got = client.chat.completions.create(**asked, top_logprobs=3).choices[0]
    ids, prompt = plain.choices[0].model_extra["token_ids"], plain.model_extra["prompt_token_ids"]  # type: ignore[index]
    assert got.message.content == plain.choices[0].message.content, "what is told changes what is drawn"
    rows = got.logprobs.content  # type: ignore[union-attr]
    best_TV = own(server, [*prompt, *ids])[len(prompt) - 1 :]
    assert rows is not None and len(rows) > 5
    for place, row in enumerate(rows):
        best = best_TV[place].topk(3)
        spelt = [server.words.token_bytes(token) for token in best.indices.tolist()]
        assert [bytes(one.bytes or ()) for one in row.top_logprobs] == spelt
        assert [one.logprob for one in row.top_logprobs] == pytest.approx(best.values.tolist(), abs=2e-2)
        assert row.logprob == next((one.logprob for one in row.top_logprobs if one.bytes == row.bytes), row.logprob)
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(**asked, top_logprobs=3, stream=True):
        for choice in chunk.choices:
            streamed += (choice.logprobs.content or []) if choice.logprobs else []
    assert [one.model_dump() for one in streamed] == [one.model_dump() for one in rows]
    include: list[Any] = ["message.output_text.logprobs"]
    one = client.responses.create(
        model="tiny", input=ASK, max_output_tokens=10, include=include, top_logprobs=3, extra_body={"seed": 4}
    )
    told = [row.model_dump() for row in one.output[0].content[0].logprobs]  # type: ignore[union-attr,index]
    assert told == [row.model_dump() for row in rows]


def test_a_prompts_log_probs_as_evaluators_read_them(server: Server, client: openai.OpenAI) -> None:
    """lm-eval and its like sum them from the end of the context on: one too few or too many is another score."""
    tokens = server.words.tokenizer
    context, rest = tokens.encode("What is 1 + 2? ", True), tokens.encode("It is 3.")
    prompts = [[*context, *rest], [*context, *rest[:3]]]
    asked: dict[str, Any] = {"model": "tiny", "temperature": 0, "seed": 1, "logprobs": 1, "echo": True}
    for most in (1, 0):
        got = client.completions.create(prompt=prompts, max_tokens=most, **asked)
        assert got.usage is not None and got.usage.completion_tokens == 2 * most
        for prompt, choice in zip(prompts, got.choices, strict=True):
            told, own_TV = choice.logprobs, own(server, prompt)
            assert told is not None and told.token_logprobs and told.top_logprobs and told.tokens and told.text_offset
            assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(prompt) + most
            assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
            end = len(prompt)
            summed = sum(told.token_logprobs[len(context) : end])
            wanted = [own_TV[place - 1, prompt[place]].item() for place in range(len(context), end)]
            assert summed == pytest.approx(sum(wanted), abs=5e-2)
            greedy = [max(told.top_logprobs[place], key=told.top_logprobs[place].get) for place in range(1, end)]  # type: ignore[arg-type]
            assert greedy == [server.words.spelt(int(own_TV[place - 1].argmax())) for place in range(1, end)]
            assert "".join(told.tokens[:end]) == tokens.decode(prompt) and choice.text.startswith(tokens.decode(prompt))
            assert told.text_offset[:end] == [len(tokens.decode(prompt[:place])) for place in range(end)]


def test_what_evaluators_ask_for_streams_or_not(server: Server, client: openai.OpenAI) -> None:
    """Places of a stream's tokens are counted by the text that is not held back, or nothing is drawn twice."""
    asked: dict[str, Any] = {"model": "tiny", "prompt": "ab", "seed": 3, "max_tokens": 12, "logprobs": 2}
    whole = client.completions.create(**asked, stop=["zzz", "a stop that never comes"]).choices[0].logprobs
    assert whole is not None and whole.top_logprobs and {len(row) for row in whole.top_logprobs} <= {2, 3}
    parts = [
        c.logprobs for chunk in client.completions.create(**asked, stop=["zzz"], stream=True) for c in chunk.choices
    ]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for part in parts if part for one in getattr(part, name) or ()] == getattr(whole, name), name
    for wrong, param in (
        ({"echo": True, "stream": True}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
    ):
        refused = httpx.post(f"{server.url}/v1/completions", json={**asked, **wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    nothing = {**asked, "max_tokens": 0, "echo": True, "logprobs": None}
    assert client.completions.create(**nothing).choices[0].text == "ab"
    texts = [c.text for chunk in client.completions.create(**nothing, stream=True) for c in chunk.choices]
    assert "".join(texts) == "ab"


def test_ignored_ends_have_log_probs(server: Server, client: openai.OpenAI) -> None:
    """A stop token that is ignored is in the text, and its log-prob is left out: the two don't match."""
    end = server.words.renderer.stop_token_ids[0]
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "seed": 1, "max_tokens": 40, "logprobs": True}
    extra = {"ignore_eos": True, "return_token_ids": True, "temperature": 100}
    for seed in range(40):
        choice = client.chat.completions.create(**{**asked, "seed": seed}, extra_body=extra).choices[0]
        ids = choice.model_extra["token_ids"]  # type: ignore[index]
        assert choice.logprobs is not None and len(choice.logprobs.content or ()) == len(ids)
        if end in ids:
            return
    raise AssertionError("no answer drew an end")
