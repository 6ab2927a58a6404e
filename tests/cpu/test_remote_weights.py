"""Weights for other engines' servers: a version that goes in part, or one that keeps the older and is believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tandem.algo.pack import count_prompts
from tandem.columns import Columns
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.errors import ConfigError, DeliveryError, EngineError
from tandem.models.checkpoint import open_checkpoint
from tandem.models.decoder import Decoder
from tandem.run import remote_ways, remote_weights
from tandem.run.remote_calls import Server
from tandem.run.remote_config import RemoteConfig
from tandem.run.remote_ways import EMPTY, WAYS, Sent, checksums, compare, parts_of
from tandem.run.remote_weights import Probed, ToServers, check_policy
from tandem.train.score import with_logprobs
from tandem.types import Completion, Request, Sample, WeightVersion
from tests.stub import Said, stub

LAYER = "model.layers.0.self_attn"
SHAPES = {f"{LAYER}.q_proj.weight": (4, 4), f"{LAYER}.k_proj.weight": (2, 4), f"{LAYER}.v_proj.weight": (2, 4)}
SHAPES |= {"model.norm.weight": (4,), "model.embed_tokens.weight": (6, 4), f"{LAYER}.o_proj.weight": (4, 4)}
VECTORS = {"model.norm.weight"}


def drawn(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}


def sent(step: int, tensors: dict[str, torch.Tensor]) -> Sent:
    return Sent(WeightVersion(step, f"digest{step}"), f"{step}-digest{step}", tensors, f"/weights/{step}")


def at_vllm(tensors: dict[str, torch.Tensor], packed: bool = False) -> dict[str, str]:
    """As its weight_checker has them: q, k and v joined, and on a CPU matrices packed into nothing."""
    joined = torch.cat([tensors[f"{LAYER}.{part}_proj.weight"] for part in "qkv"])
    there = {name: one for name, one in tensors.items() if name[-13] not in "qkv" or "_proj" not in name}
    there |= {f"{LAYER}.qkv_proj.weight": joined}
    sums = {name: sha256(one.view(torch.int16).numpy().tobytes()).hexdigest() for name, one in there.items()}
    if packed:
        sums |= dict.fromkeys((f"{LAYER}.qkv_proj.weight", f"{LAYER}.o_proj.weight"), EMPTY)
    return {f"dp0:pp0:pcp0:tp0:{name}": one for name, one in sums.items()}


def way(dialect: Any, url: str) -> Any:
    server = Server(url)
    return WAYS[dialect](url, lambda path, body=None, within_s=10.0: server.ask(path, body, within_s=within_s))


def test_parts_are_all_tensors_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that is in two parts or in none, or a part that grows with the model."""
    monkeypatch.setattr(remote_ways, "PART_BYTES", 48)
    tensors = drawn(0)
    parts = list(parts_of(tensors))
    assert [name for part in parts for name in part] == list(tensors)
    assert all(len(part) == 1 or sum(one.nbytes for one in part.values()) <= 48 for part in parts) and len(parts) > 2


def test_tandem_is_sent_all_and_its_hash_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that serves something else than was sent, and says so, is taken for one that does not."""
    monkeypatch.setattr(remote_ways, "PART_BYTES", 48)
    told: dict[str, Any] = {"digest": "digest3", "weight_version": "3-digest3"}
    with stub(lambda path, body: told) as server:
        there = way("tandem", server.url)
        there.send(sent(3, drawn(0)))
        paths = [path for path, _ in server.asked]
        assert paths[0] == "/start_weight_update" and paths[-1] == "/finish_weight_update"
        assert server.asked[-1][1] == {"weight_version": "3-digest3", "digest": "digest3"}
        came = {
            name: one for path, body in server.asked if path == "/update_weights" for name, one in load(body).items()
        }
        assert came.keys() == SHAPES.keys() and all(torch.equal(came[name], one) for name, one in drawn(0).items())
        assert there.label() == "3-digest3"
        told["digest"] = "other"
        with pytest.raises(DeliveryError, match="'other', not 'digest4'"):
            there.send(sent(4, drawn(0)))


class Vllm:
    """A stub of vLLM's verbs, which holds `tensors`, or keeps older ones."""

    def __init__(self, packed: bool = False) -> None:
        self.tensors, self.label, self.packed = drawn(0), "default", packed
        self.takes, self.flushes, self.coming = True, True, drawn(0)

    def __call__(self, path: str, body: Any) -> Any:
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.tensors = self.coming if self.takes else self.tensors
        if path == "/update_weight_version":
            self.label = body["new_version"]
        if path == "/weight_checker":
            return {"checksums": at_vllm(self.tensors, self.packed)}
        return {"success": self.flushes, "weight_version": self.label}


