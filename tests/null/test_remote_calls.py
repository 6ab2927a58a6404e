"""Calls of servers: one that outlives its deadline, hides an error, or takes half an answer for a whole."""

from __future__ import annotations

import threading
import time

import pytest

from tandem.run import remote_calls
from tandem.run.remote_calls import Call, CallError, Server
from tests.stub import Said, stub


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_calls, "PAUSES_S", (0.01, 0.02))
    monkeypatch.setattr(remote_calls, "BUSY_S", 0.01)


def failed(call: Call) -> CallError:
    with pytest.raises(CallError) as caught:
        call.result()
    return caught.value


def test_an_answer_is_read_and_a_key_goes_along() -> None:
    """A body that is sent otherwise than as JSON, a key that is left out, or a path behind /v1 twice."""
    with stub(lambda path, body: {"path": path, "body": body}) as server:
        asked = Server(f"{server.url}/v1/", "secret")
        assert asked.ask("/v1/models", within_s=10) == {"path": "/v1/models", "body": None}
        assert asked.ask("/generate", {"input_ids": (1, 2)}, within_s=10)["body"] == {"input_ids": [1, 2]}
        assert [head["Authorization"] for head in server.heads] == ["Bearer secret"] * 2


SAID: dict[str, tuple[Said, str]] = {
    "OpenAI's error": (Said({"error": {"message": "no such token", "code": 3}}, 400), "answered 400: no such token"),
    "FastAPI's error": (Said({"detail": "Not Found"}, 404), "answered 404: Not Found"),
    "vLLM's error": (Said({"error": "engine is dead"}, 500), "answered 500: engine is dead"),
    "HTML": (Said(sent=b"<html>gateway</html>"), "what is no JSON"),
    "cut": (Said(sent=b'{"a": 1', length=100), "cut, 93 bytes before its end"),
    "nothing at all": (Said(status=500, sent=b""), "answered 500: nothing more"),
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_no_answer_is_an_error_with_its_words(name: str) -> None:
    """An error of a server that is taken for an answer, or whose words do not reach the user."""
    said, words = SAID[name]
    with stub(lambda path, body: said) as server:
        error = failed(Server(server.url).begin("/generate", {}, 10))
    assert words in str(error) and f"{server.url}/generate" in str(error)


def test_who_is_away_is_asked_again_and_who_refuses_is_not() -> None:
    """A server that starts again ends the run, a refusal is repeated, or a call that changes things is made twice."""
    came = [Said(status=503), Said(status=502), Said({"fine": 1})]
    with stub(lambda path, body: came.pop(0)) as server:
        assert Server(server.url).begin("/generate", {}, 10, again=True).result() == {"fine": 1}
    for again, times, status in ((True, 3, 503), (False, 1, 503), (True, 1, 400)):
        with stub(lambda path, body, status=status: Said(status=status)) as server:
            assert failed(Server(server.url).begin("/generate", {}, 10, again)).status == status
            assert len(server.asked) == times


def test_a_full_server_is_asked_until_it_has_room() -> None:
    """A 429 that fails a request, where waiting would do; or a wait without an end."""
    came = [Said(status=429, headers={"retry-after": "0"})] * 20 + [Said({"fine": 1})]
    with stub(lambda path, body: came.pop(0)) as server:
        assert Server(server.url).begin("/generate", {}, 10, again=True).result() == {"fine": 1}
    with stub(lambda path, body: Said(status=429, headers={"retry-after": "0"})) as server:
        assert "0.3 s" in str(failed(Server(server.url).begin("/generate", {}, 0.3, again=True)))


@pytest.mark.parametrize("how", ["says nothing", "trickles"])
def test_no_call_outlives_its_deadline(how: str) -> None:
    """A server that takes a call and never ends it holds the run for ever, a byte a while included."""
    gate = threading.Event()
    says = Said({"long": "x" * 1000}, trickles_s=0.05) if how == "trickles" else Said({}, pause=gate)
    with stub(lambda path, body: says) as server:
        before_s = time.monotonic()
        call = Server(server.url).begin("/generate", {}, 0.5, again=True)
        assert "within 0.5 s" in str(failed(call))
        assert time.monotonic() - before_s < 20
        with pytest.raises(CallError):  # its thread ends too
            call.future.result(20)
        gate.set()


def test_a_call_that_is_given_up_ends_at_once() -> None:
    """An aborted request keeps a thread and a connection until the server answers."""
    gate, closed = threading.Event(), Said({}, pause=threading.Event())
    with stub(lambda path, body: gate.set() or closed) as server:
        call = Server(server.url).begin("/generate", {}, 60, again=True)
        assert gate.wait(10)
        call.cancel()
        with pytest.raises(CallError, match="given up"):
            call.future.result(20)
        assert closed.pause is not None
        closed.pause.set()


def test_nobody_there() -> None:
    """A server that is absent waits for the whole deadline, or is told of without its address."""
    with stub(lambda path, body: None) as server:
        url = server.url
    error = failed(Server(url).begin("/generate", {}, 60, again=True))
    assert error.status == 0 and url in str(error) and "cannot be asked" in str(error)


def test_an_answer_without_an_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that sends more than anybody may ask for fills the memory."""
    monkeypatch.setattr(remote_calls, "MOST_BYTES", 1 << 20)
    with stub(lambda path, body: Said(sent=b" " * (3 << 20))) as server:
        assert "more than 1 MiB" in str(failed(Server(server.url).begin("/generate", {}, 30)))
