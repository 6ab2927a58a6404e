"""What a config makes of a learner: by which objective, how often, with what the plan decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, get_args

from tandem.algo.objective import Objective, PolicyGradient
from tandem.algo.preference import Preference, RewardModel
from tandem.algo.supervised import NextToken
from tandem.run.config import Learned, RunConfig
from tandem.sync.departures import is_exact

if TYPE_CHECKING:
    from tandem.plan.memory import Plan
    from tandem.train.config import Checkpointing, LearnerConfig

# `objective` of a config -> what the learner is given.
OBJECTIVES: Mapping[str, Callable[[RunConfig], Objective]] = {
    "policy_gradient": lambda config: PolicyGradient(
        config.algo, config.rollout.temperature, config.alarms, exact=is_exact(config)
    ),
    "next_token": lambda config: NextToken(),
    "preference": lambda config: (
        RewardModel(config.preference) if config.preference.loss == "reward_model" else Preference(config.preference)
    ),
}
assert {*OBJECTIVES} == {*get_args(Learned)}, f"run/config.py names {get_args(Learned)}, here: {[*OBJECTIVES]}"


def learner_config(config: RunConfig, memory: Plan) -> LearnerConfig:
    """What of the config the plan decides, decided."""
    kept: Checkpointing = "on" if memory.checkpointing else "off"
    return dataclasses.replace(config.learner, activation_checkpointing=kept)


def total_updates(config: RunConfig, objective: Objective) -> int:
    """By which the learning rate falls."""
    return (config.steps - config.critic.warmup_steps) * objective.updates_per_step