@pytest.mark.parametrize("packed", [False, True])
def test_vllm_that_keeps_the_older_weights_is_found(packed: bool) -> None:
    """Nobody looks at what vLLM holds after it was told to read the folder anew."""
    there = Vllm(packed)
    with stub(there) as server:
        to = way("vllm", server.url)
        to.send(sent(0, there.coming))
        there.coming = drawn(1)
        to.send(sent(1, there.coming))
        assert to.label() == "1-digest1"
        assert [path for path, _ in server.asked][:3] == ["/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache"]
        there.takes, there.coming = False, drawn(2)
        with pytest.raises(DeliveryError, match="others than were written"):
            to.send(sent(2, there.coming))
        assert server.asked[-1][0] == "/resume"  # whatever went wrong


def test_vllm_that_keeps_its_prefix_cache_is_found() -> None:
    """Keys and values of older weights are found again under the new ones."""
    there = Vllm()
    there.flushes = False
    with stub(there) as server, pytest.raises(DeliveryError, match="prefix cache"):
        way("vllm", server.url).send(sent(0, there.coming))


def test_vllm_without_its_verbs() -> None:
    """A server that was started without them: an error that does not say which call failed."""
    with (
        stub(lambda path, body: Said({"detail": "Not Found"}, 404)) as server,
        pytest.raises(EngineError, match="/pause"),
    ):
        way("vllm", server.url).send(sent(0, drawn(0)))


def test_a_matrix_of_two_versions_is_found() -> None:
    """A matrix that vLLM packs stays as it was, or changes where ours has not, and its norm alone is looked at."""
    old, new = drawn(0), drawn(1)
    before = checksums(old), at_vllm(old)
    theirs = at_vllm(new)
    compare("url", checksums(new), theirs, VECTORS, before)
    packed = dict(theirs) | {f"dp0:pp0:pcp0:tp0:{LAYER}.o_proj.weight": "packed, and new"}
    compare("url", checksums(new), packed, VECTORS, before)
    stale = f"dp0:pp0:pcp0:tp0:{LAYER}.qkv_proj.weight"
    with pytest.raises(DeliveryError, match="1 of 4 tensors.*qkv_proj"):
        compare("url", checksums(new), theirs | {stale: before[1][stale]}, VECTORS, before)
    with pytest.raises(DeliveryError, match="o_proj"):
        compare("url", checksums(old), at_vllm(old) | {f"dp0:pp0:pcp0:tp0:{LAYER}.o_proj.weight": "?"}, VECTORS, before)
    with pytest.raises(DeliveryError, match="all tensors"):
        compare("url", checksums(new), dict.fromkeys(theirs, EMPTY), VECTORS, None)


def test_sglang() -> None:
    """An update that SGLang refuses is taken for done, or the label is not looked for where older servers have it."""
    told: dict[str, Any] = {"success": True, "weight_version": "1-digest1"}
    says = lambda path, body: Said(status=404) if path == "/model_info" else told  # noqa: E731
    with stub(says) as server:
        to = way("sglang", server.url)
        to.send(sent(1, drawn(0)))
        assert server.asked[0] == (
            "/update_weights_from_disk",
            {"model_path": "/weights/1", "weight_version": "1-digest1"},
        )
        assert (to.label(), to.label()) == ("1-digest1", "1-digest1")
        told |= {"success": False, "message": "no such folder"}
        with pytest.raises(DeliveryError, match="no such folder"):
            to.send(sent(2, drawn(0)))


def test_a_probe_that_has_not_moved() -> None:
    """A server whose log-probs stay to the bit, where the learner moved, is believed; or one is refused that moved, or
    had no reason to."""
    before = Probed((5, 9), (-1.0, -2.0), (-1.01, -2.0))
    assert Probed((5, 9), (-1.0, -2.0), (-1.2, -2.0)).stale(before)
    assert not Probed((5, 9), (-1.0, -2.0), (-1.01, -2.0)).stale(before)
    assert not Probed((5, 9), (-1.0, -2.0001), (-1.2, -2.0)).stale(before)
    assert not Probed((5, 8), (-1.0, -2.0), (-1.2, -2.0)).stale(before)


