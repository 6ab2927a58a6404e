"""A model behind a server: its parts, and the room that answers (server/)."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

from tandem.errors import ConfigError
from tandem.models.checkpoint import open_checkpoint
from tandem.program.config import TaskConfig
from tandem.program.render import renderer_of
from tandem.run.model import asked_as
from tandem.run.parts import Parts, build_parts, plan_parts, resolve_source
from tandem.server.config import ServeConfig, names_of
from tandem.server.tenants import Access
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


def checked(config: ServeConfig) -> list[str]:
    """What a server of this config would be, a line a fact; reads no weight. Raises what its start would."""
    check_installed()
    access = Access(config.server)
    checkpoint = open_checkpoint(resolve_source(config.model.source))
    tokenizer = checkpoint.load_tokenizer()
    renderer = renderer_of(tokenizer, spoken(config))
    memory = plan_parts(checkpoint, tokenizer, config.model, config.engine, 0, None, learns=config.server.control)
    memory.check()
    server, spec = config.server, checkpoint.spec
    name = names_of(server, config.model.source)[0]
    return [
        f"model      {name}, {spec.max_position} positions, {config.model.dtype}",
        f"prompts    {'plain text' if renderer.plain else 'chat template'}, calls of tools as {renderer.format}",
        f"memory     {memory.kv_memory_bytes / 2**20:,.0f} MiB for keys and values",
        f"listens    http://{server.host}:{server.port}",
        f"callers    {'need an API key' if access.asks else 'anybody who reaches the address'}",
        f"limits     {server.max_requests} answers at once, {server.max_waiting} of them waiting",
        f"control    {'pause, weights and sleep are served' if server.control else 'off'}",
    ]


def served(config: ServeConfig) -> tuple[Parts, list[Message]]:
    """The model's parts, and what opens a conversation without a system message."""
    task = spoken(config)
    parts = build_parts(config.model, config.engine, learns=config.server.control, task=task)
    return parts, [Message("system", task.system)] if task.system else []
