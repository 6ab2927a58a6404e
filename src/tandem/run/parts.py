"""A config to the parts of a run on this machine: task, model, engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from tandem import env
from tandem.engine.admit import count_pages
from tandem.engine.batch import INITIAL
from tandem.engine.config import EngineConfig
from tandem.engine.constraint import Grammars
from tandem.engine.engine import Engine
from tandem.engine.layout import KvLayout
from tandem.engine.measure import price
from tandem.engine.runner import DecoderRunner, dtype_name
from tandem.engine.share import tree_of
from tandem.errors import ConfigError, TandemWarning
from tandem.kernels.build.load import matrix_unit
from tandem.models.adapter import AdapterSet
from tandem.models.checkpoint import Checkpoint, open_checkpoint
from tandem.models.codes import described, hold_codes, layer_codes
from tandem.models.config import AdapterConfig, ModelConfig
from tandem.models.decoder import Decoder, decoder_of
from tandem.models.peft import AdapterFolder
from tandem.models.tokenizer import Tokenizer
from tandem.plan.footprint import Asked
from tandem.plan.memory import Plan, plan_memory
from tandem.program.config import TaskConfig
from tandem.program.render import Renderer, renderer_of
from tandem.run.adapted import check_base, check_source, settled, trained_on, without
from tandem.run.apart import EngineGiven, RemoteEngine, RemoteReference
from tandem.run.config import RunConfig
from tandem.run.distil import check_teacher
from tandem.run.drafter import check_drafter, drafter_on
from tandem.run.learned import OBJECTIVES, learner_config
from tandem.run.learning import DecoderElsewhere, LearnerGiven, RemoteLearner, RemotePublisher, RemoteWay
from tandem.run.remote import ServerEngine
from tandem.run.remote_calls import Server
from tandem.run.remote_config import RemoteConfig
from tandem.run.remote_weights import ToServers
from tandem.run.source import origin_of, resolve_source
from tandem.run.times import times_file
from tandem.run.workers import Backend
from tandem.sync.departures import check_engine, of_engine, with_pages_of_spans, without_departures
from tandem.sync.publish import Publisher
from tandem.sync.receive import Copied, Receiver, Shared, integers_of, serving_decoder
from tandem.sync.transport import Remote
from tandem.sync.ways import Way, way_of
from tandem.train.score import with_logprobs
from tandem.types import Message, Sample, WeightVersion

Scorer = Callable[..., tuple[Sample, ...]]  # (samples, prompts, rows of a microbatch, temperature)


@dataclass(frozen=True, slots=True)
class Parts:
    """What generates and learns: decoders, engines, what brings weights from one to the other, and the words around."""

    decoder: Decoder  # the learner's
    tokenizer: Tokenizer
    renderer: Renderer
    engine: Engine  # samples rollouts
    exact_engine: Engine  # the learner's own policy, for evaluation; `engine` itself where nothing departs
    publisher: Publisher
    memory: Plan
    plan: dict[str, Any]  # what the program decided, for plan.json
    another: Callable[[], Engine]  # one more that samples, on the same weights
    others: tuple[Engine, ...] = ()  # that sample too, where engine.replicas are asked for
    workers: Backend | None = None  # where some of it lives
    way: Way | None = None  # that weights go there
    learner: RemoteLearner | None = None  # where it has a process of its own
    served: ToServers | None = None  # other engines' servers, where those sample

    @property
    def sampling(self) -> tuple[Engine, ...]:
        """The engines that sample, dead ones too."""
        return (self.engine, *self.others)

    def close(self) -> None:
        """No more weights go anywhere."""
        if self.way is not None:
            self.way.close()
        if self.served is not None:
            self.served.close()


Use = Literal["learn", "serve", "apart"]  # of the model in this process; apart: an engine in another has its own


def plan_parts(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    model: ModelConfig,
    config: EngineConfig,
    lag: int,
    run: RunConfig | None,
    *,
    use: Use = "learn",
    sharers: int = 1,
) -> Plan:
    """The memory that `build_parts` takes, and where `run` is given its training too. Reads no weight. `sharers`:
    processes like this one that divide the machine's memory, this one included."""
    config = with_pages_of_spans(model, config)
    if run is not None and run.workers.backend != "none":
        use = "apart"
    if run is not None:
        run = replace(run, adapter=settled(run.adapter))
    host_bytes, device_bytes = env.memory_bytes()[1] // sharers, 0
    if model.device == "cuda":
        if not torch.cuda.is_available():
            built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built for the CPU alone"
            raise ConfigError(
                f"model.device is cuda, but torch {torch.__version__} sees no CUDA device here: it {built}. Set "
                "model.device=cpu, or run it where `tandem doctor` names a GPU."
            )
        device_bytes = torch.cuda.mem_get_info()[0]
    frozen = run is not None and run.adapter.on
    coded_bytes = checkpoint.coded_bytes if use == "serve" or frozen else 0
    prompt_tokens = 1
    if run is not None and run.task.environment == "reasoning_gym":  # whose prompts have this system message, or none
        system = (Message("system", run.task.system),) if run.task.system else ()
        renderer = renderer_of(tokenizer, run.task)
        prompt_tokens = max(1, len(renderer.prompt_tokens((*system, Message("user", "")))))
    critic = run.critic.model if run is not None else ""
    distils = run is not None and run.objective == "distil"
    teacher = check_teacher(run, checkpoint, tokenizer) if run is not None and distils else None
    drafter = check_drafter(config, model, checkpoint, tokenizer)
    asked = Asked(
        checkpoint.spec,
        model,
        config,
        lag,
        run,
        checkpoint.mapped_bytes,
        coded_bytes,
        prompt_tokens,
        env.limits_addresses(),
        open_checkpoint(resolve_source(critic)).spec if critic else None,
        teacher.spec if teacher is not None else None,
        teacher.coded_bytes if teacher is not None else 0,
        serves=use == "serve" or frozen,
        apart=use == "apart",
        drafter=drafter.spec if isinstance(drafter, Checkpoint) else drafter,
        drafter_coded_bytes=drafter.coded_bytes if isinstance(drafter, Checkpoint) else 0,
    )
    return plan_memory(asked, host_bytes, device_bytes)


