"""Regression caught: OpenAI's own client gets another answer from the server than the engine gives, or none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import tandem
from tandem.engine.config import EngineConfig
from tandem.types import Message
from tests.serving import Server, script, serving

ASK: list[Any] = [{"role": "user", "content": "What is 1 + 2?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Path:
    path = tmp_path_factory.mktemp("served")
    write_model(path, scale=10.0)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(folder: Path) -> tandem.Model:
    return tandem.load(folder, EngineConfig(kv_memory_bytes=1 << 22))


def streamed(chunks: Any) -> list[str]:
    """The text of each choice of a chat that streams."""
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return [texts[place] for place in sorted(texts)]


def test_seeded_text_is_the_engines_own(client: openai.OpenAI, model: tandem.Model) -> None:
    """A seed, a filter or a sibling's number that is lost on the way: other text than tandem.generate's."""
    drawing: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9}
    wanted = model.generate(["What is 1 + 2?"], samples=3, seed=11, max_new_tokens=20, **drawing)
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "n": 3, "seed": 11, "max_tokens": 20, **drawing}
    got = client.chat.completions.create(**asked)
    texts = [one.text for one in wanted]
    assert [choice.message.content for choice in got.choices] == texts
    assert streamed(client.chat.completions.create(**asked, stream=True)) == texts
    assert len(set(texts)) == 3, "the model says the same whatever is drawn"


def test_greedy_logprobs_are_the_models(client: openai.OpenAI, model: tandem.Model) -> None:
    """At temperature 0 each token's log-prob would be 0: that of the choice, not of the model."""
    wanted = model.generate(["What is 1 + 2?"], max_new_tokens=12)[0]
    got = client.chat.completions.create(
        model="tiny", messages=ASK, temperature=0, max_tokens=12, logprobs=True, extra_body={"return_token_ids": True}
    ).choices[0]
    assert got.logprobs is not None and got.logprobs.content is not None and got.model_extra is not None
    assert got.message.content == wanted.text
    assert [one.logprob for one in got.logprobs.content] == list(wanted.logprobs[: len(got.logprobs.content)])
    assert got.model_extra["token_ids"] == list(wanted.completion.tokens)
    assert got.model_extra["weight_versions"] == [{"version": "0", "start": 0, "end": len(wanted.completion.tokens)}]
    joined = b"".join(bytes(one.bytes or ()) for one in got.logprobs.content)
    assert joined.decode() == wanted.text


