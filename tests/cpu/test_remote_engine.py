"""An engine behind a server: a request without an end, a failure that takes others along, tokens of unknown weights."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.config import EngineConfig
from tandem.engine.driver import Driver
from tandem.errors import ConfigError, EngineError
from tandem.models.checkpoint import open_checkpoint
from tandem.models.config import ModelConfig
from tandem.models.spec import ModelSpec
from tandem.rollout.router import Replica, Router
from tandem.run import remote_calls
from tandem.run.remote import ServerEngine
from tandem.run.remote_calls import Server
from tandem.run.remote_config import RemoteConfig
from tandem.types import Completion, Constraint, Request, Sampling, StopReason, WeightVersion
from tests.stub import Said, stub

CONFIG = EngineConfig(kv_memory_bytes=1 << 22, max_sequences=4)
WAIT_S = 30.0


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> ModelSpec:
    folder: Path = tmp_path_factory.mktemp("remote")
    write_model(folder)
    return open_checkpoint(str(folder)).spec


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_calls, "PAUSES_S", (0.01,))


def engine_of(url: str, spec: ModelSpec, dialect: Any = "vllm", **more: Any) -> ServerEngine:
    folder = "" if dialect == "tandem" else "/weights"
    remote = RemoteConfig((url,), dialect, folder, deadline_s=WAIT_S)
    return ServerEngine(Server(url), remote, spec, ModelConfig("m"), replace(CONFIG, **more), str)


def request(name: str, most: int = 3, **more: Any) -> Request:
    return Request(name, "program", (5, 6, 7), Sampling(max_new_tokens=most, stop_token_ids=(2,)), seed=1, **more)


def drew(body: Any, tokens: tuple[int, ...] | None = None) -> dict[str, Any]:
    """vLLM's answer of as many tokens as were asked for."""
    tokens = tokens or (9,) * body["max_tokens"]
    logprobs = {"token_logprobs": [-0.5] * len(tokens)}
    return {"choices": [{"token_ids": list(tokens), "logprobs": logprobs, "finish_reason": "length"}]}


def models(context: int = 64) -> dict[str, Any]:
    return {"data": [{"id": "m", "max_model_len": context}]}


def run(driver: Driver | Router, *requests: Request) -> list[Completion | BaseException]:
    """What became of each. AssertionError for one without an end."""
    futures = [driver.submit(one) for one in requests]
    seen = 0
    for _ in range(2000):
        if all(future.done() for future in futures):
            break
        try:
            seen = driver.progress(seen, 0.05)
        except EngineError:  # a driver alone raises what its requests end with too
            continue
    assert all(future.done() for future in futures), "a request has no end"
    return [future.exception() or future.result() for future in futures]


def test_tokens_and_what_is_known_of_them(spec: ModelSpec) -> None:
    """Log-probs, a version or a count that is not the answer's, or a limit that the server does not have."""

    def says(path: str, body: Any) -> Any:
        return models(8) if body is None else drew(body)

    with stub(says) as server:
        engine = engine_of(server.url, spec)
        engine.receive(WeightVersion(4, "digest"))
        (one, long) = run(Driver(engine), request("a"), request("b", most=20))
        assert isinstance(one, Completion) and isinstance(long, Completion)
        assert (one.tokens, one.logprobs, one.stop_reason) == ((9,) * 3, (-0.5,) * 3, StopReason.LENGTH)
        assert one.columns["versions"].tolist() == [4] * 3
        assert len(long.tokens) == 5  # positions of the server: 8
        assert (engine.stats.sampled_tokens, engine.stats.finished, engine.stats.prefilled_tokens) == (8, 2, 6)
        assert not engine.has_work


def test_what_a_server_does_not_take_fails_alone(spec: ModelSpec) -> None:
    """One prompt that is too long for a server ends the run, or its reason is lost."""

    def says(path: str, body: Any) -> Any:
        if body is None:
            return models()
        return Said({"error": {"message": "too long"}}, 400) if body["max_tokens"] == 2 else drew(body)

    with stub(says) as server:
        bad, good = run(Driver(engine_of(server.url, spec)), request("a", most=2), request("b"))
    assert isinstance(bad, Completion) and bad.stop_reason is StopReason.FAILED and "too long" in bad.failure
    assert isinstance(good, Completion) and good.stop_reason is StopReason.LENGTH


