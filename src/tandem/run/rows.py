"""The keys of a row of metrics.jsonl: the one list of their units and meanings, which docs/configs.md prints.

A row has those that its step found out: `reward` and the like where the engine sampled, the drift where a policy was
trained. `part/key` is `key` of the object `part`, of each entry where it is a list.
"""

from __future__ import annotations

from typing import NamedTuple

from tandem.algo.drift import MEANINGS
from tandem.speculate.config import MOST_STEPS


class Key(NamedTuple):
    """A key: in what its value is, and what it says."""

    unit: str
    meaning: str


_OF_THE_STEP = {
    "step": Key("count", "updates of the run so far; 0 is the evaluation before any"),
    "time_s": Key("s", "since the run began, all sittings"),
    "seconds/*": Key("s", "of the step by phase; `other` is the rest"),
    "workers/*/*": Key("s", "of the workers beside the main one, where there are any: since the row before, by phase"),
    "peak_memory_bytes": Key("bytes", "most that the process has held"),
    "weights": Key("hash", "XXH3-128 of the weights that the engine has after the step"),
    "reached": Key("text", "the target that ended the run here"),
    "output_lost/*": Key("text", "an output that could be written no more, and why"),
}
_OF_SAMPLES = {
    "reward": Key("reward", "mean over the trajectories that could be graded; null where none could"),
    "reward_std": Key("reward", "standard deviation of the same"),
    "zero_variance": Key("share", "graded groups whose rewards are all equal"),
    "spelt_tokens": Key("count", "control tokens that prompts, users and tools spelt: see task.control_tokens"),
    "truncated": Key("share", "trajectories cut at rollout.max_new_tokens"),
    "trajectories": Key("count", "of the step; for texts, the texts"),
    "failed": Key("count", "trajectories without a grade"),
    "dropped/*": Key("count", "trajectories that the learner did not take, by cause"),
    "failures": Key("list", "`N x where: reason`, most frequent first"),
    "length": Key("tokens", "mean sampled a trajectory; for texts, mean of a solution"),
    "length_max": Key("tokens", "longest"),
    "tokens": Key("tokens", "all of them"),
    "tokens_per_s": Key(
        "tokens/s",
        "sampled over the seconds of rollout, of all workers; for texts, `learner_rows` over the seconds of learner",
    ),
    "turns": Key("count", "mean completions a program, where rollout.max_turns is above 1 or tools are called"),
    "happened/*": Key(
        "count",
        "in all programs: tool_calls, malformed_calls, unreadable_calls, tool_errors, tool_timeouts, scorer_errors, "
        "turn_limit, token_limit, time_limit and context_limit where one ended a program, and split_CAUSE "
        "where rollout.history=render changed what was said",
    ),
    "run_tokens": Key("tokens", "run by the engine: prompts but for what was cached, sampled, drafted, run again"),
    "cached_tokens": Key("tokens", "of prompts, found in the engine's cache"),
    "recomputed_tokens": Key("tokens", "run again after a preemption"),
    "repeated_tokens": Key("tokens", "of contexts that programs had run before: cached no more, or other weights"),
    "preemptions": Key("count", "requests that gave their pages back"),
    "evicted_pages": Key("count", "cached pages given to others"),
    "drawn_tokens": Key("tokens", "by all engines since the row before, in an evaluation and by extra programs too"),
    "prefill_s": Key("s", "of seconds/rollout: the engine's passes over context, for the first time"),
    "decode_s": Key("s", "the same over tokens to draw the next; a pass that holds both is divided by rows"),
    "recomputed_s": Key("s", "the same over what it had run before"),
    "extra_programs": Key("count", "of groups beyond the batch, where rollout.extra_prompts is set"),
    "extra_tokens": Key("tokens", "that those had sampled; in no other key"),
    "drafted_tokens": Key("tokens", "tried before they were drawn, where engine.draft.by is set"),
    "accepted_tokens": Key("tokens", "of those, drawn"),
    "offered_tokens": Key("tokens", "that the drafter had, run or not"),
    "invalid_drafts": Key("tokens", "of no id of the vocabulary, or after one: dropped"),
    "draft_s": Key("s", "of seconds/rollout: choosing how many drafts, and the drafter"),
    "draft_found_tokens": Key("tokens", "of contexts, that a drafter with pages of its own found there"),
    "draft_ingested_tokens": Key("tokens", "of contexts, that it ran"),
    "drafted_at/*": Key("tokens", "drafted_tokens by position after the last token drawn, from 1 on"),
    "accepted_at/*": Key("tokens", "of those, drawn"),
    "drafted_found/*": Key("tokens", "drafted_tokens by how many tokens of the request's prompt the cache had"),
    "accepted_found/*": Key("tokens", "of those, drawn"),
    "undrafted/*": Key(
        "count",
        "steps that drew and had no drafts: untimed (its time without is not known well enough), unpaid (none raise "
        "the speed), unoffered (the drafter had none), room (no tokens or pages were left), raised (it is off)",
    ),
    "draft_seen_tokens": Key("tokens", "of ended answers, while the drafter had a part of the vocabulary alone"),
    "draft_covered_tokens": Key("tokens", "of those, that are in that part: its coverage"),
    "engines/*/requests": Key(
        "count", "that the engine was asked for since the row before; where engine.replicas are set"
    ),
    "engines/*/again": Key("count", "of those, asked of another before, which died or had not answered in time"),
    "engines/*/moved": Key("count", "of those, of paused programs that another engine had no room for"),
    "engines/*/tokens": Key("tokens", "that it handed over"),
    "lag": Key("count", "mean updates between the version of a group's first token and the one that it is learned on"),
    "lag_max": Key("count", "the most of them; these six where asynchrony.mode is not sync"),
    "running_groups": Key("count", "begun and not ended, as the row is written"),
    "waiting_groups": Key("count", "ended and not learned"),
    "stale_groups": Key("count", "dropped since the row before: older than the lag allows"),
    "stale_share": Key("share", "of these and the batch's groups, these"),
    "fairness/dispatched_length": Key("tokens", "mean of all programs asked for; those cut count with what they had"),
    "fairness/kept_length": Key("tokens", "mean of those that were not left out (late, stale, truncated or failed)"),
    "fairness/trained_length": Key("tokens", "mean of those with a gradient"),
    "fairness/cut": Key("count", "programs that were withdrawn before their end"),
    "fairness/longer": Key("share", "pairs in which one left out is longer than one kept; equal ones count half"),
    "fairness/z": Key("1", "of the rank-sum test by group, above 0: long ones are left out; where any was"),
    "fairness/p_value": Key("share", "two-sided, of the same"),
    "fairness/distance": Key("share", "largest between the distributions of dispatched and kept lengths"),
    "fairness/weight_max": Key("1", "largest inverse keep probability, where algo.fairness.weights is inverse"),
    "fairness/weight_clipped": Key("share", "groups whose weight was cut to algo.fairness.most"),
    "fairness/weight_ess": Key("share", "effective share of the groups under their weights"),
    "fairness/weighted_length": Key("tokens", "mean of the kept under their weights: an estimate of dispatched_length"),
    "lengths/shortest": Key("tokens", "of this tenth of the programs asked for, by length"),
    "lengths/longest": Key("tokens", "of them"),
    "lengths/dispatched": Key("count", "of them"),
    "lengths/kept": Key("count", "of them, not left out"),
    "lengths/trained": Key("count", "of them, with a gradient"),
    "lengths/keep": Key("share", "mean probability of their groups to be kept, given when they end"),
    "lengths/keep_low": Key("share", "lower end of its 95 % interval; the probability itself where it is known"),
    "lengths/keep_high": Key("share", "upper end"),
    "lengths/age": Key("count", "mean updates between the weights that sampled a token and those that learn it"),
    "lengths/clipped": Key("share", "mean share of clipped tokens of the trained ones"),
    "redrawn_groups": Key("count", "drawn in place of groups of equal rewards, where rollout.redraws is set"),
    "task_reward": Key(
        "reward", "estimated mean over the task's prompts, from those that select.window chose; unbiased"
    ),
    "selection/predicted": Key("share", "of the chosen groups that were expected to have unequal rewards"),
    "selection/met": Key("share", "that had"),
    "selection/repeated": Key("share", "of the chosen prompts that had been asked before"),
    "selection/weight_max": Key("1", "largest weight that undoes the choice, cut at select.weight_max"),
    "selection/ess": Key("share", "effective prompts of the chosen ones under those weights"),
    "stopped_groups": Key("count", "that ended before all of their programs began, where select.first_samples is set"),
    "spared_programs": Key("count", "of those groups, never begun"),
    "audited_groups": Key("count", "that should have been stopped and ran on (select.audit)"),
    "audited_wrong": Key("count", "of those, with unequal rewards in the end"),
    "cost": Key("algo.price", "mean cost a trajectory, where algo.price has a budget"),
    "price": Key("reward/cost", "of the Lagrangian after the step"),
}
_OF_PREFERENCES = {
    "preference_accuracy": Key(
        "share", "pairs whose chosen answer has the higher reward, equal ones a half; under objective=preference"
    ),
    "reward_margin": Key("reward", "mean of chosen less rejected"),
    "chosen_reward": Key("reward", "mean of the chosen answers: by preference.loss, or of a reward model's head"),
    "rejected_reward": Key("reward", "the same of the rejected"),
    "chosen_logprob": Key("nats", "mean of the chosen answers, each the sum over its tokens"),
    "rejected_logprob": Key("nats", "the same of the rejected"),
    "kl_mismatched": Key("nats", "an answer: KTO's KL, by answers to other prompts; 0 where that is below it"),
}
_OF_A_TEACHER = {
    "divergence": Key("nats", "mean of distil.divergence at the trained tokens, at distil.temperature, unweighted"),
    "teacher_nll": Key(
        "nats", "as `nll`, by the teacher; on the student's own samples, less nll, an estimate of KL(student, teacher)"
    ),
    "spanned": Key("share", "of the trained tokens, those in a span that both models wrote (distil.spans)"),
    "text_loss": Key(
        "nats", "mean -log p of the trained tokens by the student at temperature 1, with distil.text_weight"
    ),
    "hidden_positive": Key("distil.hidden_loss", "mean distance of hidden states, over tokens of weight above 0"),
    "hidden_negative": Key("distil.hidden_loss", "the same over tokens of weight below 0 (distil.bad_weight)"),
}
_OF_A_DRAFTER = {
    "accepted_length": Key("tokens", "that a step of the model would give, its own included, of drafter.steps drafts"),
    "accepted_length_low": Key("tokens", "lower end of its 95 % interval, by texts"),
    "accepted_length_high": Key("tokens", "upper end"),
    **{
        f"accept_{place}": Key("share", f"mean chance that draft {place} of a step stands where those before it do")
        for place in range(1, MOST_STEPS + 1)
    },
    "overlap": Key("share", "mean of sum min(p, q) at the first draft: its chance under p/q rejection"),
    "coverage": Key("share", "of the model's probability, what the drafter's vocabulary has"),
}
_OF_THE_LEARNER = {
    "trained_samples": Key("count", "samples in the batch"),
    "trained_tokens": Key("tokens", "in the loss, all updates"),
    "taken_out": Key("tokens", "with an advantage, in the samples, that algo.correction took out of the loss"),
    "useful/prefill_flop": Key("flop", "least work of the samples that reached a gradient: their context"),
    "useful/prefill_bytes": Key("bytes", "the same, from memory"),
    "useful/decode_flop": Key("flop", "the same of their sampled tokens"),
    "useful/decode_bytes": Key("bytes", "the same, from memory"),
    "useful/learner_flop": Key("flop", "the same of forward, backward and updates"),
    "useful/learner_bytes": Key("bytes", "the same, from memory"),
    "learner_rows": Key("tokens", "run forward and backward, prompts too"),
    "microbatches": Key("count", "of all updates"),
    "loss": Key("objective", "of the batch; nats a token under next_token"),
    "loss_unit": Key("text", "of what it is a mean, where supervised.* make another of it than that"),
    "nll": Key(
        "nats", "mean -log p of the trained tokens under next_token and distil, whatever each counts in the loss"
    ),
    "epochs/*": Key("count", "how often each source of a corpus was taken whole"),
    "entropy": Key("nats", "mean of the model at the trained tokens"),
    "grad_norm": Key("1", "before clipping, of the last update"),
    "lr": Key("1", "learning rate of the last update"),
    "clip_fraction": Key("share", "trained tokens whose ratio was clipped"),
    "ratio": Key("1", "mean of the ratio that is clipped"),
    "ratio_max": Key("1", "its largest"),
    "ratio_error": Key("1", "largest of its distance from 1"),
    "kl_reference": Key("nats", "of learner to reference a token, where algo.kl is set"),
    **_OF_PREFERENCES,
    **_OF_A_DRAFTER,
    "referred_answers": Key("count", "that the reference scored; others were kept in reference.bin"),
    "value_loss": Key("reward^2", "half the squared error of the critic, clipped, where algo.advantage is gae"),
    "value_clip_fraction": Key("share", "trained tokens whose value loss was clipped"),
    "explained_variance": Key("share", "of the returns, by the critic before the step; below 0: worse than their mean"),
    "values_mean": Key("reward", "of the critic before the step, over the trained tokens"),
    "returns_mean": Key("reward", "of what its values should have been"),
    "critic_grad_norm": Key("1", "of the critic, before clipping, of the last update"),
    **_OF_A_TEACHER,
    "corrected": Key("0 or 1", "whether an alarm turned the correction on"),
}
_OF_THE_DRIFT = {
    "kl": Key("nats", "k3 under the name that a reader looks for"),
    "mismatch": Key("nats", "abs_max under the name that a reader looks for"),
    **{name: Key(*said) for name, said in MEANINGS.items()},
    "nonfinite_samples": Key("count", "samples with a behaviour log-prob that is not finite"),
    "alarms": Key("list", "metrics beyond their thresholds, a text each"),
    "error_budget/staleness": Key("nats", "mean |Δ log p| a token that older weights make"),
    "error_budget/mismatch": Key("nats", "the same that other arithmetic makes"),
    "error_budget/sampling": Key("nats", "the same that top-k, top-p and min-p make"),
    "error_budget/masking": Key("share", "as `masked`"),
    "by_length/samples": Key("count", "in this tenth of the samples by length"),
    "by_length/shortest": Key("tokens", "of them"),
    "by_length/longest": Key("tokens", "of them"),
    "by_length/k3": Key("nats", "of their tokens"),
    "by_length/abs_mean": Key("nats", "mean |Δ log p| of their tokens"),
    "by_length/rare_share": Key("share", "as `rare_share`, of their tokens"),
}
_OF_THE_EVALUATION = {
    "evaluation/accuracy": Key(
        "share", "graded samples with a reward of 1 or more, greedy unless drawn; 0 where none was graded"
    ),
    "evaluation/low": Key("share", "lower end of its Wilson 95 % interval, samples of a prompt clustered"),
    "evaluation/high": Key("share", "upper end"),
    "evaluation/prompts": Key("count", "with a graded sample"),
    "evaluation/failed": Key("count", "samples not graded, and in no mean"),
    "evaluation/reward": Key("reward", "mean over the graded"),
    "evaluation/length": Key("tokens", "mean sampled"),
    "evaluation/failures": Key("list", "as `failures`"),
}
_OF_THE_CORPUS = {
    "corpus/*": Key("count", "rows of all sources by what became of them, in the row before the first step"),
    "heldout/loss": Key("objective", "of the held-out tasks (corpus.heldout_tasks), as `loss`"),
    "heldout/nll": Key("nats", "of the same, as `nll`"),
    "heldout/entropy": Key("nats", "of the same, as `entropy`"),
    "heldout/tokens": Key("tokens", "of the same that the loss is of"),
    **{
        f"heldout/{name}": Key(key.unit, f"of the same, as `{name}`")
        for name, key in (_OF_PREFERENCES | _OF_A_TEACHER | _OF_A_DRAFTER).items()
        if name != "hidden_negative"  # of sampled trajectories alone
    },
}
KEYS: dict[str, Key] = (
    _OF_THE_STEP | _OF_SAMPLES | _OF_THE_LEARNER | _OF_THE_DRIFT | _OF_THE_EVALUATION | _OF_THE_CORPUS
)
