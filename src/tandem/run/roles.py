"""What runs inside workers (run/workers.py), a class each: made of one value, asked for its methods one at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tandem import env
from tandem.algo.alarm import AlarmConfig
from tandem.algo.pack import PromptTotal
from tandem.columns import Columns
from tandem.engine.batch import Stats
from tandem.engine.share import Terms
from tandem.engine.space import Space
from tandem.errors import CheckpointError, DeliveryError
from tandem.models.adapter import AdapterSet
from tandem.models.checkpoint import open_checkpoint
from tandem.models.config import ModelConfig
from tandem.models.decoder import Decoder, decoder_of
from tandem.run.adapted import NAME
from tandem.run.apart import EngineGiven
from tandem.run.learned import OBJECTIVES, total_updates
from tandem.run.learning import LearnerGiven
from tandem.run.parts import engine_on, facts
from tandem.sync.publish import published
from tandem.sync.receive import POLICY, Copied, Weights, integers_of, serving_decoder
from tandem.sync.transport import Held, Reader
from tandem.sync.ways import Address, reader_of, way_of
from tandem.train.checkpoint import RunState
from tandem.train.score import with_logprobs
from tandem.train.step import Learner, LearnerReport
from tandem.types import Completion, Request, Sample, WeightVersion


class EngineWorker:
    """An engine on a decoder whose weights all come by publication."""

    def __init__(self, given: EngineGiven) -> None:
        torch.set_num_threads(env.num_threads())
        checkpoint, model, config = open_checkpoint(given.source), given.model, given.engine
        dtype = model.dtype if config.dtype == "same" else config.dtype
        decoder = serving_decoder(checkpoint.spec, model, config)
        # What arrives lies in the decoder's own weights where it is served as it comes.
        here = model.device == "cpu" and dtype == model.dtype and config.weights == "same"
        self.engine = engine_on(decoder, config, checkpoint.load_tokenizer())
        self._receiver = Copied("the engine", decoder, self.engine, rounding=integers_of(config))
        if given.adapter is not None:
            learner = decoder if here else Decoder(checkpoint.spec, model.dtype)  # as the learner's is
            version, weights = published(learner.load(checkpoint.tensors()), 0)
            self._receiver.receive(version, {POLICY: weights})
            decoder.wear(AdapterSet(decoder, given.adapter, NAME))
            kinds = {name: weight.value.dtype for name, weight in AdapterSet(learner, given.adapter).served()}
        else:
            kinds = {name: getattr(torch, model.dtype) for name, _ in decoder.published()}
        held = {name: weight.value for name, weight in decoder.published()}
        if not here:
            held = {name: torch.empty(value.shape, dtype=kinds[name]) for name, value in held.items()}
        self._held = Held(held)
        self._reader: Reader | None = None

    def clock(self) -> float:
        return time.monotonic()

    def pid(self) -> int:
        """Its process, to look it up by."""
        return os.getpid()

    def open(self, address: Address, deadline_s: float) -> None:
        """Where versions come from, the first of them whole."""
        self._held.version = None
        self._reader = reader_of(address, self._held, deadline_s)

    def receive(self, version: WeightVersion, timeout_s: float) -> WeightVersion:
        """Serve what is published; which version that is. DeliveryError where it does not come, or not as it was."""
        assert self._reader is not None
        until_s = time.monotonic() + timeout_s
        while True:  # an earlier one may come once more, whole, for another engine
            if self._reader.receive(max(0.0, until_s - time.monotonic())) is None:
                raise DeliveryError(f"version {version.step} did not come within {timeout_s:g} s.")
            if self._held.version == version:
                break
        self._receiver.receive(version, {POLICY: self._held.weights})
        return self.engine.version

    def advance(
        self,
        requests: Sequence[Request],
        slice_s: float,
        finished: Sequence[tuple[str, str]],
        terms: Mapping[str, Terms],
        heard: Mapping[str, int],
    ) -> tuple[list[Completion], Stats, dict[str, tuple[int, Columns]], Space | None]:
        """Steps with these requests beside those that run: until some end, or `slice_s` have passed.

        finished: programs, and their tenants, that ask for nothing more. terms: that tenants are promised from now on.
        heard: requests of which is told what they drew so far, and from which token on.
        """
        for program_id, tenant in finished:
            self.engine.finish_program(program_id, tenant)
        self.engine.promise(terms)
        for request in requests:  # whatever follows, they are here to be withdrawn
            self.engine.submit(request)
        if self._held.version != self.engine.version:
            raise DeliveryError("the weights that came last were damaged, and none whole came since.")
        until_s, done = time.monotonic() + slice_s, list[Completion]()
        while self.engine.has_work and not done:
            done += self.engine.step()
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                break
            if self.engine.wakes_s:  # caps hold back all that is live
                time.sleep(min(left_s, self.engine.wakes_s))
        drawn = {name: (first, self.engine.drawn(name, first)) for name, first in heard.items()}
        drawn = {name: found for name, found in drawn.items() if len(found[1])}
        return done, self.engine.stats, drawn, self.engine.space()

    def abort(self, request_id: str) -> tuple[Completion | None, Stats]:
        """As Engine's; and its counts by then, with what was on its way."""
        return self.engine.abort(request_id), self.engine.stats

    def release_memory(self) -> None:
        self.engine.release_memory()

    def check_integrity(self) -> None:
        self.engine.check_integrity()


