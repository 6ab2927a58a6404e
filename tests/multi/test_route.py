"""Regression caught: behind a router, answers differ from an engine's own, prefixes are computed twice, shares hold in
one engine and not over all, or processes are lost and left."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tandem.engine.cluster import local_terms
from tandem.engine.deal import Deals
from tandem.engine.share import Terms
from tandem.server import shares as lease
from tandem.server.config import FrontConfig
from tandem.server.front import shares
from tandem.server.front.children import Child, keep
from tandem.server.front.engines import Engine
from tests.routing import routed
from tests.serving import DEADLINE_S, Server, script, serving, wait_for

ASK: list[Any] = [{"role": "user", "content": "What is 1 + 2?"}]
START_S = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Path:
    path = tmp_path_factory.mktemp("served")
    write_model(path, scale=10.0)
    return path


@pytest.fixture(scope="module")
def engines(folder: Path) -> Iterator[list[Server]]:
    with serving(folder) as one, serving(folder) as two:
        yield [one, two]


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S)


def test_answers_are_an_engines_own(engines: list[Server]) -> None:
    """A seeded answer, its stream or its choices are others behind a router."""
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "seed": 3, "max_tokens": 12, "n": 3}
    with routed(*engines) as router:
        own = client(engines[0].url).chat.completions.create(**asked)
        got = client(router.url).chat.completions.create(**asked)
        words = [choice.message.content for choice in own.choices]
        assert [choice.message.content for choice in got.choices] == words and len(set(words)) == 3
        streamed = dict.fromkeys(range(3), "")
        for chunk in client(router.url).chat.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
        assert list(streamed.values()) == words
        assert client(router.url).models.list().data[0].id == "tiny"
        events = list(client(router.url).responses.create(model="tiny", input="hi", max_output_tokens=4, stream=True))
        assert events[-1].type == "response.incomplete"  # at its bound
        with pytest.raises(openai.BadRequestError, match="there is no parameter oops"):
            client(router.url).chat.completions.create(**asked, extra_body={"oops": 1})
        ids = client(router.url).completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=3, seed=1)
        assert (
            ids.choices[0].text
            == client(engines[1].url)
            .completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=3, seed=1)
            .choices[0]
            .text
        )


def test_a_conversation_finds_its_prefix(engines: list[Server]) -> None:
    """Turns of a conversation, of which nobody says that it is one, go to engines by turns and are computed anew."""
    with routed(*engines) as router:
        talks = {
            name: [{"role": "user", "content": f"{name} tells of itself, at some length: {name * 9}"}]
            for name in "abcd"
        }
        turns = dict.fromkeys(talks, 0)
        homes: dict[str, set[int]] = {name: set() for name in talks}
        for _ in range(3):
            for name, messages in talks.items():
                before = [engine.counts["calls"] for engine in router.engines]
                got = client(router.url).chat.completions.create(model="tiny", messages=messages, max_tokens=6)  # type: ignore[call-overload]
                homes[name] |= {
                    place for place, engine in enumerate(router.engines) if engine.counts["calls"] > before[place]
                }
                cached = got.usage.prompt_tokens_details.cached_tokens
                assert cached >= turns[name] - 16, (name, cached, turns)
                turns[name] = got.usage.prompt_tokens
                content = got.choices[0].message.content
                messages += [{"role": "assistant", "content": content}, {"role": "user", "content": "and?"}]
        assert all(len(places) == 1 for places in homes.values()), homes
        assert set().union(*homes.values()) == {0, 1}, "one engine has all"


def test_a_client_that_goes_leaves_nothing(folder: Path) -> None:
    """A call of a client that has gone runs on in its engine."""
    server = Server(folder)
    runner = script(server, "a" * 4000)
    runner.step_s = 0.005
    server.start()
    try:
        with routed(server) as router:
            for streams in (False, True):
                body = {"messages": ASK, "max_tokens": 3000, "n": 2, "stream": streams}
                with pytest.raises(httpx.ReadTimeout):
                    with httpx.stream("POST", f"{router.url}/v1/chat/completions", json=body, timeout=0.5) as sent:
                        for _ in sent.iter_raw():
                            raise httpx.ReadTimeout("enough")
                wait_for("them to be withdrawn", lambda: not server.room.desk.engine.scheduler.live)
            assert server.room.desk.engine.stats.aborted == 4
    finally:
        server.stop()


@pytest.fixture
def sharing(folder: Path, tmp_path: Path) -> Iterator[list[Server]]:
    """Two engines that share by a tree, with slow steps."""
    tree = {"tenants": {"a": {"weight": 4}, "b": {"weight": 1}}, "cost": {"base_s": 0.002, "decode_token_s": 0.001}}
    (tmp_path / "tree.json").write_text(json.dumps(tree))
    made = []
    for _ in range(2):
        settings = {"engine.order": "shares", "engine.shares": str(tmp_path / "tree.json"), "engine.max_sequences": 4}
        server = Server(folder, **settings, **{"engine.kv_memory_bytes": 1 << 24})
        script(server, "a" * 4000).step_s = 0.004
        made.append(server.start())
    yield made
    for server in made:
        server.stop()


def own(server: Server) -> dict[str, float]:
    """The weights that an engine goes by."""
    order = server.room.desk.engine.scheduler.order
    assert isinstance(order, Deals)
    return {node.path: node.own / 1000 for node in order.tree.nodes()}


def test_shares_hold_over_all_engines(sharing: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each engine divides itself as if it were alone, or terms of routers that are gone hold for ever."""
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    told = httpx.get(f"{sharing[0].url}/shares").json()
    tree = {"a": {"weight": 4.0, "guarantee": 0.0, "cap": 1.0}, "b": {"weight": 1.0, "guarantee": 0.0, "cap": 1.0}}
    assert told == {"loads": {}, "terms": tree}
    assert httpx.post(f"{sharing[0].url}/shares", json={"terms": {"a": {"weight": 0}}}).status_code == 400
    streams = [
        threading.Thread(target=drawn, args=(sharing[at].url, tenant, n))
        for at, tenant, n in ((0, "a", 8), (0, "b", 2), (1, "a", 2), (1, "b", 8))
    ]
    for stream in streams:
        stream.start()
    wait_for("all to be asked", lambda: all(len(one.room.desk.open) == 10 for one in sharing))
    loads = [httpx.get(f"{one.url}/shares").json()["loads"] for one in sharing]
    assert loads == [{"a": 8.0, "b": 2.0}, {"a": 2.0, "b": 8.0}]
    local = local_terms({"a": Terms(4.0), "b": Terms(1.0)}, loads)
    wanted = [{path: one.weight for path, one in terms.items()} for terms in local]
    with routed(*sharing) as first, routed(*sharing) as second:
        for router in (first, second):
            assert router.listener is not None
            asyncio.run_coroutine_threadsafe(shares.once(router.front), router.listener._loop).result(DEADLINE_S)
            for server, weights in zip(sharing, wanted, strict=True):
                assert own(server) == pytest.approx(weights, abs=2e-3)
    assert wanted[0]["a"] / wanted[0]["b"] != pytest.approx(4, rel=0.2), "they are the tree's own"
    wait_for("the tree's own to hold again", lambda: all(own(one) == {"a": 4, "b": 1} for one in sharing))
    for server in sharing:
        httpx.post(f"{server.url}/abort_requests", json={"request_ids": list(server.room.desk.open)})
    for stream in streams:
        stream.join(DEADLINE_S)


