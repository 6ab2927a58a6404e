"""What a config makes of a learner: by which objective, how often, with what the plan decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from tandem.algo.objective import Objective, PolicyGradient
from tandem.algo.preference import Preference, RewardModel
from tandem.algo.supervised import NextToken
from tandem.errors import ConfigError
from tandem.run.config import Learned, RunConfig
from tandem.run.distil import distil_of
from tandem.run.learned_drafter import drafter_of
from tandem.run.source import resolve_source
from tandem.sync.departures import is_exact
from tandem.train import reward
from tandem.train.critic import Critic

if TYPE_CHECKING:
    from torch import Tensor

    from tandem.models.decoder import Decoder
    from tandem.plan.memory import Plan
    from tandem.train.config import Checkpointing, LearnerConfig

# `objective` of a config -> what the learner is given.
OBJECTIVES: Mapping[str, Callable[[RunConfig], Objective]] = {
    "policy_gradient": lambda config: PolicyGradient(
        config.algo, config.rollout.temperature, config.alarms, exact=is_exact(config)
    ),
    "next_token": lambda config: NextToken(),
    "preference": lambda config: (
        RewardModel(config.preference, lambda: _head(config))
        if config.preference.loss == "reward_model"
        else Preference(config.preference)
    ),
    "distil": distil_of,
    "drafter": drafter_of,
}
assert {*OBJECTIVES} == {*get_args(Learned)}, f"run/config.py names {get_args(Learned)}, here: {[*OBJECTIVES]}"


def _head(config: RunConfig) -> Tensor | None:
    """What a reward model begins with: the head of the model that it is made of, where that is one."""
    folder = Path(resolve_source(config.model.source))
    return reward.read(folder) if (folder / reward.FILE).exists() else None


def begins(config: RunConfig) -> list[str]:
    """For people, before the first step of a new run."""
    if config.objective != "preference" or config.preference.loss != "reward_model":
        return []
    begun = "a new one of zeros" if _head(config) is None else "that of model.source, which is a reward model"
    return [f"the reward head begins as {begun}"]


def learner_config(config: RunConfig, memory: Plan) -> LearnerConfig:
    """What of the config the plan decides, decided."""
    kept: Checkpointing = "on" if memory.checkpointing else "off"
    return dataclasses.replace(config.learner, activation_checkpointing=kept)


def total_updates(config: RunConfig, objective: Objective) -> int:
    """By which the learning rate falls."""
    return (config.steps - config.critic.warmup_steps) * objective.updates_per_step


def critic_of(config: RunConfig, policy: Decoder, frozen: Callable[[str], Decoder], memory: Plan) -> Critic:
    """The critic of a run: on a trunk of its own, which `frozen` reads, or on the policy's."""
    own = config.critic.model
    trunk = frozen(own) if own else policy
    if trunk.spec.vocab_size != policy.spec.vocab_size:
        raise ConfigError(
            f"critic.model {own} has {trunk.spec.vocab_size} tokens and the policy {policy.spec.vocab_size}: they "
            "have to read the same. Choose a model of the policy's family, or an empty critic.model."
        )
    return Critic(trunk, config.critic, learner_config(config, memory), own=bool(own))
