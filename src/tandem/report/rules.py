"""The advisories: what each looks for in a run's course, what it may mean and what to try (docs/advisories.md)."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

from tandem.numerics.interval import wilson_interval
from tandem.report.evidence import (
    FULL_MARKS,
    RISEN,
    Evidence,
    kept,
    lately,
    lately_rising,
    moved,
    of_trend,
    solved,
    spread,
    with_text,
)
from tandem.report.history import History, written
from tandem.report.trend import CRITICAL, LATEST, LEAST, LIKELY

EQUAL_GROUPS = 2 / 3  # of the groups: so many teach nothing
RARE_ALARMS = LATEST // 2  # of the last rows in which one metric's alarm fired
SPIKES, SPIKE_ROWS, SPIKE_SPREAD, SPIKE_FACTOR = 3, 100, 6.0, 4.0
CLEAR = 3.0  # of z: a rise of the training reward that makes a fall elsewhere a hint of hacking
FALL_RATE = 1e-3  # of a fall of the held-out accuracy that is none, over all pairs of evaluations
SLOWER = 4 / 3
LONGER = 0.6  # of the pairs of a program that was left out and one that was kept: the former is the longer
GROWN = 12  # of the last LATEST rows in which the peak of memory rose

Look = Callable[[History], Evidence | None]


class Rule(NamedTuple):
    """One advisory."""

    name: str
    look: Look
    seen: str  # what is looked for, as the docs say it
    means: str
    tries: str  # settings in back quotes


def _entropy_collapse(history: History) -> Evidence | None:
    if not history.values["entropy"]:
        return None
    found = kept(history, "entropy", 0.15 * history.began("entropy"), below=True)
    if found is None or solved(history) or lately_rising(history):
        return None
    return with_text(found, found.text + lately(history))


def _entropy_growth(history: History) -> Evidence | None:
    return None if solved(history) else moved(history, "entropy", "up", 1.5, ratio=True, flat=True)


def _reward_fall(history: History) -> Evidence | None:
    return moved(history, "reward", "down", max(0.02, RISEN * spread(history)))


def _held_out_fall(history: History) -> Evidence | None:
    """The latest evaluation against the best before it: Newcombe's interval of the difference of two shares, at a rate
    divided among all pairs. The same prompts are asked each time, which makes the interval too wide, never too narrow.
    """
    seen = history.evaluations
    if len(seen) < 2:
        return None
    (last, right, prompts), best = seen[-1], max(seen[:-1], key=lambda one: one[1] / one[2])
    first, best_right, best_prompts = best
    pairs = len(seen) * (len(seen) - 1) / 2
    if _difference(best_right, best_prompts, right, prompts, NormalDist().inv_cdf(1.0 - FALL_RATE / pairs))[0] <= 0.0:
        return None
    low, high = _difference(best_right, best_prompts, right, prompts, LIKELY)
    start, end = best_right / best_prompts, right / prompts
    text = (
        f"held-out accuracy fell from {100 * start:.1f} % at step {first} to {100 * end:.1f} % at step {last}, "
        f"by {100 * low:.1f} to {100 * high:.1f} points"
    )
    size = (start - end) / 0.05
    return Evidence("evaluation", first, last, start, end, -high, -low, "change", text, size)


def _difference(a: float, of_a: int, b: float, of_b: int, z: float) -> tuple[float, float]:
    """Newcombe's interval (his method 10) of a / of_a - b / of_b."""
    p, q = a / of_a, b / of_b
    (p_low, p_high), (q_low, q_high) = wilson_interval(a, of_a, z), wilson_interval(b, of_b, z)
    return (
        p - q - math.hypot(p - p_low, q_high - q),
        p - q + math.hypot(p_high - p, q - q_low),
    )


def _reward_hacking(history: History) -> Evidence | None:
    fall = _held_out_fall(history)
    reward = None if fall is None else history.within("reward", fall.first)
    if fall is None or reward is None or reward.z < CLEAR:
        return None
    start, end, low, high = (written("reward", value) for value in (reward.start, reward.end, reward.low, reward.high))
    more = f", while the mean training reward rose from {start} to {end}, a change within [{low}, {high}]"
    return with_text(fall, fall.text + more)


