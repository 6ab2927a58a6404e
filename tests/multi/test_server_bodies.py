"""Regression caught: what a body or a header says ends a call with a trace, is lost, or holds up others."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tandem.server.load import Visit
from tandem.server.wire import EventStream
from tandem.types import Hints
from tests.serving import DEADLINE_S, Server, serving

ASK: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Path:
    path = tmp_path_factory.mktemp("served")
    write_model(path)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as running:
        yield running


def post(server: Server, path: str, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(server.url + path, json=body, headers=headers, timeout=DEADLINE_S)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("rid", "told"), [("日本", "%E6%97%A5%E6%9C%AC"), ("a\r\nX-Evil: 1", "a%0D%0AX-Evil: 1")])
def test_ids_of_bodies_in_headers(server: Server, rid: str, told: str, stream: bool) -> None:
    """An id that no header can hold ends the call with a trace when its answer is there, or writes headers itself."""
    body = {"input_ids": [3, 4], "rid": rid, "stream": stream, "sampling_params": {"max_new_tokens": 2}}
    got = post(server, "/generate", body)
    assert (got.status_code, got.headers["x-request-id"]) == (200, told) and "x-evil" not in got.headers


def test_tenants_of_refused_calls_are_forgotten(server: Server) -> None:
    """Each name of a tenant whose call was refused stays in memory, and in the metrics, for ever."""
    for number in range(5):
        refused = post(server, "/generate", {"input_ids": [3, 99], "tenant": f"nobody-{number}"})
        assert refused.status_code == 400
    assert not server.room.desk.tenants and "nobody" not in httpx.get(f"{server.url}/metrics").text


def test_hints_and_programs_come_as_headers_too(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that can set headers alone says nothing of its program, or what is no hint is a trace."""
    seen: list[Any] = []
    submit = server.room.desk.driver.submit
    monkeypatch.setattr(
        server.room.desk.driver, "submit", lambda request, *rest: seen.append(request) or submit(request, *rest)
    )
    body = {"messages": ASK, "max_tokens": 1}
    hints = {"X-Hints": json.dumps({"tools": ["bash"], "turns_left": 2}), "X-Program-ID": "p", "X-Tenant": "acme"}
    assert post(server, "/v1/chat/completions", body, **hints).status_code == 200
    assert (seen[0].hints, seen[0].program_id, seen[0].tenant) == (Hints(("bash",), 2), "p", "acme")
    said = {**body, "hints": {"turns_left": 0}}
    assert post(server, "/v1/chat/completions", said, **hints).status_code == 200 and seen[1].hints == Hints((), 0)
    for wrong in ("{", '{"tool": 1}', "3", '"\xe9"'):
        refused = httpx.post(
            f"{server.url}/v1/chat/completions", json=body, headers=[(b"x-hints", wrong.encode("latin-1"))]
        )
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "hints"), wrong
    assert (
        post(server, "/generate", {"input_ids": [3], "program_id": "a\x1fb"}).json()["error"]["param"] == "program_id"
    )


