"""The learner in a worker's process (run/workers.py), as the loop knows it: asked for a step, for its weights to be
published, saved and loaded. The loop's own process has no weights then.

A learner that is lost takes its weights and its optimiser's state with it, so no other takes its place: the run stops
with an error that names it and the phase, and is resumed from its last checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tandem.errors import TandemError, WorkerError
from tandem.models.decoder import DTYPES, Decoder
from tandem.run.workers import Backend, Spec
from tandem.sync.publish import Publisher
from tandem.sync.receive import Receiver, Weights
from tandem.sync.transport import Remote
from tandem.sync.ways import Address

if TYPE_CHECKING:
    from tandem.algo.alarm import AlarmConfig
    from tandem.algo.objective import Objective
    from tandem.algo.pack import PromptTotal
    from tandem.kernels.weight import Weight
    from tandem.models.spec import ModelSpec
    from tandem.models.tokenizer import Tokenizer
    from tandem.run.config import RunConfig
    from tandem.train.checkpoint import RunState
    from tandem.train.config import LearnerConfig
    from tandem.train.critic import Critic
    from tandem.train.step import LearnerReport
    from tandem.types import Sample, WeightVersion

UNKNOWN = -1  # updates, of weights that are of no step: one began, and did not come back


@dataclass(frozen=True, slots=True)
class LearnerGiven:
    """What a learner's worker is made of."""

    source: str  # of the model, resolved
    run: RunConfig
    learner: LearnerConfig  # with what the plan decided
    host: str  # of the way that its weights go: this machine, as engines reach it


class Learns(Protocol):
    """What a session asks of a learner, train/step.py's or one in another process."""

    objective: Objective
    critic: Critic | None

    @property
    def updates(self) -> int:
        """Of the optimiser."""
        ...

    def step(self, samples: Sequence[Sample], prompts: Sequence[PromptTotal]) -> LearnerReport | None: ...

    def measure(self, samples: Sequence[Sample], prompts: Sequence[PromptTotal]) -> dict[str, float]:
        """What the objective measures of samples that are not learned from."""
        ...

    def under(self, total_updates: int, alarms: AlarmConfig) -> None:
        """Other settings than its own, from the next step on."""
        ...

    def save(self, directory: Path, tokenizer: Tokenizer, state: RunState) -> None: ...

    def load(self, directory: Path) -> RunState: ...


class DecoderElsewhere(Decoder):
    """What a decoder is, without its weights."""

    def __init__(self, spec: ModelSpec, dtype: str) -> None:
        self.spec, self.dtype = spec, DTYPES[dtype]

    def weights(self) -> Iterator[tuple[str, Weight]]:
        raise AssertionError("its weights are in the learner's process")


class RemoteLearner:
    """Asked, as Learns says."""

    critic: Critic | None = None

    def __init__(self, backend: Backend, given: LearnerGiven, objective: Objective) -> None:
        self.objective = objective
        self.config = given.learner
        self._deadline_s = backend.config.deadline_s
        self._updates = 0
        spec = Spec("learner", "tandem.run.roles:LearnerWorker", given)
        self.worker = backend.start(spec, backend.config.start_deadline_s)

    def ask(self, phase: str, method: str, *arguments: Any, times: int = 1) -> Any:
        """The answer, within so many deadlines."""
        return self.worker.ask(phase, method, *arguments, deadline_s=times * self._deadline_s).result()

    @property
    def updates(self) -> int:
        return self._updates

    def step(self, samples: Sequence[Sample], prompts: Sequence[PromptTotal]) -> LearnerReport | None:
        """A deadline for each microbatch, forward and backward."""
        rows = sum(len(sample.columns) for sample in samples)
        times = 2 * (self.objective.updates_per_step + rows // self.config.microbatch_tokens)
        report: LearnerReport | None
        self._updates = UNKNOWN
        try:
            report, self._updates = self.ask("learn", "step", samples, prompts, times=times)
        except TandemError:
            with contextlib.suppress(WorkerError):
                self._updates = self.ask("learn", "updates")
            raise
        return report

    def measure(self, samples: Sequence[Sample], prompts: Sequence[PromptTotal]) -> dict[str, float]:
        """A deadline for each microbatch."""
        times = 1 + sum(len(sample.columns) for sample in samples) // self.config.microbatch_tokens
        found: dict[str, float] = self.ask("evaluate", "measure", samples, prompts, times=2 * times)
        return found

    def under(self, total_updates: int, alarms: AlarmConfig) -> None:
        self.ask("learn", "under", total_updates, alarms)

    def save(self, directory: Path, tokenizer: Tokenizer, state: RunState) -> None:
        """Into a folder that its machine has too."""
        self.ask("save", "save", directory.absolute(), state)

    def load(self, directory: Path) -> RunState:
        state: RunState = self.ask("load", "load", directory.absolute())
        self._updates = state.updates
        return state


class RemoteWay:
    """The learner's end of what its weights go by (sync/ways.py), asked from here. Where both ends wait for each other,
    each has its own call."""

    def __init__(self, learner: RemoteLearner) -> None:
        self._learner = learner

    def address(self, reader: str) -> Address:
        address: Address = self._learner.ask("publish", "address", reader)
        return address

    def meet(self, reader: str) -> None:
        self._learner.ask("publish", "meet", reader)

    def again(self, reader: str) -> None:
        self._learner.ask("publish", "again", reader)

    def publish(self, version: WeightVersion, weights: Weights) -> None:
        raise AssertionError("the learner's process has the weights")

    def close(self) -> None:
        """What a learner that is lost leaves in a folder goes with the next run."""
        with contextlib.suppress(WorkerError):
            self._learner.ask("close", "close")


class RemotePublisher(Publisher):
    """Of the weights that a learner elsewhere has."""

    def __init__(self, learner: RemoteLearner, receivers: Sequence[Receiver]) -> None:
        self._learner = learner
        self.receivers = tuple(receivers)
        self.version: WeightVersion | None = None

    def publish(self, step: int) -> WeightVersion:
        """As Publisher's."""
        version: WeightVersion = self._learner.ask("publish", "hashed", step)
        for receiver in self.receivers:
            assert isinstance(receiver, Remote), receiver
            receiver.exchange(version, lambda: self._learner.ask("publish", "publish"))
        self.version = version
        return version

    def sources(self) -> Mapping[int, Decoder]:
        return {}

    def save(self, directory: Path) -> None: ...

    def load(self, directory: Path) -> None: ...
