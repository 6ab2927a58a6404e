"""Rollouts on another server: a policy that is not the run's, stale weights, or an answer that nobody can learn from.

The servers are `tandem serve` in a process of its own, and in a thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tandem import env
from tandem.config import override
from tandem.errors import ConfigError, DeliveryError, EngineError
from tandem.kernels.build.toolchain import compiler
from tandem.rollout.watch import Progress
from tandem.run import local
from tandem.run.config import RunConfig, check_training
from tandem.run.remote_ways import Sent, TandemWay
from tandem.run.rollout import roll_out, sized
from tandem.sync.departures import declaration, is_exact
from tandem.types import Request, Sampling
from tests.display import Silent
from tests.multi.test_asynchronous import tiny, weights
from tests.serving import serving

__all__ = ["tiny"]
STEPS = 2
pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels' bits depend on the batch")


@contextmanager
def child(folder: Path, *settings: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The url of a `tandem serve` of that model, and its process."""
    given = ["server.port=0", "server.control=true", "engine.kv_memory_bytes=4194304", *settings]
    command = [sys.executable, "-m", "tandem", "serve", str(folder), *(f"--set={one}" for one in given)]
    told: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env.child()}
    with subprocess.Popen(command, **told) as running:
        try:
            seen = ""
            while "http://" not in seen:
                line = running.stdout.readline() if running.stdout is not None else ""
                assert line, seen
                seen += line
            yield "http://" + seen.partition("http://")[2].split()[0].rstrip("/.,"), running
        finally:
            running.kill()


class Noted(Silent):
    """A display that keeps what a run says, and shows rows to `looks`."""

    def __init__(self, looks: Callable[[Any], Any] = lambda row: None) -> None:
        self.notes: list[str] = []
        self.update = looks  # type: ignore[method-assign, assignment]

    def __enter__(self) -> Noted:
        return self

    def note(self, text: str) -> None:
        self.notes.append(text)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_on_a_server_is_the_run_itself(tiny: RunConfig, tmp_path: Path) -> None:
    """Another seed, an older version, a rounded log-prob: anything by which what a server of the same bits draws is not
    what an engine here would."""
    config = override(tiny, {"steps": "2", "rollout.max_turns": "2"})
    local.train(config, out=tmp_path / "here", resume=None, display=Silent())
    with child(Path(config.model.source)) as (url, _):
        served = override(config, {"remote.servers": url})
        code, _ = local.train(served, out=tmp_path / "there", resume=None, display=Silent())
    assert code == 0
    here, there = (weights(tmp_path / name) for name in ("here", "there"))
    assert there == here and len(set(here)) == STEPS
    assert [row["error_budget"]["mismatch"] for row in rows(tmp_path / "there")] == [0.0] * STEPS