def test_plain_completions(client: openai.OpenAI, folder: Path) -> None:
    """Prompts of a list, or of token ids, are answered in another order, or by another prompt's seed."""
    model = tandem.load(folder, EngineConfig(kv_memory_bytes=1 << 22), form="plain")
    wanted = model.generate(["ab", "c d"], samples=2, seed=5, temperature=1.0, max_new_tokens=9)
    asked: dict[str, Any] = {"model": "tiny", "seed": 5, "n": 2, "max_tokens": 9}
    got = client.completions.create(prompt=["ab", "c d"], **asked)
    assert [choice.text for choice in got.choices] == [one.text for one in wanted]
    ids = [list(model.parts.tokenizer.encode(text, True)) for text in ("ab", "c d")]
    again = client.completions.create(prompt=ids, echo=True, **asked)
    texts = [one.text for one in wanted]
    assert [choice.text for choice in again.choices] == [
        *(f"ab{text}" for text in texts[:2]),
        *(f"c d{text}" for text in texts[2:]),
    ]
    assert got.usage is not None and (got.usage.prompt_tokens, got.usage.completion_tokens) == (
        sum(map(len, ids)),
        sum(len(one.completion.tokens) for one in wanted),
    )
    chunks = client.completions.create(
        prompt=["ab", "c d"], stream=True, stream_options={"include_usage": True}, **asked
    )
    texts_by = ["", "", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts_by[choice.index] += choice.text
        last = chunk
    assert texts_by == texts and last.usage == got.usage.model_copy(
        update={"prompt_tokens_details": last.usage.prompt_tokens_details}
    )


def test_usage_counts_as_cached_what_was_before_the_call(server: Server) -> None:
    """What siblings find of each other is told as cached: a prompt that nobody asked before costs nothing."""
    prompts = [list(range(first, first + 36)) for first in (20, 30, 40)]
    asked: dict[str, Any] = {"prompt": prompts[:2], "n": 2, "max_tokens": 2, "seed": 1, "ignore_eos": True}

    def cached(**more: Any) -> int:
        body = {**asked, **more, **({"stream_options": {"include_usage": True}} if more.get("stream") else {})}
        sent = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        told = sent.json() if not more.get("stream") else json.loads(sent.text.split("data: ")[-2])
        assert sent.status_code == 200, sent.text
        return int(told["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached() == 0
    assert 32 <= cached(prompt=prompts[1:], stream=True) < 36


def test_token_ids_of_a_stream_are_those_of_the_whole(server: Server) -> None:
    """Who keeps its own tokens has those of the prompt from a whole answer, and from a stream never."""
    asked = {"prompt": ["ab", "cde"], "n": 2, "seed": 3, "max_tokens": 4, "return_token_ids": True, "ignore_eos": True}
    whole = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60).json()["choices"]
    for echo in (False, True):
        sent = httpx.post(f"{server.url}/v1/completions", json={**asked, "echo": echo, "stream": True}, timeout=60)
        lines = [line.removeprefix("data: ") for line in sent.text.split("\n") if line.startswith("data: {")]
        chunks = [choice for line in lines for choice in json.loads(line)["choices"]]
        for place, choice in enumerate(whole):
            own = [one for one in chunks if one["index"] == place]
            assert [one["prompt_token_ids"] for one in own if "prompt_token_ids" in one] == [choice["prompt_token_ids"]]
            assert sum([one.get("token_ids", []) for one in own], []) == choice["token_ids"]


def test_stop_strings_end_the_text(client: openai.OpenAI, model: tandem.Model) -> None:
    """Half a stop string is sent before it is seen to be one, or it stands in the answer."""
    whole = model.generate(["What is 1 + 2?"], seed=3, temperature=1.0, max_new_tokens=40)[0].text
    stop = whole[10:13]
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "seed": 3, "max_tokens": 40, "stop": [stop, "never"]}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.message.content == whole[: whole.index(stop)] and choice.finish_reason == "stop"
    assert streamed(client.chat.completions.create(**asked, stream=True)) == [choice.message.content]


def test_generate_takes_and_gives_token_ids(server: Server, model: tandem.Model) -> None:
    """Tokens that went through a text on the way, or log-probs of others."""
    wanted = model.generate(["hi"], seed=4, temperature=1.0, top_k=9, max_new_tokens=8)[0]
    tokens = model.parts.renderer.prompt_tokens([Message("user", "hi")])
    asked = {"input_ids": list(tokens), "rid": "mine", "return_logprob": True}
    asked["sampling_params"] = {"max_new_tokens": 8, "sampling_seed": 4, "top_k": 9}
    got = httpx.post(f"{server.url}/generate", json=asked).json()
    assert got["output_ids"] == list(wanted.completion.tokens)
    assert got["meta_info"]["output_logprobs"] == list(wanted.completion.logprobs)
    assert got["meta_info"]["id"] == "mine" and got["meta_info"]["finish_reason"]["type"] == "length"
    lines = httpx.post(f"{server.url}/generate", json={**asked, "stream": True}).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert [token for one in events for token in one["output_ids"]] == got["output_ids"]
    assert lines[-2] == "data: [DONE]"


def test_tokens_of_texts_and_back(server: Server, model: tandem.Model) -> None:
    """/tokenize of a conversation gives other tokens than the engine is asked with."""
    got = httpx.post(f"{server.url}/tokenize", json={"messages": ASK}).json()
    assert (
        got["tokens"] == list(model.parts.renderer.prompt_tokens([Message("user", "What is 1 + 2?")]))
        and got["max_model_len"] == 256
    )
    text = httpx.post(f"{server.url}/tokenize", json={"prompt": "ab c", "return_token_strs": True}).json()
    assert text["token_strs"] == ["a", "b", "Ġ", "c"]
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": text["tokens"]}).json() == {"prompt": "ab c"}


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


@pytest.mark.parametrize(
    ("tool_format", "written"),
    [
        ("fenced", "So:\n\n```python\nadd(a=1, b=2)\n```"),
        ("hermes", 'So:\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'),
        ("llama3", '{"name": "add", "parameters": {"a": 1, "b": 2}}'),
    ],
)
def test_tools_are_called(folder: Path, tool_format: str, written: str) -> None:
    """A call of a tool comes as text, half of it before the call, or is lost where it streams."""
    server = Server(folder, **{"server.tool_format": tool_format})
    script(server, f"<think>\nwhy\n</think>\n\n{written}")
    server.start()
    try:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "tools": [TOOL]}
        choice = client.chat.completions.create(**asked).choices[0]
        said = "So:" if written.startswith("So") else ""
        assert choice.finish_reason == "tool_calls" and (choice.message.content or "") == said
        assert choice.message.model_extra == {"reasoning_content": "why"}
        assert choice.message.tool_calls is not None
        call: Any = choice.message.tool_calls[0]
        assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1, "b": 2})
        content, reasoning, calls, reasons = "", "", list[Any](), list[str]()
        for chunk in client.chat.completions.create(**asked, stream=True):
            delta: Any = chunk.choices[0].delta
            content += delta.content or ""
            reasoning += (delta.model_extra or {}).get("reasoning_content", "")
            calls += delta.tool_calls or []
            reasons += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
        assert (content, reasoning, reasons) == (said, "why", ["tool_calls"])
        assert [(one.index, one.function.name, one.function.arguments) for one in calls] == [
            (0, "add", call.function.arguments)
        ]
        answered = [
            *ASK,
            choice.message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "3"},
        ]
        following = client.chat.completions.with_raw_response.create(model="tiny", messages=answered, tools=[TOOL])
        first = client.chat.completions.with_raw_response.create(**asked)
        assert following.headers["x-program-id"] != first.headers["x-program-id"]
        none = client.chat.completions.create(**asked, tool_choice="none").choices[0]
        assert none.finish_reason == "stop" and written in (none.message.content or "")
    finally:
        server.stop()


def test_programs_are_known_by_their_conversations(client: openai.OpenAI) -> None:
    """An agent's later turns look like new programs, or two users' first ones like one."""
    create = client.chat.completions.with_raw_response.create
    first = create(model="tiny", messages=ASK, max_tokens=8, seed=1)
    other = create(model="tiny", messages=ASK, max_tokens=8, seed=2)
    said = first.parse().choices[0].message.content
    turn = [*ASK, {"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
    second = create(model="tiny", messages=turn, max_tokens=8)
    named = create(model="tiny", messages=turn, max_tokens=8, extra_body={"program_id": "mine"})
    header = create(model="tiny", messages=turn, max_tokens=8, extra_headers={"X-Program-ID": "mine too"})
    programs = [one.headers["x-program-id"] for one in (first, other, second, named, header)]
    assert programs[0] == programs[2] != programs[1] and programs[3:] == ["mine", "mine too"]
