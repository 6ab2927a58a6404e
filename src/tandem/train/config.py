"""How the learner updates the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from tandem.errors import ConfigError, nearest

Schedule = Literal["constant", "linear", "cosine"]
Checkpointing = Literal["auto", "on", "off"]
Offload = Literal["none", "host", "disk"]
SLICE = 4 << 20  # numbers of an offloaded state that are updated at once: 48 MiB
SHARD_BYTES = 128 << 20  # of the optimiser's state in a checkpoint: the serialiser holds a copy of a shard


@dataclass(frozen=True, slots=True)
class LearnerConfig:
    """AdamW and the shape of a microbatch.

    >>> LearnerConfig(lr=1e-5).lr
    1e-05
    """

    lr: float = 1e-6  # peak learning rate
    schedule: Schedule = "constant"  # after the warm-up; linear and cosine end at lr * final_share
    warmup_steps: int = 0  # updates over which the rate rises linearly to lr
    final_share: float = 0.0  # of lr, at the last update of a linear or cosine schedule
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.999  # AdamW's decay of the mean squared gradient
    eps: float = 1e-8  # AdamW's, beside the root of the mean square
    weight_decay: float = 0.0  # decoupled; of matrices, not of norms and biases
    grad_clip: float = 1.0  # largest gradient norm; larger ones are scaled down
    microbatch_tokens: int = 1024  # rows of one forward and backward pass at most
    share_prefix: bool = True  # samples of a prompt share the rows of the tokens they begin with
    activation_checkpointing: Checkpointing = "auto"  # run layers again in the backward pass; auto: only to fit memory
    optimiser_offload: Offload = "none"  # where master weights and moments lie: disk (a mapped file), host (of a GPU)

    def __post_init__(self) -> None:
        for name, kind in (
            ("schedule", Schedule),
            ("activation_checkpointing", Checkpointing),
            ("optimiser_offload", Offload),
        ):
            if getattr(self, name) not in get_args(kind):
                advice = nearest(str(getattr(self, name)), get_args(kind))
                raise ConfigError(f"learner.{name} is {getattr(self, name)!r}.{advice}")
        for name, low, high in (
            ("lr", 0.0, 1.0),
            ("final_share", 0.0, 1.0),
            ("beta1", 0.0, 1.0),
            ("beta2", 0.0, 1.0),
            ("eps", 0.0, 1.0),
            ("weight_decay", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise ConfigError(f"learner.{name} is {value}; it must be a number in [{low}, {high}].")
        if self.beta1 == 1.0 or self.beta2 == 1.0:
            raise ConfigError(f"learner.beta1 {self.beta1} and learner.beta2 {self.beta2} must be below 1.")
        if not self.grad_clip > 0:
            raise ConfigError(f"learner.grad_clip is {self.grad_clip}; it must be above 0 (inf switches clipping off).")
        if self.warmup_steps < 0:
            raise ConfigError(f"learner.warmup_steps is {self.warmup_steps}; it must be 0 or more.")
        if self.microbatch_tokens < 1:
            raise ConfigError(f"learner.microbatch_tokens is {self.microbatch_tokens}; it must be at least 1.")

    def rate(self, update: int, total: int) -> float:
        """Learning rate of the 0-based `update` of `total`. Linear warm-up, then the schedule.

        >>> LearnerConfig(lr=1.0, warmup_steps=2, schedule="linear").rate(0, 10)
        0.5
        """
        if update < self.warmup_steps:
            return self.lr * (update + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        progress = min(1.0, (update - self.warmup_steps) / max(1, total - self.warmup_steps))
        left = 1.0 - progress if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.lr * (self.final_share + (1.0 - self.final_share) * left)