def test_people_and_rollouts_share_one_engine(tiny: RunConfig, tmp_path: Path) -> None:
    """A run on a server that people ask at the same time: they are refused or cut off at an update, the run's tokens
    hang on theirs, or its rollouts are of no tenant."""
    config = override(tiny, {"steps": "3"})
    local.train(config, out=tmp_path / "here", resume=None, display=Silent())
    tree = tmp_path / "tree.toml"
    tree.write_text("[tenants]\nrollouts = { weight = 0.01, guarantee = 0.1 }\n[cost]\nbase_s = 0.001\n")
    settings = {"server.control": True, "engine.order": "shares", "engine.shares": str(tree)}
    answered, over = [], threading.Event()

    def asking(url: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not over.is_set():
                said = {"prompt": [5, 6, 7], "max_tokens": 24, "ignore_eos": True, "tenant": "people"}
                answered.append(client.post("/v1/completions", json=said | {"return_token_ids": True}).json())

    with serving(Path(config.model.source), **settings) as server:
        people = [threading.Thread(target=asking, args=(server.url,)) for _ in range(3)]
        for one in people:
            one.start()
        served = override(config, {"remote.servers": server.url, "rollout.tenant": "rollouts"})
        try:
            local.train(served, out=tmp_path / "there", resume=None, display=Silent())
        finally:
            over.set()
            for one in people:
                one.join(60)
        tree_of = server.parts.engine.scheduler.order.tree  # type: ignore[attr-defined]
        had = {name: tree_of.tenant(name).had for name in ("rollouts", "people")}
    assert weights(tmp_path / "there") == weights(tmp_path / "here")
    assert min(had.values()) > 0
    assert all(len(one["choices"][0]["token_ids"]) == 24 for one in answered), answered[:1]
    versions = {span["version"] for one in answered for span in one["choices"][0]["weight_versions"]}
    assert len(versions) > 1  # they were asked while weights changed


def test_kept_sets_come_along(tiny: RunConfig, tmp_path: Path) -> None:
    """Under top-p the learner divides by all tokens where the server drew from a part of them."""
    config = override(tiny, {"steps": "2", "rollout.top_p": "0.8", "rollout.temperature": "0.7"})
    local.train(config, out=tmp_path / "here", resume=None, display=Silent())
    with serving(Path(config.model.source), **{"server.control": True}) as server:
        served = override(config, {"remote.servers": server.url})
        local.train(served, out=tmp_path / "there", resume=None, display=Silent())
    assert weights(tmp_path / "there") == weights(tmp_path / "here")
    assert [row["error_budget"]["mismatch"] for row in rows(tmp_path / "there")] == [0.0] * STEPS


def test_a_server_that_dies_changes_no_weight(tiny: RunConfig, tmp_path: Path) -> None:
    """What a server had when it died is lost, or drawn otherwise by the one that is asked again; or the run waits for
    it, or ends."""
    config = override(tiny, {"steps": "2", "rollout.max_new_tokens": "64", "engine.kv_memory_bytes": str(8 << 20)})
    local.train(config, out=tmp_path / "here", resume=None, display=Silent())
    source = Path(config.model.source)
    with serving(source, **{"server.control": True}) as stays, child(source) as (url, process):
        servers = ",".join((url, stays.url))
        display = Noted(lambda row: process.kill() if row["step"] == 1 else None)
        served = override(config, {"remote.servers": servers})
        code, _ = local.train(served, out=tmp_path / "there", resume=None, display=display)
    assert code == 0 and weights(tmp_path / "there") == weights(tmp_path / "here")
    assert any("died" in note and url.removesuffix("/v1") in note for note in display.notes), display.notes


def test_a_run_goes_on_where_it_stopped(tiny: RunConfig, tmp_path: Path) -> None:
    """A resumed run asks a server that still has the weights of the step before, or of the run's start."""
    config = override(tiny, {"steps": "2"})
    local.train(config, out=tmp_path / "here", resume=None, display=Silent())
    with serving(Path(config.model.source), **{"server.control": True}) as server:
        served = override(config, {"remote.servers": server.url})
        local.train(served, out=tmp_path / "there", resume=None, display=Silent(), last=1)
    with serving(Path(config.model.source), **{"server.control": True}) as server:  # at another address
        moved = override(config, {"remote.servers": server.url})
        local.train(moved, out=None, resume=tmp_path / "there", display=Silent())
    assert weights(tmp_path / "there") == weights(tmp_path / "here")


def test_rollouts_and_accuracy_without_training(tiny: RunConfig, tmp_path: Path) -> None:
    """Programs or an evaluation that a server draws differ from those of an engine here, or need its control."""
    config = override(tiny, {"rollout.max_turns": "2", "evaluation.prompts": "4"})
    roll_out(sized(config, None, "train"), "train", tmp_path / "here", Progress(12))
    with serving(Path(config.model.source)) as one, serving(Path(config.model.source)) as two:
        served = override(config, {"remote.servers": f"{one.url},{two.url}"})
        roll_out(sized(served, None, "train"), "train", tmp_path / "there", Progress(12))
        here, there = ([r["tokens"] for r in trajectories(tmp_path / name)] for name in ("here", "there"))
        assert there == here and len(here) == 12
        assert all(server.room.desk.engine.stats.sampled_tokens > 0 for server in (one, two))
        before = one.room.desk.engine.stats.finished
        assert local.evaluate_model(served) == local.evaluate_model(config)
        assert one.room.desk.engine.stats.finished > before


def trajectories(folder: Path) -> list[dict[str, Any]]:
    (path,) = (folder / "trajectories").iterdir()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_another_model_is_found_before_anything_is_drawn(
    tiny: RunConfig, tmp_path: Path, write_model: Callable[..., None]
) -> None:
    """Rollouts of a model that somebody else serves are taken for those of the run's own."""
    write_model(tmp_path / "other", scale=30.0)
    with serving(tmp_path / "other") as server, pytest.raises(DeliveryError, match="another policy than the learner"):
        served = override(tiny, {"remote.servers": server.url})
        roll_out(sized(served, None, "train"), "train", tmp_path / "there", Progress(12))


def test_a_server_without_control_takes_no_weights(tiny: RunConfig, tmp_path: Path) -> None:
    """A run whose weights reach nobody goes on, on the weights that the server has."""
    with serving(Path(tiny.model.source)) as server, pytest.raises(DeliveryError, match=r"server\.control=true"):
        served = override(tiny, {"remote.servers": server.url})
        local.train(served, out=tmp_path / "there", resume=None, display=Silent())


@pytest.mark.parametrize("step", [0, 1])
def test_one_of_two_that_takes_no_weights_is_left_out_and_told_of(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """A server that kept the older weights is asked, or nobody hears that the run has one less."""
    config = override(tiny, {"steps": "2"})
    local.train(config, out=tmp_path / "here", resume=None, display=Silent())
    source, plain = Path(config.model.source), TandemWay.send

    def send(way: TandemWay, sent: Sent) -> None:
        if way.url == keeps.url and sent.version.step == step:
            raise EngineError("its network is down.")
        plain(way, sent)

    monkeypatch.setattr(TandemWay, "send", send)
    with serving(source, **{"server.control": True}) as takes, serving(source, **{"server.control": True}) as keeps:
        display = Noted()
        served = override(config, {"remote.servers": f"{keeps.url},{takes.url}"})
        code, _ = local.train(served, out=tmp_path / "there", resume=None, display=display)
        assert (keeps.room.desk.engine.stats.sampled_tokens > 0) == (step > 0)
    assert code == 0 and weights(tmp_path / "there") == weights(tmp_path / "here")
    (note,) = [note for note in display.notes if "died" in note]
    assert f"after update {step} {keeps.url} did not take the learner's weights: its network is down" in note


def test_weights_that_somebody_else_changed(tiny: RunConfig, tmp_path: Path) -> None:
    """Tokens of weights that another trainer gave the server in the middle of a run are learned from."""
    with serving(Path(tiny.model.source), **{"server.control": True}) as server:
        body = {"model_path": tiny.model.source}

        def other(row: Any) -> None:
            httpx.post(f"{server.url}/update_weights_from_disk", json=body, timeout=60).raise_for_status()

        served = override(tiny, {"remote.servers": server.url})
        with pytest.raises(EngineError, match="somebody else changed them"):
            local.train(served, out=tmp_path / "there", resume=None, display=Noted(other))
    assert len(rows(tmp_path / "there")) == 1


REFUSED = {
    "rollout.top_p": ("0.9", "vllm does not give"),
    "asynchrony.mode": ("one_off", "while nothing is on its way"),
    "sync.lag": ("1", "as it comes"),
    "workers.backend": ("local", "no engine of the run samples"),
    "engine.replicas": ("2", "remote.servers says"),
    "engine.weights": ("int4", "as it was started"),
    "engine.order": ("fair", "a server has its own"),
    "rollout.extra_prompts": ("2", "who ends first"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_with_servers_is_refused(tiny: RunConfig, name: str) -> None:
    """A setting that a server does not follow is taken, and changes nothing."""
    value, words = REFUSED[name]
    remote = {"remote.servers": "http://host:1", "remote.dialect": "vllm", "remote.folder": "/weights"}
    with pytest.raises(ConfigError, match=f"{name} is .*{words}"):
        check_training(override(tiny, {**remote, name: value}))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"remote.servers": "host:1"}, "wanted an address"),
        ({"remote.servers": "http://host:1,http://host:1/"}, "names one twice"),
        ({"remote.servers": "http://host:1", "remote.dialect": "vllm"}, "read them in a folder"),
        ({"remote.servers": "http://host:1", "remote.folder": "/weights"}, "is sent its weights"),
        ({"remote.dialect": "sglang"}, "remote.servers is empty"),
    ],
)
def test_addresses(tiny: RunConfig, given: dict[str, str], words: str) -> None:
    """An address that is none, or a folder that nobody reads, is found at the first request."""
    with pytest.raises(ConfigError, match=words):
        override(tiny, given)