def build_parts(
    model: ModelConfig,
    config: EngineConfig,
    lag: int = 0,
    run: RunConfig | None = None,
    *,
    learns: bool = True,
    task: TaskConfig | None = None,
    workers: Backend | None = None,
    remote: RemoteConfig | None = None,
) -> Parts:
    """Load the model and put an engine on it. ModelError, ConfigError, CapacityError for what the user can mend.

    The engine shares the learner's decoder unless its weights are rounded, of another dtype, or `lag` updates old.
    `run`: what will train it, whose memory is planned for. Without `learns` that decoder keeps the codes of a quantised
    file, at the same bits, and of other matrices the packed form alone; nothing can train or save it. `task`: how
    prompts are written (its format, control tokens, template arguments) and calls are read. `workers`: where the engine
    is, in a process of its own. `remote`: whose servers sample, where it names some.
    """
    torch.set_num_threads(env.num_threads())
    source, worn = origin_of(model.source)
    check_source(run if learns else None, worn)
    checkpoint = open_checkpoint(source)
    spec = checkpoint.spec
    config = with_pages_of_spans(model, config)
    check_engine(spec, model, config)
    tokenizer = checkpoint.load_tokenizer()
    task = task or TaskConfig()
    renderer = renderer_of(tokenizer, task)
    if renderer.plain and task.format == "auto":
        warnings.warn(f"{model.source} has no chat template: prompts are plain text.", TandemWarning, stacklevel=2)
    apart = workers is not None
    served = remote if remote is not None and remote.servers else None
    learns = learns or apart or served is not None  # what is published is the values of the weights
    use: Use = "apart" if apart else "learn" if learns else "serve"
    memory = plan_parts(checkpoint, tokenizer, model, config, lag, run, use=use)
    memory.check()
    config = replace(config, kv_memory_bytes=memory.kv_memory_bytes)
    words = _Words(checkpoint, tokenizer, renderer, worn, run if learns else None)
    with memory.foreseen():
        if served is not None:
            return _build_served(words, model, config, served, run, memory)
        if workers is not None:
            engines = config if run is not None else replace(config, replicas=1)
            return _build_apart(words, model, engines, workers, run, memory)
        beside = run is not None and run.asynchrony.mode != "sync"
        return _build(words, model, config, memory, _Use(lag, beside, learns))


