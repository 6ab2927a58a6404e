"""What a step's sampling is spent on: which prompts it asks, and which groups it goes on with (docs/spending.md)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tandem.algo.advantage import Selection, weighed
from tandem.numerics.random import Stream, derive_seed, uniform, words
from tandem.rollout.belief import Beliefs, shares
from tandem.rollout.choose import Choice, choose, selection_seed
from tandem.rollout.config import SelectConfig
from tandem.rollout.early import Early
from tandem.run.stream import PromptStream
from tandem.types import Group, Prompt


class Spending:
    """The choices of a step, and what is believed of the task's prompts after those that were settled.

    With `select.window` a step's prompts are drawn from the next so many of the task; then `select.fresh` of them make
    place for others, so that who is a candidate depends on no reward. What was drawn since the last `settle` is drawn
    again after a resume.
    """

    def __init__(
        self,
        stream: PromptStream,
        config: SelectConfig,
        size: int,
        run_seed: int,
        differ: Callable[[Group], bool],
    ) -> None:
        self.stream = stream
        self.config = config
        self.size = size  # programs of a group
        self.run_seed = run_seed
        self.differ = differ
        self.beliefs = Beliefs(config.half_life, config.bucket)
        self._choices: list[Choice] = []  # of this step
        self._early: Early | None = None  # of this step
        self._groups: Sequence[Group] | None = None  # of this step, once they are known

    @property
    def first(self) -> int:
        """Programs of a group that run whatever the others earn."""
        return min(self.config.first_samples or self.size, self.size)

    def take(self, step: int, count: int) -> Sequence[Prompt]:
        """The prompts of a draw; a step's second and later ones are drawn from those that were left."""
        if not self.config.window:
            return self.stream.take(count)
        taken = {prompt.id for choice in self._choices for prompt in choice.prompts}
        left = [prompt for prompt in self.stream.ahead(self.config.window) if prompt.id not in taken]
        candidates = [(prompt, self.beliefs.of(prompt), self.beliefs.knows(prompt)) for prompt in left]
        seed = selection_seed(self.run_seed, step, len(self._choices))
        choice = choose(candidates, count, self.config.floor, self.config.power, seed)
        self._choices.append(choice)
        return choice.prompts

    def early(self, step: int) -> Early | None:
        """When groups of this step have enough programs; None where all have as many."""
        if self.first == self.size:
            return None
        if self._early is None:
            known = (self.beliefs.of, self.differ, lambda prompt: self._audited(step, prompt))
            self._early = Early(self.first, self.size, self.config.error, *known)
        return self._early

    def _audited(self, step: int, prompt: Prompt) -> bool:
        noise = words(derive_seed(self.run_seed, step, prompt.id, -1), 0, 0, Stream.SELECTION)
        return bool(uniform(noise) < self.config.audit)

    def weight(self, prompt_id: str) -> float:
        """Of what is learned of a group, so that in expectation all candidates count alike; at most select.weight_max.

        1 over its probability of being asked and, where it should have been stopped, of having run on.
        """
        weight = next((one.weight(prompt_id) for one in self._choices if prompt_id in one.chances), 1.0)
        if self._early is not None and prompt_id in self._early.audited:
            weight /= self.config.audit
        return min(weight, self.config.weight_max)

    def weigh(self, batch: Selection) -> Selection:
        """The batch, with the weights of its groups where select.weigh asks for them."""
        return weighed(batch, self.weight) if self.config.weigh else batch

    def facts(self, prompt_id: str) -> dict[str, Any]:
        """What a row of a trajectory says of its group."""
        found: dict[str, Any] = {}
        for choice in self._choices:
            if prompt_id in choice.chances:
                belief = choice.beliefs[prompt_id]
                found = {"chance": choice.chances[prompt_id], "expected": belief.mean, "variance": belief.variance}
        if self._early is not None:
            found["stopped"] = prompt_id in self._early.stopped
            if prompt_id in self._early.audited:
                found["audit"] = self.config.audit
        return {"selection": found} if found else {}

    def learn(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Keys of the step's row. What the groups say is believed from `settle` on."""
        self._groups = groups
        row: dict[str, Any] = {}
        if self._early is not None:
            early, differing = self._early, {group.prompt.id for group in groups if self.differ(group)}
            row["stopped_groups"] = len(early.stopped)
            row["spared_programs"] = sum(self.size - len(group.programs) for group in groups)
            row["audited_groups"], row["audited_wrong"] = len(early.audited), len(early.audited & differing)
        if self._choices:
            row |= self._chosen(groups)
        return row

    def _chosen(self, groups: Sequence[Group]) -> dict[str, Any]:
        first = self._choices[0]
        drawn = {group.prompt.id: group for group in groups}
        means = {
            name: statistics.fmean(known)
            for name, group in drawn.items()
            if (known := [share for share in shares(group)[: self.first] if share is not None])
        }
        asked = [prompt.id for choice in self._choices for prompt in choice.prompts if prompt.id in drawn]
        weights = [self.weight(name) for name in asked]
        beliefs = {name: belief for choice in self._choices for name, belief in choice.beliefs.items()}
        repeated = {name: again for choice in self._choices for name, again in choice.repeated.items()}
        return {
            "task_reward": first.mean({name: mean for name, mean in means.items() if name in first.chances}),
            "selection": {
                "predicted": statistics.fmean(beliefs[name].differs(self.size) for name in asked),
                "met": statistics.fmean(self.differ(drawn[name]) for name in asked),
                "repeated": statistics.fmean(repeated[name] for name in asked),
                "weight_max": max(weights),
                "ess": sum(weights) ** 2 / (len(weights) * sum(weight * weight for weight in weights)),
            },
        }

    def settle(self) -> None:
        """The step has met its fate."""
        if self._groups is None or not self.config.on:
            return
        self.beliefs.learn(self._groups, self.first)
        if self.config.window:
            self.stream.skip(self.stream.cursor + self.config.fresh)
        self._choices, self._early, self._groups = [], None, None

    def state(self) -> dict[str, Any]:
        return self.beliefs.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.beliefs.restore(state)
