"""Regression caught: callers that flood, vanish, dawdle or have no key take what is others', or end the server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serving import DEADLINE_S, Server, script, serving, wait_for

ASK: list[Any] = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Path:
    path = tmp_path_factory.mktemp("served")
    write_model(path)
    return path


def ask(server: Server, **more: Any) -> httpx.Response:
    headers = more.pop("headers", None)
    return httpx.post(server.url + CHAT, json={"messages": ASK, "max_tokens": 4, **more}, headers=headers, timeout=60)


def raw(server: Server, *parts: bytes) -> socket.socket:
    """A connection that sent these."""
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=DEADLINE_S)
    for part in parts:
        connection.sendall(part)
    return connection


def call(body: dict[str, Any], length: int | None = None) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {length or len(content)}"
    )
    return f"{head}\r\n\r\n".encode() + content


def test_no_room_is_said(folder: Path) -> None:
    """A flood is queued without end, or refused without a word on when to come again."""
    server = Server(folder, **{"server.max_waiting": 2, "engine.max_sequences": 1, "server.tenant_requests": 2})
    runner = script(server, "ab")
    runner.gate.clear()
    server.start()
    try:
        threads = [threading.Thread(target=ask, args=(server,), kwargs={"tenant": f"t{number}"}) for number in range(3)]
        for number, thread in enumerate(threads, start=1):
            thread.start()
            wait_for("a call to arrive", lambda wanted=number: len(server.room.desk.open) == wanted)
        refused = ask(server)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "1" and "server.max_waiting" in refused.text
        runner.gate.set()
        for thread in threads:
            thread.join(DEADLINE_S)
        runner.gate.clear()
        own = threading.Thread(target=ask, args=(server,), kwargs={"tenant": "t", "n": 2})
        own.start()
        wait_for("a call to arrive", lambda: len(server.room.desk.open) == 2)
        assert "server.tenant_requests" in ask(server, tenant="t").text
        runner.gate.set()
        own.join(DEADLINE_S)
        assert ask(server, tenant="t").status_code == 200
        assert not server.room.desk.open and not server.room.desk.tenants
    finally:
        runner.gate.set()
        server.stop()


def test_ten_thousand_wait(folder: Path) -> None:
    """Ten thousand answers that wait are lost, or one of them is given twice."""
    server = Server(folder, **{"server.max_choices": 1024, "engine.kv_memory_bytes": 1 << 24})
    runner = script(server, "ab")
    runner.gate.clear()
    server.start()
    answers: list[httpx.Response] = []

    def prompts(first: int) -> list[list[int]]:
        return [[3 + number % 90, 3 + number // 90 % 90, 3 + number // 8100] for number in range(first, first + 1000)]

    def flood(first: int) -> None:
        body = {"prompt": prompts(first), "max_tokens": 2, "return_token_ids": True}
        answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=DEADLINE_S))

    try:
        threads = [threading.Thread(target=flood, args=(number * 1000,)) for number in range(10)]
        for thread in threads:
            thread.start()
        wait_for("all to wait", lambda: len(server.room.desk.open) == 10_000)
        assert httpx.get(f"{server.url}/health").status_code == 200
        runner.gate.set()
        for thread in threads:
            thread.join(DEADLINE_S)
        choices = [choice for one in answers for choice in one.json()["choices"]]
        assert {choice["text"] for choice in choices} == {"ab"}
        got = sorted(choice["prompt_token_ids"] for choice in choices)
        assert got == sorted(prompt for first in range(0, 10_000, 1000) for prompt in prompts(first))
    finally:
        runner.gate.set()
        server.stop()


def test_keys_name_tenants(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call without a key is answered, or one speaks for another's tenant."""
    keys = tmp_path / "keys.toml"
    keys.write_text(
        '[[keys]]\nkey = "sk-search-1"\ntenant = "acme/search"\n[[keys]]\nkey = "sk-globex-1"\ntenant = "globex"\n'
    )
    monkeypatch.setenv("TANDEM_API_KEY", "sk-of-the-house")
    with serving(folder, **{"server.keys": str(keys), "server.tenants": "acme,globex"}) as server:

        def told(key: str, **more: Any) -> tuple[int, str]:
            got = ask(server, headers={"authorization": f"Bearer {key}"} if key else {}, **more)
            return got.status_code, "" if got.status_code == 200 else got.json()["error"]["code"]

        assert told("") == (401, "missing_api_key") and told("sk-unknown") == (401, "invalid_api_key")
        assert told("sk-search-1") == (200, "") and told("sk-search-1", tenant="acme/search/ann") == (200, "")
        assert told("sk-search-1", tenant="acme") == (403, "tenant_not_allowed")
        assert told("sk-search-1", tenant="globex") == (403, "tenant_not_allowed")
        assert told("sk-of-the-house", tenant="globex/x") == (200, "")
        assert told("sk-of-the-house", tenant="initech") == (403, "unknown_tenant")
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-unknown", max_retries=0).models.list()
        long: list[Any] = [{"role": "user", "content": "a prompt of more than a block"}]
        cached = []
        for key in ("sk-search-1", "sk-globex-1", "sk-search-1"):
            got = ask(server, messages=long, headers={"authorization": f"Bearer {key}"}).json()
            cached.append(got["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached[:2] == [0, 0] and cached[2] > 0, "one tenant sees by its cached tokens what another asked"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x", "no TOML"),
        ("[[keys]]\nkey = 'short'", "8 or more"),
        ("[[keys]]\nkey = 'sk-123456'\ntenant = 'a b'", "tenant is 'a b'"),
        ("[[keys]]\nkey = 'sk-123456'\n[[keys]]\nkey = 'sk-123456'", "stands there before"),
        ("[[keys]]\nkey = 'sk-123456'\nadmn = true", "other fields"),
    ],
)
def test_files_of_keys_are_checked(folder: Path, tmp_path: Path, text: str, said: str) -> None:
    """A misspelt file of keys leaves the server open, or a key without its rights."""
    from tandem.errors import ConfigError
    from tandem.server.config import ServerConfig
    from tandem.server.tenants import Access

    (tmp_path / "keys.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        Access(ServerConfig(keys=str(tmp_path / "keys.toml")))


@pytest.mark.parametrize("streams", [False, True])
def test_who_goes_away_is_forgotten(folder: Path, streams: bool) -> None:
    """The answer of a client that closed its connection runs on to its end, and holds its pages."""
    server = Server(folder)
    runner = script(server, "a" * 4000)
    runner.step_s = 0.005
    server.start()
    try:
        connection = raw(server, call({"messages": ASK, "stream": streams, "n": 3, "max_tokens": 3000}))
        wait_for("the answers to run", lambda: server.room.desk.num_running == 3)
        if streams:
            assert b"200 OK" in connection.recv(1000)
        connection.close()
        wait_for("them to be withdrawn", lambda: not server.room.desk.engine.scheduler.live)
        wait_for("them to be forgotten", lambda: not server.room.desk.open)
        assert server.room.desk.engine.stats.aborted == 3 and ask(server).status_code == 200
    finally:
        server.stop()


def test_who_takes_nothing_is_cut_off(folder: Path) -> None:
    """A client that does not read holds its answers in the server's memory for ever."""
    server = Server(folder, **{"server.send_s": 0.3})
    script(server, "a" * 4000)
    server.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    server.start()
    try:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        connection.sendall(call({"messages": ASK, "stream": True, "n": 2, "max_tokens": 3000}))
        wait_for("the answers to run", lambda: server.room.desk.open)
        wait_for("them to be withdrawn", lambda: not server.room.desk.open)
        wait_for("the connection to be cut", lambda: not server.listener.server_state.connections)
        connection.close()
        assert ask(server).status_code == 200
    finally:
        server.stop()


def test_who_waits_longer_than_a_send_may_take_is_not_cut_off(folder: Path) -> None:
    """A stream whose next token takes longer than server.send_s is taken for a client that takes nothing."""
    server = Server(folder, **{"server.send_s": 0.3})
    runner = script(server, "a" * 4000)
    runner.step_s = 0.02
    server.start()
    try:
        body, events = {"messages": ASK, "stream": True, "max_tokens": 30}, 0
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=30) as answer:
            for line in answer.iter_lines():
                events += line.startswith("data: ")
                if events == 5 and runner.gate.is_set() and line:
                    runner.gate.clear()
                    threading.Timer(0.8, runner.gate.set).start()
        assert line == "" and events > 5 and not server.room.desk.engine.stats.aborted
    finally:
        runner.gate.set()
        server.stop()