def test_it_is_declared(tiny: RunConfig) -> None:
    """A run on another engine says that it is exact, and ends at the first log-prob that is not."""
    served = override(tiny, {"remote.servers": "http://host:1"})
    assert not is_exact(served) and "1 servers of tandem sample" in declaration(served)


def test_a_key_goes_along(tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the config, where it would be written into the run's folder; or a variable that is not there."""
    keys = tmp_path / "keys.toml"
    keys.write_text('[[keys]]\nkey = "sk-of-a-test"\ntenant = "t"\nadmin = true\n')
    with serving(Path(tiny.model.source), **{"server.control": True, "server.keys": str(keys)}) as server:
        served = override(tiny, {"steps": "1", "remote.servers": server.url, "remote.key_env": "KEY_OF_A_SERVER"})
        with pytest.raises(ConfigError, match="KEY_OF_A_SERVER is not set"):
            local.train(served, out=tmp_path / "none", resume=None, display=Silent())
        monkeypatch.setenv("KEY_OF_A_SERVER", "sk-of-a-test")
        code, folder = local.train(served, out=tmp_path / "there", resume=None, display=Silent())
    assert code == 0 and "sk-of-a-test" not in (folder / "config.json").read_text()


def test_what_a_client_of_token_ids_may_ask(tiny: RunConfig) -> None:
    """A seed of one answer is taken for several, which are then alike; or kept sets are asked for and do not come."""
    ids = [5, 6, 7]
    with serving(Path(tiny.model.source)) as server:

        def ask(more: dict[str, Any], **sampling: Any) -> httpx.Response:
            given = {"max_new_tokens": 8, "ignore_eos": True, **sampling}
            return httpx.post(
                f"{server.url}/generate", json={"input_ids": ids, "sampling_params": given, **more}, timeout=60
            )

        whole = ask({"return_kept": True}, noise_seed=2**64 - 1, top_k=3)
        own = Request("own", "", tuple(ids), Sampling(top_k=3, max_new_tokens=8), seed=2**64 - 1)
        (wanted,) = server.parts.another().generate([own])
        told = whole.json()["meta_info"]
        assert whole.json()["output_ids"] == list(wanted.tokens)
        assert [b64decode(one) for one in told["output_kept"]] == wanted.columns["kept"].tolist()
        assert "output_kept" not in ask({}, noise_seed=1, top_k=3).json()["meta_info"]
        refused = [
            ask({}, noise_seed=1, n=2),
            ask({}, noise_seed=1, sampling_seed=1),
            ask({}, noise_seed=2**64),
            ask({}, noise_seed=-1),
            ask({"return_kept": True, "stream": True}),
        ]
        assert [one.status_code for one in refused] == [400] * len(refused)
