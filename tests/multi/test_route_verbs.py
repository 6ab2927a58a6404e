"""Regression caught: engines behind one router serve different weights, one of them works on through a pause, or their
counts, loads and tenants are told as those of one."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from tandem.server.config import FrontConfig, ServerConfig
from tandem.server.front import shares
from tandem.server.front.engines import Engine
from tandem.server.front.front import Front
from tests.routing import Routed, Stub, plain, routed, stubs
from tests.serving import DEADLINE_S, wait_for

ASK: list[Any] = [{"role": "user", "content": "hi"}]
LOOK: dict[str, Any] = {
    "time": 1.0,
    "model": "tiny",
    "version": "0",
    "step": 0,
    "digest": "old",
    "status": "ok",
    "running": 0,
    "waiting": 0,
    "pages": {"held": 1, "cached": 2, "free": 3},
    "page_tokens": 16,
    "drawn": 5,
    "prompt": 7,
    "cached": 1,
    "preemptions": 0,
    "tenants": [],
    "programs": [],
}


def ask(router: Routed, **more: Any) -> str:
    body = {"model": "tiny", "messages": ASK, **more}
    got = httpx.post(f"{router.url}/v1/chat/completions", json=body, timeout=DEADLINE_S)
    assert got.status_code == 200, got.text
    text: str = got.json()["choices"][0]["message"]["content"]
    return text


def post(router: Routed, path: str, body: Any = None, status: int = 200) -> Any:
    got = httpx.post(router.url + path, json=body, timeout=DEADLINE_S)
    assert got.status_code == status, got.text
    return got.json()


class Weights:
    """The weights of a stub, which other ones take the place of as in tandem's own server."""

    def __init__(self, stub: Stub) -> None:
        self.stub, self.refuses, self.paused = stub, False, False
        stub.look = dict(LOOK)
        stub.verb = self

    def __call__(self, path: str, body: Any) -> tuple[int, Any]:
        look = self.stub.look
        assert look is not None
        if self.refuses:
            error = {"message": "out of memory", "type": "server_error", "param": None, "code": "delivery_failed"}
            return 500, {"error": error}
        if path in ("/finish_weight_update", "/update_weights_from_disk"):
            said = json.loads(body)
            look["step"] += 1
            look["digest"] = said.get("model_path", "parts")
            return 200, {"step": look["step"], "digest": look["digest"], "weight_version": "v"}
        if path.startswith(("/pause", "/resume")):
            self.paused = path.startswith("/pause")
            return 200, {"status": "paused" if self.paused else "resumed"}
        if path == "/is_paused":
            return 200, {"is_paused": self.paused}
        return 200, {"aborted": [self.stub.name]}


def test_verbs_go_to_all_and_say_who_failed() -> None:
    """A pause that one engine refused is told as a pause, or an answer of one stands for all."""
    with stubs(2) as engines, routed(*engines) as router:
        weights = [Weights(one) for one in engines]
        told = post(router, "/pause?mode=keep")
        assert told["status"] == "paused" and all(one.paused for one in weights)
        assert {one.verbs[0][0] for one in engines} == {"/pause?mode=keep"}
        assert told["engines"]["engine-2"] == {"status": 200, "answer": {"status": "paused"}}
        post(router, "/resume")
        for one in weights:
            assert httpx.get(f"{router.url}/is_paused").json()["is_paused"] is False
            one.paused = True
        assert httpx.get(f"{router.url}/is_paused").json()["is_paused"] is True
        assert sorted(post(router, "/abort_requests", {"request_ids": ["x"]})["aborted"]) == ["s1", "s2"]
        weights[1].refuses = True
        told = post(router, "/pause", status=500)
        assert told["error"]["code"] == "delivery_failed" and "failed at 1 of 2 engines" in told["error"]["message"]
        assert "engine-2: out of memory Done at: engine-1." in told["error"]["message"]


