"""Regression caught: a trainer that pauses, changes the weights and goes on gets tokens of other weights than told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save, save_file

import tandem
from tandem.engine.config import EngineConfig
from tandem.types import Request, Sampling
from tests.serving import DEADLINE_S, Server, serving, wait_for

ASK: list[Any] = [{"role": "user", "content": "What is 1 + 2?"}]
KV = EngineConfig(kv_memory_bytes=1 << 22)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> tuple[Path, Path]:
    """A model, and the same with other weights."""
    old, new = tmp_path_factory.mktemp("old"), tmp_path_factory.mktemp("new")
    for path in (old, new):
        write_model(path, scale=10.0)
    generator = torch.Generator().manual_seed(7)
    tensors = load_file(new / "model.safetensors")
    for tensor in tensors.values():
        tensor += 0.3 * tensor.abs().mean() * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, new / "model.safetensors", {"format": "pt"})
    return old, new


@pytest.fixture
def server(folders: tuple[Path, Path]) -> Iterator[Server]:
    with serving(folders[0], **{"server.control": True}) as running:
        yield running


def post(server: Server, path: str, body: Any = None, status: int = 200) -> Any:
    sent = httpx.post(server.url + path, json={} if body is None else body, timeout=DEADLINE_S)
    assert sent.status_code == status, sent.text
    return sent.json()


def ask(server: Server, **more: Any) -> dict[str, Any]:
    body = {"messages": ASK, "max_tokens": 12, "seed": 3, "return_token_ids": True, "ignore_eos": True, **more}
    choice: dict[str, Any] = post(server, "/v1/chat/completions", body)["choices"][0]
    return choice


@cache
def loaded(folder: Path) -> tandem.Model:
    return tandem.load(folder, KV)


def wanted(folder: Path) -> str:
    return loaded(folder).generate(["What is 1 + 2?"], seed=3, temperature=1.0, max_new_tokens=12)[0].text


class Long(threading.Thread):
    """An answer on its way; `lines` are the events that have come."""

    def __init__(self, server: Server, tokens: int = 180, **more: Any) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []
        ids = list(server.words.renderer.prompt_tokens([tandem.types.Message("user", "What is 1 + 2?")]))
        sampling = {"max_new_tokens": tokens, "ignore_eos": True, "sampling_seed": 3}
        self.ids, self.server = ids, server
        self.body = {"input_ids": ids, "sampling_params": sampling, "stream": True, **more}
        self.start()
        wait_for("the first tokens", lambda: len(self.tokens) > 3)

    @property
    def tokens(self) -> list[int]:
        return [token for line in self.lines for token in line["output_ids"]]

    @property
    def versions(self) -> list[str]:
        spans = [span for line in self.lines for span in line["meta_info"]["weight_versions"]]
        return [span["version"] for span in spans for _ in range(span["start"], span["end"])]

    def run(self) -> None:
        with httpx.stream("POST", f"{self.server.url}/generate", json=self.body, timeout=DEADLINE_S) as sent:
            for line in sent.iter_lines():
                if line.startswith("data: {"):
                    self.lines.append(json.loads(line.removeprefix("data: ")))


def slowed(server: Server, step_s: float = 0.01) -> None:
    """Steps take so long at least, and much longer after many with the first weights: what is told comes on the way."""
    engine, wait = server.room.desk.engine, threading.Event()
    ran = engine.runner.run

    def run(batch: Any) -> Any:
        wait.wait(step_s if engine.version.step or engine.stats.sampled_tokens < 50 else 0.25)
        return ran(batch)

    engine.runner.run = run  # type: ignore[method-assign]


def test_weights_of_a_folder_are_served(server: Server, folders: tuple[Path, Path]) -> None:
    """The engine computes with old weights, or some of them, under the new version's name."""
    old, new = folders
    assert ask(server)["message"]["content"] == wanted(old) != wanted(new)
    before = post(server, "/weight_checker", {"action": "checksum"})
    told = post(server, "/update_weights_from_disk", {"model_path": str(new), "weight_version": "run-7/step-3"})
    assert told["success"] and (told["weight_version"], told["step"]) == ("run-7/step-3", 1)
    choice = ask(server)
    assert choice["message"]["content"] == wanted(new)
    assert choice["weight_versions"] == [{"version": "run-7/step-3", "start": 0, "end": 12}]
    after = post(server, "/weight_checker")
    assert after["digest"] == told["digest"] == loaded(new).parts.engine.version.digest
    assert before["checksums"].keys() == after["checksums"].keys()
    changed = [name for name, value in before["checksums"].items() if after["checksums"][name] != value]
    assert len(changed) == len(before["checksums"])