def drawn(url: str, tenant: str, n: int) -> None:
    body = {"prompt": [5] * 20, "max_tokens": 3000, "tenant": tenant, "n": n}
    httpx.post(f"{url}/v1/completions", json=body, timeout=DEADLINE_S)


class Family:
    """`tandem serve --engines 2` as a process."""

    def __init__(self, folder: Path, *settings: str) -> None:
        command = [sys.executable, "-m", "tandem", "serve", str(folder), "--engines", "2", "--port", "0"]
        own = ("server.name=tiny", "engine.kv_memory_bytes=4194304", "route.restart_s=0.1", "route.health_s=0.1")
        for text in (*own, *settings):
            command += ["--set", text]
        self.running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.running.stdout is not None
        line = self.running.stdout.readline()
        assert line.startswith("tandem: tiny on http://"), self.running.communicate(timeout=DEADLINE_S)
        self.url = line.split(" on ")[1].strip().removesuffix("/v1")

    @property
    def pids(self) -> list[int]:
        """Of its engines."""
        listed = Path(f"/proc/{self.running.pid}/task/{self.running.pid}/children").read_text().split()
        return [int(pid) for pid in listed]

    def look(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/load", timeout=DEADLINE_S).json()
        return found

    def kill(self) -> None:
        if self.running.poll() is None:
            self.running.kill()
        self.running.communicate(timeout=DEADLINE_S)


def there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


@pytest.fixture
def family(folder: Path) -> Iterator[Family]:
    made = Family(folder)
    yield made
    made.kill()


def test_engines_that_die_are_started_again_and_all_end_together(family: Family) -> None:
    """A dead engine stays away, its calls are lost, or SIGTERM leaves engines behind, or cuts what is on its way."""
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "seed": 3, "max_tokens": 12}
    words = client(family.url).chat.completions.create(**asked).choices[0].message.content
    pids = family.pids
    assert len(pids) == 2
    for pid in pids:  # one after the other: there is always one
        os.kill(pid, signal.SIGKILL)
        assert client(family.url).chat.completions.create(**asked).choices[0].message.content == words
        wait_for("it to be there again", lambda: [one["state"] for one in family.look()["engines"]] == ["ok", "ok"])
    assert [one["restarts"] for one in family.look()["engines"]] == [1, 1]
    pids = family.pids
    assert len(pids) == 2
    lines: list[str] = []

    def stream() -> None:
        body = {**asked, "stream": True, "max_tokens": 200, "ignore_eos": True, "n": 4}
        with httpx.stream("POST", f"{family.url}/v1/chat/completions", json=body, timeout=DEADLINE_S) as sent:
            lines.extend(sent.iter_lines())

    thread = threading.Thread(target=stream)
    thread.start()
    wait_for("the stream to run", lambda: any(one["on_their_way"] for one in family.look()["engines"]) or lines)
    family.running.send_signal(signal.SIGTERM)
    thread.join(DEADLINE_S)
    assert lines[-2] == "data: [DONE]" or "data: [DONE]" in lines
    assert not any('"error"' in line for line in lines)
    assert sum('"finish_reason":"length"' in line for line in lines) == 4
    _, said = family.running.communicate(timeout=DEADLINE_S)
    assert family.running.returncode == 0 and said.count("it is started again in 0.1 s") == 2
    assert not any(there(pid) for pid in pids)


