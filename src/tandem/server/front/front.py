"""A router over HTTP: several engines, each a server of its own (`tandem serve`, or vLLM's), asked as one.

    front = Front([Engine("one", "http://127.0.0.1:8001", config.route), ...], config.server, config.route)
    await front.start()

Which engine: engine/affinity.py, of those that are well, not drained, and serve the newest weights (engines.py). What
becomes of a call: forward.py. Several routers may stand before the same engines: what each knows it asks of them.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from functools import partial

from tandem import env
from tandem.engine.affinity import Affinity
from tandem.errors import ConfigError
from tandem.server.config import FrontConfig, ServerConfig
from tandem.server.front.call import Call
from tandem.server.front.client import Lost
from tandem.server.front.engines import Engine, Loaded, Served, digest_of, lacking, newest, read, served_of
from tandem.server.refusal import Refusal
from tandem.server.tenants import Access
from tandem.server.wire import log

LOAD = "/v1/load_lora_adapter"
CATCH_UP_S = 10.0  # between two times that an engine is given the weights that it missed
DELIVER_S = 600.0  # for it to take them


async def repeated(every_s: float, work: Callable[[], Awaitable[None]], what: str) -> None:
    """For ever; what goes wrong once is in the log."""
    while True:
        await asyncio.sleep(every_s)
        try:
            await work()
        except Exception:  # noqa: BLE001 - recorded boundary: the next time may go well
            log.exception("%s failed", what)


class Front:
    """Its parts. Used on the event loop alone, from `start` to `close`."""

    def __init__(self, engines: Iterable[Engine], server: ServerConfig, route: FrontConfig, key: str = "") -> None:
        self.engines = list(engines)
        self.config, self.route = server, route
        self.access = Access(server)
        self.key = key or env.api_key()  # that engines are asked with, where the router itself asks
        self.model = ""
        self.affinity = Affinity[Engine]()
        self.refusals = Counter[str]()
        self.open = 0  # calls on their way
        self.draining = False
        self.had: Served | None = None  # the weights that are to be served
        self.folder = ("", b"")  # their digest, and the call that brought them, where they are of a folder
        self.adapters: dict[str, Loaded] = {}  # by name, of those that were loaded from here
        self.updating = 0  # updates of weights on their way
        self.held: tuple[str, bytes] | None = None  # the pause that is on: what an engine that comes back is told
        self.freed = "/resume"  # what ended the last one
        self.watchers = 0
        self._tasks = list[asyncio.Task[None]]()
        self._caught_up: dict[Engine, float] = {}

    @property
    def num_open(self) -> int:
        return self.open

    async def start(self) -> None:
        """Looks at the engines until one is well. ConfigError where none is within route.start_s, where they serve
        different models, or one asks for a key that the router has not."""
        until_s = time.monotonic() + self.route.start_s
        while True:
            await asyncio.gather(*(one.ask(self.key) for one in self.engines))
            keyless = [one for one in self.engines if "TANDEM_API_KEY" in one.said]
            if keyless:
                raise ConfigError(f"{keyless[0].client.url}{keyless[0].said}.")
            if any(one.well for one in self.engines):
                break
            if time.monotonic() > until_s:
                each = "; ".join(f"{one.client.url}: {one.said}" for one in self.engines)
                raise ConfigError(f"no engine answered within {self.route.start_s:g} s (route.start_s). {each}.")
            await asyncio.sleep(min(0.2, self.route.health_s))
        names = {one.model: one for one in self.engines if one.model}
        if len(names) > 1:
            each = ", ".join(f"{one.client.url} serves {name}" for name, one in names.items())
            raise ConfigError(f"engines behind one router must serve one model: {each}. Set server.name alike.")
        self.model = next(iter(names))
        told = {one.served for one in self.engines if one.well and one.served is not None}
        if len({one.digest for one in told}) > 1 and len({one.step for one in told}) == 1:
            each = ", ".join(f"{one.client.url} {one.served.digest}" for one in self.engines if one.served)
            raise ConfigError(f"engines behind one router must serve the same weights: {each}.")
        self._settle()
        for one in self.engines:
            self.beside(repeated(self.route.health_s, partial(self._look_after, one), f"the look at {one.name}"))

    def beside(self, work: Awaitable[None]) -> None:
        """What goes on until `close`."""
        self._tasks.append(asyncio.ensure_future(work))

    async def drain(self) -> None:
        """Takes no more calls; those that are on their way have ended after it, or are given up after drain_s."""
        self.draining = True
        until_s = time.monotonic() + self.config.drain_s
        while self.open and time.monotonic() < until_s:
            await asyncio.sleep(0.02)
        for task in self._tasks:  # nobody looks any more: what follows is no engine's doing
            task.cancel()
        for engine in self.engines:
            engine.gone("the router ends")
        until_s = time.monotonic() + 5
        while self.open and time.monotonic() < until_s:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for engine in self.engines:
            engine.client.close()

    # Which engine.

    @property
    def well(self) -> bool:
        """Whether it takes calls, and an engine could answer them."""
        return not self.draining and any(one.ready for one in self.engines)

    def choose(self, call: Call, tried: Collection[Engine]) -> Engine | None:
        """One that was not tried; None where there is none."""
        may = self.left(tried)
        return self.affinity.choose(may, call.program, call.tokens, call.keys, call.program) if may else None

    def left(self, tried: Collection[Engine]) -> list[Engine]:
        """Engines that may be asked, without those that were."""
        told = self.held[0] if self.held is not None else ""  # who was away in a pause is told of it first
        return [one for one in self.engines if one.ready and one not in tried and told in ("", one.told_held)]

    def none_left(self) -> Refusal:
        each = "; ".join(f"{one.name} is {one.state}" for one in self.engines)
        return Refusal(503, f"no engine can be asked: {each}. Ask again.", "no_engine", retry_s=1)

    def named(self, name: str) -> Engine:
        """By name or address. Refusal where there is none."""
        for one in self.engines:
            if name.rstrip("/") in (one.name, one.client.url):
                return one
        there = ", ".join(one.name for one in self.engines)
        raise Refusal(404, f"there is no engine {name}. There are: {there}.", "no_such_engine", "engine")

    # How they are.

    async def _look_after(self, engine: Engine) -> None:
        """Asks how it is."""
        if engine.given_up:
            return
        before = engine.state
        await engine.ask(self.key)
        if engine.well and engine.model != self.model:
            engine.failed(f"it serves {engine.model}, and the others {self.model}")
        self._settle()
        if engine.well:
            await self._catch_up(engine)
        if engine.state != before:
            log.warning("engine %s (%s) is %s; it was %s", engine.name, engine.client.url, engine.state, before)

    def _settle(self) -> None:
        """Which weights and adapters are to be served, and who has not got them."""
        for one in self.engines:
            lacks = {name: lacking(name, wanted, one.adapters.get(name)) for name, wanted in self.adapters.items()}
            one.lacks = {name: why for name, why in lacks.items() if why}
        told = [one for one in self.engines if one.well]
        self.had = newest(self.had, [one.served for one in told if one.served is not None])
        for one in told:
            served = one.served
            if served is not None and self.had is not None:
                same = served.digest == self.had.digest
                one.behind = "" if same else f"it serves weights {served.digest}, the others {self.had.digest}"

    def delivered(self, took: dict[Engine, Served | None], missed: dict[Engine, str], folder: bytes) -> None:
        """Engines took other weights (None: they do not say which), others did not, and why. folder: the call that
        brought them, and that brings them to who comes later."""
        counts = Counter(one.digest for one in took.values() if one is not None)
        digest = counts.most_common(1)[0][0] if counts else ""
        if digest:
            steps = [one.step for one in took.values() if one is not None]
            self.had = Served(max(self.had.step if self.had is not None else 0, *steps), digest)
        for engine, own in took.items():
            engine.took(own)
            engine.behind = f"it took weights {own.digest}, and not {digest}" if own and own.digest != digest else ""
        for engine, why in missed.items():
            engine.behind = f"it missed an update of the weights: {why}"
        self.folder = (digest, folder)

    def adapted(self, name: str, call: bytes | None, took: Mapping[Engine, str], done: bool) -> None:
        """Engines loaded an adapter by a call, with the digests that they came to, or (None) have it no more. done: so
        it stands for all, as what most came to; else what they should have is what it was."""
        if done:
            self.adapters.pop(name, None)
        if done and call is not None:
            self.adapters[name] = Loaded(call, Counter(took.values()).most_common(1)[0][0])
        for one, digest in took.items():
            one.adapters.pop(name, None)
            if call is not None:
                one.adapters[name] = Loaded(call, digest)
        self._settle()
        for one in took:
            if call is not None and name in one.lacks:
                log.warning("engine %s is asked for nothing: %s", one.name, one.lacks[name])

    @property
    def had_digest(self) -> str:
        return self.had.digest if self.had is not None else ""

    def _loaded(self, engine: Engine, name: str, call: bytes, said: bytes) -> None:
        self.adapted(name, call, {engine: digest_of(read(said))}, done=False)

    async def _catch_up(self, engine: Engine) -> None:
        """One that was away gets the pause and the weights that it missed, where the router can bring them."""
        deliver: list[tuple[str, bytes, Callable[[bytes], None]]] = []
        if self.held is not None and engine.told_held != self.held[0]:
            path = self.held[0]
            deliver.append((path, self.held[1], lambda said: setattr(engine, "told_held", path)))
        elif self.held is None and engine.told_held:
            deliver.append((self.freed, b"", lambda said: setattr(engine, "told_held", "")))
        now = time.monotonic()
        digest, folder = self.folder
        fits = bool(folder) and digest == self.had_digest and not self.updating
        weights = bool(engine.behind) and fits
        if (weights or engine.lacks) and now - self._caught_up.get(engine, -CATCH_UP_S) >= CATCH_UP_S:
            self._caught_up[engine] = now
            if weights:
                deliver.append(("/update_weights_from_disk", folder, lambda said: engine.took(served_of(read(said)))))
            for name in engine.lacks:
                call = self.adapters[name].call
                deliver.append((LOAD, call, partial(self._loaded, engine, name, call)))
        for path, body, done in deliver:
            try:
                status, said = await engine.client.told("POST", path, self.key, body, DELIVER_S)
            except Lost as error:
                log.warning("engine %s could not be told %s: %s", engine.name, path, error)
                return
            if status == 200:
                done(said)
            else:
                log.warning("engine %s answers %s to %s: %s", engine.name, status, path, said[:500])
