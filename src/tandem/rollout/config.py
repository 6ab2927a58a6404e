"""How many rollouts a step takes and how their tokens are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Interval

from tandem.config import Amount, Count, Positive, section
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