class Draws:
    """What a probe needs of a server's engine: it draws by `decoder`, and says log-probs of temperature `told`."""

    def __init__(self, decoder: Decoder, told: float | None = None) -> None:
        self.decoder, self.told, self.server = decoder, told, Server("http://host:1")

    def draw(self, request: Request) -> Completion:
        engine = Engine(DecoderRunner(self.decoder, 16, 16, EngineConfig()), EngineConfig(), 16)
        (done,) = engine.generate([request])
        prompt, at = request.tokens, self.told or request.sampling.temperature
        mask = [False] * len(prompt) + [True] * len(done.tokens)
        sample = Sample("p", "p", Columns.of(tokens=(*prompt, *done.tokens), loss_mask=mask))
        (scored,) = with_logprobs("values", self.decoder, [sample], count_prompts([sample]), 512, at)
        return replace(done, columns=done.columns.having(logprobs=scored.columns["values"][len(prompt) :]))


def decoder_of(folder: Path) -> Decoder:
    checkpoint = open_checkpoint(str(folder))
    return Decoder(checkpoint.spec, "bfloat16").load(checkpoint.tensors())


def test_a_probe_tells_whose_logprobs_they_are(tmp_path: Path, write_model: Callable[..., None]) -> None:
    """Log-probs before temperature are taken for those after it, or another model's for the learner's."""
    for name, scale in (("model", 10.0), ("other", 30.0)):
        write_model(tmp_path / name, scale=scale)
    decoder, other = decoder_of(tmp_path / "model"), decoder_of(tmp_path / "other")
    prompt = (5, 6, 7)
    for temperature in (0.0, 0.7, 1.0, 1.3):
        after: Any = Draws(decoder)
        probed = check_policy(after, decoder, prompt, temperature)
        assert probed.own == probed.theirs
    before: Any = Draws(decoder, told=1.0)
    check_policy(before, decoder, prompt, 1.0)
    for temperature in (0.7, 0.95, 1.3):
        with pytest.raises(ConfigError, match="gives log-probs before temperature"):
            check_policy(before, decoder, prompt, temperature)
    strange: Any = Draws(other)
    with pytest.raises(DeliveryError, match="another policy"):
        check_policy(strange, decoder, prompt, 1.0)
    with pytest.raises(DeliveryError, match="still serves the older"):
        check_policy(after, decoder, prompt, 1.3, probed._replace(own=tuple(one - 0.1 for one in probed.own)))


class Taker:
    """What `ToServers` needs of a server's engine, which takes all weights; its probe fails where it `dies`."""

    def __init__(self, dies: bool) -> None:
        self.dies, self.lost, self.look = dies, None, None
        self.remote, self.server = RemoteConfig(servers=("http://host:1",)), Server("http://host:1")
        self.known: dict[str, int] = {}
        self.version, self.has_work = WeightVersion(0, ""), False

    def ask(self, path: str, body: Any = None, within_s: float = 0.0) -> Any:
        if path == "/finish_weight_update":
            self.label = body["weight_version"]
            return {"digest": body["digest"]}
        return {"weight_version": self.label} if path == "/weight_info" else {}

    def receive(self, version: WeightVersion) -> None:
        self.version = version

    def compare(self, label: str) -> None:
        assert self.known[label] == self.version.step


def test_a_server_that_dies_as_it_is_probed_is_left_out(
    tmp_path: Path, write_model: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of several servers ends by the death of one, if it comes behind the weights and before the first answer."""
    write_model(tmp_path / "model", scale=10.0)
    decoder, probed = decoder_of(tmp_path / "model"), Probed((1,), (-1.0,), (-1.0,))

    def probe(engine: Any, *given: Any) -> Probed:
        if engine.dies:
            raise EngineError("no connection")
        return probed

    monkeypatch.setattr(remote_weights, "check_policy", probe)
    monkeypatch.setattr(remote_weights, "policy_of", lambda *given: None)
    one, two = Taker(False), Taker(True)
    engines: Any = [one, two]
    servers = ToServers(decoder, engines, (5, 6), 1.0)
    servers.receive(WeightVersion(1, "d"), {})
    assert one.lost is None and str(two.lost) == "no connection" and one.version.step == 1
    one.dies = True
    with pytest.raises(EngineError, match="no connection"):
        servers.receive(WeightVersion(2, "e"), {})