def _generalisation(history: History) -> Evidence | None:
    return None if _reward_hacking(history) else _held_out_fall(history)


def _zero_variance(history: History) -> Evidence | None:
    if solved(history):
        return None
    reward = history.latest("reward")
    found = kept(history, "zero_variance", EQUAL_GROUPS)
    if found is None or reward is None:
        return found
    return with_text(found, f"{found.text}; the mean reward of these steps is {written('reward', reward)}")


def _solved(history: History) -> Evidence | None:
    if not solved(history):
        return None
    return kept(history, "reward", FULL_MARKS) if kept(history, "zero_variance", EQUAL_GROUPS) else None


def _ess_collapse(history: History) -> Evidence | None:
    return kept(history, "ess", 0.7, below=True) or moved(history, "ess", "down", 0.1, to=0.8)


def _slowdown(history: History) -> Evidence | None:
    """Seconds for a piece of work grow, and not only because there are fewer pieces to share a step's fixed costs."""
    for each, all_of in (("a_token", "rollout"), ("a_row", "learner")):
        found = history.moved(each, True, math.log(SLOWER), lambda one: one.end >= SLOWER * one.start, log=True)
        seconds = None if found is None else history.within(all_of, found.first)
        if found is not None and seconds is not None and seconds.z > LIKELY:
            start, end = (written(all_of, value) for value in (seconds.start, seconds.end))
            return of_trend(
                each, found, found.end / found.start / SLOWER, f"; {all_of} took {start} s and then {end} s"
            )
    return None