def test_a_label_is_known_before_its_weights_draw(
    server: Server, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that ends between an update and its label says a number, or a failed update's label stays."""
    store, seen = server.listener.config.app.state.control.store, list[Any]()
    serve = store.serve

    def fails(engine: Any, ready: Any, step: int) -> Any:
        seen.append(server.room.label(step))
        raise RuntimeError("no")

    disk = {"model_path": str(folders[1])}
    monkeypatch.setattr(store, "serve", fails)
    post(server, "/update_weights_from_disk", {**disk, "weight_version": "first"}, status=500)
    monkeypatch.setattr(store, "serve", serve)
    assert seen == ["first"] and post(server, "/update_weights_from_disk", disk)["weight_version"] == "1"
    for step in range(5000):
        server.room.labelled(step, "x")
    assert len(server.room.labels) < 5000


def test_weights_come_in_parts(server: Server, folders: tuple[Path, Path]) -> None:
    """A part that is missing, comes twice or is damaged is served, or ends what is served."""
    old, new = folders
    tensors = load_file(new / "model.safetensors")
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in names[start::3]} for start in range(3)]

    def send(content: bytes, status: int = 200) -> Any:
        head = {"content-type": "application/octet-stream"}
        sent = httpx.post(f"{server.url}/update_weights", content=content, headers=head)
        assert sent.status_code == status, sent.text
        return sent.json()

    assert send(save(parts[0]), 409)["error"]["code"] == "not_updating"
    post(server, "/start_weight_update")
    assert set(send(save(parts[0]))["received"]) == set(parts[0])
    assert "were sent before" in send(save(parts[0]), 400)["error"]["message"]
    assert "no safetensors" in send(save(parts[1])[:-9], 400)["error"]["message"]
    assert "lacks" in post(server, "/finish_weight_update", status=400)["error"]["message"]
    assert ask(server)["message"]["content"] == wanted(old)
    post(server, "/start_weight_update")
    for part in parts:
        send(save(part))
    assert post(server, "/finish_weight_update", {"digest": "ab"}, 409)["error"]["code"] == "other_weights"
    post(server, "/start_weight_update")
    for part in parts:
        send(save(part))
    told = post(server, "/finish_weight_update", {"digest": loaded(new).parts.engine.version.digest})
    assert told["weight_version"] == "1" and ask(server)["message"]["content"] == wanted(new)
    narrow = {name: tensor[:-1] for name, tensor in tensors.items()}
    post(server, "/start_weight_update")
    send(save(narrow))
    assert "shape" in post(server, "/finish_weight_update", status=400)["error"]["message"]
    assert ask(server)["message"]["content"] == wanted(new)


