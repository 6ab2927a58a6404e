"""Regression caught: a call that can't be answered gets the wrong status, another shape than OpenAI's, or a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from tests.serving import Server, serving

ASK: list[Any] = [{"role": "user", "content": "hi"}]
CHAT, PLAIN, IDS = "/v1/chat/completions", "/v1/completions", "/generate"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("served")
    write_model(path)
    with serving(path, **{"server.max_body_bytes": 1 << 16, "server.max_choices": 4}) as running:
        yield running


CASES: list[tuple[str, Any, int, str, str | None]] = [
    (CHAT, b"{", 400, "invalid_json", None),
    (CHAT, b"\xff\xfe", 400, "invalid_json", None),
    (CHAT, b'{"metadata": {"a": ' + b"[" * 20000, 400, "invalid_json", None),
    (CHAT, {"messages": ASK, "temperatur": 1}, 400, "unknown_parameter", "temperatur"),
    (CHAT, {"messages": [{"role": "user", "contents": "x"}]}, 400, "unknown_parameter", "messages[0].contents"),
    (CHAT, {"messages": ASK, "temperature": "1"}, 400, "invalid_type", "temperature"),
    (CHAT, {"messages": ASK, "n": 0}, 400, "invalid_type", "n"),
    (CHAT, {"messages": []}, 400, "invalid_type", "messages"),
    (CHAT, {"model": "tiny"}, 400, "missing_required_parameter", None),
    (CHAT, {"messages": ASK, "model": "other"}, 404, "model_not_found", "model"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "unsupported_content", None),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "missing_required_parameter", None),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "missing_required_parameter", None),
    (CHAT, {"messages": ASK, "logit_bias": {"3": 1}}, 400, "unsupported_value", "logit_bias"),
    (CHAT, {"messages": ASK, "logprobs": True, "top_logprobs": 21}, 400, "invalid_type", "top_logprobs"),
    (CHAT, {"messages": ASK, "top_logprobs": 3}, 400, "invalid_value", "top_logprobs"),
    (CHAT, {"messages": ASK, "stream_options": {"include_usage": True}}, 400, "invalid_value", "stream_options"),
    (CHAT, {"messages": ASK, "stop": ""}, 400, "invalid_value", None),
    (CHAT, {"messages": ASK, "n": 5}, 400, "invalid_value", "n"),
    (CHAT, {"messages": ASK, "max_tokens": 5000}, 400, "context_length_exceeded", "max_tokens"),
    (CHAT, {"messages": [{"role": "user", "content": "long " * 100}]}, 400, "context_length_exceeded", None),
    (CHAT, {"messages": ASK, "tenant": "no//path"}, 400, "invalid_value", "tenant"),
    (PLAIN, {"prompt": ["a", [1]]}, 400, "invalid_value", "prompt"),
    (PLAIN, {"prompt": [1, 99]}, 400, "invalid_value", None),
    (PLAIN, {"prompt": [1, -1]}, 400, "invalid_type", "prompt[1]"),
    (PLAIN, {"prompt": "a", "logprobs": 21}, 400, "invalid_type", "logprobs"),
    (PLAIN, {"prompt": "a", "max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    (PLAIN, {"prompt": ""}, 400, "invalid_value", None),
    (IDS, {"input_ids": [3, 99]}, 400, "invalid_value", None),
    (IDS, {"input_ids": []}, 400, "invalid_type", "input_ids"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 70000}]}, 413, "body_too_large", None),
]


@pytest.mark.parametrize(("path", "body", "status", "code", "param"), CASES)
def test_refusals(server: Server, path: str, body: Any, status: int, code: str, param: str | None) -> None:
    """What can't be answered is answered, crashes, or is refused without saying what is wrong."""
    head = {"content-type": "application/json"}
    sent = httpx.post(
        server.url + path, **({"content": body, "headers": head} if isinstance(body, bytes) else {"json": body})
    )
    assert sent.status_code == status, sent.text
    error = sent.json()["error"]
    assert (error["code"], set(error)) == (code, {"message", "type", "param", "code"}), error
    assert (param is None or error["param"] == param) and "Traceback" not in sent.text, error


def test_paths_methods_and_kinds(server: Server) -> None:
    """An unknown path, a wrong method or a form gets FastAPI's shape of error."""
    for sent, status in (
        (httpx.get(server.url + "/nowhere"), 404),
        (httpx.get(server.url + "/v1/models/other"), 404),
        (httpx.get(server.url + CHAT), 405),
        (httpx.put(server.url + CHAT, json={}), 405),
        (httpx.post(server.url + CHAT, data={"a": "b"}), 415),
        (httpx.post(server.url + CHAT, content=b"x", headers={"content-encoding": "gzip"}), 415),
    ):
        assert sent.status_code == status and set(sent.json()["error"]) == {"message", "type", "param", "code"}, (
            sent.text
        )
    assert httpx.get(server.url + CHAT).headers["allow"] == "POST"


def test_the_clients_exceptions(server: Server) -> None:
    """A refused stream is an empty one for OpenAI's client, which then says nothing."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    for streams in (False, True):
        with pytest.raises(openai.BadRequestError, match="frequency_penalty"):
            client.chat.completions.create(model="tiny", messages=ASK, frequency_penalty=1, stream=streams)
    with pytest.raises(openai.NotFoundError, match="other"):
        client.chat.completions.create(model="other", messages=ASK)
    assert client.chat.completions.create(model="tiny", messages=ASK, max_tokens=3).usage is not None


CHECKS: list[Any] = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_fuzzed_from_its_own_document(server: Server, mode: GenerationMode) -> None:
    """A body that the OpenAPI document allows, or nearly, crashes a handler or gets a status that it doesn't name."""
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert {one.path for one in operations} >= {CHAT, PLAIN, IDS, "/tokenize", "/detokenize", "/health", "/v1/models"}
    for operation in operations:
        if mode is GenerationMode.POSITIVE or any(one.media_type == "application/json" for one in operation.body):
            fuzz(operation, mode)


def fuzz(operation: Any, mode: GenerationMode) -> None:
    wanted = [*CHECKS, *([checks.negative_data_rejection] if mode is GenerationMode.NEGATIVE else [])]

    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def answered(case: Any) -> None:
        case.call_and_validate(checks=wanted, timeout=30)

    answered()
