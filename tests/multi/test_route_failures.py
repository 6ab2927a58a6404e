"""Regression caught: an engine that dies, hangs, refuses or is slow loses a call, gives it twice, or takes the rest."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.routing import Routed, Stub, chat, delta, plain, routed, stubs
from tests.serving import DEADLINE_S, wait_for

ASK: list[Any] = [{"role": "user", "content": "hi"}]
Act = Callable[[Any, Any], None]


def ask(router: Routed, **more: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": ASK, **more}
    return httpx.post(f"{router.url}/v1/chat/completions", json=body, timeout=DEADLINE_S)


def client(router: Routed) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S)


def said(router: Routed, streams: bool, **more: Any) -> str:
    """What a client of OpenAI's gets."""
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, **more}
    if not streams:
        return client(router).chat.completions.create(**asked).choices[0].message.content or ""
    chunks = client(router).chat.completions.create(**asked, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def dies(handler: Any, body: Any) -> None:
    """Before a byte."""
    handler.cut()


def dies_in_head(handler: Any, body: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-type: appl")
    handler.cut()


def dies_in_body(handler: Any, body: Any) -> None:
    """A stream's first event is not whole."""
    content = json.dumps(chat("half an answer")).encode()
    if body.get("stream"):
        handler.stream()
        handler.chunk(b": waiting\n\n")
        handler.chunk(delta("lost")[:30])
    else:
        handler.send_response(200)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:40])
    handler.cut()


def hangs(handler: Any, body: Any) -> None:
    """With all else: it answers nothing until its client is gone."""
    handler.engine.health = lambda other: other.gone()
    handler.gone()
    handler.close_connection = True


def fails(handler: Any, body: Any) -> None:
    handler.tell(500, {"error": {"message": "secret", "type": "server_error", "param": None, "code": "engine_failed"}})


def no_http(handler: Any, body: Any) -> None:
    handler.wfile.write(b"what?\r\n\r\n")
    handler.cut()


def full(handler: Any, body: Any) -> None:
    handler.tell(429, {"error": {"message": "no room", "type": "x", "param": None, "code": "rate_limit_exceeded"}})


def ending(handler: Any, body: Any) -> None:
    handler.tell(503, {"error": {"message": "about to end", "type": "x", "param": None, "code": "draining"}})


FAULTS: dict[str, Act] = {
    "dies": dies,
    "dies in its head": dies_in_head,
    "dies in its body": dies_in_body,
    "hangs": hangs,
    "fails": fails,
    "no HTTP": no_http,
    "full": full,
    "ending": ending,
}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_one_engine_fails_at_another_answers(fault: str, streams: bool) -> None:
    """A call that no word was said to is lost with its engine, or half an answer is given as a whole one."""
    with stubs(2) as engines, routed(*engines) as router:
        first: list[Stub] = []  # the engine that is asked first; it always fails

        def acts(handler: Any, body: Any) -> None:
            first.append(handler.engine)
            (FAULTS[fault] if handler.engine is first[0] else plain)(handler, body)

        engines[0].acts = engines[1].acts = acts
        got = said(router, streams)
        assert got.rstrip(".") == next(one.name for one in engines if one is not first[0])
        wait_for("the call to be forgotten", lambda: router.front.open == 0)
        assert not any(one.open or one.tokens or one.answers for one in router.engines)


@pytest.mark.parametrize("fault", ["dies", "fails", "full"])
def test_what_all_fail_at_is_said_and_not_tried_for_ever(fault: str) -> None:
    """A call that engines die of goes round all of them, or its client hears nothing."""
    with stubs(4) as engines, routed(*engines) as router:
        for one in engines:
            one.acts = FAULTS[fault]
        got = ask(router)
        asked = sum(bool(one.asked) for one in engines)
        if fault == "full":  # nobody is hurt by asking all
            assert (got.status_code, asked) == (429, 4) and got.json()["error"]["code"] == "rate_limit_exceeded"
        else:
            assert asked == 2, "route.deaths"
            code = got.json()["error"]["code"]
            assert (got.status_code, code) == ((500, "engine_failed") if fault == "fails" else (502, "engines_failed"))
        for one in engines:
            one.acts = plain
        wait_for("the engines to be well", lambda: all(one.ready for one in router.engines))
        assert ask(router).status_code == 200