def test_an_engine_that_the_system_does_not_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no memory for a process, the engine is never started again, and nobody is told."""
    begin, tries = asyncio.create_subprocess_exec, list[int]()

    async def short(*given: Any, **named: Any) -> Any:
        tries.append(1)
        if len(tries) in (2, 3):
            raise OSError(12, "Cannot allocate memory")
        return await begin(*given, **named)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", short)
    says = "print('tandem: tiny on http://127.0.0.1:1/v1', flush=True)"
    child, config = Child("engine-1", [sys.executable, "-c", says], {}), FrontConfig(restart_s=0.01, restarts=4)

    async def kept() -> Engine:
        engine = Engine("engine-1", await child.begin(DEADLINE_S), config)
        async with asyncio.timeout(DEADLINE_S):
            await keep(child, engine, config)
        return engine

    engine = asyncio.run(kept())
    assert engine.given_up and engine.counts["restarts"] == 4 and len(tries) == 5


def test_no_engine_outlives_a_killed_router(family: Family) -> None:
    """A router that is killed leaves its engines with their memory and ports."""
    pids = family.pids
    assert len(pids) == 2
    family.running.kill()
    wait_for("the engines to end", lambda: not any(there(pid) for pid in pids))


def test_what_engines_cannot_be_is_said(folder: Path, tmp_path: Path, capfd: Any) -> None:
    """A router whose engines can't start waits for them, or starts them again for ever."""
    from tandem.cli import main

    assert main.main(["serve", str(tmp_path / "none"), "--engines", "2", "--port", "0"]) == 2
    assert re.search(r"none.*\n.*ended with code 2 before it listened", capfd.readouterr().err)
    assert main.main(["route", "http://127.0.0.1:9", "--port", "0", "--set", "route.start_s=0.1"]) == 2
    assert "no engine answered within 0.1 s" in capfd.readouterr().err
    again = ["route", "http://127.0.0.1:9", "http://127.0.0.1:9/v1/", "--port", "0", "--set", "server.control=true"]
    assert main.main(again) == 2
    said = capfd.readouterr().err
    assert "named twice" in said and "has no use for server.control" in said
