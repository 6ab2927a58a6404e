"""What is learned from that is written already."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from annotated_types import Interval

from tandem.config import AboveZero, Count, section
from tandem.errors import ConfigError, nearest

# What a row may have, by the name that tandem has for it; corpus.fields gives the name that a file has.
PREFERRED = ("prompt", "chosen", "rejected", "completion", "label", "score", "margin", "score_chosen", "score_rejected")
FIELDS = ("messages", "conversations", "text", "tools", "system", "reward", "task", *PREFERRED)
Finite = Annotated[float, Interval(gt=-math.inf, lt=math.inf)]


@dataclass(frozen=True, slots=True)
@section("corpus")
class CorpusConfig:
    """Files and runs that are learned from, and which of their rows.

    >>> CorpusConfig(("train.jsonl",)).on
    True
    """

    sources: tuple[str, ...] = ()  # .jsonl, .parquet, .txt (or a pattern of them), run folders; empty: the task's own
    weights: tuple[AboveZero, ...] = ()  # of the rows drawn, those of each source; empty: by size, as one file
    fields: tuple[tuple[str, str], ...] = ()  # of a row, other names: messages=dialogue,tools=functions
    max_tokens: Count = 0  # of a sequence; 0: learner.microbatch_tokens, or the model's positions where those are less
    long: Literal["split", "drop", "stop"] = "split"  # longer ones: at turns (documents anywhere), left out, an error
    bad: Literal["stop", "count"] = "stop"  # a row that cannot be read: ends the run, or is counted
    duplicates: Literal["drop", "keep"] = "drop"  # rows with the tokens of an earlier one
    rows: Count = 0  # of each source, most that are trained, drawn at random by the run's seed; 0: all
    heldout_tasks: Count = 0  # tasks that are kept out of training; their loss is measured as evaluation.every says
    tokens_per_step: Count = 0  # rows of a step, as many as have so many tokens; 0: rollout.prompts_per_step rows
    turns: Literal["all", "last"] = "all"  # of a conversation, which of the assistant's are trained
    error_turns: Literal["train", "mark"] = "train"  # that a tool answers with an error: marked, they are not trained
    repeated_turns: Literal["train", "mark"] = "train"  # that do what the turn before did: marked, they are not trained
    reward_at_least: Finite | None = None  # programs of a run, and rows, of less are left out; none: all are taken

    def __post_init__(self) -> None:
        if not self.on:
            if given := [one.name for one in fields(self) if getattr(self, one.name) != one.default]:
                raise ConfigError(
                    f"corpus.{given[0]} is set, and corpus.sources is empty. Name what to learn from, or leave it out."
                )
            return
        if self.max_tokens == 1:
            raise ConfigError("corpus.max_tokens is 1, and of one token nothing is learned. Allowed: 0, or 2 and more.")
        if self.weights and len(self.weights) != len(self.sources):
            raise ConfigError(
                f"corpus.weights has {len(self.weights)} numbers and corpus.sources {len(self.sources)} names. Give "
                "one a source, or none."
            )
        if len(set(self.sources)) < len(self.sources):
            raise ConfigError(
                f"corpus.sources names one twice: {', '.join(self.sources)}. Take one out; corpus.weights says how "
                "often its rows come."
            )
        for name, _ in self.fields:
            if name not in FIELDS:
                raise ConfigError(f"corpus.fields names {name!r}.{nearest(name, FIELDS)}")

    @property
    def on(self) -> bool:
        """Whether there are sources."""
        return bool(self.sources)

    def field(self, name: str) -> str:
        """What files call a field of FIELDS.

        >>> CorpusConfig(("a.jsonl",), fields=(("messages", "dialogue"),)).field("messages")
        'dialogue'
        """
        return dict(self.fields).get(name, name)

    def limit(self, microbatch_tokens: int, positions: int) -> int:
        """Most tokens of a sequence."""
        return min(self.max_tokens or microbatch_tokens, positions)
