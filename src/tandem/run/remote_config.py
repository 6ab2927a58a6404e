"""Which servers sample in place of a run's own engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from annotated_types import Interval

from tandem.config import section
from tandem.errors import ConfigError

Seconds = Annotated[float, Interval(gt=0, lt=math.inf)]
Dialect = Literal["tandem", "vllm", "sglang"]


@dataclass(frozen=True, slots=True)
@section("remote")
class RemoteConfig:
    """Servers that sample in place of the run's own engine (docs/serving.md, Rollouts on another engine).

    >>> RemoteConfig(servers=("http://127.0.0.1:8000",)).dialect
    'tandem'
    """

    servers: tuple[str, ...] = ()  # http://HOST:PORT of each; empty: the run's own engine samples
    dialect: Dialect = "tandem"  # what they speak: of tandem serve, of vLLM, of SGLang
    folder: str = ""  # of vllm and sglang: where weights are written for them; they mount it in the same place
    key_env: str = ""  # the environment variable that has the API key they ask for; empty: they ask for none
    deadline_s: Seconds = 600.0  # of a call that is no generation (those have engine.answer_s): new weights, a look

    def __post_init__(self) -> None:
        if not self.servers and (self.dialect != "tandem" or self.folder or self.key_env):
            raise ConfigError("remote is configured, but remote.servers is empty. Set it, or leave the others out.")
        for url in self.servers:
            place = urlsplit(url)
            if place.scheme not in ("http", "https") or not place.hostname or place.query or place.fragment:
                raise ConfigError(f"remote.servers names {url!r}; wanted an address such as http://127.0.0.1:8000.")
        if len({url.rstrip("/") for url in self.servers}) < len(self.servers):
            raise ConfigError(f"remote.servers names one twice: {', '.join(self.servers)}. Take one out.")
        if self.servers and (self.dialect == "tandem") == bool(self.folder):
            raise ConfigError(
                f"remote.dialect is {self.dialect} and remote.folder {self.folder!r}: a server of tandem is sent its "
                "weights, and those of vllm and sglang read them in a folder. Set remote.folder for these alone."
            )