def test_a_stream_that_waits_shows_signs_of_life(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy cuts a stream off whose first token takes a minute; or signs of life beside every token."""
    monkeypatch.setattr("tandem.server.desk.PING_S", 0.4)
    server = Server(folder)
    runner = script(server, "a" * 4000)
    server.start()
    try:
        runner.gate.clear()
        body, signs, events = {"messages": ASK, "stream": True, "max_tokens": 30}, 0, 0
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=30) as answer:
            for line in answer.iter_lines():
                signs, events = signs + (line == ": waiting"), events + line.startswith("data: {")
                if signs == 3 and not runner.gate.is_set():
                    assert events <= 1  # the role
                    runner.gate.set()
        assert signs in (3, 4) and events > 1  # the tokens, of several steps at once on a busy machine
    finally:
        runner.gate.set()
        server.stop()


def test_who_sends_slowly_is_not_waited_for(folder: Path) -> None:
    """A head or a body that never ends holds a connection for ever; a head without end, memory."""
    with serving(folder, **{"server.head_s": 0.3, "server.body_s": 0.3}) as server:
        for parts in ((b"POST /v1/chat",), (), (b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /he",)):
            connection = raw(server, *parts)
            while connection.recv(1000):
                pass
            connection.close()
        body = raw(server, call({"messages": ASK}, length=5000))
        assert b"408 Request Timeout" in body.recv(1000)
        flood = raw(server)
        with pytest.raises(OSError, match=re.compile("reset|pipe", re.IGNORECASE)):
            flood.sendall(b"GET /health HTTP/1.1\r\n")
            for number in range(4096):
                flood.sendall(f"X-{number}: {'a' * 4000}\r\n".encode())
        assert ask(server).status_code == 200


@pytest.mark.parametrize("streams", [False, True])
def test_a_step_that_raises_ends_its_requests_alone(folder: Path, streams: bool, caplog: Any) -> None:
    """An error in a step ends the server, or leaves its clients without a word."""
    with serving(folder) as server:
        before = ask(server, seed=1, max_tokens=20).json()["choices"][0]["message"]["content"]
        scheduler = server.room.desk.engine.scheduler
        planned = scheduler.plan

        def plan(now: float) -> Any:
            if any(sequence.num_drawn == 3 for sequence in scheduler.running):
                raise RuntimeError("a fault of ours, secret")
            return planned(now)

        scheduler.plan = plan  # type: ignore[method-assign]
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "seed": 1, "max_tokens": 20}
        with pytest.raises(openai.APIError, match="the engine failed, and this request with it") as failed:
            for _ in client.chat.completions.create(**asked, stream=streams):
                pass
        assert "secret" not in str(failed.value) and "a fault of ours, secret" in caplog.text
        again = client.chat.completions.create(**asked)
        assert again.choices[0].message.content == before and not server.room.desk.open
        assert httpx.get(f"{server.url}/health").status_code == 200
        server.room.desk.engine.check_integrity()
        assert server.room.desk.total().finished == 2 and server.room.desk.renewals == 1
        counted = httpx.get(f"{server.url}/metrics").text
        for reason, count in (("error", 1.0), ("length", 2.0)):
            labels = f'engine="0",finished_reason="{reason}",model_name="tiny"'
            assert f"vllm:request_success_total{{{labels}}} {count}" in counted, "who watches sees no failure"


def test_a_signal_lets_calls_finish(folder: Path) -> None:
    """SIGTERM cuts answers off, or the server never ends after it."""
    command = [sys.executable, "-m", "tandem", "serve", str(folder), "--port", "0"]
    command += ["--set", "server.name=tiny", "--set", "engine.kv_memory_bytes=4194304"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        found = re.search(r"http://\S+(?=/v1)", child.stdout.readline())
        assert found is not None
        client = openai.OpenAI(base_url=f"{found[0]}/v1", api_key="none", max_retries=0)
        asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "seed": 1, "max_tokens": 200}
        asked["extra_body"] = {"ignore_eos": True}
        whole = client.chat.completions.create(**asked).choices[0].message.content
        stream = iter(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        chunks = [next(stream), next(stream)]
        os.kill(child.pid, signal.SIGTERM)
        refused = None
        while refused is None and child.poll() is None:
            got = httpx.get(f"{found[0]}/health")
            refused = got.status_code if got.status_code != 200 else None
        chunks += list(stream)
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 200
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
        assert child.wait(DEADLINE_S) == 0
    except httpx.HTTPError:
        assert child.wait(DEADLINE_S) == 0  # it had ended before it was asked
    finally:
        child.kill()
        child.communicate()


def test_a_second_signal_ends_at_once_and_without_a_trace(folder: Path) -> None:
    """Who can't wait waits on, or is shown the inside of the server."""
    command = [sys.executable, "-m", "tandem", "serve", str(folder), "--port", "0"]
    command += ["--set", "server.name=tiny", "--set", "engine.kv_memory_bytes=4194304", "--set", "server.drain_s=300"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stderr is not None
        found = re.search(r"http://\S+(?=/v1)", child.stdout.readline())
        assert found is not None
        asked = {"model": "tiny", "messages": ASK, "max_tokens": 200, "n": 100, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{found[0]}/v1/chat/completions", json=asked) as stream:
            next(stream.iter_lines())
            os.kill(child.pid, signal.SIGTERM)
            said = child.stderr.readline()  # that it waits for answers
            os.kill(child.pid, signal.SIGTERM)
            assert "ends when" in said
            assert child.wait(DEADLINE_S) in (0, -signal.SIGTERM)
        assert "Traceback" not in child.stderr.read()
    except httpx.HTTPError:
        assert child.wait(DEADLINE_S) in (0, -signal.SIGTERM)
        assert "Traceback" not in child.stderr.read()
    finally:
        child.kill()
        child.communicate()


def test_what_drains_takes_no_more(folder: Path) -> None:
    """A server that is about to end takes calls that it will not answer, or keeps those that take too long."""
    server = Server(folder, **{"server.drain_s": 0.3})
    runner = script(server, "a" * 4000)
    runner.step_s = 0.02
    server.start()
    told: list[Any] = []
    try:
        thread = threading.Thread(target=lambda: told.append(ask(server, max_tokens=3000)))
        thread.start()
        wait_for("the call to run", lambda: server.room.desk.num_running)
        server.room.desk.draining = True
        refused = ask(server)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert httpx.get(f"{server.url}/health").json() == {"status": "draining"}
        server.listener._loop.call_soon_threadsafe(server.listener.end)
        thread.join(DEADLINE_S)
        assert told[0].json()["choices"][0]["finish_reason"] == "abort"
        server.thread.join(DEADLINE_S)
        assert not server.thread.is_alive()
    finally:
        server.stop()


def test_engines_share_what_is_left_beside_all_their_weights(
    folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--engines N` gives pages the room of the other engines' weights, and the machine runs out of memory."""
    from tandem.cli import main

    room, found = 160 << 20, []
    for available, engines in ((room, 1), (4 * room, 4)):
        monkeypatch.setattr("tandem.env.memory_bytes", lambda available=available: (8 << 30, available))
        assert main.main(["serve", str(folder), "--check", "--engines", str(engines)]) == 0
        found.append(capsys.readouterr().out.splitlines()[2])
    assert found == [found[0], f"{found[0]} of each engine"]


def test_check_says_what_would_be_served(folder: Path, capsys: Any, tmp_path: Path) -> None:
    """A config that the server would refuse passes --check, or a sound one does not."""
    from tandem.cli import main

    assert main.main(["serve", str(folder), "--check", "--set", "server.control=true", "--port", "1234"]) == 0
    said = capsys.readouterr().out
    assert "http://127.0.0.1:1234" in said and "pause, weights and sleep are served" in said and "256 positions" in said
    shares = ("--set", "engine.order=shares")
    for wrong in ("server.keys=nowhere.toml", "server.port=70000", "server.tenants=a//b", "engine.page_tokens=3"):
        assert main.main(["serve", str(folder), "--check", "--set", wrong]) == 2, wrong
    for wrong in ("engine.shares=nowhere.toml", f"engine.programs.park={tmp_path}"):
        assert main.main(["serve", str(folder), "--check", *shares, "--set", wrong]) == 2, wrong
    taken = socket.create_server(("127.0.0.1", 0))
    assert main.main(["serve", str(folder), "--port", str(taken.getsockname()[1])]) == 2
    assert "Take another port" in capsys.readouterr().err
    taken.close()