class ReferenceWorker:
    """The reference policy."""

    def __init__(self, given: tuple[str, ModelConfig]) -> None:
        source, model = given
        torch.set_num_threads(env.num_threads())
        checkpoint = open_checkpoint(source)
        self._decoder = decoder_of(checkpoint.spec, model).load(checkpoint.tensors())

    def pid(self) -> int:
        """Its process, to look it up by."""
        return os.getpid()

    def score(
        self, samples: Sequence[Sample], prompts: Sequence[PromptTotal], budget_tokens: int, temperature: float
    ) -> tuple[Sample, ...]:
        """With their `reference_logprobs`."""
        return with_logprobs("reference_logprobs", self._decoder, samples, prompts, budget_tokens, temperature)


class LearnerWorker:
    """The learner: its weights, its optimiser, and where they go."""

    def __init__(self, given: LearnerGiven) -> None:
        torch.set_num_threads(env.num_threads())
        run, model, workers = given.run, given.run.model, given.run.workers
        checkpoint = open_checkpoint(given.source)
        decoder = decoder_of(checkpoint.spec, model).load(checkpoint.tensors())
        self._tokenizer = checkpoint.load_tokenizer()
        objective = OBJECTIVES[run.objective](run)
        self._learner = Learner(decoder, given.learner, objective, total_updates(run, objective))
        tensors = {name: weight.value for name, weight in decoder.weights()}
        self._way = way_of(workers.transport, tensors, workers.folder, given.host, workers.deadline_s / 2)
        self._due: tuple[WeightVersion, Weights] | None = None  # to be published

    def pid(self) -> int:
        """Its process, to look it up by."""
        return os.getpid()

    def step(self, samples: Sequence[Sample], prompts: Sequence[PromptTotal]) -> tuple[LearnerReport | None, int]:
        """As Learner's; and its updates by then."""
        return self._learner.step(samples, prompts), self._learner.updates

    def measure(self, samples: Sequence[Sample], prompts: Sequence[PromptTotal]) -> dict[str, float]:
        """As Learner's."""
        return self._learner.measure(samples, prompts)

    def updates(self) -> int:
        """As Learner's."""
        return self._learner.updates

    def under(self, total_updates: int, alarms: AlarmConfig) -> None:
        self._learner.under(total_updates, alarms)

    def facts(self) -> dict[str, Any]:
        """As parts.py's."""
        return facts(self._learner.decoder)

    def save(self, directory: Path, state: RunState) -> None:
        """CheckpointError where the disk, or its folder, is not there for it."""
        try:
            self._learner.save(directory, self._tokenizer, state)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{directory} could not be written: {error}. Free disk space or choose another."
            ) from error

    def load(self, directory: Path) -> RunState:
        return self._learner.load(directory)

    def address(self, reader: str) -> Address:
        """As Way's, as the next three."""
        return self._way.address(reader)

    def meet(self, reader: str) -> None:
        self._way.meet(reader)

    def again(self, reader: str) -> None:
        self._way.again(reader)

    def hashed(self, step: int) -> WeightVersion:
        """The version that `publish` is to publish."""
        self._due = published(self._learner.decoder, step)
        return self._due[0]

    def publish(self) -> None:
        assert self._due is not None
        self._way.publish(*self._due)

    def close(self) -> None:
        """Take away what would stay."""
        self._way.close()