def test_a_verb_is_no_longer_than_a_call_but_for_weights(tmp_path: Path) -> None:
    """Who may not change weights has the router hold as much as a part of them, as often as they ask."""
    keys = "".join(
        f'[[keys]]\nkey = "sk-{name}-12345"\nadmin = {name == "root"}\n'.lower() for name in ("root", "user")
    )
    (tmp_path / "keys.toml").write_text(keys)
    limits = {"server.keys": str(tmp_path / "keys.toml"), "server.max_body_bytes": 1000, "server.max_part_bytes": 5000}
    long = b"x" * 3000

    def post_as(name: str, path: str, content: bytes) -> int:
        headers = {"authorization": f"Bearer sk-{name}-12345"}
        return httpx.post(router.url + path, content=content, headers=headers, timeout=DEADLINE_S).status_code

    with stubs(1) as engines, routed(*engines, **limits) as router:
        assert [post_as("root", path, long) for path in ("/pause", "/abort_requests", "/update_weights")] == [
            413,
            413,
            200,
        ]
        assert (post_as("root", "/update_weights", long * 2), post_as("user", "/update_weights", long)) == (413, 403)
        assert [path for path, _ in engines[0].verbs] == ["/update_weights"]
        assert [post_as(name, "/programs", b'{"mode":"shadow"}') for name in ("user", "root")] == [403, 200]


def test_an_engine_that_missed_weights_is_asked_for_nothing() -> None:
    """Answers come of old weights and new ones by turns; or no engine is asked because one missed them."""
    with stubs(2) as engines, routed(*engines) as router:
        weights = [Weights(one) for one in engines]
        weights[0].refuses = True
        for path in ("/start_weight_update",):
            post(router, path, {}, 500)
        told = post(router, "/finish_weight_update", {})
        assert told["digest"] == "parts" and told["engines"]["engine-1"]["status"] == 500
        assert not router.engines[0].ready and "missed an update" in router.engines[0].state
        assert [ask(router) for _ in range(4)] == ["s2"] * 4
        wait_for("a look", lambda: "serves weights old" in router.engines[0].state)
        assert [ask(router) for _ in range(4)] == ["s2"] * 4
        look = httpx.get(f"{router.url}/load").json()
        assert (look["digest"], look["step"]) == ("parts", 1)
        assert [one["state"].split(":")[0] for one in look["engines"]] == ["behind", "ok"]
        weights[0].refuses = False
        post(router, "/finish_weight_update", {})  # steps differ, and weights do not
        assert all(one.ready for one in router.engines)
        engines[1].end()
        wait_for("the router to see it", lambda: not router.engines[1].well)
        assert ask(router) == "s1"
        engines[0].look = dict(LOOK)  # it began anew
        wait_for("the router to see it", lambda: not router.engines[0].ready)
        assert router.front.none_left().status == 503, "the last engine serves weights of before"


def test_who_comes_back_in_a_pause_is_asked_for_nothing_before_it_is_told() -> None:
    """An engine that was away, and so has nothing to do, draws for all while the others are paused."""
    with stubs(2) as engines, routed(*engines) as router:
        weights = [Weights(one) for one in engines]
        engines[1].end()
        wait_for("it to be missed", lambda: not router.front.engines[1].well)
        post(router, "/pause?mode=keep")
        weights[1].refuses = True
        engines[1].begin(engines[1].port)
        wait_for("it to be told, in vain", lambda: router.front.engines[1].well and engines[1].verbs)
        texts = [[{"role": "user", "content": f"{n} " * 300}] for n in range(8)]
        assert {ask(router, messages=text) for text in texts[:4]} == {"s1"}
        weights[1].refuses = False
        wait_for("it to be told", lambda: weights[1].paused and router.front.engines[1].told_held)
        assert "s2" in {ask(router, messages=text) for text in texts[4:]}


def test_weights_of_a_folder_reach_who_was_away() -> None:
    """An engine that begins anew serves old weights, or is never asked again."""
    with stubs(2) as engines, routed(*engines) as router:
        weights = [Weights(one) for one in engines]
        wait_for("looks", lambda: all(one.served for one in router.engines))
        port = engines[0].port
        engines[0].end()
        wait_for("the router to see it", lambda: not router.engines[0].well)
        post(router, "/update_weights_from_disk", {"model_path": "new"})
        post(router, "/pause")
        assert weights[1].paused and not weights[0].paused
        engines[0].look = dict(LOOK)
        engines[0].begin(port)
        wait_for("it to have them", lambda: engines[0].look and engines[0].look["digest"] == "new")
        wait_for("it to be asked", lambda: router.engines[0].ready)
        assert weights[0].paused
        assert [path for path, _ in engines[0].verbs].count("/update_weights_from_disk") == 1
        engines[1].end()
        wait_for("the router to see it", lambda: not router.engines[1].well)
        post(router, "/resume")
        assert ask(router) == "s1"


