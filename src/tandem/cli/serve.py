"""`tandem serve`: a model over HTTP, as OpenAI's clients ask for one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tandem.cli.generate import MODEL_HELP
from tandem.cli.options import Assignments, ConfigFiles

if TYPE_CHECKING:
    from tandem.server.config import ServeConfig

ALONE = {"model.weights": "engine.weights", "model.kv": "engine.kv_dtype", "model.logits": "engine.logits"}


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 for all. Sets server.host.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 for one that is free. Sets server.port.")] = None,
    engines: Annotated[
        int | None, typer.Option(min=1, help="Engines, each a process, behind one router. Sets route.engines.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="An adapter to serve as a model. Sets server.adapters."),
    ] = None,
    files: ConfigFiles = None,
    settings: Assignments = None,
    check: Annotated[bool, typer.Option("--check", help="Say what would be served, and end.")] = False,
) -> int:
    """Serve a model to OpenAI's clients, until SIGTERM or Ctrl-C."""
    from tandem.cli.settings import assignments
    from tandem.config import override
    from tandem.models.config import ModelConfig
    from tandem.run.source import say_trained_as
    from tandem.server.config import ServeConfig

    config = ServeConfig(ModelConfig(model))
    assigned = assignments(config, files or [], settings or [])
    pairs = {"server.adapters": _pairs(adapter)} if adapter else {}
    given = {"server.host": host, "server.port": port, "route.engines": engines}
    flags = {name: str(text) for name, text in given.items() if text is not None}
    # what rounds an engine alone stands for what rounds it with its learner, and both at once are refused
    own = [*assigned, *(one for one, other in ALONE.items() if other in assigned)]
    config = override(config, {**say_trained_as(model, own, taken="serve"), **assigned, **pairs, **flags})

    from tandem.run.served import check_installed, checked, served

    if check:
        print("\n".join(checked(config)))
        return 0
    check_installed()
    if config.route.engines > 1 and not config.server.ends_with:
        return _serve_several(config)

    import threading

    from tandem.program.worker import leave_with
    from tandem.run.weights import ServedWeights
    from tandem.server.app import build
    from tandem.server.desk import Desk
    from tandem.server.listen import Listener, bound
    from tandem.server.room import Room
    from tandem.server.words import Words

    if config.server.ends_with:
        threading.Thread(target=leave_with, args=(config.server.ends_with,), daemon=True).start()
    listening = bound(config.server.host, config.server.port)  # before the weights are read: it may be taken
    parts, opening = served(config)
    words = Words(parts.tokenizer, parts.renderer, opening)
    room = Room(Desk(parts.engine, config.server), words, config.server, model)
    with parts.memory.foreseen():
        Listener(build(room, ServedWeights(config.model.source) if config.server.control else None), room).run(
            [listening]
        )
    return 0


def _pairs(given: list[str]) -> dict[str, str]:
    """Names and folders of --adapter."""
    from tandem.errors import ConfigError

    pairs = [text.partition("=") for text in given]
    for text, (name, _, folder) in zip(given, pairs, strict=True):
        if not (name and folder):
            raise ConfigError(f"--adapter {text}: wanted NAME=FOLDER, a name to ask for and an adapter's folder.")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ConfigError(f"--adapter gives a name twice: {', '.join(given)}. Give each a name of its own.")
    return {name: folder for name, _, folder in pairs}


def _serve_several(config: ServeConfig) -> int:
    """Engines as processes of their own, which read the same settings, and a router here."""
    from tandem.run.served import alike
    from tandem.server.front.run import serve as routed
    from tandem.server.listen import bound

    routed(bound(config.server.host, config.server.port), alike(config), config.server, config.route)
    return 0
