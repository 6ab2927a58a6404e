"""A server in a thread of the test's process, on a random model."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tandem.config import override
from tandem.models.config import ModelConfig
from tandem.run.served import served
from tandem.run.weights import ServedWeights
from tandem.server.app import build
from tandem.server.config import ServeConfig
from tandem.server.desk import Desk
from tandem.server.listen import Listener, bound
from tandem.server.room import Room
from tandem.server.words import Words

DEADLINE_S = 60.0


class Server:
    """One that listens at `url`; `parts` are its model's."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        given = {"server.port": 0, "server.name": "tiny", "engine.kv_memory_bytes": 1 << 22}
        self.config = override(ServeConfig(ModelConfig(str(folder))), {**given, **settings})
        self.parts, opening = served(self.config)
        self.words = Words(self.parts.tokenizer, self.parts.renderer, opening)
        self.room = Room(Desk(self.parts.engine, self.config.server), self.words, self.config.server, str(folder))
        self.listening = bound("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.listener = Listener(build(self.room, ServedWeights(self.config.model.source)), self.room)
        self.thread = threading.Thread(target=self.listener.run, args=([self.listening],), daemon=True)

    def start(self) -> Server:
        self.thread.start()
        wait_for("the server's start", lambda: self.listener.started)
        return self

    def stop(self) -> None:
        self.listener.should_exit = True
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive(), "the server did not end"


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[Server]:
    server = Server(folder, **settings).start()
    try:
        yield server
    finally:
        server.stop()


def wait_for(what: str, holds: Any) -> None:
    until_s = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < until_s, f"waited {DEADLINE_S:g} s for {what}"
        time.sleep(0.01)


class Scripted:
    """A runner that draws what it is told, in place of a model's: `says(request)` are the tokens of its answer."""

    def __init__(self, runner: Any, says: Any) -> None:
        self.layout, self.vocab_size, self.says = runner.layout, runner.vocab_size, says
        self.step_s = 0.0
        self.gate = threading.Event()  # steps wait while it is not set
        self.gate.set()

    def run(self, batch: Any) -> Any:
        from tandem.engine.batch import Sampled

        assert self.gate.wait(DEADLINE_S)
        time.sleep(self.step_s)
        tokens = []
        for work in batch.works:
            if work.draws:
                drawn = work.start + len(work.tokens) - len(work.request.tokens)
                tokens.append(self.says(work.request)[drawn])
        return Sampled(tokens, {"logprobs": [-0.5] * len(tokens)})

    def release_memory(self) -> None:
        pass


def script(server: Server, text: str, ends: bool = True) -> Scripted:
    """All answers of a server that is not started yet are this text."""
    tokens = server.words.tokenizer.encode(text) + ([2] if ends else [])
    runner = Scripted(server.parts.engine.runner, lambda request: tokens)
    server.parts.engine.runner = runner
    server.parts.engine.scheduler.max_context = 4096  # a character a token: a tool's description is long
    return runner
