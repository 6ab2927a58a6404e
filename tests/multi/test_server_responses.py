"""Regression caught: OpenAI's client reads another response than the engine's answer, whole or event by event."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import tandem
from tandem.engine.config import EngineConfig
from tests.serving import Server, script, serving

FUNCTION: Any = {
    "type": "function",
    "name": "add",
    "strict": False,
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Path:
    path = tmp_path_factory.mktemp("served")
    write_model(path, scale=10.0)
    return path


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[openai.OpenAI]:
    with serving(folder) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def scripted(folder: Path) -> Iterator[tuple[Server, openai.OpenAI]]:
    """Whose answer thinks, speaks and calls a tool twice."""
    server = Server(folder, **{"server.tool_format": "hermes"})
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": %d}}\n</tool_call>'
    script(server, f"<think>\nwhy\n</think>\n\nSo:\n{call % 2}\n{call % 3}")
    server.start()
    try:
        yield server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    finally:
        server.stop()


def test_text_is_the_engines_own(client: openai.OpenAI, folder: Path) -> None:
    """Instructions, seed or filter are lost on the way."""
    model = tandem.load(folder, EngineConfig(kv_memory_bytes=1 << 22))
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 2?"}]
    wanted = model.generate([said], seed=5, temperature=0.9, max_new_tokens=30)[0]
    asked: dict[str, Any] = {"model": "tiny", "instructions": "Be brief.", "temperature": 0.9, "max_output_tokens": 30}
    got = client.responses.create(input="What is 1 + 2?", extra_body={"seed": 5}, **asked)
    assert got.output_text == wanted.text and got.status == "incomplete"
    assert got.incomplete_details is not None and got.incomplete_details.reason == "max_output_tokens"
    assert got.usage is not None and got.usage.output_tokens == 30 and got.usage.input_tokens == wanted.prompt_tokens
    with client.responses.stream(input=[said[1]], extra_body={"seed": 5}, **asked) as stream:  # type: ignore[list-item]
        events: list[Any] = list(stream)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == wanted.text
    final = events[-1].response
    assert events[-1].type == "response.incomplete" and final.output_text == wanted.text
    assert final.usage.output_tokens == 30 and final.usage.input_tokens_details.cached_tokens > 0


def test_greedy_logprobs_are_the_models(client: openai.OpenAI, folder: Path) -> None:
    """Log-probs of the choice of the likeliest, which are all 0, or of half of the tokens."""
    wanted = tandem.load(folder, EngineConfig(kv_memory_bytes=1 << 22)).generate(["Hi"], max_new_tokens=9)[0]
    asked: dict[str, Any] = {"model": "tiny", "input": "Hi", "temperature": 0, "max_output_tokens": 9}
    asked["include"] = ["message.output_text.logprobs"]
    whole: Any = client.responses.create(**asked).output[0]
    seen: list[float] = []
    for event in client.responses.create(**asked, stream=True):
        if event.type == "response.output_text.delta":
            seen += [one.logprob for one in event.logprobs]
    assert [one.logprob for one in whole.content[0].logprobs] == list(wanted.logprobs) == seen


def test_a_part_begins_empty(client: openai.OpenAI) -> None:
    """The first token's log-prob stands in the part's beginning and in its first delta: who adds up has it twice."""
    asked: dict[str, Any] = {"model": "tiny", "input": "Hi", "max_output_tokens": 5, "stream": True}
    events: list[Any] = list(client.responses.create(**asked, include=["message.output_text.logprobs"]))
    (begun,) = (one.part for one in events if one.type == "response.content_part.added")
    assert begun.text == "" and begun.logprobs == [] and begun.annotations == []
    deltas = [row.logprob for one in events if one.type == "response.output_text.delta" for row in one.logprobs]
    whole = [row.logprob for row in events[-1].response.output[0].content[0].logprobs]
    assert deltas and deltas == whole[: len(deltas)]


def test_items_come_in_events(scripted: tuple[Server, openai.OpenAI]) -> None:
    """An event is missing, out of order, or says something else than the response that it ends in."""
    _, client = scripted
    asked: dict[str, Any] = {"model": "tiny", "input": "What is 1 + 2?", "tools": [FUNCTION]}
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    part = ["response.output_item.added", "response.content_part.added"]
    ends = ["response.content_part.done", "response.output_item.done"]
    call = ["response.output_item.added", "response.function_call_arguments.delta"]
    call += ["response.function_call_arguments.done", "response.output_item.done"]
    shown = [
        kind for place, kind in enumerate(kinds) if not (place and "text.delta" in kind and kinds[place - 1] == kind)
    ]
    assert shown == [
        *("response.created", "response.in_progress"),
        *(*part, "response.reasoning_text.delta", "response.reasoning_text.done", *ends),
        *(*part, "response.output_text.delta", "response.output_text.done", *ends),
        *(*call, *call, "response.completed"),
    ]
    last: Any = events[-1]
    items = last.response.output
    assert [(one.type, one.status) for one in items] == [
        ("reasoning", "completed"),
        ("message", "completed"),
        ("function_call", "completed"),
        ("function_call", "completed"),
    ]
    assert items[0].content[0].text == "why" and last.response.output_text == "So:"
    assert [json.loads(one.arguments) for one in items[2:]] == [{"a": 1, "b": 2}, {"a": 1, "b": 3}]
    done = {event.output_index: event.item for event in events if event.type == "response.output_item.done"}
    assert [done[place] for place in range(4)] == items
    whole = client.responses.create(**asked)
    without = {"id", "call_id", "created_at", "cached_tokens"}

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items() if name not in without}
        return [plain(one) for one in value] if isinstance(value, list) else value

    assert plain(whole.model_dump()) == plain(last.response.model_dump())
    alone = client.responses.create(**asked, parallel_tool_calls=False)
    assert [one.type for one in alone.output] == ["reasoning", "message", "function_call"]


def test_a_response_goes_on_from_its_items(scripted: tuple[Server, openai.OpenAI]) -> None:
    """What a client sends back of an answer is another conversation, and so another program."""
    server, client = scripted
    asked: dict[str, Any] = {"model": "tiny", "tools": [FUNCTION]}
    create = client.responses.with_raw_response.create
    first = create(input="What is 1 + 2?", **asked)
    items = [one.model_dump(exclude_none=True) for one in first.parse().output]
    results = [
        {"type": "function_call_output", "call_id": one["call_id"], "output": "3"}
        for one in items
        if one["type"] == "function_call"
    ]
    opening = {"role": "user", "content": [{"type": "input_text", "text": "What is 1 + 2?"}]}
    seen: list[Any] = []
    says = server.room.desk.engine.runner.says  # type: ignore[attr-defined]
    server.room.desk.engine.runner.says = lambda request: seen.append(request) or says(request)  # type: ignore[attr-defined]
    second = create(input=[opening, *items, *results], **asked)
    assert second.headers["x-program-id"] == first.headers["x-program-id"]
    text = server.words.tokenizer.decode(seen[0].tokens)
    assert text.count("<tool_call>") == 3 and "So:" in text, "two calls, and the example of the system message"


def test_what_responses_refuse(client: openai.OpenAI) -> None:
    """A field that asks for what is not here is believed to be heard."""
    for wrong in (
        {"previous_response_id": "resp_1"},
        {"store": True},
        {"background": True},
        {"text": {"format": {"type": "json_object"}}, "tools": [FUNCTION]},
        {"text": {"format": {"type": "yaml"}}},
        {"reasoning": {"effort": "high"}},
        {"tools": [{**FUNCTION, "strict": True}]},
        {"tool_choice": {"type": "function", "name": "other"}, "tools": [FUNCTION]},
        {"include": ["file_search_call.results"]},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"top_logprobs": 2},
        {"max_output_tokens": 10_000},
    ):
        asked: dict[str, Any] = {"model": "tiny", "input": "Hi", **wrong}
        with pytest.raises(openai.BadRequestError):
            client.responses.create(**asked)


def test_a_failure_is_an_event(folder: Path) -> None:
    """A response that fails on the way ends without a word."""
    with serving(folder) as server:
        runner = server.room.desk.engine.runner
        ran = runner.run

        def run(batch: Any) -> Any:
            if any(work.start > 40 for work in batch.works):
                raise RuntimeError("broken")
            return ran(batch)

        runner.run = run  # type: ignore[method-assign]
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        events: Any = list(client.responses.create(model="tiny", input="Hi", stream=True, extra_body={"seed": 1}))
        assert events[-1].type == "response.failed" and events[-1].response.status == "failed"
        assert "the engine failed" in events[-1].response.error.message