def breaks(handler: Any, body: Any) -> None:
    """After two words and a half."""
    handler.stream()
    handler.chunk(delta("one ") + delta("two "))
    handler.chunk(delta("three")[:25])
    handler.cut()


def silent(handler: Any, body: Any) -> None:
    handler.stream()
    handler.chunk(delta("one ") + delta("two "))
    handler.gone()
    handler.close_connection = True


@pytest.mark.parametrize("act", [breaks, silent])
def test_a_stream_that_breaks_ends_with_an_error(act: Act) -> None:
    """A stream that lost its engine looks as if it had ended, begins again, or hangs."""
    with stubs(2) as engines, routed(*engines, **{"route.silence_s": 0.5}) as router:
        for one in engines:
            one.acts = act
        words: list[str] = []
        with pytest.raises(openai.APIError, match="lost amid the answer"):
            for chunk in client(router).chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True
            ):
                words.append(chunk.choices[0].delta.content or "")
        assert words == ["one ", "two "] and sum(len(one.asked) for one in engines) == 1
        wait_for("the call to be forgotten", lambda: router.front.open == 0)
        with httpx.stream("POST", f"{router.url}/v1/chat/completions", json={"messages": ASK, "stream": True}) as sent:
            raw = b"".join(sent.iter_raw())
        assert raw.startswith(delta("one ") + delta("two ") + b'data: {"error":') and raw.endswith(b"data: [DONE]\n\n")


def test_streams_are_passed_on_byte_for_byte_as_they_come() -> None:
    """Events are gathered, cut or written anew on the way."""
    parts = [
        b": waiting\n\n",
        delta("é")[:-9],
        delta("é")[-9:] + delta("b"),
        b"event: x\r\ndata: 1\r\n\r\n",
        b"left over",
    ]
    go = threading.Event()

    def acts(handler: Any, body: Any) -> None:
        handler.stream()
        for place, part in enumerate(parts):
            handler.chunk(part)
            if place == 2:
                assert go.wait(DEADLINE_S)
        handler.chunk(b"")

    with stubs(1) as engines, routed(*engines) as router:
        engines[0].acts = acts
        body = {"messages": ASK, "stream": True}
        got = b""
        with httpx.stream("POST", f"{router.url}/v1/chat/completions", json=body, timeout=DEADLINE_S) as sent:
            assert sent.headers["content-type"].startswith("text/event-stream")
            for part in sent.iter_raw():
                got += part
                if got == b"".join(parts[:3]):
                    go.set()
        assert got == b"".join(parts)
        assert engines[0].asked == [body]


def test_bodies_headers_and_errors_are_passed_on() -> None:
    """A call reaches its engine otherwise than it was sent, or its refusal is another one."""
    seen: list[Any] = []

    def acts(handler: Any, body: Any) -> None:
        seen.append((handler.path, dict(handler.headers)))
        handler.tell(422, b'{"odd":  1}', {"x-odd": "yes", "retry-after": "7"})

    with stubs(1) as engines, routed(*engines) as router:
        engines[0].acts = acts
        headers = {"authorization": "Bearer sk-own", "x-program-id": "p", "x-request-id": "r"}
        got = httpx.post(f"{router.url}/v1/odd/path?a=%20b", json={"any": 1}, headers=headers)
        assert (got.status_code, got.content) == (422, b'{"odd":  1}')
        assert got.headers["x-odd"] == "yes" and got.headers["retry-after"] == "7"
        path, sent = seen[0]
        assert path == "/v1/odd/path?a=%20b" and sent["host"] == f"127.0.0.1:{engines[0].port}"
        assert {name: sent[name] for name in headers} == headers
        engines[0].acts = lambda handler, body: handler.tell(200, json.dumps(body).encode())
        large = {"prompt": "x" * (4 << 20)}
        assert httpx.post(f"{router.url}/v1/completions", json=large, timeout=DEADLINE_S).json() == large
        assert httpx.get(f"{router.url}/nowhere").json()["error"]["code"] == "not_found"
        assert httpx.get(f"{router.url}/generate").status_code == 405
        assert httpx.get(f"{router.url}/v1/nothing").json()["error"]["message"] == "no such path"


