"""How many rollouts a step takes and how their tokens are drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from tandem.config import AboveZero, Amount, Count, Positive, Share, section
from tandem.errors import ConfigError
from tandem.types import Sampling


@dataclass(frozen=True, slots=True)
@section("rollout")
class RolloutConfig:
    """A step's rollouts: prompts_per_step x samples_per_prompt programs.

    >>> RolloutConfig(max_new_tokens=8).sampling((2,)).stop_token_ids
    (2,)
    """

    prompts_per_step: Positive = 16  # each with its own group
    samples_per_prompt: Positive = 8  # the group whose rewards are compared
    redraws: Count = 0  # times that a step draws other prompts for groups of equal rewards, until none is lacking
    extra_prompts: Count = 0  # prompts run beyond those of a batch, which the first groups to end make (first.py)
    temperature: float = 1.0  # 0 takes the most likely token
    top_k: Annotated[int, Interval(ge=0, le=2**31 - 1)] = 0  # keep this many most likely tokens; 0 keeps all
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0  # keep the smallest set whose mass reaches this
    min_p: Annotated[float, Interval(ge=0, lt=1)] = 0.0  # keep tokens of this share of the likeliest's probability
    max_new_tokens: Positive = 64  # tokens at most, a turn
    stop_strings: tuple[str, ...] = ()  # texts that end a turn, beside the tokeniser's stop tokens
    history: Literal["append", "render"] = "append"  # later turns: behind the sampled tokens, or all rendered anew
    max_turns: Positive = 1  # completions a program may make; 1 never asks the environment to observe
    max_program_tokens: Count = 0  # sampled in all turns of a program, at most; 0: as its turns and the context allow
    max_program_s: Amount = 0.0  # from a program's first token on, after which it takes no turn; 0: no limit
    tenant: str = ""  # whose share of the engine rollouts take, under engine.order=shares; a path of its tree
    returning_first: bool = True  # programs that come back from their environment run before those that begin
    deadline_s: Annotated[float, Gt(0)] = 600.0  # seconds for rollouts and rewards; what is left fails with a reason
    keep_tokens: bool = True  # in trajectories/: ids, log-probs and credit of each token, which the page colours

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:  # logits are divided in fp32
            raise ConfigError(f"rollout.temperature is {self.temperature}. Allowed: 0 (greedy), or 1e-6 to 1e6.")
        if "" in self.stop_strings:
            raise ConfigError("rollout.stop_strings holds an empty string, which would stop at once. Take it out.")

    def sampling(self, stop_token_ids: tuple[int, ...]) -> Sampling:
        """What a request of this config asks for, with the tokeniser's stop tokens."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            max_new_tokens=self.max_new_tokens,
            stop_token_ids=stop_token_ids,
            stop_strings=self.stop_strings,
        )


@dataclass(frozen=True, slots=True)
class Drawing:
    """How the answers of an evaluation are drawn: by default the most likely one, once.

    >>> Drawing(samples=8, temperature=0.6).of(RolloutConfig(min_p=0.1)).min_p
    0.0
    """

    samples: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def of(self, config: RolloutConfig) -> RolloutConfig:
        """`config`, of whose own sampling nothing is left."""
        drawn = replace(config, samples_per_prompt=self.samples, temperature=self.temperature)
        return replace(drawn, top_k=self.top_k, top_p=self.top_p, min_p=0.0)


Mode = Literal["sync", "one_off", "full"]
Order = Literal["fifo", "window", "completion", "drop"]
AtUpdate = Literal["carry", "keep", "restart", "finish"]