def test_a_record_can_tell_calls_by_their_arguments(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls with other arguments are one and the same, or a conversation without any has a hash."""
    seen: list[Any] = []
    submit = server.room.desk.driver.submit
    monkeypatch.setattr(
        server.room.desk.driver, "submit", lambda request, *rest: seen.append(request.hints) or submit(request, *rest)
    )
    for arguments in ('{"a": 1, "b": 2}', '{"b":2,"a":1}', '{"a": 2, "b": 2}', None):
        call = {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": arguments}}]}
        tail = [call, {"role": "tool", "tool_call_id": "x", "content": "3"}] if arguments else []
        body = {"messages": [*ASK, *tail], "max_tokens": 1, "hints": {"turns_left": 3}}
        assert post(server, "/v1/chat/completions", body).status_code == 200
    first, same, other, none = (hints.arguments for hints in seen)
    assert first == same != other and first and other and not none and {one.turns_left for one in seen} == {3}


def test_a_model_is_asked_for_by_its_last_name_or_as_it_was_given(folder: Path) -> None:
    """The name that a user knows a model by is refused, or a path is its only one."""
    with serving(folder, **{"server.name": ""}) as running:
        listed = httpx.get(f"{running.url}/v1/models").json()["data"]
        assert [one["id"] for one in listed] == [folder.name]
        for name in (folder.name, str(folder)):
            got = post(running, "/v1/completions", {"model": name, "prompt": "a", "max_tokens": 1})
            assert (got.status_code, got.json()["model"]) == (200, folder.name)
        assert httpx.get(f"{running.url}/v1/models/{folder}".replace("models//", "models/%2F")).status_code == 200
        assert post(running, "/v1/completions", {"model": "other", "prompt": "a"}).status_code == 404


@pytest.mark.parametrize("sent", [b"\x16\x03\x01 hello\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"])
def test_what_is_no_http_is_refused_in_the_same_shape(server: Server, sent: bytes) -> None:
    """A line of plain text, which no client of this protocol reads."""
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), DEADLINE_S) as connection:
        connection.settimeout(DEADLINE_S)
        connection.sendall(sent)
        with connection.makefile("rb") as got:
            head, _, content = got.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and f"content-length: {len(content)}".encode() in head
    error = json.loads(content)["error"]
    assert error["code"] == "invalid_http" and set(error) == {"message", "type", "param", "code"}


BIG: list[tuple[str, Any, str]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 5000}, "messages"),
    ("/v1/responses", {"input": [{"role": "user", "content": ""}] * 5000}, "messages"),
    ("/tokenize", {"messages": [{"role": "user", "content": ""}] * 5000}, "messages"),
    ("/tokenize", {"prompt": "a " * 100_000}, "prompt"),
    ("/detokenize", {"tokens": [3] * 5000}, "tokens"),
    (
        "/v1/chat/completions",
        {
            "messages": ASK,
            "tools": [{"type": "function", "function": {"name": "f", "description": "long " * 50_000}}],
        },
        "prompt",
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "x", "function": {"name": "f", "arguments": '{"a": "' + "x" * 200_000 + '"}'}}
                    ],
                }
            ]
        },
        "prompt",
    ),
]


@pytest.mark.parametrize(("path", "body", "param"), BIG)
def test_what_fits_no_context_is_refused_unread(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str, body: Any, param: str
) -> None:
    """Megabytes of small messages, arguments, tools or ids are read and encoded while all other calls wait."""

    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was read")

    monkeypatch.setattr("tandem.server.words._message", read)
    monkeypatch.setattr(server.words.tokenizer, "encode", read)
    monkeypatch.setattr(server.words.tokenizer, "decode", read)
    error = post(server, path, body).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", param), error


def test_long_texts_leave_other_threads_their_turn(server: Server) -> None:
    """The tokeniser holds the interpreter while it encodes a long prompt: every stream of the server stands still."""
    tokenizer, text = server.words.tokenizer, "some words, 12 and more. " * 10_000

    def encoded() -> tuple[list[int], int]:
        """Its ids, and the turns that another thread had meanwhile."""
        turns, encoding = [0], threading.Event()

        def count() -> None:
            encoding.wait(DEADLINE_S)
            while encoding.is_set():
                turns[0] += 1
                time.sleep(0)

        other = threading.Thread(target=count)
        other.start()
        encoding.set()
        ids = tokenizer.encode(text, True)
        encoding.clear()
        other.join(DEADLINE_S)
        return ids, turns[0]

    ids, turns = encoded()
    tokenizer.yields = False
    try:
        same, held = encoded()
    finally:
        tokenizer.yields = True
    assert same == ids and turns > 5 * held, (turns, held)


@pytest.mark.parametrize("last", [0, 1, 2])
def test_no_send_of_a_stream_is_waited_for_without_end(last: int) -> None:
    """A client that reads nothing holds the end of its stream, or the beginning, for ever."""
    sent, cut, visit = [0], [0], Visit()

    async def blocks() -> AsyncIterator[bytes]:
        yield b"data: {}\n\n"

    async def send(_: Any) -> None:
        sent[0] += 1
        if sent[0] > last:
            await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    def abort() -> None:
        cut[0] += 1

    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await EventStream(blocks(), visit, 0.05, {})({"type": "http", "abort": abort}, receive, send)

    asyncio.run(run())
    assert (sent[0], cut[0]) == (last + 1, 1)