@pytest.mark.parametrize("streams", [False, True])
def test_who_goes_away_withdraws_the_call(streams: bool) -> None:
    """The answer of a client that has gone is drawn to its end, or asked of another engine."""
    left = threading.Event()

    def acts(handler: Any, body: Any) -> None:
        if body.get("stream"):
            handler.stream()
            handler.chunk(delta("one"))
        if handler.gone():
            left.set()
        handler.close_connection = True

    with stubs(2) as engines, routed(*engines) as router:
        for one in engines:
            one.acts = acts
        body = {"messages": ASK, "stream": streams}
        if streams:
            with httpx.stream("POST", f"{router.url}/v1/chat/completions", json=body, timeout=DEADLINE_S) as sent:
                next(sent.iter_raw())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{router.url}/v1/chat/completions", json=body, timeout=0.3)
        assert left.wait(DEADLINE_S), "the engine's client is there still"
        wait_for("the call to be forgotten", lambda: router.front.open == 0)
        assert sum(len(one.asked) for one in engines) == 1
        assert all(one.ready for one in router.engines), "an engine is blamed for a client that left"


def test_an_engine_that_is_away_is_not_asked_and_again_when_it_is_back() -> None:
    """Calls go to an engine that is gone, or never again to one that came back."""
    with stubs(2) as engines, routed(*engines) as router:
        port = engines[0].port
        engines[0].end()
        wait_for("the router to see it", lambda: not router.engines[0].ready)
        for _ in range(4):
            assert said(router, False) == "s2"
        engines[0].asked.clear()
        assert httpx.get(f"{router.url}/health").status_code == 200
        engines[1].end()
        wait_for("the router to see it", lambda: not router.engines[1].ready)
        got = ask(router)
        assert got.status_code == 503 and got.json()["error"]["code"] == "no_engine"
        assert got.headers["retry-after"] == "1" and "Connection refused" in got.text
        assert httpx.get(f"{router.url}/health").status_code == 503
        engines[0].begin(port)
        wait_for("the router to see it", lambda: router.engines[0].ready)
        assert said(router, False) == "s1"
        engines[1].ended.set()


def test_an_engine_that_died_under_a_call_is_not_asked_by_the_next() -> None:
    """Each call until the next look at the engines tries the dead one first."""
    with stubs(2) as engines, routed(*engines, **{"route.health_s": 60}) as router:
        engines[0].acts = dies
        for number in range(6):  # each of another prefix, so that either engine may be asked
            assert said(router, False, messages=[{"role": "user", "content": f"{number} " * 300}]) == "s2"
        assert router.engines[0].counts["failed"] == 1


def test_a_kept_connection_that_was_closed_costs_no_call() -> None:
    """A call that crosses the end of a kept connection is taken for the engine's death."""

    def acts(handler: Any, body: Any) -> None:
        if getattr(handler, "used", False):
            handler.cut()
        else:
            handler.used = True
            plain(handler, body)

    with stubs(1) as engines, routed(*engines, **{"route.health_s": 60}) as router:
        engines[0].acts = acts
        for _ in range(4):
            assert said(router, False) == "s1"
        assert router.engines[0].counts["failed"] == 0 and len(engines[0].asked) > 4


