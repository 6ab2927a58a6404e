"""The engine that `tandem serve` would serve, without the server, in a process of its own.

    python -m tandem.bench.alone

It reads lines of JSON, a list of calls each, and answers each with a line: the seconds from the first submission to the
last token, and the tokens of each.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from tandem import env
from tandem.bench.child import KV_BYTES
from tandem.bench.client import Ask
from tandem.bench.work import MODEL
from tandem.errors import WorldError

DEADLINE_S = 600.0  # for a batch, the engine's start included


class Ran(msgspec.Struct):
    """What a batch gave."""

    wall_s: float
    tokens: list[list[int]]


class Alone:
    """A child that runs batches."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tandem.bench.alone"]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env.foreign())

    def run(self, asks: Sequence[Ask]) -> Ran:
        """WorldError where it ends, or takes longer than DEADLINE_S."""
        assert self.child.stdin is not None and self.child.stdout is not None
        late = threading.Timer(DEADLINE_S, self.child.kill)
        late.start()
        try:
            self.child.stdin.write(msgspec.json.encode(list(asks)) + b"\n")
            self.child.stdin.flush()
            line = self.child.stdout.readline()
        except OSError:
            line = b""
        finally:
            late.cancel()
        if not line:
            raise WorldError(f"the engine alone ended, or gave nothing within {DEADLINE_S:g} s.")
        return msgspec.json.decode(line, type=Ran)


@contextmanager
def alone() -> Iterator[Alone]:
    child = Alone()
    try:
        yield child
    finally:
        child.child.kill()
        child.child.wait()


def main() -> None:
    from tandem.config import override
    from tandem.models.config import ModelConfig
    from tandem.run.served import served
    from tandem.server import demand
    from tandem.server.config import ServeConfig
    from tandem.types import Completion, Request, Sampling

    env.limit_spinning()
    config = override(ServeConfig(ModelConfig(MODEL)), {"engine.kv_memory_bytes": str(KV_BYTES)})
    engine = served(config)[0].engine
    for number, line in enumerate(sys.stdin):
        requests = []
        for place, ask in enumerate(msgspec.json.decode(line, type=list[Ask])):
            assert ask.seed is not None
            name, (seed,) = f"{number}/{place}", demand.seeds(ask.seed, 0, 1)
            requests.append(Request(name, name, tuple(ask.prompt), Sampling(max_new_tokens=ask.new), seed))
        done: list[Completion] = []
        began_s = time.perf_counter()
        for request in requests:
            engine.submit(request)
        while engine.has_work:
            done += engine.step()
        wall_s = time.perf_counter() - began_s
        tokens = {one.request_id: list(one.tokens) for one in done}
        ran = Ran(wall_s, [tokens[request.id] for request in requests])
        sys.stdout.buffer.write(msgspec.json.encode(ran) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
