"""`tandem route`: several engines behind one address."""

from __future__ import annotations

from typing import Annotated

import typer

from tandem.cli.options import Assignments, ConfigFiles


def route(
    urls: Annotated[list[str], typer.Argument(metavar="URL...", help="Of each engine, as http://HOST:PORT.")],
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 for all. Sets server.host.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 for one that is free. Sets server.port.")] = None,
    files: ConfigFiles = None,
    settings: Assignments = None,
) -> int:
    """Route calls over engines that `tandem serve` or vLLM serve, until SIGTERM or Ctrl-C."""
    from tandem.cli.settings import assignments, say_unused
    from tandem.config import override
    from tandem.server.config import ENGINES_ALONE, RouteConfig

    config = RouteConfig()
    assigned = assignments(config, files or [], settings or [])
    given = {"server.host": host, "server.port": None if port is None else str(port)}
    config = override(config, {**assigned, **{name: text for name, text in given.items() if text is not None}})
    say_unused("route", assigned, ["server.", "route."], ENGINES_ALONE, "each engine has its own")

    from tandem.run.served import check_installed

    check_installed()

    from tandem.server.front.run import route as routed
    from tandem.server.listen import bound

    routed(bound(config.server.host, config.server.port), urls, config.server, config.route)
    return 0