@pytest.mark.parametrize("how", ["running", "keep", "retract"])
def test_versions_by_spans_of_tokens(server: Server, folders: tuple[Path, Path], how: str) -> None:
    """Tokens of the old weights are said to be of the new ones, or what goes on keeps what the old ones computed."""
    slowed(server)
    long = Long(server)
    if how == "keep":
        assert post(server, "/pause?mode=keep")["mode"] == "keep"
    elif how == "retract":
        post(server, "/pause_generation", {"mode": "retract"})
    if how != "running":
        wait_for("what was drawn to arrive", lambda: len(long.tokens) == server.room.desk.engine.stats.sampled_tokens)
        seen = len(long.tokens)
    post(server, "/update_weights_from_disk", {"model_path": str(folders[1]), "weight_version": "new"})
    if how != "running":
        assert len(long.tokens) == seen and httpx.get(f"{server.url}/is_paused").json() == {"is_paused": True}
        post(server, "/resume" if how == "keep" else "/continue_generation")
    long.join(DEADLINE_S)
    swap = long.versions.index("new")
    assert 3 < swap < 180 and long.versions == ["0"] * swap + ["new"] * (180 - swap)
    last = long.lines[-1]["meta_info"]
    assert last["weight_version"] == "new" and last["completion_tokens"] == 180
    first, second = (loaded(folder).parts.engine for folder in folders)
    seed = server_seed()
    before = Request("a", "a", tuple(long.ids), Sampling(max_new_tokens=swap), seed)
    assert first.generate([before])[0].tokens == tuple(long.tokens[:swap])
    after = Request("b", "b", (*long.ids, *long.tokens[:swap]), Sampling(max_new_tokens=180 - swap), seed)
    again = second.generate([after])[0].tokens == tuple(long.tokens[swap:])
    assert again == (how == "retract"), "only what is computed again has no keys and values of the old weights"
    server.room.desk.engine.check_integrity()


def server_seed() -> int:
    from tandem.server.demand import seeds

    return seeds(3, 0, 1)[0]


def test_pauses(server: Server) -> None:
    """What is asked in a pause is answered in it, or never; what was on its way is lost where it was to be awaited."""
    slowed(server)
    long = Long(server)
    post(server, "/pause?mode=abort")
    long.join(DEADLINE_S)
    assert long.lines[-1]["meta_info"]["finish_reason"] == {"type": "abort"} and 3 < len(long.tokens) < 180
    answers: list[Any] = []
    late = threading.Thread(target=lambda: answers.append(ask(server)))
    late.start()
    wait_for("the call to wait", lambda: server.room.desk.num_waiting == 1)
    assert not answers and not server.room.desk.open
    gone = httpx.Client(timeout=0.3)
    with pytest.raises(httpx.ReadTimeout):
        gone.post(f"{server.url}/v1/chat/completions", json={"messages": ASK})
    gone.close()
    wait_for("who went away in the pause to be forgotten", lambda: server.room.desk.num_waiting == 1)
    post(server, "/resume")
    late.join(DEADLINE_S)
    assert answers[0]["finish_reason"] == "length"
    long = Long(server, 60)
    waits: list[int] = []
    waiter = threading.Thread(target=lambda: waits.append(httpx.post(f"{server.url}/pause?mode=wait").status_code))
    waiter.start()
    wait_for("the pause", lambda: server.room.desk.paused)
    post(server, "/resume")
    waiter.join(DEADLINE_S)
    assert waits == [409] and server.room.desk.open
    assert post(server, "/pause?mode=wait")["status"] == "paused"
    long.join(DEADLINE_S)
    assert long.lines[-1]["meta_info"]["finish_reason"]["type"] == "length"
    post(server, "/resume")
    assert not server.room.desk.tenants


def test_sleep(server: Server) -> None:
    """A sleeping engine is asked, or forgets its weights."""
    before = ask(server)
    post(server, "/sleep?level=1")
    assert httpx.get(f"{server.url}/is_sleeping").json() == {"is_sleeping": True}
    assert post(server, "/resume", status=409)["error"]["code"] == "asleep"
    assert post(server, "/sleep?level=3", status=400)["error"]["param"] == "level"
    assert post(server, "/wake_up?tags=weights&tags=odd", status=400)["error"]["param"] == "tags"
    assert post(server, "/wake_up?tags=weights") == {"status": "asleep"}
    post(server, "/wake_up")
    post(server, "/pause?mode=keep")
    post(server, "/wake_up")
    assert httpx.get(f"{server.url}/is_paused").json() == {"is_paused": True}, "one that is awake was resumed"
    post(server, "/resume")
    again = ask(server)
    assert again["token_ids"] == before["token_ids"] and server.room.desk.engine.stats.cached_tokens == 0


