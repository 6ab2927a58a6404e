"""A model behind a server: its parts, and the room that answers (server/)."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib.util import find_spec

from tandem.config import names, render
from tandem.engine.config import EngineConfig
from tandem.engine.share import read_shares
from tandem.errors import ConfigError
from tandem.models.checkpoint import Checkpoint, open_checkpoint
from tandem.models.config import ModelConfig
from tandem.models.peft import AdapterFolder, read_adapter
from tandem.models.tokenizer import Tokenizer
from tandem.plan.memory import Plan
from tandem.program.config import TaskConfig
from tandem.program.render import renderer_of
from tandem.run.adapted import for_engine
from tandem.run.model import asked_as
from tandem.run.parts import Parts, build_parts, plan_parts
from tandem.run.source import origin_of, resolve_source, trained_as
from tandem.server.config import ServeConfig, names_of
from tandem.server.tenants import Access
from tandem.sync.receive import serve_adapter
from tandem.types import Message

NEEDED = ("fastapi", "uvicorn", "httptools", "uvloop", "prometheus_client")  # of the extra `serve`


def check_installed() -> None:
    """ConfigError where the extra is missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"tandem serve needs {', '.join(missing)}, which is not installed: pip install 'tandem-rl[serve]'."
        )


def spoken(config: ServeConfig) -> TaskConfig:
    """How conversations are written and calls are read: as a run's were, with what the server's settings say."""
    task, server = asked_as(config.model.source), config.server
    task = replace(task, tool_format=server.tool_format)
    return replace(task, template_arguments=server.template_arguments) if server.template_arguments else task


def adapters(config: ServeConfig) -> list[tuple[str, AdapterFolder]]:
    """What is served beside the model. ConfigError: a name is taken; ModelError: a folder is no adapter."""
    found, taken = list[tuple[str, AdapterFolder]](), {*names_of(config.server, config.model.source)}
    for name, folder in config.server.adapters:
        if not name or name in taken:
            raise ConfigError(f"server.adapters names {name!r}, which is empty or taken. Give each a name of its own.")
        taken.add(name)
        found.append((name, read_adapter(resolve_source(folder))))
    return found


def checked(config: ServeConfig) -> list[str]:
    """What a server of this config would be, a line a fact; reads no weight. Raises what its start would, but for what
    it would write and the port."""
    check_installed()
    access, engines = Access(config.server), config.route.engines
    read_shares(config.engine.shares)
    if engines > 1:
        alike(config)
    checkpoint = open_checkpoint(origin_of(config.model.source)[0])
    tokenizer = checkpoint.load_tokenizer()
    renderer = renderer_of(tokenizer, spoken(config))
    memory = _planned(config, checkpoint, tokenizer)
    memory.check()
    server, spec = config.server, checkpoint.spec
    name = names_of(server, config.model.source)[0]
    return [
        f"model      {name}, {spec.max_position} positions, {config.model.dtype}",
        *([f"adapters   {', '.join(one for one, _ in adapters(config))}"] if config.server.adapters else []),
        f"prompts    {'plain text' if renderer.plain else 'chat template'}, calls of tools as {renderer.format}",
        f"memory     {memory.kv_memory_bytes / 2**20:,.0f} MiB for keys and values"
        + (" of each engine" if engines > 1 else ""),
        *([f"engines    {engines}, a process each, and a router"] if engines > 1 else []),
        f"listens    http://{server.host}:{server.port}",
        f"callers    {'need an API key' if access.asks else 'anybody who reaches the address'}",
        f"limits     {server.max_requests} answers at once, {server.max_waiting} of them waiting",
        f"control    {'pause, weights and sleep are served' if server.control else 'off'}",
    ]


def alike(config: ServeConfig) -> list[str]:
    """The command of one of several servers that this process starts, with the settings of all. ConfigError for those
    that can't be divided."""
    if config.model.device == "cuda":
        raise ConfigError(
            "route.engines starts engines on the CPU. Start a tandem serve on each GPU (CUDA_VISIBLE_DEVICES=0, ...), "
            "and tandem route before them."
        )
    own = replace(config.server, host="127.0.0.1", port=0, ends_with=os.getpid())
    before = {name: value for name, _, value in names(ServeConfig(ModelConfig(config.model.source)))}
    now = names(replace(config, server=own))
    known = trained_as(config.model.source)  # what a server would take by itself
    changed = [f"{name}={render(value)}" for name, _, value in now if value != before.get(name) or name in known]
    settings = [part for text in changed for part in ("--set", text)]
    return [sys.executable, "-m", "tandem", "serve", config.model.source, *settings]


def _planned(config: ServeConfig, checkpoint: Checkpoint, tokenizer: Tokenizer) -> Plan:
    """Of each engine: every one has weights of its own."""
    given = (checkpoint, tokenizer, config.model, config.engine, 0, None)
    return plan_parts(*given, use="learn" if config.server.control else "serve", sharers=config.route.engines)


def _divided(config: ServeConfig) -> EngineConfig:
    """The engine's settings, with its part of the memory for pages where several share the machine."""
    engine, count = config.engine, config.route.engines
    if count == 1 or engine.kv_memory_bytes:
        return engine
    checkpoint = open_checkpoint(origin_of(config.model.source)[0])
    tokenizer = checkpoint.load_tokenizer()
    return replace(engine, kv_memory_bytes=_planned(config, checkpoint, tokenizer).kv_memory_bytes)


def served(config: ServeConfig) -> tuple[Parts, list[Message]]:
    """The model's parts, and what opens a conversation without a system message."""
    task = spoken(config)
    parts = build_parts(config.model, _divided(config), learns=config.server.control, task=task)
    for name, folder in adapters(config):
        made = for_engine(folder, parts.engine, name, config.model.source)
        serve_adapter("the server's engine", parts.engine, made, 0)
    return parts, [Message("system", task.system)] if task.system else []
