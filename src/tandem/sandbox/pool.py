"""Sandboxes that are prepared before they are asked for, so that a command starts at once."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import cache

from tandem.errors import SandboxError
from tandem.sandbox.backend import Started, start
from tandem.sandbox.box import Result, Sandbox
from tandem.sandbox.config import SandboxConfig

WARM = 2  # prepared ones, some 7 MB each
CHECK_S = 60.0


class SandboxPool:
    """Gives sandboxes out, each once. Used from one event loop."""

    def __init__(self, config: SandboxConfig, warm: int = WARM) -> None:
        self.config = config
        self.warm = warm
        self._prepared: deque[Future[Started]] = deque()
        self._closed = False

    async def open(self, files: Mapping[str, str | bytes] | None = None) -> Sandbox:
        """A sandbox with these files in its working folder; whoever asks closes it.

        SandboxError says why none starts, and what to do.
        """
        if self._closed:
            raise SandboxError("the pool of sandboxes was closed")
        begun = self._prepared.popleft() if self._prepared else start(self.config)
        while len(self._prepared) < self.warm:
            self._prepared.append(start(self.config))
        box = Sandbox(await asyncio.wrap_future(begun), self.config)
        await box.ready()
        if files:
            try:
                await box.write(files)
            except BaseException:
                await box.close()
                raise
        return box

    @asynccontextmanager
    async def sandbox(self, files: Mapping[str, str | bytes] | None = None) -> AsyncIterator[Sandbox]:
        """`open`, closed at the end."""
        box = await self.open(files)
        try:
            yield box
        finally:
            await box.close()

    async def close(self) -> None:
        """End the prepared ones. Those that were given out end with their owners, or with this process."""
        self._closed = True
        while self._prepared:
            try:
                started = await asyncio.wrap_future(self._prepared.popleft())
            except SandboxError:
                continue
            await Sandbox(started, self.config).close()


def check(config: SandboxConfig) -> None:
    """Start a sandbox and run Python in it. SandboxError or ConfigError says why it fails, and what to do."""

    async def tried() -> Result:
        pool = SandboxPool(config, warm=0)
        async with pool.sandbox() as box:
            return await box.run(["python", "-c", "open('written', 'w').close(); print(6 * 7)"])

    done = asyncio.run_coroutine_threadsafe(tried(), _background()).result(CHECK_S)
    if (done.exit_code, done.stdout, done.reason) != (0, "42\n", ""):
        raise SandboxError(
            f"task.sandbox.backend={config.backend}: a sandbox starts, but Python in it does not: {done}. "
            "Are task.sandbox.memory_bytes and task.sandbox.seconds large enough?"
        )


def run_once(
    config: SandboxConfig, argv: Sequence[str], files: Mapping[str, str | bytes] | None = None, stdin: str = ""
) -> Result:
    """A command in a sandbox of its own, waited for: for a reward that is no coroutine."""

    async def ran() -> Result:
        async with _kept(config).sandbox(files) as box:
            return await box.run(argv, stdin=stdin)

    return asyncio.run_coroutine_threadsafe(ran(), _background()).result()


@cache
def _kept(config: SandboxConfig) -> SandboxPool:
    return SandboxPool(config, warm=1)


@cache
def _background() -> asyncio.AbstractEventLoop:
    """A loop in a thread of its own: the caller's may have one that runs."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="sandboxes", daemon=True).start()
    return loop