def test_sleep_without_weights(server: Server, folders: tuple[Path, Path]) -> None:
    """An engine whose weights were dropped draws with what lies there; or it can't be had back."""
    old, new = folders
    decoder = server.room.desk.engine.runner.decoder
    post(server, "/sleep")
    post(server, "/sleep?level=2")
    assert all(not weight.value.any() and not weight.served().any() for _, weight in decoder.weights())
    assert not httpx.get(f"{server.url}/weight_info").json()["has_weights"]
    for path in ("/wake_up", "/wake_up?tags=kv_cache", "/wake_up?tags=weights&tags=kv_cache", "/weight_checker"):
        assert post(server, path, status=409)["error"]["code"] == "no_weights"
    loads = {"lora_name": "a", "lora_path": str(old)}
    assert post(server, "/v1/load_lora_adapter", loads, 409)["error"]["code"] == "no_weights"
    assert post(server, "/resume", status=409)["error"]["code"] == "asleep"
    assert post(server, "/wake_up?tags=weights") == {"status": "asleep"}
    post(server, "/update_weights_from_disk", {"model_path": "nowhere"}, 400)
    assert post(server, "/wake_up", status=409)["error"]["code"] == "no_weights"
    told = post(server, "/update_weights_from_disk", {"model_path": str(new)})
    assert told["is_sleeping"] and told["has_weights"]
    assert post(server, "/wake_up") == {"status": "awake"}
    assert ask(server)["message"]["content"] == wanted(new)
    post(server, "/sleep?level=2")
    post(server, "/start_weight_update")
    part = save(load_file(old / "model.safetensors"))
    head = {"content-type": "application/octet-stream"}
    assert httpx.post(f"{server.url}/update_weights", content=part, headers=head).status_code == 200
    post(server, "/finish_weight_update", {"digest": loaded(old).parts.engine.version.digest})
    post(server, "/wake_up")
    assert ask(server)["message"]["content"] == wanted(old)


@pytest.mark.parametrize("level", [1, 2])
def test_calls_that_wait_as_a_sleeper_ends(folders: tuple[Path, Path], level: int) -> None:
    """Calls that wait for a sleeper are cut off as it drains, or are answered from weights that are not there."""
    with serving(folders[0], **{"server.control": True}) as server:
        post(server, f"/sleep?level={level}")
        sent: list[httpx.Response] = []
        slowed(server)
        body = {"messages": ASK, "max_tokens": 100, "ignore_eos": True}
        url = f"{server.url}/v1/chat/completions"
        late = threading.Thread(target=lambda: sent.append(httpx.post(url, json=body, timeout=DEADLINE_S)))
        late.start()
        wait_for("the call", lambda: server.room.desk.num_waiting == 1)
        server.listener.handle_exit(15, None)
        late.join(DEADLINE_S)
    if level == 1:
        assert sent[0].status_code == 200 and sent[0].json()["usage"]["completion_tokens"] == 100
    else:
        assert sent[0].status_code == 503 and sent[0].json()["error"]["code"] == "no_weights"


