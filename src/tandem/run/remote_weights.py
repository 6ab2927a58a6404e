"""New weights to the servers of other engines, and whether they serve them: each dialect its own way, then a probe.

Whatever a server says of its weights (remote_ways.py), it draws some tokens, which the learner's own weights score: so
one of another model, or whose log-probs are of another distribution, is found before anything is learned.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tandem.algo.pack import count_prompts
from tandem.columns import Array, Columns
from tandem.errors import ConfigError, DeliveryError, EngineError
from tandem.models.checkpoint import save_checkpoint
from tandem.models.decoder import Decoder
from tandem.run.remote import ServerEngine
from tandem.run.remote_ways import ADVICE, WAYS, Sent, Way
from tandem.sync.receive import Weights, policy_of
from tandem.train.score import with_logprobs
from tandem.types import Request, Sample, Sampling, WeightVersion

PROBE_TOKENS = 24
PROBE_TEMPERATURE = 2.0  # at which what is drawn is rare before temperature, also by a policy that is nearly sure
MOVED = 1e-3  # nats: a log-prob of the learner's that has changed by more shows in any arithmetic
MOST_GAP = 0.25  # nats, mean |difference| of the probe's log-probs: arithmetic makes hundredths, another model several


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
        self._ways = [WAYS[engine.remote.dialect](engine.server.url, engine.ask) for engine in engines]
        self._probed: dict[ServerEngine, Probed] = {}  # under the last version
        self._folder: Path | None = None  # of this run
        self._written: list[Path] = []

    def receive(self, version: WeightVersion, sets: Mapping[str, Weights]) -> None:
        """As Receiver's."""
        policy_of(self.name, version, sets)
        ways = {engine: way for engine, way in zip(self.engines, self._ways, strict=True) if engine.lost is None}
        living = list(ways)
        assert not any(engine.has_work for engine in living), "weights change under running requests"
        if living and all(engine.version == version and engine.known for engine in living):
            return
        tensors = dict(self.decoder.export())
        label = f"{version.step}-{version.digest}"
        folder = self._write(version, tensors) if living and living[0].remote.folder else ""
        sent = Sent(version, label, tensors, folder)
        with ThreadPoolExecutor(max(1, len(living))) as sending:
            took = sending.map(lambda engine: self._take(engine, ways[engine], sent), living)
            failed: list[Exception] = [error for error in took if error]
        for engine in living:
            if engine.lost is None:
                before = self._probed.get(engine)
                try:
                    self._probed[engine] = check_policy(engine, self.decoder, self.prompt, self.temperature, before)
                except EngineError as error:  # it is not reached, or answers what cannot be learned from
                    engine.lost = error
                    failed.append(error)
        if failed and len(failed) == len(living):
            raise failed[0]

    def agree(self, version: WeightVersion, temperature: float) -> None:
        """Whether servers that are given no weights serve the decoder's, of that version. Raises as `check_policy`."""
        for engine in self.engines:
            check_policy(engine, self.decoder, self.prompt, temperature)
            engine.receive(version)

    def _take(self, engine: ServerEngine, way: Way, sent: Sent) -> DeliveryError | None:
        """Why the server has other weights."""
        try:
            way.send(sent)
            engine.known[sent.label] = sent.version.step
            engine.receive(sent.version)
            engine.compare(way.label())
            engine.look = way.label
        except (EngineError, DeliveryError) as error:
            reason = (
                f"after update {sent.version.step} {engine.server.url} did not take the learner's weights: {error} "
                f"Nothing was sampled from it since. {ADVICE[engine.remote.dialect]}"
            )
            engine.lost = EngineError(reason)
            engine.receive(sent.version)  # so that a router asks it, finds that it is lost, and says so
            return DeliveryError(reason)
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


class Probed(NamedTuple):
    """Tokens that a server drew, and their log-probs, as it has them and as the learner's weights do."""

    tokens: tuple[int, ...]
    theirs: tuple[float, ...]
    own: tuple[float, ...]

    def stale(self, before: Probed) -> bool:
        """Whether the server has not moved at all, where the learner has.

        >>> before = Probed((5, 9), (-1.0, -2.0), (-1.01, -2.0))
        >>> Probed((5, 9), (-1.0, -2.0), (-1.1, -2.0)).stale(before)
        True
        """
        moved = max((abs(now - then) for now, then in zip(self.own, before.own, strict=False)), default=0.0)
        return self[:2] == before[:2] and moved > MOVED


def check_policy(
    engine: ServerEngine, decoder: Decoder, prompt: Sequence[int], temperature: float, before: Probed | None = None
) -> Probed:
    """Has a server draw, and scores that by the decoder. before: what came of it under the weights before.

    DeliveryError where log-probs differ by more than arithmetic makes, or the server's are those of `before` still.
    ConfigError where they are those before temperature and the run's temperature is another than 1.
    """
    if temperature not in (0.0, 1.0):
        drawn, logprobs = _probe(engine, prompt, PROBE_TEMPERATURE)
        gaps = [float(np.abs(_scored(decoder, prompt, drawn, at) - logprobs).mean()) for at in (PROBE_TEMPERATURE, 1.0)]
        if not gaps[0] <= gaps[1]:
            raise ConfigError(
                f"rollout.temperature is {temperature:g}, and {engine.server.url} gives log-probs before temperature "
                f"(at {PROBE_TEMPERATURE:g} off by {gaps[0]:.2g} nats, and by {gaps[1]:.2g} from those at 1). Start "
                "vLLM with --logprobs-mode processed_logprobs and SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB, or "
                "set rollout.temperature to 1."
            )
    at = temperature or 1.0
    drawn, logprobs = _probe(engine, prompt, at)
    own = _scored(decoder, prompt, drawn, at)
    gap = float(np.abs(own - logprobs).mean())
    if not gap <= MOST_GAP:
        raise DeliveryError(
            f"{engine.server.url} serves another policy than the learner's: of {PROBE_TOKENS} tokens that it drew, its "
            f"log-probs and the learner's are {gap:.3g} nats apart in the mean, where arithmetic makes hundredths. "
            "Start it on the model of model.source."
        )
    probed = Probed(drawn, tuple(logprobs), tuple(own))
    if before is not None and probed.stale(before):
        raise DeliveryError(
            f"{engine.server.url} drew the same tokens with the same log-probs as before the update, by which the "
            "learner's own have changed: it still serves the older weights."
        )
    return probed


def _probe(engine: ServerEngine, prompt: Sequence[int], temperature: float) -> tuple[tuple[int, ...], Array]:
    """Tokens and their log-probs, as the server has them."""
    sampling = Sampling(temperature=temperature, max_new_tokens=PROBE_TOKENS)
    completion = engine.draw(Request("probe", "", tuple(prompt), sampling, seed=1))
    return completion.tokens, completion.columns["logprobs"]


def _scored(decoder: Decoder, prompt: Sequence[int], drawn: Sequence[int], temperature: float) -> Array:
    """Log-probs of the drawn tokens by the decoder."""
    mask = [False] * len(prompt) + [True] * len(drawn)
    sample = Sample("probe", "probe", Columns.of(tokens=(*prompt, *drawn), loss_mask=mask))
    name, budget_tokens = "reference_logprobs", len(prompt) + len(drawn)
    (scored,) = with_logprobs(name, decoder, [sample], count_prompts([sample]), budget_tokens, temperature)
    return scored.columns[name][len(prompt) :]
