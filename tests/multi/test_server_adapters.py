"""Adapters over HTTP: each is a model of its own name, on one base."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tandem.config import override
from tandem.errors import ConfigError, ModelError, TandemWarning
from tandem.models.adapter import AdapterSet, Base
from tandem.models.checkpoint import open_checkpoint
from tandem.models.config import AdapterConfig, ModelConfig
from tandem.models.decoder import Decoder
from tandem.models.peft import save_adapter
from tandem.run import model as models
from tandem.run.model import load
from tandem.run.served import alike
from tandem.server.config import ServeConfig
from tandem.sync.publish import weight_version
from tandem.types import Request, Sampling
from tests.serving import Server, serving

NAMES = ("one", "two")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Path:
    """A model, and two adapters of it beside."""
    path = tmp_path_factory.mktemp("served")
    write_model(path / "model", scale=10.0)
    checkpoint = open_checkpoint(str(path / "model"))
    decoder = Decoder(checkpoint.spec, "bfloat16").load(checkpoint.tensors())
    for number, name in enumerate(NAMES):
        made = AdapterSet(decoder, AdapterConfig(rank=4, dora=bool(number))).draw(number)
        for one in made.additions:
            one.piece.up.value.copy_(
                torch.randn(one.piece.up.value.shape, generator=torch.Generator().manual_seed(number))
            )
        made.base = Base(str(path / "model"), "")
        save_adapter(path / name, made)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder / "model", **{"server.adapters": {name: str(folder / name) for name in NAMES}}) as running:
        yield running


def ask(server: Server, path: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}{path}", json={"temperature": 0, "max_tokens": 12, **body}, timeout=60)
    told: dict[str, Any] = answer.json()
    assert answer.status_code == 200, told
    return told


def test_each_answers_as_it_does_alone(server: Server, folder: Path) -> None:
    """A call for one adapter is answered by another or by the base, or its answer says another model."""
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "What is 1 + 2?"}]}
    texts, prints = [], set()
    for name, alone in (("tiny", "model"), *((name, name) for name in NAMES)):
        told = ask(server, "/v1/chat/completions", model=name, **chat)
        assert told["model"] == name
        texts.append(told["choices"][0]["message"]["content"])
        assert texts[-1] == load(folder / alone).generate(["What is 1 + 2?"], max_new_tokens=12)[0].text
        plain = ask(server, "/v1/completions", model=name, prompt="1 + 2 =")
        assert plain["model"] == name and plain["system_fingerprint"] == told["system_fingerprint"]
        prints.add(told["system_fingerprint"])
    assert len(set(texts)) == len(prints) == 3


def test_they_are_listed_and_others_refused(server: Server, folder: Path) -> None:
    """An adapter that no client finds; an unknown model that the base answers for."""
    told = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [(card["id"], card.get("parent")) for card in told] == [("tiny", None), ("one", "tiny"), ("two", "tiny")]
    assert httpx.get(f"{server.url}/v1/models/two").json()["id"] == "two"
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": "three", "prompt": "1"})
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "there is no model three. Served here: tiny, one, two."


def test_they_come_and_go_while_it_runs(folder: Path) -> None:
    """An adapter that is loaded into a running server and answers as the base or as another; one that is unloaded under
    an answer, or answers on; a name or a folder that is wrong and ends the server."""

    def post(path: str, status: int = 200, **body: Any) -> Any:
        answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
        assert answer.status_code == status, answer.text
        return answer.json()

    load, unload, ask = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/chat/completions"
    with serving(folder / "model", **{"server.control": True}) as server:
        asked = [{"role": "user", "content": "1 + 2 ="}]
        drawn: dict[str, Any] = {"messages": asked, "temperature": 0, "max_tokens": 12}
        texts = {"tiny": post(ask, **drawn)["choices"][0]["message"]["content"]}
        prints = {post(ask, **drawn)["system_fingerprint"]}
        post(ask, 404, model="mine", **drawn)
        for name in NAMES:
            digest = post(load, lora_name="mine", lora_path=str(folder / name), load_inplace=name == "two")["digest"]
            assert digest == server.parts.engine.adapters["mine"].digest
            told = post(ask, model="mine", **drawn)
            prints.add(told["system_fingerprint"])
            texts[name] = told["choices"][0]["message"]["content"]
            assert texts[name] == models.load(folder / name).generate(["1 + 2 ="], max_new_tokens=12)[0].text
        assert len(set(texts.values())) == 3 and post(ask, **drawn)["choices"][0]["message"]["content"] == texts["tiny"]
        assert len(prints) == 3  # of the base, and of either adapter under one name
        assert [card["id"] for card in httpx.get(f"{server.url}/v1/models").json()["data"]] == ["tiny", "mine"]
        for name, path, says in (
            ("mine", "one", "is loaded already"),
            ("tiny", "one", "is the model's own name"),
            ("other", "model", "is no adapter: it has no adapter_config.json"),
        ):
            assert says in post(load, 400, lora_name=name, lora_path=str(folder / path))["error"]["message"]
        assert "Unload them first" in post("/update_weights_from_disk", 400, model_path=str(folder))["error"]["message"]
        server.room.desk.driver.hold(True)
        future = server.room.desk.driver.submit(Request("held", "held", (1, 2, 3), Sampling(2), 0, adapter="mine"))
        assert "1 requests for adapter 'mine'" in post(unload, 409, lora_name="mine")["error"]["message"]
        server.room.desk.driver.hold(False)
        future.result(60)
        post(unload, lora_name="mine")
        assert post(unload, 404, lora_name="mine")["error"]["code"] == "model_not_found"
        post(ask, 404, model="mine", **drawn)
        assert post(ask, **drawn)["choices"][0]["message"]["content"] == texts["tiny"]
    with serving(folder / "model") as server:
        post(load, 403, lora_name="mine", lora_path=str(folder / "one"))


def test_what_is_of_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    """An adapter that was trained on other weights, or has another model's shapes, is served; one of these weights, or
    of a base that nobody knows, is not."""
    checkpoint = open_checkpoint(str(folder / "model"))
    decoder = Decoder(checkpoint.spec, "bfloat16").load(checkpoint.tensors())
    own = weight_version(decoder, 0).digest
    for name, base in {
        "own": Base(str(folder / "model"), own),
        "moved": Base("/elsewhere/other", own),
        "changed": Base(str(folder / "model"), "5" * 32),
        "another": Base("/elsewhere/other", ""),
    }.items():
        made = AdapterSet(decoder, AdapterConfig(rank=4)).draw(7)
        made.base = base
        save_adapter(tmp_path / name, made)
    wider = Decoder(open_checkpoint("new:width=48,layers=2,heads=4,kv_heads=2,ff_width=48").spec, "bfloat16")
    save_adapter(tmp_path / "wider", AdapterSet(wider, AdapterConfig(rank=4)))
    says = {
        "changed": f"trained on weights that hash to {'5' * 12}, and those of {folder}/model hash to {own[:12]}",
        "wider": "tensor base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight has shape",
    }
    with serving(folder / "model", **{"server.control": True}) as server, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for name in ("own", "moved", "changed", "another", "wider"):
            body = {"lora_name": name, "lora_path": str(tmp_path / name)}
            answer = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=60)
            assert answer.status_code == (400 if name in says else 200), answer.text
            assert says.get(name, "") in answer.text
        assert [*server.parts.engine.adapters] == ["own", "moved", "another"]
    (warned,) = [str(one.message) for one in seen if one.category is TandemWarning]
    assert f"{tmp_path}/another is of /elsewhere/other (base_model_name_or_path), and goes on" in warned
    with pytest.raises(ModelError, match="was trained on weights that hash to 5555"):
        Server(folder / "model", **{"server.adapters": {"changed": str(tmp_path / "changed")}})


def test_several_engines_are_given_them(folder: Path) -> None:
    """`serve --engines 2 --adapter ...` starts engines without adapters, or with folders of other names."""
    given = {"server.adapters": {name: str(folder / name) for name in NAMES}, "route.engines": 2}
    config = override(ServeConfig(ModelConfig(str(folder / "model"))), given)
    command = alike(config)
    settings = dict(text.split("=", 1) for text in command[command.index("--set") + 1 :: 2])
    again = override(ServeConfig(ModelConfig(command[4])), settings)
    assert again.server.adapters == config.server.adapters and len(again.server.adapters) == 2


def test_what_cannot_be_served_is_refused(folder: Path) -> None:
    """A name that hides the model, or a folder that is none, found at the first call."""
    for adapters, wrong, says in (
        ({"tiny": str(folder / "one")}, ConfigError, "names 'tiny', which is empty or taken"),
        ({"one": str(folder / "model")}, ModelError, "is no adapter: it has no adapter_config.json"),
    ):
        with pytest.raises(wrong, match=says):
            Server(folder / "model", **{"server.adapters": adapters})