def test_answers_are_withdrawn_by_id(server: Server) -> None:
    """Another's answer is withdrawn, or the one that was meant runs on."""
    slowed(server)
    mine, other = Long(server, rid="mine"), Long(server, 60)
    assert post(server, "/abort_requests", {"request_ids": ["mine", "unknown"]}) == {"aborted": ["mine"]}
    mine.join(DEADLINE_S)
    other.join(DEADLINE_S)
    assert mine.lines[-1]["meta_info"]["finish_reason"]["type"] == "abort" and len(other.tokens) == 60
    two = [Long(server, rid=name) for name in ("a", "b")]
    assert sorted(post(server, "/abort_request", {"abort_all": True})["aborted"]) == ["a", "b"]
    for one in two:
        one.join(DEADLINE_S)
    again = Long(server, rid="again")
    assert post(server, "/generate", {"input_ids": [5], "rid": "again"}, 409)["error"]["code"] == "id_in_use"
    post(server, "/abort_requests", {})
    again.join(DEADLINE_S)


def test_answers_that_wait_in_a_pause_are_withdrawn_by_id(server: Server) -> None:
    """Who withdraws a call that waits for the end of a pause is told of none, and the call is answered after it."""
    post(server, "/pause?mode=keep")
    sent: dict[str, Any] = {}

    def call(id: str, n: int) -> None:
        body = {"prompt": "a", "max_tokens": 3, "n": n, "seed": 1, "ignore_eos": True}
        head = {"x-request-id": id}
        sent[id] = httpx.post(f"{server.url}/v1/completions", json=body, headers=head, timeout=DEADLINE_S)

    threads = [threading.Thread(target=call, args=one) for one in (("gone", 2), ("part", 2), ("stays", 1))]
    for place, one in enumerate(threads):
        one.start()
        wait_for("the call to wait", lambda held=(2, 4, 5)[place]: server.room.desk.num_waiting == held)  # type: ignore[misc]
    again = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "stays"})
    assert again.status_code == 409 and server.room.desk.num_waiting == 5
    ids = ["cmpl-gone", "cmpl-part/1"]
    assert post(server, "/abort_requests", {"request_ids": ids})["aborted"] == ["cmpl-gone/0", "cmpl-gone/1", ids[1]]
    threads[0].join(DEADLINE_S)
    assert [one["finish_reason"] for one in sent["gone"].json()["choices"]] == ["abort", "abort"]
    assert sent["gone"].json()["usage"]["completion_tokens"] == 0 and server.room.desk.num_waiting == 2
    post(server, "/resume")
    for one in threads:
        one.join(DEADLINE_S)
    assert [one["finish_reason"] for one in sent["part"].json()["choices"]] == ["length", "abort"]
    assert sent["stays"].json()["choices"][0]["finish_reason"] == "length"
    desk = server.room.desk
    assert not (desk.tenants or desk.gated or desk.open)