class _Use(NamedTuple):
    lag: int  # updates that the engine's weights trail
    beside: bool  # the engine works while the learner does
    learns: bool


@dataclass(frozen=True, slots=True)
class _Words:
    """A model's files, and how its texts are read and written."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    renderer: Renderer
    worn: AdapterFolder | None = None  # what is served is this adapter
    run: RunConfig | None = None  # that trains one, where adapter.* say so

    @property
    def trains(self) -> bool:
        """An adapter."""
        return self.run is not None and self.run.adapter.on

    @property
    def adapts(self) -> AdapterConfig | None:
        """What is served or trained beside the weights."""
        if self.worn is not None:
            return self.worn.config
        return settled(self.run.adapter) if self.run is not None and self.run.adapter.on else None

    def adapter(self, decoder: Decoder) -> AdapterSet | None:
        """For a decoder, without which its weights were loaded; None: of no adapter."""
        if self.worn is not None:
            check_base(self.worn, decoder, self.worn.base)
            return self.worn.onto(decoder)
        if self.run is None or not self.run.adapter.on:
            return None
        return trained_on(decoder, self.run, self.run.model.source)


def engine_on(decoder: Decoder, config: EngineConfig, tokenizer: Tokenizer, version: WeightVersion = INITIAL) -> Engine:
    """An engine with the page memory that `config` has decided."""
    kept = decoder.kept.name if decoder.kept is not None else "same"
    layout = KvLayout.for_engine(decoder.spec, config, dtype_name(decoder.dtype), kept)
    num_pages = count_pages(layout, config)
    runner = DecoderRunner(decoder, num_pages, config.page_tokens, config)
    if config.draft.model:
        runner.drafter = drafter_on(runner, num_pages, config, tokenizer)
    engine = Engine(runner, config, num_pages, decoder.spec.max_position, decode=tokenizer.decode, version=version)
    engine.grammars = Grammars(tokenizer.backend.to_str, decoder.spec.vocab_size)
    price(engine)
    engine.scheduler.drafting.remember(times_file(decoder, config))
    return engine


def _build_apart(
    words: _Words, model: ModelConfig, config: EngineConfig, workers: Backend, run: RunConfig | None, memory: Plan
) -> Parts:
    """With the engines in processes of their own, and the learner too where workers.learner says so."""
    checkpoint, tokenizer, asked = words.checkpoint, words.tokenizer, workers.config
    source, spec = origin_of(model.source)[0], checkpoint.spec
    if config.shares:  # another machine need not have the file
        config = replace(config, shares=tree_of(config.shares))
    learner: RemoteLearner | None = None
    way: Way
    if run is not None and asked.learner == "apart":
        given = LearnerGiven(source, run, learner_config(run, memory), workers.host)
        learner = RemoteLearner(workers, given, OBJECTIVES[run.objective](run))
        decoder: Decoder = DecoderElsewhere(spec, model.dtype)
        way = RemoteWay(learner)
    else:
        decoder = decoder_of(spec, model).load(checkpoint.tensors())
        decoder.wear(words.adapter(decoder))
        weights = {name: weight.value for name, weight in decoder.published()}
        way = way_of(asked.transport, weights, asked.folder, workers.host, asked.deadline_s / 2)
    beside = run is not None and run.asynchrony.mode != "sync"
    own = bool(beside or of_engine(model, config))  # evaluation has an engine of its own

    def come(name: str, engine: EngineConfig = config) -> RemoteEngine:
        given = EngineGiven(source, model, engine, words.adapts)
        there = RemoteEngine(workers, given, spec, tokenizer.decode, way, name)
        there.grammars = Grammars(tokenizer.backend.to_str, spec.vocab_size)  # for its checks, which are made here
        return there

    try:
        names = [f"engine {number + 1}" for number in range(config.replicas)] if config.replicas > 1 else ["engine"]
        with ThreadPoolExecutor() as starting:  # each takes a while to come up
            coming = [starting.submit(come, name) for name in names]
            if own and learner is not None:
                coming.append(starting.submit(come, "evaluation", without_departures(config)))
        engines = [one.result() for one in coming]
        receivers: list[Receiver] = [Remote("the engine's process", way, *engines)]
        exact_engine: Engine = engines.pop() if own and learner is not None else engines[0]
        if own and learner is None:
            exact_engine = engine_on(decoder, without_departures(config), tokenizer)
            receivers.append(Shared("what runs on the learner's weights", decoder, exact_engine))
        publisher = Publisher(decoder, receivers) if learner is None else RemotePublisher(learner, receivers)
        version = publisher.publish(0)
    except BaseException:
        way.close()
        raise
    known = facts(decoder) if learner is None else learner.ask("start", "facts")
    plan = _decided(words, model, engines[0], known, version, memory)
    plan |= {"decoders": len(engines) + 1 + int(own and learner is not None), "workers": asked.backend}
    return Parts(
        decoder,
        tokenizer,
        words.renderer,
        engines[0],
        exact_engine,
        publisher,
        memory,
        plan,
        lambda: engine_on(decoder, config, tokenizer, engines[0].version),
        tuple(engines[1:]),
        workers,
        way,
        learner,
    )


def _build_served(
    words: _Words, model: ModelConfig, config: EngineConfig, remote: RemoteConfig, run: RunConfig | None, memory: Plan
) -> Parts:
    """With servers that sample, and an engine of its own for evaluation. Without a run their weights stay as they are:
    who asks them looks first whether they are these (`Parts.served`)."""
    checkpoint, tokenizer = words.checkpoint, words.tokenizer
    decoder = decoder_of(checkpoint.spec, model).load(checkpoint.tensors())
    exact_engine = engine_on(decoder, config, tokenizer)
    decoder.wear(words.adapter(decoder))
    key = env.named(remote.key_env) if remote.key_env else ""
    servers: list[ServerEngine] = []
    for url in remote.servers:
        there = ServerEngine(Server(url, key), remote, checkpoint.spec, model, config, tokenizer.decode)
        there.grammars = Grammars(tokenizer.backend.to_str, checkpoint.spec.vocab_size)  # for its checks
        servers.append(there)
    prompt = words.renderer.prompt_tokens((Message("user", "What is 1 + 2?"),))
    receivers: list[Receiver] = [Shared("what runs on the learner's weights", decoder, exact_engine)]
    way = ToServers(decoder, servers, prompt, run.rollout.temperature if run is not None else 1.0)
    try:
        if run is not None:
            receivers.append(way)
        publisher = Publisher(decoder, receivers)
        version = publisher.publish(0)
    except BaseException:
        way.close()
        raise
    plan = _decided(words, model, exact_engine, facts(decoder), version, memory)
    return Parts(
        decoder,
        tokenizer,
        words.renderer,
        servers[0],
        exact_engine,
        publisher,
        memory,
        plan | {"decoders": 1, "servers": list(remote.servers)},
        lambda: engine_on(decoder, config, tokenizer, exact_engine.version),
        tuple(servers[1:]),
        served=way,
    )


def _build(words: _Words, model: ModelConfig, config: EngineConfig, memory: Plan, use: _Use) -> Parts:
    lag, beside, learns = use
    checkpoint, tokenizer, spec = words.checkpoint, words.tokenizer, words.checkpoint.spec
    decoder = decoder_of(spec, model)
    dtype = model.dtype if config.dtype == "same" else config.dtype
    rounded = config.weights != "same" or dtype != model.dtype
    apart = rounded or lag or beside  # the engine has weights of its own
    frozen = words.trains or not learns
    held = frozenset() if apart or not frozen else hold_codes(decoder, checkpoint, learns=words.trains)
    decoder.load(checkpoint.tensors(held))
    serving = serving_decoder(spec, model, config) if apart else decoder
    source = (decoder_of(spec, model) if rounded else serving) if lag else None

    engine = engine_on(serving, config, tokenizer)
    count = config.replicas - 1 if learns else 0
    others = tuple(engine_on(serving, config, tokenizer) for _ in range(count))
    exact = not (lag or beside or of_engine(model, config))
    exact_engine = engine if exact else engine_on(decoder, without_departures(config), tokenizer)
    on_learner = [exact_engine] if serving is not decoder else [engine, *others, *([] if exact else [exact_engine])]
    receivers: list[Receiver] = [Shared("what runs on the learner's weights", decoder, *on_learner)]
    if serving is not decoder:
        rounding = integers_of(config)
        own = layer_codes(decoder, checkpoint) if rounding.products and not learns else None
        copied = Copied("the engine", serving, engine, *others, rounding=rounding, lag=lag, source=source, codes=own)
        receivers.append(copied)
    publisher = Publisher(decoder, receivers)
    version = publisher.publish(0)
    if frozen and serving is decoder:
        decoder.freeze(head=learns)
    worn = words.adapter(decoder)
    if worn is not None:  # from here on it alone travels
        decoder.wear(worn)
        for other in {id(one): one for one in (serving, source) if one is not None and one is not decoder}.values():
            other.wear(AdapterSet(other, worn.config, worn.name))
        publisher = Publisher(decoder, receivers)
        version = publisher.publish(0)
    known = facts(decoder) | {"codes": described(serving)}
    plan = _decided(words, model, engine, known, version, memory)
    plan |= {"decoders": len({id(d) for d in (decoder, serving, source) if d is not None})}
    return Parts(
        decoder,
        tokenizer,
        words.renderer,
        engine,
        exact_engine,
        publisher,
        memory,
        plan,
        lambda: engine_on(serving, config, tokenizer, engine.version),
        others,
    )


def facts(decoder: Decoder) -> dict[str, Any]:
    """What plan.json says of weights that learn."""
    return {
        "kernels": "compiled" if decoder.compiled else "reference",
        "parameters": sum(weight.value.numel() for _, weight in decoder.weights()),
        "trained": sum(weight.value.numel() for _, weight in (decoder.adapter or decoder).weights()),
        "codes": described(decoder),
    }


def _decided(
    words: _Words,
    model: ModelConfig,
    engine: Engine,
    known: dict[str, Any],
    version: WeightVersion,
    memory: Plan,
) -> dict[str, Any]:
    """What plan.json says of any run."""
    pool, config = engine.scheduler.pool, engine.scheduler.config
    return {
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        **known,
        "matrix_unit": matrix_unit() if model.device == "cpu" else model.device,
        "kv_pages": pool.num_pages,
        "kv_capacity_tokens": engine.runner.layout.capacity_tokens(pool.num_pages, config.page_tokens),
        "kv_bytes_per_token": engine.runner.layout.token_bytes,
        "weights": version.digest,
        "prompts": "plain text" if words.renderer.plain else "chat template",
        "tools": "described in a system message" if words.renderer.describes else "told by the chat template",
        "tool_format": words.renderer.format,
        "memory": memory.record(),
    }


def reference_of(parts: Parts, config: RunConfig, load: Callable[[str], Decoder]) -> Scorer:
    """What fills in `reference_logprobs` by the model that the run began with, in a process of its own or `load`ed."""
    if parts.decoder.adapter is not None:
        return without(parts.decoder, config.adapter.source)
    if parts.workers is None:
        return partial(with_logprobs, "reference_logprobs", load(config.model.source))
    source = resolve_source(config.model.source)
    return RemoteReference(parts.workers, source, config.model).score