def _memory_growth(history: History) -> Evidence | None:
    steps, peaks = history.steps["peak_memory_bytes"], history.values["peak_memory_bytes"]
    if len(peaks) < LEAST:
        return None
    latest = peaks[-LATEST:]
    rises = [after - before for before, after in pairwise(latest) if after > before]
    grown = latest[-1] - latest[0]
    if len(rises) < GROWN or grown < 0.01 * latest[0]:
        return None
    first, last = steps[-LATEST], steps[-1]
    text = (
        f"peak memory rose in {len(rises)} of the last {LATEST} steps, from {written('peak_memory_bytes', latest[0])} "
        f"at step {first} to {written('peak_memory_bytes', latest[-1])} at step {last}"
    )
    a_step = sorted(rises)
    low, high = a_step[len(a_step) // 4] * len(rises), a_step[3 * len(a_step) // 4] * len(rises)
    return Evidence(
        "peak_memory_bytes", first, last, latest[0], latest[-1], low, high, "change", text, grown / (0.01 * latest[0])
    )


def _failures(history: History) -> Evidence | None:
    found = kept(history, "failed", 0.1) or moved(history, "failed", "up", 0.03, to=0.05)
    return found and with_text(found, found.text + (f"; most: {history.failure}" if history.failure else ""))


def _length_bias(history: History) -> Evidence | None:
    """The rank-sum tests of the last steps as one (Stouffer): whatever lengths do from step to step, each z has mean 0
    and variance 1 given the lengths of its step, where fates have nothing to do with them."""
    steps, found = history.series("left_out_z")
    longer = sorted(history.values["left_out_longer"][-LATEST:])
    if len(found) < LEAST:
        return None
    z, median = math.fsum(found[-LATEST:]) / math.sqrt(LATEST), statistics.median(longer)
    if z < CRITICAL or median < LONGER:
        return None
    share, low, high, began = (
        written("left_out_longer", value) for value in (median, longer[5], longer[14], history.began("left_out_longer"))
    )
    text = (
        f"of a program that was left out of the batch and one that was kept, the former was the longer in {share} "
        f"[{low}, {high}] of the pairs of a step (steps {steps[-LATEST]} to {steps[-1]}, {began} in the first); the "
        f"tests of these {LATEST} steps by group together give z = {z:.1f}"
    )
    size = (median - 0.5) / (LONGER - 0.5)
    ends = history.began("left_out_longer"), median, longer[5], longer[14]
    return Evidence("left_out_longer", steps[-LATEST], steps[-1], *ends, "level", text, size)


def _tools_abandoned(history: History) -> Evidence | None:
    found = history.values["calls"] and history.began("calls")
    if not found or found < 0.2:
        return None
    return moved(history, "calls", "down", 0.6 * found, to=0.4 * found, flat=True)


def _gradient_spikes(history: History) -> Evidence | None:
    steps, norms = history.steps["grad_norm"][-SPIKE_ROWS:], history.values["grad_norm"][-SPIKE_ROWS:]
    logs = [math.log(norm) for norm in norms if norm > 0.0]
    if len(logs) < LEAST:
        return None
    middle = statistics.median(logs)
    spread = 1.4826 * statistics.median(abs(one - middle) for one in logs)
    limit = math.exp(middle + max(SPIKE_SPREAD * spread, math.log(SPIKE_FACTOR)))
    spikes = [(step, norm) for step, norm in zip(steps, norms, strict=True) if norm > limit]
    if len(spikes) < SPIKES:
        return None
    largest, usual = max(norm for _, norm in spikes), math.exp(middle)
    named = ", ".join(f"{step} ({written('grad_norm', norm)})" for step, norm in spikes[-5:])
    text = (
        f"the gradient norm was above {written('grad_norm', limit)} in {len(spikes)} of {len(norms)} steps, where its "
        f"median is {written('grad_norm', usual)}: steps {named}"
    )
    low, high = math.exp(middle - LIKELY * spread), math.exp(middle + LIKELY * spread)
    return Evidence("grad_norm", steps[0], steps[-1], usual, largest, low, high, "level", text, len(spikes) / SPIKES)


def _critic_blind(history: History) -> Evidence | None:
    if solved(history):
        return None
    return kept(history, "explained_variance", 0.0, below=True) or moved(
        history, "explained_variance", "down", 0.3, to=0.3
    )


def _alarms_repeated(history: History) -> Evidence | None:
    latest = history.alarms[-LATEST:]
    fired = Counter(metric for _, texts in latest for metric in {text.split(maxsplit=1)[0] for text in texts})
    often = [(metric, number) for metric, number in fired.most_common() if number >= RARE_ALARMS]
    if not often:
        return None
    first, last = latest[0][0], latest[-1][0]
    last_text = next(
        text for _, texts in reversed(latest) for text in texts if text.split(maxsplit=1)[0] == often[0][0]
    )
    named = ", ".join(f"{metric} in {number}" for metric, number in often)
    text = f"of the last {len(latest)} steps the alarm fired of {named}; the last: {last_text}"
    share = often[0][1] / len(latest)
    low, high = wilson_interval(often[0][1], len(latest), LIKELY)
    return Evidence("alarms", first, last, 0.0, share, low, high, "level", text, often[0][1] / RARE_ALARMS)


RULES: tuple[Rule, ...] = (
    Rule(
        "reward_hacking",
        _reward_hacking,
        "held-out accuracy is below its best (0.1 % over all pairs of evaluations) while the training reward "
        "rose since",
        "The policy earns the reward by what the held-out task doesn't pay: a gap in the reward, or prompts "
        "learned by heart.",
        "Read the best programs of the last steps (`tandem report RUN --trajectories`), close the gap in "
        "`task.reward`; keep the policy near its start with `algo.kl` and `algo.kl_weight`; go back with "
        "`checkpoint.best`; more prompts: `task.train_size`.",
    ),
    Rule(
        "held_out_fall",
        _generalisation,
        "the same fall of the held-out accuracy, without a rise of the training reward",
        "The update hurts: steps too large, or prompts that repeat.",
        "A lower `learner.lr`, more `rollout.prompts_per_step`, `algo.kl` with `algo.kl_weight`; keep the best "
        "step with `checkpoint.best`, and see it in time with `evaluation.every`.",
    ),
    Rule(
        "reward_fall",
        _reward_fall,
        "the mean reward falls by a quarter of its spread within a step, or more",
        "Updates undo what was learned: too large a step, data too old, or a task that became harder.",
        "A lower `learner.lr`, a smaller `learner.grad_clip`, a smaller `sync.lag`, fewer "
        "`algo.updates_per_step`; go back to a checkpoint (`checkpoint.best`).",
    ),
    Rule(
        "entropy_collapse",
        _entropy_collapse,
        "entropy stays below 15 % of where it began, while the reward is below 0.95 and hasn't risen in the "
        "last 48 steps",
        "The policy no longer tries anything else, so what it can't do yet it will not find.",
        "From an earlier checkpoint: a higher `algo.clip_high` (with `algo.updates_per_step` above 1), "
        "`algo.kl` with `algo.kl_weight`, a lower `learner.lr`, a higher `rollout.temperature`; more "
        "`rollout.samples_per_prompt` to find what is rare.",
    ),
    Rule(
        "entropy_growth",
        _entropy_growth,
        "entropy grows by half while the reward doesn't rise",
        "The policy turns into noise: the gradient is mostly of chance, or of tokens that it hardly ever draws.",
        "A lower `learner.lr`, `algo.rare_weight`, a smaller `algo.clip_high`, a lower `rollout.temperature`, "
        "`algo.filter_truncated`.",
    ),
    Rule(
        "zero_variance",
        _zero_variance,
        "two thirds of the groups or more have equal rewards in 18 of 20 steps, at a mean reward below 0.95",
        "Most of what is sampled teaches nothing: prompts are too easy or too hard for the group, or all "
        "answers are the same.",
        "`select.window`, `rollout.redraws`, more `rollout.samples_per_prompt`, a task of the right difficulty "
        "(`task.parameters`), a reward with steps in place of all or nothing.",
    ),
    Rule(
        "solved",
        _solved,
        "the mean reward stays at 0.95 or more and two thirds of the groups have equal rewards",
        "The task is learned; further steps cost time and teach next to nothing.",
        "`evaluation.stop_reward` or `evaluation.stop_accuracy`; a harder task (`task.parameters`).",
    ),
    Rule(
        "length_growth",
        lambda history: moved(history, "length", "up", 1.5, ratio=True, flat=True),
        "the mean length grows by half while the reward doesn't rise",
        "Length is learned for its own sake: the loss may favour long answers, or the policy rambles on.",
        "`algo.aggregation` `constant_mean` or `token_mean`, `algo.filter_truncated`, a budget "
        "(`algo.price.budget`), a smaller `rollout.max_new_tokens`.",
    ),
    Rule(
        "length_fall",
        lambda history: None if solved(history) else moved(history, "length", "down", 1.5, ratio=True, flat=True),
        "the mean length falls by a third while the reward is below 0.95 and doesn't rise",
        "The policy gives up on reasoning, or ends before the answer.",
        "Read the programs; `algo.aggregation` other than `sequence_mean` (which favours short ones that are "
        "right), a larger `algo.price.budget`, no pay for answers without work in `task.reward`.",
    ),
    Rule(
        "truncation",
        lambda history: kept(history, "truncated", 0.5) or moved(history, "truncated", "up", 0.05, to=0.1),
        "half of the trajectories are cut in 18 of 20 steps, or the share grows by 5 points to 10 % or more",
        "Answers that would have been right earn nothing because they were cut, and the policy learns from that.",
        "A larger `rollout.max_new_tokens`, `algo.filter_truncated`, `rollout.stop_strings` for a model that "
        "doesn't end.",
    ),
    Rule(
        "length_bias",
        _length_bias,
        "programs that are left out of the batch (late, stale, truncated, failed) are longer than those that are kept "
        "in 60 % of pairs or more, surely over 20 steps",
        "What is trained is shorter than what was asked for, and so mostly easier: the policy is not taught where it "
        "has to think for long.",
        "`asynchrony.order` `window` or `fifo`, a larger `asynchrony.lag`, fewer `rollout.extra_prompts`; or "
        "`algo.fairness.weights` `inverse`, which gives those that are kept in spite of their length the weight of the "
        "others; a larger `rollout.max_new_tokens` or `rollout.deadline_s`, `algo.filter_truncated` off. Which lengths "
        "are lost says the table of tenths in the report.",
    ),
    Rule(
        "ess_collapse",
        _ess_collapse,
        "the effective share of the tokens stays below 70 %, or falls by 10 points to 80 % or less",
        "A few tokens carry the gradient: the policy that sampled is no longer the one that is trained.",
        "A smaller `sync.lag`, fewer `algo.updates_per_step`, a lower `learner.lr`, `algo.correction.form` "
        "`decoupled` with `algo.correction.weight` `token_tis` or `icepop`.",
    ),
    Rule(
        "staleness",
        lambda history: moved(history, "staleness", "up", 3.0, ratio=True, to=0.02),
        "|Δ log p| a token from older weights triples, to 0.02 nats or more",
        "The weights move further in an update than they did, so the same lag is staler.",
        "A smaller `asynchrony.lag` or `sync.lag`, a lower `learner.lr`, `algo.correction.weight`, "
        "`algo.correction.reject`.",
    ),
    Rule(
        "stale_share",
        lambda history: kept(history, "stale_share", 0.2) or moved(history, "stale_share", "up", 0.2, to=0.2),
        "a fifth or more of the groups are dropped, older than the lag allows, in 18 of 20 steps, or as many more",
        "What took long is sampled for nothing, and long answers are not trained (docs/fairness.md).",
        "A larger `asynchrony.lag`; `asynchrony.order` `window`, `completion` or `fifo`, which drop nothing.",
    ),
    Rule(
        "mismatch_growth",
        lambda history: moved(history, "arithmetic", "up", 3.0, ratio=True, to=1e-3),
        "|Δ log p| a token from other arithmetic triples, to 0.001 nats or more",
        "A declared departure of the engine costs more as the weights change; such growth comes before a collapse.",
        "Take a departure back (`engine.dtype`, `engine.weights`, `engine.kv_dtype`, `engine.kv_window`), or "
        "correct it: `algo.correction.weight` `icepop`, `algo.correction.reject`.",
    ),
    Rule(
        "rare_gradient",
        lambda history: kept(history, "rare_share", 0.3) or moved(history, "rare_share", "up", 0.15, to=0.25),
        "30 % of the gradient or more comes from tokens with p < 0.001 in 18 of 20 steps, or the share grows by"
        " 15 points to 25 %",
        "Chance draws steer the update: each lifts a token that the policy nearly never draws.",
        "`algo.rare_weight`, `rollout.top_p` or `rollout.min_p`, a lower `rollout.temperature`.",
    ),
    Rule(
        "clipping",
        lambda history: kept(history, "clip_fraction", 0.3) or moved(history, "clip_fraction", "up", 0.1, to=0.2),
        "30 % of the trained tokens are clipped in 18 of 20 steps, or the share grows by 10 points to 20 % or more",
        "Much of the batch gives no gradient: the policy leaves the region in which its samples count.",
        "Fewer `algo.updates_per_step`, a lower `learner.lr`, a smaller `sync.lag`, wider `algo.clip_low` and "
        "`algo.clip_high`.",
    ),
    Rule(
        "gradient_spikes",
        _gradient_spikes,
        "in 3 of the last 100 steps the gradient norm is 4 times its median and 6 robust standard deviations "
        "above it (of its logarithm)",
        "Single batches move the weights out of proportion, often those with few or odd samples.",
        "A smaller `learner.grad_clip`, a lower `learner.beta2`, more `rollout.prompts_per_step`, "
        "`algo.rare_weight`; read the programs of those steps.",
    ),
    Rule(
        "critic_blind",
        _critic_blind,
        "the critic explains none of the returns in 18 of 20 steps, or its share falls by 0.3 to 0.3 or less",
        "Advantages are worse than returns less their mean: the critic is behind the policy, or cannot see.",
        "A higher `critic.lr`, `critic.warmup_steps`, `critic.model`, `critic.trunk_gradient`, a wider "
        "`critic.clip`; or `algo.advantage` `grpo`.",
    ),
    Rule(
        "failures",
        _failures,
        "10 % of the trajectories fail in 18 of 20 steps, or the share grows by 3 points to 5 % or more",
        "Rewards or environments break more often, and what they drop is not dropped at random.",
        "Read the reasons (Failures in the report); `task.reward_deadline_s`, `rollout.deadline_s`, "
        "`task.workers`, `task.memory_bytes`, `task.reward_on_error`.",
    ),
    Rule(
        "malformed_calls",
        lambda history: kept(history, "malformed", 0.2) or moved(history, "malformed", "up", 0.05, to=0.1),
        "20 % of the calls of tools fit no tool in 18 of 20 steps, or the share grows by 5 points to 10 % or more",
        "The model writes calls in another form than is read, or unlearns the form.",
        "`task.tool_format`, tools told in `task.system`, no pay for answers after a broken call in the "
        "environment's reward, `algo.kl` with `algo.kl_weight`.",
    ),
    Rule(
        "tool_errors",
        lambda history: kept(history, "tool_errors", 0.5) or moved(history, "tool_errors", "up", 0.1, to=0.2),
        "half of the calls fail or are late in 18 of 20 steps, or the share grows by 10 points to 20 % or more",
        "Tools break, or the model asks them for what they can't do.",
        "Read the programs; `task.workers`, `task.memory_bytes` and `task.reward_deadline_s` for tools that are"
        " late or killed, `rollout.max_turns` for calls that are tried again.",
    ),
    Rule(
        "tools_abandoned",
        _tools_abandoned,
        "calls of tools a trajectory fall to 40 % or less while the reward doesn't rise",
        "The policy has found it cheaper to guess.",
        "A reward that guesses don't earn (`task.reward`), a larger `algo.price.budget`, `algo.credit` `step`.",
    ),
    Rule(
        "spelt_tokens",
        lambda history: kept(history, "spelt", 0.05) or moved(history, "spelt", "up", 0.05, to=0.05),
        "prompts, users and tools spell one control token in 20 trajectories in 18 of 20 steps, or that rate "
        "grows by as much",
        "What tools return holds the marks of a chat template; read as such they would end or begin turns.",
        "`task.control_tokens` `text` keeps them text; look at what the tools return.",
    ),
    Rule(
        "kv_pressure",
        lambda history: kept(history, "recomputed", 0.05) or moved(history, "recomputed", "up", 0.05, to=0.05),
        "tokens computed again after a preemption are 5 % of those sampled in 18 of 20 steps, or grow by as much",
        "Keys and values don't fit: requests give their pages back and are computed anew.",
        "More `engine.kv_memory_bytes`, fewer `engine.max_sequences`, a larger `engine.lookahead_tokens`, "
        "`engine.kv_dtype` `int8` (a declared departure).",
    ),
    Rule(
        "slowdown",
        _slowdown,
        "milliseconds a sampled token, or a row of the learner, grow by a third, and the phase's seconds grow too",
        "The machine is shared or hot, memory is short, or contexts have grown.",
        "Look at what else runs and at the phase's seconds; `engine.kv_memory_bytes`, `engine.max_sequences`, "
        "`learner.microbatch_tokens`; `tandem doctor`.",
    ),
    Rule(
        "memory_growth",
        _memory_growth,
        "the peak of the process's memory rises in 12 of the last 20 steps, by 1 % or more",
        "Something is kept that should go; a run that goes on like this is killed.",
        "`rollout.keep_tokens` off, smaller `learner.microbatch_tokens`, `learner.activation_checkpointing` "
        "`on`; `checkpoint.every`, so that little is lost; look for what a reward or environment of yours "
        "keeps.",
    ),
    Rule(
        "alarms_repeated",
        _alarms_repeated,
        "the alarm of one metric fires in 10 of the last 20 steps",
        "A drift that is no accident: what samples and what is trained differ all the time.",
        "`alarms.action` `stop` or `correct` (with `algo.correction.weight`), a smaller `sync.lag`, fewer "
        "departures of the engine; or a threshold of `alarms` that fits.",
    ),
)
