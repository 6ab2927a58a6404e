"""Engines that the router starts itself: processes that it starts again when they end, and that end with it."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence

from tandem import env
from tandem.errors import ConfigError, WorldError
from tandem.server.config import FrontConfig
from tandem.server.front.engines import Engine
from tandem.server.wire import log

SAYS = re.compile(r"tandem: .* on (http://\S+)/v1\s*$")
LINE_BYTES = 1 << 16
USERS = 2  # exit code of a child whose settings are wrong (cli/main.py)


class Ended(WorldError):
    """A child ended before it answered. code: its exit code; below 0, a signal."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name} ended with code {code} before it listened; what it said of it stands above.")
        self.code = code


class Child:
    """One process. Its stderr is the router's."""

    def __init__(self, name: str, command: Sequence[str], variables: Mapping[str, str]) -> None:
        self.name, self.command, self.variables = name, command, variables
        self._running: Process | None = None
        self._read: asyncio.Task[None] | None = None

    async def begin(self, limit_s: float) -> str:
        """Its address, once it listens. WorldError where it does not within `limit_s`."""
        try:
            running = await asyncio.create_subprocess_exec(
                *self.command, stdout=PIPE, limit=LINE_BYTES, env=env.child(**self.variables), start_new_session=True
            )
        except OSError as error:  # no memory, or no more processes
            raise WorldError(f"{self.name} cannot be started: {error.strerror or error}.") from error
        self._running = running
        address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._read = asyncio.create_task(self._lines(running, address))
        try:
            async with asyncio.timeout(limit_s):
                return await address
        except TimeoutError as error:
            raise WorldError(f"{self.name} does not listen after {limit_s:g} s (route.start_s).") from error

    async def _lines(self, running: Process, address: asyncio.Future[str]) -> None:
        """Reads what it prints to its end: it must not wait for a reader."""
        assert running.stdout is not None
        while line := await running.stdout.readline():
            found = SAYS.match(line.decode("utf-8", "replace"))
            if found and not address.done():
                address.set_result(found[1])
        code = await running.wait()
        if not address.done():
            address.set_exception(Ended(self.name, code))

    async def ended(self) -> int:
        """Its exit code, when it has."""
        assert self._running is not None
        return await self._running.wait()

    @property
    def pid(self) -> int:
        return self._running.pid if self._running is not None else 0

    async def end(self, limit_s: float) -> None:
        """It ends what it has, within `limit_s`, and is gone."""
        running = self._running
        if running is None:
            return
        if running.returncode is None:
            running.terminate()
            try:
                async with asyncio.timeout(limit_s):
                    await running.wait()
            except TimeoutError:
                log.warning("%s did not end within %g s of SIGTERM: killed", self.name, limit_s)
                running.kill()
                await running.wait()
        if self._read is not None:
            self._read.cancel()


async def begun(children: Sequence[Child], limit_s: float) -> list[str]:
    """Addresses of all. Where one can't begin, none is left: WorldError; ConfigError where its settings were wrong."""
    try:
        return list(await asyncio.gather(*(one.begin(limit_s) for one in children)))
    except BaseException as error:
        await asyncio.gather(*(one.end(1.0) for one in children))
        if isinstance(error, Ended) and error.code == USERS:
            raise ConfigError(str(error)) from error
        raise


async def keep(child: Child, engine: Engine, config: FrontConfig) -> None:
    """Starts it again whenever it ends, later each time; gives it up after route.restarts that came to nothing."""
    failures, since_s = 0, time.monotonic()
    while True:
        code = await child.ended()
        while True:
            engine.gone(f"it ended with code {code}")
            if time.monotonic() - since_s >= config.restart_most_s:
                failures = 0
            if failures >= config.restarts:
                engine.given_up = True
                print(f"tandem: {child.name} ended with code {code}; given up", file=sys.stderr, flush=True)
                return
            wait_s = min(config.restart_most_s, config.restart_s * 2**failures)
            failures += 1
            said = f"tandem: {child.name} ended with code {code}; it is started again in {wait_s:g} s"
            print(said, file=sys.stderr, flush=True)
            await asyncio.sleep(wait_s)
            since_s = time.monotonic()
            engine.counts["restarts"] += 1
            try:
                engine.moved(await child.begin(config.start_s))
                break
            except Ended as error:
                code = error.code
            except WorldError as error:
                log.warning("%s", error)
                await child.end(1.0)
                code = await child.ended()