def test_who_reads_slowly_holds_the_engine_back() -> None:
    """The answer to a client that reads slowly fills the router's memory, or stops for ever."""
    wrote = [0]
    block = delta("x" * (1 << 16))

    def acts(handler: Any, body: Any) -> None:
        handler.stream()
        for count in range(1000):
            handler.chunk(block)
            wrote[0] = count + 1
        handler.chunk(b"")

    with stubs(1) as engines, routed(*engines) as router:
        engines[0].acts = acts
        body = {"messages": ASK, "stream": True}
        with httpx.stream("POST", f"{router.url}/v1/chat/completions", json=body, timeout=DEADLINE_S) as sent:
            parts = sent.iter_raw()
            got, seen = len(next(parts)), 0
            while seen != wrote[0]:  # until nothing goes on
                seen = wrote[0]
                threading.Event().wait(0.3)
            assert seen < 900
            got += sum(map(len, parts))
        assert got == 1000 * len(block)


def test_an_engine_that_drains_or_fails_keeps_what_it_has() -> None:
    """An engine that says that it is about to end loses its answers, or is given more."""
    go = threading.Event()

    def acts(handler: Any, body: Any) -> None:
        assert go.wait(DEADLINE_S)
        plain(handler, body)

    with stubs(2) as engines, routed(*engines) as router:
        for one in engines:
            one.acts = acts
        got: list[str] = []
        thread = threading.Thread(target=lambda: got.append(said(router, False)))
        thread.start()
        wait_for("the call to arrive", lambda: any(one.asked for one in engines))
        has = next(one for one in engines if one.asked)
        other = next(one for one in engines if one is not has)
        has.health = lambda handler: handler.tell(503, {"status": "draining"})
        place = engines.index(has)
        wait_for("the router to see it", lambda: router.engines[place].said == "draining")
        other.acts = plain
        assert said(router, False) == other.name
        assert len(has.asked) == 1 and not got
        go.set()
        thread.join(DEADLINE_S)
        assert got == [has.name]


def test_drain_of_one_engine() -> None:
    """An engine that an admin drains is asked for more, or can't be had back."""
    with stubs(2) as engines, routed(*engines) as router:
        for name in ("engine-1", router.engines[0].client.url):
            told = httpx.post(f"{router.url}/drain", json={"engine": name}).json()
            assert told == {"engine": "engine-1", "state": "draining", "on_their_way": 0}
        assert [said(router, False) for _ in range(3)] == ["s2"] * 3
        assert httpx.post(f"{router.url}/undrain", json={"engine": "engine-1"}).json()["state"] == "ok"
        httpx.post(f"{router.url}/drain", json={"engine": "engine-2"})
        assert [said(router, False) for _ in range(3)] == ["s1"] * 3
        for body, code in (
            ({"engine": "x"}, "no_such_engine"),
            ({"engin": "x"}, "unknown_parameter"),
            ([], "invalid_type"),
        ):
            assert httpx.post(f"{router.url}/drain", json=body).json()["error"]["code"] == code


def test_limits_of_the_router() -> None:
    """More calls than may be, or a body without end, are taken."""
    go = threading.Event()

    def acts(handler: Any, body: Any) -> None:
        assert go.wait(DEADLINE_S)
        plain(handler, body)

    with stubs(1) as engines, routed(*engines, **{"server.max_requests": 1, "server.max_body_bytes": 2000}) as router:
        engines[0].acts = acts
        thread = threading.Thread(target=ask, args=(router,))
        thread.start()
        wait_for("the call to arrive", lambda: engines[0].asked)
        got = ask(router)
        assert got.status_code == 429 and got.headers["retry-after"] == "1" and "server.max_requests" in got.text
        go.set()
        thread.join(DEADLINE_S)
        wait_for("it to end", lambda: router.front.open == 0)
        assert ask(router, user="x" * 3000).status_code == 413
        assert ask(router).status_code == 200 and router.front.open == 0


def test_a_head_takes_no_engine_away() -> None:
    """Who asks for the head of an answer alone has the router wait for a body, and take its engines for lost."""
    with stubs(2) as engines, routed(*engines) as router:
        got = httpx.head(f"{router.url}/v1/models", timeout=DEADLINE_S)
        assert got.status_code == 405
        assert httpx.head(f"{router.url}/health", timeout=DEADLINE_S).status_code == 200
        assert all(one.counts["failed"] == 0 and one.well for one in router.front.engines)
        assert httpx.get(f"{router.url}/v1/models", timeout=DEADLINE_S).status_code == 200


