"""How many rollouts a step takes and how their tokens are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.errors import ConfigError
from tandem.types import Sampling


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    """A step's rollouts: prompts_per_step x samples_per_prompt programs.

    >>> RolloutConfig(max_new_tokens=8).sampling((2,)).stop_token_ids
    (2,)
    """

    prompts_per_step: int = 16  # each with its own group
    samples_per_prompt: int = 8  # the group whose rewards are compared
    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int = 0  # keep this many most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set whose mass reaches this
    min_p: float = 0.0  # keep tokens of at least this share of the most likely one's probability
    max_new_tokens: int = 64  # tokens at most, a turn
    stop_strings: tuple[str, ...] = ()  # texts that end a turn, beside the tokeniser's stop tokens
    max_turns: int = 1  # completions a program may make; 1 never asks the environment to observe
    deadline_s: float = 600.0  # seconds for a step's rollouts and rewards; what is left then fails with a reason

    def __post_init__(self) -> None:
        for name in ("prompts_per_step", "samples_per_prompt", "max_new_tokens", "max_turns"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"rollout.{name} is {value}. Allowed: 1 or more.")
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:  # logits are divided in fp32
            raise ConfigError(f"rollout.temperature is {self.temperature}. Allowed: 0 (greedy), or 1e-6 to 1e6.")
        if not 0 <= self.top_k < 2**31:
            raise ConfigError(f"rollout.top_k is {self.top_k}. Allowed: 0 (all tokens), or up to 2^31 - 1.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"rollout.top_p is {self.top_p}. Allowed: above 0, at most 1 (all tokens).")
        if not 0 <= self.min_p < 1:
            raise ConfigError(f"rollout.min_p is {self.min_p}. Allowed: 0 (all tokens) to below 1.")
        if "" in self.stop_strings:
            raise ConfigError("rollout.stop_strings holds an empty string, which would stop at once. Take it out.")
        if not self.deadline_s > 0:
            raise ConfigError(f"rollout.deadline_s is {self.deadline_s}. Allowed: seconds above 0.")

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
