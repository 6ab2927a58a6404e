"""New weights to the servers of other engines, and whether they serve them: each dialect its own way, then a probe.

Tandem's are sent all tensors and answer with their hash. vLLM's and SGLang's read a folder; they are then asked for
what they call their weights. Whatever they say, each draws some tokens, which the learner's own weights score: so a
server of another model, or one whose log-probs are of another distribution, is found before anything is learned.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save

from tandem.algo.pack import count_prompts
from tandem.columns import Columns
from tandem.errors import ConfigError, DeliveryError, EngineError
from tandem.models.checkpoint import save_checkpoint
from tandem.models.decoder import Decoder
from tandem.run.config import Dialect
from tandem.run.remote import ServerEngine
from tandem.run.remote_calls import CallError
from tandem.sync.receive import Weights, policy_of
from tandem.train.score import with_logprobs
from tandem.types import Request, Sample, Sampling, WeightVersion

PART_BYTES = 64 << 20  # of the weights that are sent at once, or one tensor
PROBE_TOKENS = 24
PROBE_TEMPERATURE = 0.5  # at which log-probs before and after temperature are far apart
MOST_GAP = 0.25  # nats, mean |difference| of the probe's log-probs: arithmetic makes hundredths, another model several


class Sent(NamedTuple):
    """What goes to a server."""

    version: WeightVersion
    label: str  # what the server is to call it
    tensors: Mapping[str, torch.Tensor]  # the learner's own, by their names in Transformers' checkpoints
    folder: str  # where they lie, for who reads them there


def send_tandem(engine: ServerEngine, sent: Sent) -> Callable[[], str]:
    engine.ask("/start_weight_update", {})
    for part in parts_of(sent.tensors):
        engine.ask("/update_weights", save(part))
    engine.ask("/finish_weight_update", {"weight_version": sent.label, "digest": sent.version.digest})
    told = engine.ask("/weight_info")
    if told.get("digest") != sent.version.digest:
        raise DeliveryError(f"{engine.server.url} serves weights {told.get('digest')!r}, not {sent.version.digest!r}.")
    return lambda: _label(engine, "/weight_info")


def send_vllm(engine: ServerEngine, sent: Sent) -> Callable[[], str]:
    """By the verbs that VLLM_SERVER_DEV_MODE=1 opens."""
    engine.ask("/pause?mode=wait", {})
    try:
        engine.ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": sent.folder}})
        flushed = engine.ask("/reset_prefix_cache", {})
        if isinstance(flushed, dict) and flushed.get("success") is False:
            raise DeliveryError(f"{engine.server.url} kept its prefix cache, whose keys are of older weights.")
        engine.ask("/update_weight_version", {"new_version": sent.label})
        _compare_checksums(engine, sent, engine.ask("/weight_checker", {"action": "checksum"}))
    finally:
        with suppress(EngineError):  # the first error says why
            engine.ask("/resume", {})
    return lambda: _label(engine, "/weight_info")


def send_sglang(engine: ServerEngine, sent: Sent) -> Callable[[], str]:
    told = engine.ask("/update_weights_from_disk", {"model_path": sent.folder, "weight_version": sent.label})
    if not isinstance(told, dict) or told.get("success") is not True:
        said = told.get("message") if isinstance(told, dict) else told
        raise DeliveryError(f"{engine.server.url} did not take the weights of {sent.folder}: {said}.")
    try:
        engine.ask("/model_info")
        path = "/model_info"
    except CallError as error:
        if error.status != 404:
            raise
        path = "/get_model_info"  # until 0.5
    return lambda: _label(engine, path)


WAYS: Mapping[Dialect, Callable[[ServerEngine, Sent], Callable[[], str]]] = {
    "tandem": send_tandem,
    "vllm": send_vllm,
    "sglang": send_sglang,
}


class ToServers:
    """The servers of a run, as its publisher knows them (sync/receive.py). One that fails is asked no more, and has the
    reason; where all do, the first reason is raised."""

    name = "the servers of remote.servers"
    lag = 0

    def __init__(
        self, decoder: Decoder, engines: Sequence[ServerEngine], prompt: Sequence[int], temperature: float
    ) -> None:
        self.decoder, self.engines = decoder, tuple(engines)
        self.prompt, self.temperature = tuple(prompt), temperature
        self._folder: Path | None = None  # of this run
        self._written: list[Path] = []

    def receive(self, version: WeightVersion, sets: Mapping[str, Weights]) -> None:
        """As Receiver's."""
        policy_of(self.name, version, sets)
        living = [engine for engine in self.engines if engine.lost is None]
        assert not any(engine.has_work for engine in living), "weights change under running requests"
        if living and all(engine.version == version and engine.known for engine in living):
            return
        tensors = dict(self.decoder.export())
        label = f"{version.step}-{version.digest}"
        folder = self._write(version, tensors) if living and living[0].remote.folder else ""
        sent = Sent(version, label, tensors, folder)
        with ThreadPoolExecutor(max(1, len(living))) as sending:
            failed = [error for error in sending.map(lambda engine: self._take(engine, sent), living) if error]
        if failed and len(failed) == len(living):
            raise failed[0]
        for engine in living:
            if engine.lost is None:
                check_policy(engine, self.decoder, self.prompt, self.temperature)

    def _take(self, engine: ServerEngine, sent: Sent) -> DeliveryError | None:
        """Why the server has other weights."""
        try:
            engine.look = WAYS[engine.remote.dialect](engine, sent)
            engine.known[sent.label] = sent.version.step
            engine.receive(sent.version)
            engine.compare(engine.look())
        except (EngineError, DeliveryError) as error:
            engine.lost = EngineError(str(error))
            return DeliveryError(
                f"after update {sent.version.step} {engine.server.url} did not take the learner's weights: {error} "
                f"Nothing was sampled from it since. {ADVICE[engine.remote.dialect]}"
            )
        return None

    def _write(self, version: WeightVersion, tensors: Mapping[str, torch.Tensor]) -> str:
        """A folder as Transformers has it; the one before stays, since a server may still have its files open."""
        if self._folder is None:
            base = Path(self.engines[0].remote.folder).expanduser().absolute()
            self._folder = base / f"weights-{secrets.token_hex(8)}"
        path = self._folder / f"{version.step:06d}-{version.digest[:16]}"
        if not path.exists():
            aside = path.with_name(f"{path.name}.part")
            shutil.rmtree(aside, ignore_errors=True)
            save_checkpoint(aside, self.decoder.spec, tensors, None, str(self.decoder.dtype).removeprefix("torch."))
            aside.rename(path)
            self._written.append(path)
        while len(self._written) > 2:
            shutil.rmtree(self._written.pop(0), ignore_errors=True)
        return str(path)

    def sources(self) -> Mapping[int, Decoder]:
        return {}

    def close(self) -> None:
        """The weights that lie in the folder go with the run."""
        for engine in self.engines:
            engine.give_up()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