def test_who_may(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Anybody's key changes the weights, or withdraws what is another tenant's."""
    keys = tmp_path / "keys.toml"
    rows = [("sk-admin-1", "", True), ("sk-acme-12", "acme", False), ("sk-globex", "globex", False)]
    lines = [
        f'[[keys]]\nkey = "{key}"\ntenant = "{tenant}"\nadmin = {str(admin).lower()}\n' for key, tenant, admin in rows
    ]
    keys.write_text("".join(lines))
    with serving(folders[0], **{"server.control": True, "server.keys": str(keys)}) as server:
        for key, status in (("sk-admin-1", 200), ("sk-acme-12", 403), ("sk-other", 401)):
            head = {"authorization": f"Bearer {key}"}
            assert httpx.post(f"{server.url}/pause", headers=head).status_code == status
            assert httpx.post(f"{server.url}/abort_requests", json={}, headers=head).status_code == status
            assert httpx.get(f"{server.url}/weight_info", headers=head).status_code == status
        admin = {"authorization": "Bearer sk-admin-1"}
        httpx.post(f"{server.url}/resume", headers=admin)
        slowed(server)
        acme, globex = ({"authorization": f"Bearer {key}"} for key in ("sk-acme-12", "sk-globex"))
        body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 150, "ignore_eos": True}, "rid": "mine"}
        told: list[Any] = []
        thread = threading.Thread(
            target=lambda: told.append(httpx.post(f"{server.url}/generate", json=body, headers=acme, timeout=60).json())
        )
        thread.start()
        wait_for("it to run", lambda: server.room.desk.num_running)
        asked = {"request_ids": ["mine"]}
        assert httpx.post(f"{server.url}/abort_requests", json=asked, headers=globex).json() == {"aborted": []}
        assert httpx.post(f"{server.url}/abort_requests", json=asked, headers=acme).json() == {"aborted": ["mine"]}
        thread.join(DEADLINE_S)
        assert told[0]["meta_info"]["finish_reason"] == {"type": "abort"}
    with serving(folders[0]) as plain:
        assert post(plain, "/pause", status=403)["error"]["code"] == "control_is_off"
        assert post(plain, "/abort_requests", {"request_ids": ["x"]}) == {"aborted": []}


def test_a_program_that_is_over_keeps_nothing(folders: tuple[Path, Path]) -> None:
    """An agent that ends says so, and its pages stay until done_s; or another tenant's program of that name ends."""
    followed = {"engine.programs.mode": "enforce", "engine.programs.policy": "ttl", "engine.programs.ttl_s": 600}
    with serving(folders[0], **followed) as server:
        known = server.room.desk.engine.scheduler.programs
        assert known is not None
        said: list[Any] = [{"role": "user", "content": "x" * 200}]
        body = {"messages": said, "max_tokens": 4, "program_id": "p", "tenant": "a", "ignore_eos": True}
        post(server, "/v1/chat/completions", body)
        wait_for("its pages to be kept", lambda: known.tables)
        for other in ({"program_id": "p"}, {"program_id": "p", "tenant": "b"}, {"program_id": "q", "tenant": "a"}):
            assert post(server, "/finish_program", other) == {"program_id": other["program_id"]}
        server.room.desk.driver.call(lambda: None).result(DEADLINE_S)  # what was asked before is done
        assert known.tables
        post(server, "/finish_program", {"program_id": "p", "tenant": "a"})
        wait_for("its pages to be let go", lambda: not known.tables)
        assert not known.by_name
        assert "program_id" in post(server, "/finish_program", {}, 400)["error"]["message"]


def test_programs_are_let_go_on_a_running_server(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A policy that does harm can be stopped by no more than the server's end; or anybody stops it."""
    (tmp_path / "keys.toml").write_text(
        '[[keys]]\nkey = "sk-user-1234"\n\n[[keys]]\nkey = "sk-root-1234"\nadmin = true\n'
    )
    followed = {"engine.programs.mode": "enforce", "engine.programs.policy": "ttl", "engine.programs.ttl_s": 600}
    with serving(folders[0], **followed, **{"server.keys": str(tmp_path / "keys.toml")}) as server:

        def asked(key: str, path: str, **body: Any) -> httpx.Response:
            headers = {"authorization": f"Bearer {key}"}
            return httpx.post(server.url + path, json=body, headers=headers, timeout=DEADLINE_S)

        known = server.room.desk.engine.scheduler.programs
        assert known is not None
        said: list[Any] = [{"role": "user", "content": "x" * 200}]
        body = {"messages": said, "max_tokens": 4, "program_id": "p", "ignore_eos": True}
        assert asked("sk-user-1234", "/v1/chat/completions", **body).status_code == 200
        wait_for("its pages to be kept", lambda: known.tables)
        assert asked("sk-user-1234", "/programs", mode="shadow").status_code == 403
        assert asked("sk-root-1234", "/programs", mode="off").status_code == 400
        assert known.mode == "enforce" and known.tables
        assert asked("sk-root-1234", "/programs", mode="shadow").json() == {"mode": "shadow"}
        assert known.mode == "shadow" and not known.tables
    with serving(folders[0]) as server:
        assert "follows no programs" in post(server, "/programs", {"mode": "shadow"}, 400)["error"]["message"]
