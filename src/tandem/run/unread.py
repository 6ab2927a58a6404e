"""Settings that a run of a config never reads: what a person sets to see its effect would have none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tandem.run.config import RunConfig

# Of rollout: what a step draws, which evaluation.* and the corpus say for themselves.
DRAWN = ("samples_per_prompt", "redraws", "extra_prompts", "temperature", "top_k", "top_p", "min_p")
STEPS = ("rollout.prompts_per_step", "rollout.keep_tokens")  # read whatever a step is made of
ANSWERS = ("samples", "temperature", "top_k", "top_p")  # of evaluation
# Of a task that is not asked: how a corpus is written as tokens.
WRITING = ("task.format", "task.tool_format", "task.control_tokens", "task.template_arguments")
POOL = "engine.kv_memory_bytes"  # held whether or not anything is generated


def unread(config: RunConfig, names: Iterable[str]) -> dict[str, list[str]]:
    """Why -> those of `names`, settings by their dotted names, that a run of `config` does not read.

    >>> from tandem.models.config import ModelConfig
    >>> of_texts = RunConfig("a", 1, ModelConfig("m"), objective="next_token")
    >>> unread(of_texts, ["rollout.top_k", "learner.lr"])
    {'objective next_token samples nothing': ['rollout.top_k']}
    """
    left, found = list(names), dict[str, list[str]]()
    for why, tables, but in _unread(config):
        named = [name for name in left if f"{name}.".startswith(tables) and name not in but]
        left = [name for name in left if name not in named]
        if named:
            found[why] = named
    return found


def _unread(config: RunConfig) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """(Why, settings and tables with a dot at the end, those of them that are read)."""
    samples = config.objective == "policy_gradient" or config.distil.on_policy or config.drafter.on_policy
    asked, learner, corpus = config.evaluation, config.learner, config.corpus
    if not samples:
        drawn = tuple(f"rollout.{name}." for name in DRAWN)
        yield f"objective {config.objective} samples nothing", (*drawn, "sync.", "evaluation.stop_reward."), ()
        if not asked.prompts:
            why = f"objective {config.objective} samples nothing, and evaluation.prompts is 0"
            yield why, ("rollout.", "engine."), (*STEPS, POOL)
    if config.objective != "policy_gradient":
        yield f"objective {config.objective} compares no engine with the learner", ("alarms.",), ()
    if not asked.prompts:
        yield "evaluation.prompts is 0", tuple(f"evaluation.{name}." for name in ANSWERS), ()
        if not corpus.heldout_tasks:
            yield "evaluation.prompts is 0, and corpus.heldout_tasks too", ("evaluation.every.",), ()
    if not config.asks_task:
        yield "the corpus is learned, and evaluation.prompts is 0", ("task.",), WRITING
    if corpus.tokens_per_step:
        yield "corpus.tokens_per_step is set", ("rollout.prompts_per_step.",), ()
    if learner.schedule == "constant":
        yield "learner.schedule is constant", ("learner.final_share.",), ()
    if not config.select.on:
        yield "neither select.window nor select.first_samples is set", ("select.",), ()
    if config.workers.backend == "none":
        yield "workers.backend is none", ("workers.",), ("workers.backend",)