def test_a_bound_beyond_all_numbers_goes_to_an_engine() -> None:
    """A number that no float holds is an error of the router's own, and of all calls beside it."""
    with stubs(2) as engines, routed(*engines) as router:
        assert ask(router, max_tokens=10**400).status_code == 200
        assert ask(router, n=10**400).status_code == 200


def test_engines_of_two_models_are_refused() -> None:
    """Calls of one model are answered by another, or a router without an engine starts."""
    from tandem.errors import ConfigError

    one, two = Stub("one"), Stub("two", "other")
    with pytest.raises(ConfigError, match="must serve one model"):
        Routed([one.url, two.url]).start()
    two.model, two.look = "tiny", {"step": 0, "digest": "b"}
    one.look = {"step": 0, "digest": "a"}
    with pytest.raises(ConfigError, match="must serve the same weights"):
        Routed([one.url, two.url]).start()
    for stub in (one, two):
        stub.end()
    with pytest.raises(ConfigError, match=r"no engine answered within 0.5 s .*Connection refused"):
        Routed([one.url], **{"route.start_s": 0.5}).start()
    for url in ("ftp://a", "http://", "http://a:b", "http://user@a"):
        with pytest.raises(ConfigError, match="is no address of a server"):
            Routed([url])


def test_the_router_drains() -> None:
    """What is on its way when the router is told to end is lost, or waited for without end."""
    go = threading.Event()

    def acts(handler: Any, body: Any) -> None:
        handler.stream()
        handler.chunk(delta("one"))
        if body["messages"][0]["content"] == "ends":
            assert go.wait(DEADLINE_S)
            handler.chunk(b"data: [DONE]\n\n")
            handler.chunk(b"")
        else:
            handler.gone()

    with stubs(1) as engines, routed(*engines, **{"server.drain_s": 1}) as router:
        engines[0].acts = acts
        ends: list[bytes] = []

        def stream(content: str) -> None:
            body = {"messages": [{"role": "user", "content": content}], "stream": True}
            with httpx.stream("POST", f"{router.url}/v1/chat/completions", json=body, timeout=DEADLINE_S) as sent:
                ends.append(b"".join(sent.iter_raw()))

        threads = [threading.Thread(target=stream, args=(content,)) for content in ("ends", "never")]
        for thread in threads:
            thread.start()
        wait_for("both to be asked", lambda: len(engines[0].asked) == 2)
        assert router.listener is not None
        router.listener._loop.call_soon_threadsafe(router.listener.end)
        wait_for("it to drain", lambda: router.front.draining)
        assert ask(router).status_code == 503
        go.set()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert sorted(b"[DONE]" in end and b"the router ends" in end for end in ends) == [False, True]
        router.thread.join(DEADLINE_S)
        assert not router.thread.is_alive()


def test_an_answer_that_is_not_there_as_the_router_ends_is_refused() -> None:
    """A call that waits for an engine is asked of another as the router ends, and its client is told nothing."""
    with stubs(2) as engines, routed(*engines, **{"server.drain_s": 0.5}) as router:
        assert (
            ask(router).status_code == 200
        )  # its connection is kept, and could be taken for one that the engine ended
        for engine in engines:
            engine.asked.clear()
            engine.acts = lambda handler, body: handler.gone()
        with ThreadPoolExecutor() as threads:
            asked = threads.submit(ask, router)
            wait_for("the call to arrive", lambda: any(engine.asked for engine in engines))
            assert router.listener is not None
            router.listener._loop.call_soon_threadsafe(router.listener.end)
            got = asked.result(DEADLINE_S)
        assert got.status_code == 503 and got.json()["error"]["code"] == "draining" and "the router ends" in got.text
        assert sum(len(engine.asked) for engine in engines) == 1
        router.thread.join(DEADLINE_S)
        assert not router.thread.is_alive()
