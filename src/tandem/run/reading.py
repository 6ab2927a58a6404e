"""What a run learns from where nothing is sampled: the task's own solutions, or the sources of config.corpus."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tandem.algo import preference
from tandem.algo.advantage import Selection
from tandem.algo.supervised import select
from tandem.corpus.preferences import preferences_of
from tandem.corpus.reader import Reader, tasks_of
from tandem.corpus.solutions import written
from tandem.corpus.sources import readers_of
from tandem.corpus.stream import CorpusStream
from tandem.program.pool import EnvironmentPool
from tandem.program.render import Renderer
from tandem.run.config import RunConfig
from tandem.run.distil import check_corpus, positions_of
from tandem.run.learned import OBJECTIVES
from tandem.run.learning import Learns
from tandem.run.spans import Answers
from tandem.run.stream import PromptStream
from tandem.types import Group

if TYPE_CHECKING:
    from tandem.run.parts import Parts
    from tandem.train.checkpoint import Part

# Keys of a row that what was read has not: a reward, and an end of its own.
OF_SAMPLES = ("reward", "reward_std", "zero_variance", "truncated", "turns", "happened")

# `objective` of a config -> who reads its sources, and what of their groups is trained.
READERS: Mapping[str, Callable[[RunConfig, Renderer], Sequence[Reader]]] = {
    "next_token": lambda config, renderer: readers_of(config.corpus, renderer),
    "drafter": lambda config, renderer: readers_of(config.corpus, renderer),
    "distil": lambda config, renderer: _taught(config, renderer),
    "preference": lambda config, renderer: preferences_of(
        config.corpus,
        config.preference,
        renderer,
        most_rows=config.learner.microbatch_tokens,
        share_prefix=config.learner.share_prefix,
    ),
}
SELECTIONS: Mapping[str, Callable[[RunConfig, Sequence[Group]], Selection]] = {
    "next_token": lambda config, groups: select(groups, config.supervised),
    "preference": lambda config, groups: preference.select(groups),
    "distil": lambda config, groups: select(groups),
    "drafter": lambda config, groups: select(groups),
}


def _taught(config: RunConfig, renderer: Renderer) -> Sequence[Reader]:
    """Of a student whose teacher can say something of them."""
    readers = readers_of(config.corpus, renderer)
    check_corpus(config, {reader.name: reader.digest for reader in readers})
    return [Answers(reader, renderer) for reader in readers] if config.distil.spans else readers


Scored = Callable[[Sequence[Group]], Selection]  # what of groups is learned, with the columns that its loss reads


class Reading(Protocol):
    """What takes the place of rollouts."""

    saved: Mapping[str, Part]  # of a checkpoint

    def take(self, prompts: PromptStream) -> Sequence[Group]:
        """The groups of a step; `prompts` are the task's, which a checkpoint has."""
        ...

    def told(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A step's row, as far as it is of what was read, and what this has to add."""
        ...

    def heldout(self, learner: Learns, scored: Scored) -> dict[str, Any]:
        """A row's key of what the held-out tasks come to; nothing where there are none. `scored`: as a step's are."""
        ...

    def begun(self) -> dict[str, Any]:
        """Keys of the row before the first step."""
        ...

    def plan(self) -> dict[str, Any]:
        """For plan.json: what exactly is read."""
        ...

    def notes(self) -> list[str]:
        """For people, before the first step."""
        ...

    def settle(self) -> None:
        """What was taken has met its fate."""
        ...


class Solutions:
    """The task's own, in the order of its prompts."""

    saved: Mapping[str, Part] = {}

    def __init__(self, config: RunConfig, renderer: Renderer, positions: int, pool: EnvironmentPool) -> None:
        """positions: of the model."""
        self.count, self.pool = config.rollout.prompts_per_step, pool
        self.renderer, self.positions = renderer, positions_of(config, positions)

    def take(self, prompts: PromptStream) -> Sequence[Group]:
        asked = prompts.take(self.count)
        return written(asked, self.pool.solutions(asked), self.renderer, self.positions)

    def told(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in OF_SAMPLES}

    def heldout(self, learner: Learns, scored: Scored) -> dict[str, Any]:
        return {}

    def begun(self) -> dict[str, Any]:
        return {}

    def plan(self) -> dict[str, Any]:
        return {}

    def notes(self) -> list[str]:
        return []

    def settle(self) -> None: ...


class Corpus:
    """Of config.corpus. Tasks that the evaluation asks are not trained on."""

    def __init__(
        self,
        config: RunConfig,
        renderer: Renderer,
        positions: int,
        pool: EnvironmentPool,
        told: Callable[[str], None] = lambda text: None,
    ) -> None:
        """positions: of the model. told: hears how far the reading is."""
        self.config = config
        limit = config.corpus.limit(config.learner.microbatch_tokens, positions_of(config, positions))
        evaluated = [tasks_of(prompt) for prompt in pool.heldout] if config.evaluation.prompts else []
        readers = READERS[config.objective](config, renderer)
        excluded, choose = frozenset[int]().union(*evaluated), SELECTIONS[config.objective]
        self.stream = CorpusStream(
            readers, config.corpus, limit, config.seed, excluded, told=told, tried=lambda group: choose(config, [group])
        )
        self.saved: Mapping[str, Part] = {"corpus": self.stream}

    def take(self, prompts: PromptStream) -> Sequence[Group]:
        return self.stream.take(self.config.rollout.prompts_per_step)

    def told(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in OF_SAMPLES} | {"epochs": self.stream.epochs()}

    def heldout(self, learner: Learns, scored: Scored) -> dict[str, Any]:
        if not self.stream.heldout:
            return {}
        batch = scored(self.stream.heldout)
        return {"heldout": learner.measure(batch.samples, batch.prompts)}

    def begun(self) -> dict[str, Any]:
        return {"corpus": self.stream.totals()}

    def plan(self) -> dict[str, Any]:
        return {"corpus": {name: dict(counts) for name, counts in self.stream.counts.items()}} | {
            "corpus_digests": self.stream.state()["digests"]
        }

    def notes(self) -> list[str]:
        steps = self.stream.steps_of_an_epoch(self.config.rollout.prompts_per_step)
        return [*self.stream.account(), f"all rows once are about {steps:,} steps; the run has {self.config.steps:,}"]

    def settle(self) -> None:
        self.stream.settle()


def reading_of(config: RunConfig, parts: Parts, pool: EnvironmentPool, told: Callable[[str], None]) -> Reading | None:
    """What a config names; None where the engine samples. Reads all of a corpus, and tells how far it is."""
    if OBJECTIVES[config.objective](config).samples:
        return None
    given = config, parts.renderer, parts.decoder.spec.max_position, pool
    return Corpus(*given, told) if config.corpus.on else Solutions(*given)
