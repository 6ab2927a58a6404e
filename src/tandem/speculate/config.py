"""How a drafter on the target's hidden states is made and trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from tandem.config import AboveZero, Count, Positive, section
from tandem.errors import ConfigError

DraftLoss = Literal["ce", "kl", "tv", "lk", "lk_hybrid", "match"]
Kind = Literal["eagle3", "dflash", "mixed"]
Mixer = Literal["attention", "gru", "linear"]
MOST_STEPS = 16


@dataclass(frozen=True, slots=True)
@section("drafter")
class DrafterConfig:
    """A drafter that objective=drafter trains; the model itself stays as it is (docs/speculation.md).

    >>> DrafterConfig().steps
    5
    """

    kind: Kind = "eagle3"  # one layer, a token at a time; mixed: as drafter.mixers; dflash: a block of masks at once
    source: str = ""  # a drafter's folder to go on from, or a run that trained one; empty: a new one
    vocabulary: Count = 0  # tokens that it may say: the most frequent, and stop tokens; 0: all
    vocabulary_of: str = ""  # texts, a run or a token map that says which; empty: those of the lowest ids
    layers: tuple[int, ...] = ()  # of the model, from 0, whose states it reads; empty: low, middle and high
    steps: Annotated[int, Interval(ge=1, le=MOST_STEPS)] = 5  # drafts that it is trained to make, each on those before
    depth: Positive = 1  # layers of a new dflash
    mixers: tuple[Mixer, ...] = ()  # of a new mixed: what each layer has, attention, gru or linear (attention)
    loss: DraftLoss = "kl"  # between its distributions and the model's (speculate/losses.py)
    decay: Annotated[float, Interval(gt=0, le=1)] = 0.8  # of the loss from one step to the next
    temperature: AboveZero = 1.0  # that divides both models' logits
    updates: Positive = 1  # of a step, each of a part of its prompts
    on_policy: bool = False  # the model samples the texts; else the task's own, or those of corpus.sources

    def __post_init__(self) -> None:
        if self.depth != 1 and self.kind != "dflash":
            raise ConfigError(f"drafter.depth is {self.depth}, of an {self.kind}. Set drafter.kind=dflash.")
        if (self.kind == "mixed" and not self.source) != bool(self.mixers):
            raise ConfigError(
                f"drafter.kind is {self.kind} and drafter.mixers {', '.join(self.mixers) or 'empty'}. Give both, such "
                "as drafter.kind=mixed and drafter.mixers=attention,gru, or neither; one that goes on from "
                "drafter.source has its own."
            )
        if self.vocabulary_of and not self.vocabulary:
            raise ConfigError("drafter.vocabulary_of is given: say how many tokens, with drafter.vocabulary.")
        if self.source:
            for name in ("layers",) if self.kind == "dflash" else ("vocabulary", "layers"):
                if value := getattr(self, name):
                    raise ConfigError(
                        f"drafter.source is {self.source}, which has its own {name}, and drafter.{name} is {value}. "
                        "Leave one of them out."
                    )
