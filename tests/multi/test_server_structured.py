"""Regression caught: an answer that was asked to be of a form is not, or what can't be held is believed to be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from tests.serving import Server, serving

pytest.importorskip("llguidance")
ASK: list[Any] = [{"role": "user", "content": "Hi"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 99}, "side": {"enum": ["left", "right"]}},
    "required": ["number", "side"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "turn", "parameters": SCHEMA}}
NOTHING: Any = {"type": "object", "properties": {}, "additionalProperties": False}
OTHER: Any = {"type": "function", "function": {"name": "stop", "parameters": NOTHING}}


class Turned(pydantic.BaseModel):
    """SCHEMA, as a client writes it."""

    model_config = pydantic.ConfigDict(extra="forbid")
    number: int = pydantic.Field(ge=0, le=99)
    side: Literal["left", "right"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("served")
    write_model(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))  # tools take many
    with serving(path, **{"server.tool_format": "hermes"}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("seed", range(3))
def test_schemas_hold(client: openai.OpenAI, seed: int) -> None:
    """A schema is not heard, whole, in a stream, or as a client's own class."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "turned", "schema": SCHEMA, "strict": True}}
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "seed": seed, "max_tokens": 180}
    whole = client.chat.completions.create(**asked, response_format=form).choices[0]
    assert whole.finish_reason == "stop" and Turned.model_validate_json(whole.message.content or "")
    assert "unmet" not in (whole.model_extra or {})
    chunks = client.chat.completions.create(**asked, response_format=form, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    parsed = client.chat.completions.parse(**asked, response_format=Turned).choices[0].message.parsed
    assert isinstance(parsed, Turned)
    text: Any = {"format": {"type": "json_schema", "name": "turned", "schema": SCHEMA}}
    said = client.responses.create(
        model="tiny", input="Hi", text=text, max_output_tokens=180, extra_body={"seed": seed}
    )
    assert said.output_text == whole.message.content and said.text is not None


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"guided_regex": "[a-c]{3}-[0-9]{2}"}, "[a-c]{3}-[0-9]{2}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"structured_outputs": {"regex": "x+y"}}, "x+y"),
        ({"structured_outputs": {"choice": ["a b", "c"]}}, "a b|c"),
        ({"guided_grammar": 'start: "<" /[0-9]/ ">"'}, "<[0-9]>"),
    ],
)
def test_vllms_fields_hold(client: openai.OpenAI, fields: dict[str, Any], wanted: str) -> None:
    """A field of vLLM's is taken and not heard."""
    chat = client.chat.completions.create(model="tiny", messages=ASK, seed=1, max_tokens=60, extra_body=fields)
    plain = client.completions.create(model="tiny", prompt="Hi", seed=2, n=3, max_tokens=60, extra_body=fields)
    texts = [chat.choices[0].message.content or "", *(choice.text for choice in plain.choices)]
    ends = [chat.choices[0].finish_reason, *(choice.finish_reason for choice in plain.choices)]
    for text, end in zip(texts, ends, strict=True):
        assert re.fullmatch(wanted, text) or (end == "length" and wanted == "x+y"), text


def test_token_ids_hold_too(server: Server) -> None:
    """/generate draws what its regex forbids."""
    sampling = {"max_new_tokens": 9, "regex": "[0-9]{4}", "n": 4}
    sent = httpx.post(f"{server.url}/generate", json={"input_ids": [5, 6], "sampling_params": sampling}).json()
    for one in sent:
        assert re.fullmatch("[0-9]{4}", server.words.tokenizer.decode(one["output_ids"][:-1])), one
        assert len(one["meta_info"]["output_unfiltered_logprobs"]) == 5


def test_calls_are_forced(client: openai.OpenAI) -> None:
    """A call that is asked for does not come, is of another tool, or has other arguments than its schema's."""
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "tools": [TOOL, OTHER], "max_tokens": 250}
    for seed in range(3):
        named: Any = {"type": "function", "function": {"name": "turn"}}
        choice = client.chat.completions.create(**asked, tool_choice=named, seed=seed).choices[0]
        assert choice.finish_reason == "tool_calls" and not choice.message.content
        calls: Any = choice.message.tool_calls
        assert [call.function.name for call in calls] == ["turn"]
        assert Turned.model_validate_json(calls[0].function.arguments)
        required = client.chat.completions.create(
            **asked, tool_choice="required", parallel_tool_calls=False, seed=seed, stream=True
        )
        deltas: Any = [call for chunk in required for call in chunk.choices[0].delta.tool_calls or ()]
        assert len(deltas) == 1 and deltas[0].function.name in ("turn", "stop")
    functions: Any = [{"type": "function", "name": "turn", "parameters": SCHEMA, "strict": True}]
    forced = client.responses.create(
        model="tiny", input="Hi", tools=functions, tool_choice="required", parallel_tool_calls=False
    )
    item: Any = forced.output[0]
    assert item.type == "function_call" and Turned.model_validate_json(item.arguments)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "not"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"guided_regex": "("}, "regex"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "two forms"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"guided_regex": "a", "ignore_eos": True}, "stop_token_ids"),
        ({"response_format": {"type": "json_object"}, "tools": [TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "none"}}}, "tool_choice names"),
        ({"tool_choice": "required"}, "no tools"),
    ],
)
def test_what_cannot_be_held_is_refused(client: openai.OpenAI, fields: dict[str, Any], said: str) -> None:
    """A form that the engine can't hold is answered by any text, or by a server's error."""
    with pytest.raises(openai.BadRequestError, match=re.escape(said)):
        client.chat.completions.create(model="tiny", messages=ASK, extra_body=fields)


def test_what_no_mask_holds_is_said(client: openai.OpenAI, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that does not validate is given as one that does."""
    from tandem.server import answers

    monkeypatch.setattr(answers, "unmet", lambda constraint, text: f"it is {json.loads(text)!r}")
    asked: dict[str, Any] = {
        "messages": ASK,
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"const": 7}}},
    }
    sent = httpx.post(f"{server.url}/v1/chat/completions", json=asked).json()
    assert sent["choices"][0]["unmet"] == "it is 7"
    lines = httpx.post(f"{server.url}/v1/chat/completions", json={**asked, "stream": True}).text
    assert lines.count('"unmet":"it is 7"') == 1