ADVICE: Mapping[Dialect, str] = {
    "tandem": "Start it with --set server.control=true, and give remote.key_env an admin's key where it has keys.",
    "vllm": "Start it with VLLM_SERVER_DEV_MODE=1 and without quantization, and mount remote.folder where it runs.",
    "sglang": "Mount remote.folder where it runs, in the same place.",
}


def check_policy(engine: ServerEngine, decoder: Decoder, prompt: Sequence[int], temperature: float) -> float:
    """Has a server draw, and scores that by the decoder: mean |difference| of log-probs, nats.

    DeliveryError where that is more than arithmetic makes. ConfigError where its log-probs are those before temperature
    and the run's temperature is another than 1.
    """
    if temperature != 1.0:
        drawn, logprobs = _probe(engine, prompt, PROBE_TEMPERATURE)
        gaps = [_gap(decoder, prompt, drawn, logprobs, at) for at in (PROBE_TEMPERATURE, 1.0)]
        if gaps[0] > MOST_GAP and gaps[1] < gaps[0]:
            raise ConfigError(
                f"rollout.temperature is {temperature:g}, and {engine.server.url} gives log-probs before temperature "
                f"(at {PROBE_TEMPERATURE:g} off by {gaps[0]:.2g} nats, and by {gaps[1]:.2g} from those at 1). Start "
                "vLLM with --logprobs-mode processed_logprobs and SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB, or "
                "set rollout.temperature to 1."
            )
    at = temperature or 1.0
    gap = _gap(decoder, prompt, *_probe(engine, prompt, at), at)
    if not gap <= MOST_GAP:
        raise DeliveryError(
            f"{engine.server.url} serves another policy than the learner's: of {PROBE_TOKENS} tokens that it drew, its "
            f"log-probs and the learner's are {gap:.3g} nats apart in the mean, where arithmetic makes hundredths. Start "
            "it on the model of model.source."
        )
    return gap


def _probe(
    engine: ServerEngine, prompt: Sequence[int], temperature: float
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Tokens and their log-probs, as the server has them."""
    sampling = Sampling(temperature=temperature, max_new_tokens=PROBE_TOKENS)
    completion = engine.draw(Request("probe", "", tuple(prompt), sampling, seed=1))
    return completion.tokens, completion.logprobs


def _gap(
    decoder: Decoder, prompt: Sequence[int], drawn: Sequence[int], logprobs: Sequence[float], temperature: float
) -> float:
    mask = [False] * len(prompt) + [True] * len(drawn)
    sample = Sample("probe", "probe", Columns.of(tokens=(*prompt, *drawn), loss_mask=mask))
    (scored,) = with_logprobs(
        "reference_logprobs", decoder, [sample], count_prompts([sample]), len(prompt) + len(drawn), temperature
    )
    own = scored.columns["reference_logprobs"][len(prompt) :]
    return float(np.abs(own - np.array(logprobs)).mean())


def parts_of(tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """In their order, PART_BYTES at once or a tensor."""
    part, size = dict[str, torch.Tensor](), 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > PART_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor.detach().to("cpu").contiguous()
        size += tensor.nbytes
    yield part


def _compare_checksums(engine: ServerEngine, sent: Sent, told: Any) -> None:
    """Of what is the same tensor at vLLM, which joins or packs others. DeliveryError where one differs."""
    found = told.get("checksums") if isinstance(told, dict) else None
    if not isinstance(found, dict):
        raise DeliveryError(f"{engine.server.url}/weight_checker gave no checksums.")
    same = [name for name in sent.tensors if name in found]
    print(len(same), [n for n in same if found[n] != _sha256(sent.tensors[n])][:4], list(found)[:12])


def _sha256(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return sha256(flat.numpy().tobytes()).hexdigest()


def _label(engine: ServerEngine, path: str) -> str:
    told = engine.ask(path)
    return str(told.get("weight_version")) if isinstance(told, dict) else ""