def test_adapters_reach_all_and_who_was_away(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An adapter that one engine of several has, whose callers are told by turns that there is none; another one under
    its name, of a folder that was written anew since, or that is not the same everywhere."""
    monkeypatch.setattr("tandem.server.front.front.CATCH_UP_S", 0.2)
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    had: dict[str, dict[str, str]] = {"s1": {}, "s2": {}}
    digests = {"s1": "d", "s2": "d"}

    def act(handler: Any, body: Any) -> None:
        if handler.path not in (load, unload):
            plain(handler, body)
        elif body.get("lora_path") == f"missing at {handler.engine.name}":
            error = {"message": "is no adapter", "type": "x", "param": None, "code": "model_error"}
            handler.tell(400, {"error": error})
        elif handler.path == unload:
            there = had[handler.engine.name].pop(body["lora_name"], None)
            handler.tell(200 if there else 404, {"status": "unloaded"})
        else:
            had[handler.engine.name][body["lora_name"]] = body["lora_path"]
            handler.tell(200, {"status": "loaded", "digest": digests[handler.engine.name]})

    with stubs(2) as engines, routed(*engines) as router:
        for one in engines:
            one.acts = act
        assert post(router, load, {"lora_name": "a", "lora_path": "x"})["status"] == "loaded"
        assert had == {"s1": {"a": "x"}, "s2": {"a": "x"}}
        told = post(router, load, {"lora_name": "b", "lora_path": "missing at s2"}, status=400)
        assert "engine-2: is no adapter Done at: engine-1." in told["error"]["message"]
        assert all(one.ready for one in router.engines)
        port = engines[0].port
        engines[0].end()
        wait_for("the router to see it", lambda: not router.engines[0].well)
        post(router, load, {"lora_name": "c", "lora_path": "missing at s1"})
        had["s1"] = {}
        engines[0].begin(port)
        wait_for("it to have one", lambda: router.engines[0].state == "behind: it has not loaded c")
        assert ask(router) == "s2" and had["s1"] == {"a": "x"}
        post(router, unload, {"lora_name": "c"})
        assert had == {"s1": {"a": "x"}, "s2": {"a": "x"}} and router.engines[0].ready
        post(router, unload, {"lora_name": "a"})
        post(router, unload, {"lora_name": "a"}, status=404)
        assert had == {"s1": {}, "s2": {}}
        post(router, load, {"lora_name": "a", "lora_path": "x"})
        engines[0].end()
        wait_for("the router to see it", lambda: not router.engines[0].well)
        had["s1"], digests["s1"] = {}, "e"
        engines[0].begin(port)
        why = "behind: its adapter a hashes to e, and what was loaded first to d"
        wait_for("it to have another", lambda: router.engines[0].state == why)
        assert ask(router) == "s2" and had["s1"] == {"a": "x"} and "engine-1 is asked for nothing" in caplog.text
        digests["s1"] = "d"
        wait_for("it to have the same", lambda: router.engines[0].ready)
        digests["s1"] = ""
        assert post(router, load, {"lora_name": "b", "lora_path": "x"})["digest"] == ""
        assert [one.ready for one in router.engines] == [True, False] and ask(router) == "s1"


def test_weights_that_another_router_brought_are_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two routers before the same engines, one asks an engine of old weights, or brings them back."""
    monkeypatch.setattr("tandem.server.front.front.CATCH_UP_S", 0.2)
    with stubs(2) as engines, routed(*engines) as one, routed(*engines) as other:
        weights = [Weights(stub) for stub in engines]
        wait_for("looks", lambda: all(engine.served for router in (one, other) for engine in router.engines))
        post(one, "/update_weights_from_disk", {"model_path": "first"})
        wait_for("the other to hear", lambda: other.front.had_digest == "first")
        weights[0].refuses = True
        post(other, "/update_weights_from_disk", {"model_path": "second"})
        wait_for("the one to hear", lambda: one.front.had_digest == "second")
        wait_for("it to see who missed them", lambda: not one.engines[0].ready)
        assert [ask(one) for _ in range(3)] == ["s2"] * 3 == [ask(other) for _ in range(3)]
        weights[0].refuses = False
        wait_for("it to be given them", lambda: one.engines[0].ready and other.engines[0].ready)
        assert [look["digest"] for stub in engines if (look := stub.look)] == ["second", "second"]
        brought = [json.loads(body)["model_path"] for _, body in engines[0].verbs]
        assert "first" not in brought[brought.index("second") :]


def test_looks_and_counts_are_those_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine's load stands for all, a count falls as an engine begins anew, or a tenant sees another's."""
    text = """# HELP vllm:generation_tokens_total Tokens drawn.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{model_name="tiny",engine="0"}} {0}.0
# HELP vllm:generation_tokens_created Tokens drawn.
# TYPE vllm:generation_tokens_created gauge
vllm:generation_tokens_created{{model_name="tiny",engine="0"}} 1.7e9
# HELP vllm:kv_cache_usage_perc Share.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{model_name="tiny",engine="0"}} 0.{0}
# HELP vllm:num_requests_running Running.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{model_name="tiny",engine="0"}} {0}.0
# HELP tandem:weight_version Updates.
# TYPE tandem:weight_version gauge
tandem:weight_version{{model_name="tiny",engine="0"}} {0}.0
# HELP vllm:e2e_request_latency_seconds Whole.
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{{le="2.5"}} 1.0
vllm:e2e_request_latency_seconds_bucket{{le="10.0"}} 2.0
vllm:e2e_request_latency_seconds_bucket{{le="+Inf"}} {0}.0
vllm:e2e_request_latency_seconds_count {0}.0
vllm:e2e_request_latency_seconds_sum 2.0
"""
    keys = tmp_path / "keys.toml"
    keys.write_text('[[keys]]\nkey = "sk-search-1"\ntenant = "acme"\n')
    monkeypatch.setenv("TANDEM_API_KEY", "sk-of-the-house")
    house, acme = {"authorization": "Bearer sk-of-the-house"}, {"authorization": "Bearer sk-search-1"}

    with stubs(2) as engines:
        for number, stub in enumerate(engines, start=1):
            rows = [{"running": 1, "answers": 2, "tokens": 3, "context": number, "idle_s": number}]
            tenants = [{**rows[0], "name": name, "tenant": name} for name in ("acme", "globex")]
            stub.look = {**LOOK, "running": number, "tenants": tenants, "programs": []}
        engines[0].metrics, engines[1].metrics = text.format(3), text.format(4)
        with routed(*engines, **{"server.keys": str(keys)}) as router:

            def get(path: str, headers: dict[str, str] | None = None) -> httpx.Response:
                return httpx.get(router.url + path, headers=headers, timeout=DEADLINE_S)

            look = get("/load", house).json()
            assert (look["running"], look["drawn"], look["pages"]) == (3, 10, {"held": 2, "cached": 4, "free": 6})
            row = {"name": "acme", "tenant": "acme", "running": 2, "answers": 4, "tokens": 6, "context": 2, "idle_s": 1}
            assert look["tenants"][0] == row and len(look["tenants"]) == 2 and look["status"] == "ok"
            assert [one["name"] for one in look["engines"]] == ["engine-1", "engine-2"]
            assert [one["name"] for one in get("/load", acme).json()["tenants"]] == ["acme"]
            assert get("/load").status_code == 401 and get("/v1/models").status_code == 401
            assert get("/health").status_code == 200 and b"<!doctype html>" in get("/").content
            denied = httpx.post(f"{router.url}/drain", json={"engine": "engine-1"}, headers=acme)
            assert denied.status_code == 403 and denied.json()["error"]["code"] == "admin_only"

            def count(name: str, **labels: str) -> float:
                told = get("/metrics", house).text
                found = re.findall(rf"^{re.escape(name)}(\{{.*\}})? (\S+)$", told, re.MULTILINE)
                return next(
                    float(value) for said, value in found if all(f'{k}="{v}"' in said for k, v in labels.items())
                )

            total = "vllm:generation_tokens_total"
            assert (count(total), count("vllm:num_requests_running")) == (7, 7)
            assert (count("vllm:kv_cache_usage_perc"), count("tandem:weight_version")) == (0.35, 4)
            assert count("vllm:e2e_request_latency_seconds_bucket", le="+Inf") == 7
            order = re.findall(r'seconds_bucket\{le="(.*?)"\}', get("/metrics", house).text)
            assert order == ["2.5", "10.0", "+Inf"]
            assert count("tandem:route_up", engine="engine-2") == 1
            engines[0].metrics = text.format(1)  # it began anew
            assert (count(total), count("vllm:num_requests_running")) == (3 + 1 + 4, 5)
            engines[0].end()
            assert (count(total), count("vllm:num_requests_running")) == (8, 4)


def test_an_engine_that_asks_for_another_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that may not ask its engines starts, and says that they fail."""
    from tandem.errors import ConfigError

    with stubs(1) as engines:
        served = engines[0].server.RequestHandlerClass.do_GET

        def guarded(handler: Any) -> None:
            if handler.path == "/v1/models" and handler.headers.get("authorization") != "Bearer sk-of-theirs":
                handler.tell(401, {"error": {"message": "no key", "code": "missing_api_key"}})
            else:
                served(handler)

        monkeypatch.setattr(engines[0].server.RequestHandlerClass, "do_GET", guarded)
        with pytest.raises(ConfigError, match="Set TANDEM_API_KEY to that of an admin"):
            Routed([engines[0].url]).start()
        monkeypatch.setenv("TANDEM_API_KEY", "sk-of-theirs")
        with routed(*engines) as router:
            assert router.front.model == "tiny"


def test_calls_go_where_their_prefix_is() -> None:
    """A conversation goes on at an engine that has nothing of it; or all go to one while another idles."""
    with stubs(3) as engines, routed(*engines) as router:
        for one in engines:
            one.acts = plain
        opening = [{"role": "system", "content": f"You are number {{}}. {'Be kind. ' * 60}"}]
        first = {}
        for number in range(6):
            said = [{"role": "system", "content": opening[0]["content"].format(number)}, *ASK]
            first[number] = ask(router, messages=said)
        assert {list(first.values()).count(f"s{number}") for number in (1, 2, 3)} == {2}
        for turn in range(3):
            for number, engine in first.items():
                said = [{"role": "system", "content": opening[0]["content"].format(number)}, *ASK]
                said += [{"role": "assistant", "content": engine}, {"role": "user", "content": f"and {turn}"}]
                assert ask(router, messages=said) == engine
        ids = {"input_ids": list(range(1000)), "sampling_params": {"max_new_tokens": 4}}
        homes = []
        for more in ([], [7], [7, 8]):
            body = {**ids, "input_ids": [*range(1000), *more]}
            homes.append(httpx.post(f"{router.url}/generate", json=body).json()["choices"][0]["message"]["content"])
        assert len(set(homes)) == 1


def test_a_program_stays_where_it_is_while_there_is_room() -> None:
    """A program's turn goes elsewhere because another's prefix is longer there, or stays where there is no room."""
    with stubs(2) as engines, routed(*engines) as router:
        home = ask(router, program_id="p")
        other = next(one.name for one in engines if one.name != home)
        assert ask(router, messages=[{"role": "user", "content": "x" * 4000}]) == other
        long: Any = [{"role": "user", "content": "x" * 4000}, *ASK]
        assert ask(router, messages=long, program_id="p") == home
        assert ask(router, messages=long) == other
        go = threading.Event()
        where = next(one for one in engines if one.name == home)

        def acts(handler: Any, body: Any) -> None:
            assert go.wait(DEADLINE_S)
            plain(handler, body)

        where.acts = acts
        got: list[str] = []
        big = threading.Thread(target=lambda: got.append(ask(router, program_id="p", max_tokens=150_000)))
        big.start()
        wait_for("it to arrive", lambda: len(where.asked) > 2)
        assert ask(router, program_id="p") == other, "it waits behind more than the engine holds"
        go.set()
        big.join(DEADLINE_S)
        assert got == [home]


def test_engines_that_tell_no_shares_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """Tenants have the shares of one engine, and nobody is told why; or somebody is, every second."""
    terms = {"a": {"weight": 4.0, "guarantee": 0.0, "cap": 1.0}}
    says: list[tuple[int, Any]] = [(200, {"loads": {"a": 1.0}, "terms": terms})] * 2 + [(403, {}), (404, {})]
    told: list[str] = []

    class Client:
        def __init__(self, number: int) -> None:
            self.number, self.name = number, f"e{number}"

        async def told(self, method: str, path: str, *given: Any) -> tuple[int, bytes]:
            told.append(f"{method} {self.name}")
            status, said = says[self.number]
            return status, json.dumps(said).encode()

    engines = [Engine(f"e{number}", "http://127.0.0.1:1", FrontConfig()) for number in range(4)]
    for number, one in enumerate(engines):
        one.well, one.client = True, Client(number)  # type: ignore[assignment]
    front = Front(engines, ServerConfig(), FrontConfig())
    for _ in range(3):
        asyncio.run(shares.once(front))
    assert told.count("POST e0") == told.count("POST e1") == 3 and len(told) == 18
    says[1] = (200, {"loads": {}, "terms": {"a": {"weight": 1.0, "guarantee": 0.0, "cap": 1.0}}})
    for _ in range(3):
        asyncio.run(shares.once(front))
    refused, other = [record.getMessage() for record in caplog.records]
    assert "engine e2: it tells no shares" in refused and "TANDEM_API_KEY" in refused
    assert "engine e1: it has another tree of tenants (engine.shares) than e0" in other
