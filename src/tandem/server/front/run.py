"""A router's process, from its first look at the engines to its end."""

from __future__ import annotations

import asyncio
import secrets
import socket
import sys
from collections.abc import Sequence

import uvloop

from tandem import env
from tandem.errors import ConfigError, WorldError
from tandem.server.config import FrontConfig, ServerConfig
from tandem.server.front.app import build
from tandem.server.front.children import Child, begun, keep
from tandem.server.front.engines import Engine
from tandem.server.front.front import Front
from tandem.server.front.shares import balance
from tandem.server.listen import Listener
from tandem.server.tenants import Access


def route(listening: socket.socket, urls: Sequence[str], server: ServerConfig, config: FrontConfig) -> None:
    """Before engines that others started, until SIGTERM. ConfigError where they can't be routed over."""
    engines = [Engine(url, url, config) for url in urls]
    for engine in engines:
        engine.name = engine.client.name
    if len({one.name for one in engines}) < len(engines):
        raise ConfigError(f"an engine is named twice, of {', '.join(urls)}. Name each once.")
    _run(_routed(listening, Front(engines, server, config), []))


def serve(listening: socket.socket, command: Sequence[str], server: ServerConfig, config: FrontConfig) -> None:
    """Before engines that it starts, `command` each, until SIGTERM. WorldError where one can't be started at first, or
    none could be kept."""
    Access(server)  # what is wrong with the keys is said before engines start
    key = env.api_key()
    variables = {"TANDEM_THREADS": str(max(1, env.num_threads() // config.engines))}
    if server.keys and not key:  # the router asks its engines with a key of its own
        key = variables["TANDEM_API_KEY"] = f"sk-{secrets.token_hex(24)}"
    children = [Child(f"engine-{number}", command, variables) for number in range(1, config.engines + 1)]

    async def started() -> None:
        urls = await begun(children, config.start_s)
        engines = [Engine(child.name, url, config) for child, url in zip(children, urls, strict=True)]
        await _routed(listening, Front(engines, server, config, key), children)

    _run(started())


async def _routed(listening: socket.socket, front: Front, children: Sequence[Child]) -> None:
    try:
        await front.start()
        listener = Listener(build(front), front)
        if len(front.engines) > 1:
            front.beside(balance(front))
        kept = [
            asyncio.create_task(keep(child, engine, front.route))
            for child, engine in zip(children, front.engines, strict=False)
        ]
        watch = asyncio.create_task(_until_none(kept, listener))
        try:
            await listener.serve([listening])
        finally:
            for task in (*kept, watch):
                task.cancel()
        if front.engines and all(one.given_up for one in front.engines):
            raise WorldError("no engine could be kept running; what each said of it stands above.")
    finally:
        front.draining = True
        await front.close()
        await asyncio.gather(*(child.end(front.config.drain_s + 10) for child in children))


async def _until_none(kept: Sequence[asyncio.Task[None]], listener: Listener) -> None:
    """Ends the router when all its engines are given up."""
    if kept:
        await asyncio.gather(*kept)
        print("tandem: no engine is left", file=sys.stderr, flush=True)
        listener.should_exit = True


def _run(work: object) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)  # type: ignore[arg-type]