ODD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no log-probs": (lambda body: {"choices": [{"token_ids": [9], "finish_reason": "length"}]}, "no logprobs"),
    "no ids": (lambda body: {"choices": [{"text": "x", "finish_reason": "length"}]}, "no token_ids"),
    "cut": (lambda body: drew(body, (9, 9)), "cut after 2 of 3 tokens"),
    "another vocabulary": (lambda body: drew(body, (9, 9, 5000)), "another model"),
    "gone": (lambda body: Said({"error": "engine is dead"}, 500), "engine is dead"),
    "away": (lambda body: Said("", 503), "answered 503"),
    "no key": (lambda body: Said({"error": {"message": "wrong key"}}, 401), "wrong key"),
    "HTML": (lambda body: Said(sent=b"<html>"), "no JSON"),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_server_that_is_lost_is_named_and_another_is_asked(spec: ModelSpec, odd: str) -> None:
    """A server that answers what nobody can learn from: its tokens are learned from, the run waits for it for ever, or
    what it had is not asked of another."""
    answers, words = ODD[odd]
    with stub(lambda path, body: models() if body is None else answers(body)) as bad:
        (alone,) = run(Driver(engine_of(bad.url, spec)), request("a"))
        assert isinstance(alone, EngineError) and words in str(alone) and bad.url in str(alone)
        with stub(lambda path, body: models() if body is None else drew(body)) as good:
            engines = [engine_of(one.url, spec) for one in (bad, good)]
            serve = [partial(getattr, one, "version") for one in engines]
            replicas = [Replica(f"engine {n}", Driver(one), serve[n], 500) for n, one in enumerate(engines)]
            died: list[str] = []
            router = Router(replicas, died=lambda one, error: died.append(f"{one.name}: {error}"))
            found = run(router, *(request(str(number)) for number in range(6)))
    assert all(isinstance(one, Completion) and one.tokens == (9,) * 3 for one in found)
    assert len(died) == 1 and died[0].startswith("engine 0") and words in died[0]


def test_a_server_that_does_not_answer_in_time(spec: ModelSpec) -> None:
    """A server that takes a request and says nothing holds the run beyond engine.answer_s, twice over."""
    gate = threading.Event()
    silent = Said({}, pause=gate)
    with stub(lambda path, body: models() if body is None else silent) as server:
        (late,) = run(Driver(engine_of(server.url, spec, answer_s=0.2)), request("a"))
        gate.set()
    assert isinstance(late, EngineError) and "within 0.4 s" in str(late)


def test_an_aborted_request_ends_with_nothing(spec: ModelSpec) -> None:
    """What is withdrawn runs on, waits in the queue, or comes back as if it had been drawn."""
    gate = threading.Event()
    with stub(lambda path, body: models() if body is None else Said(drew(body), pause=gate)) as server:
        engine = engine_of(server.url, spec, max_sequences=1)
        driver = Driver(engine)
        futures = [driver.submit(request(name)) for name in ("runs", "waits")]
        seen = driver.progress(0, 0.05)
        assert len([body for _, body in server.asked if body]) == 1  # of max_sequences
        for name in ("runs", "waits"):
            driver.abort(name)
        while not all(future.done() for future in futures):
            seen = driver.progress(seen, 0.05)
        gate.set()
        assert [future.result().stop_reason for future in futures] == [StopReason.ABORTED] * 2
        assert engine.stats.aborted == 2 and engine.stats.sampled_tokens == 0 and not engine.has_work


def test_tokens_of_weights_that_this_run_did_not_give(spec: ModelSpec) -> None:
    """Somebody else trains the server too, or it was started again on its first weights: its tokens count as drawn by
    the run's."""
    told = {"label": "1-a"}

    def says(path: str, body: Any) -> Any:
        if body is None:
            return models()
        pairs = [[-0.5, 9, None]] * body["sampling_params"]["max_new_tokens"]
        marks = {"output_token_logprobs": pairs, "finish_reason": {"type": "length"}, "weight_version": told["label"]}
        return {"meta_info": marks}

    with stub(says) as server:
        engine = engine_of(server.url, spec, "sglang")
        engine.known, engine.look = {"1-a": 1, "2-b": 2}, lambda: told["label"]
        engine.receive(WeightVersion(2, "b"))
        (one,) = run(Driver(engine), request("a"))
        assert isinstance(one, Completion) and one.columns["versions"].tolist() == [1] * 3
        with pytest.raises(EngineError, match="'1-a', not those of version 2"):
            engine.release_memory()
        told["label"] = "2-b"
        engine.release_memory()
        told["label"] = "default"
        (other,) = run(Driver(engine), request("b"))
        assert isinstance(other, EngineError) and "weights 'default' drew it" in str(other)


def test_what_the_learner_could_not_score_is_refused(spec: ModelSpec) -> None:
    """A filter or a mask of a server that does not say what it kept: a wrong log-prob, and no word of it."""
    with stub(lambda path, body: models()) as server:
        engine, own = engine_of(server.url, spec), engine_of(server.url, spec, "tandem")
        for name, value in (("top_k", 5), ("top_p", 0.9), ("min_p", 0.1)):
            filtered = replace(request("a"), sampling=Sampling(max_new_tokens=3, **{name: value}))
            with pytest.raises(ConfigError, match="which tokens they kept"):
                engine.check(filtered)
            own.check(filtered)
        with pytest.raises(ConfigError, match="constraint"):
            engine.check(request("a", constraint=Constraint("regex", "a")))
        carried = replace(request("a", carried=1), sampling=Sampling(max_new_tokens=3, stop_strings=("END",)))
        with pytest.raises(ConfigError, match="in the rest alone"):
            engine.check(carried)


@pytest.mark.parametrize("answer", [{"data": []}, {"object": "error"}, [], Said(status=404), Said(sent=b"hello")])
def test_what_is_no_server_of_a_model_is_found_at_once(spec: ModelSpec, answer: Any) -> None:
    """An address of something else, which fails at the first request in words of its own."""
    with stub(lambda path, body: answer) as server, pytest.raises(EngineError, match="/v1/models"):
        engine_of(server.url, spec)