@dataclass(frozen=True, slots=True)
@section("asynchrony")
class AsyncConfig:
    """How far rollouts run ahead of the learner. P: rollout.prompts_per_step groups. docs/asynchrony.md.

    >>> AsyncConfig(mode="full", lag=2).most_lag, AsyncConfig(mode="one_off").most_lag
    (2, 1)
    """

    mode: Mode = "sync"  # sync: they take turns; one_off: a batch ahead; full: (lag + 1) P groups run or wait
    lag: Count = 1  # updates that the weights behind a group's first token may trail the learner's, in mode full
    order: Order = "fifo"  # in which groups are learned; window and completion favour those that end early
    window: Positive = 1  # of order window: any of this many groups, from the oldest that nothing was learned of
    stream: bool = False  # the learner computes the gradients of a batch's groups as these end, and updates at the last
    at_update: AtUpdate = "carry"  # programs that run: go on (keys and values anew, or kept), begin anew, or end first
    by_load: bool = True  # groups begin where the engine has none waiting and the learner needs more
    replay_uses: Positive = 1  # batches that a group may be in
    replay_groups: Count = 0  # most that are kept for another use; 0: as many as the lag allows
    replay_lag: Count = 4  # updates that what is used again may trail
    replay_order: Literal["oldest", "newest", "random", "spread"] = "oldest"  # of those kept; spread: of rewards

    def __post_init__(self) -> None:
        if self.window != 1 and self.order != "window":
            raise ConfigError(
                f"asynchrony.window is {self.window}, and asynchrony.order is {self.order!r}, which has none. Set "
                "asynchrony.order to window, or leave asynchrony.window at 1."
            )
        if self.mode == "one_off" and (self.order, self.at_update) != ("fifo", "carry"):
            raise ConfigError(
                "asynchrony.mode is one_off: batches are learned in order and end before the weights change. Leave "
                "asynchrony.order and asynchrony.at_update out, or set asynchrony.mode to full."
            )

    @property
    def most_lag(self) -> int:
        """S."""
        return {"sync": 0, "one_off": 1, "full": self.lag}[self.mode]

    @property
    def ends_first(self) -> bool:
        """Whether nothing may run while the weights change."""
        return self.mode == "one_off" or self.at_update == "finish"


@dataclass(frozen=True, slots=True)
@section("select")
class SelectConfig:
    """What sampling is spent on: which prompts a step asks, and which groups it goes on with (docs/spending.md).

    >>> SelectConfig().on
    False
    """

    window: Count = 0  # prompts that a step chooses among, by the predicted variance of their rewards; 0: the next ones
    fresh: Count = 16  # of them that make place for the task's next ones after each step
    floor: Annotated[float, Interval(gt=0, le=1)] = 0.2  # share of a step's prompts that is drawn evenly
    power: Amount = 1.0  # of the predicted variance; 0 draws all evenly
    half_life: AboveZero = 10.0  # steps after which a reward counts half in what is believed of a prompt
    bucket: str = ""  # field of a prompt's record that says how hard it is; empty: its text with each digit as 0
    first_samples: Count = 0  # samples of a group that are drawn first, the rest where they may differ; 0: all at once
    error: Share = 0.1  # probability, at most, that the rest of a group that is stopped would have differed
    audit: Share = 0.0  # share of the groups to be stopped that run on, which measures that
    weigh: bool = False  # learn of each group by 1 over the probability of having been asked, as if none was chosen
    weight_max: Annotated[float, Ge(1)] = 10.0  # of those weights; what is beyond is cut

    def __post_init__(self) -> None:
        if self.weigh and not self.on:
            raise ConfigError("select.weigh is on, but nothing is chosen. Set select.window, or leave it out.")
        if self.window and not 0 < self.fresh <= self.window:
            raise ConfigError(f"select.fresh is {self.fresh} of a select.window of {self.window}. Allowed: 1 to that.")
        if self.first_samples == 1:
            raise ConfigError("select.first_samples is 1, of which no spread is seen. Allowed: 0, or 2 or more.")
        if self.audit and not self.first_samples:
            raise ConfigError("select.audit is set, but no group is stopped. Set select.first_samples.")

    @property
    def on(self) -> bool:
        """Whether anything is chosen."""
        return self.window > 0 or self.first_samples > 0
