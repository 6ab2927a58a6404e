"""A sandbox as its owner sees it: files in, commands, files out. One event loop; one command at a time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from tandem.errors import ConfigError, SandboxError
from tandem.sandbox.backend import Started
from tandem.sandbox.config import SandboxConfig
from tandem.sandbox.init import HEADER

START_S = 30.0  # for the first process to come up, on a busy machine
GRACE_S = 5.0  # beyond a command's time, in which its end is answered
MOST_BYTES = 1 << 30  # of one answer
PARTS = 16  # of what a command says in a conversation, kept until they are asked for
READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended.

    >>> Result(0, "4\\n", "", "", 0.02).ok, Result(-9, "", "", "memory", 0.5).ok
    (True, False)
    """

    exit_code: int | None  # minus a signal's number where one ended it; None where the sandbox ended with it
    stdout: str
    stderr: str
    reason: str  # the limit that ended it: time, memory, processes, files, output; or sandbox; "" where none did
    seconds: float

    @property
    def ok(self) -> bool:
        return self.exit_code == 0 and not self.reason


class Sandbox:
    """One sandbox. It is used by one owner and not again after `close`."""

    def __init__(self, started: Started, config: SandboxConfig) -> None:
        self.config = config
        self._started = started
        self._lock = asyncio.Lock()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._closed = False

    async def ready(self) -> None:
        """Wait until it takes orders; SandboxError with the reason and the remedy where it does not come up."""
        try:
            self._reader, self._writer = await asyncio.open_connection(sock=self._started.socket, limit=READ_BYTES)
            answer, _ = await asyncio.wait_for(self._receive(), START_S)
            assert answer == {"ready": True}, answer
        except TimeoutError as error:  # an OSError too
            await self.close()
            raise SandboxError(f"a sandbox did not come up within {START_S:g} s. Is the machine overloaded?") from error
        except (EOFError, OSError) as error:
            fault = await asyncio.get_running_loop().run_in_executor(enders(), self._started.fault)
            await self.close()
            raise fault from error
        except BaseException:
            await self.close()
            raise

    async def write(self, files: Mapping[str, str | bytes]) -> None:
        """Write files below the working folder, in place of what is there."""
        texts = [text.encode() if isinstance(text, str) else text for text in files.values()]
        listed = [[path, len(text)] for path, text in zip(files, texts, strict=True)]
        await self._asked({"do": "write", "files": listed}, b"".join(texts))

    async def read(self, path: str) -> str:
        """A file below the working folder, cut at `output_bytes`."""
        answer, text = await self._asked({"do": "read", "path": path}, b"")
        return _text(text, answer["cut"])

    async def run(
        self, argv: Sequence[str], *, stdin: str = "", seconds: float | None = None, background: bool = False
    ) -> Result:
        """Run a command in the working folder. Nothing of it runs on after this, unless `background`: then what it
        left behind does, up to the end of the next command that is not."""
        order = self._order(argv, seconds, background=background)
        async with self._lock:
            try:
                exchange = self._exchange(order, stdin.encode())
                return result(*await self._whole(exchange, order["seconds"] + GRACE_S))
            except SandboxError:  # as where the machine ran out of memory: the command's doing until shown otherwise
                return Result(None, "", "", "sandbox", 0.0)

    async def talk(self, argv: Sequence[str], seconds: float | None = None) -> Conversation:
        """Start a command whose stdout is read as it comes. No other command runs until its `end`."""
        order = self._order(argv, seconds, talks=True)
        await self._lock.acquire()
        try:
            await self._send(order, b"")
        except BaseException:
            self._lock.release()
            raise
        return Conversation(self, order["seconds"] + GRACE_S)

    async def close(self) -> None:
        """End it, and wait until nothing of it is left."""
        if self._closed:
            return
        self._closed = True
        if self._writer is not None:
            self._writer.transport.abort()
        self._started.socket.close()
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(enders(), self._started.end))

    def _order(self, argv: Sequence[str], seconds: float | None, **more: bool) -> dict[str, Any]:
        if isinstance(argv, str) or not argv:
            raise ConfigError(f'the command is {argv!r}. Give a list of words, as ["python", "main.py"].')
        limit = self.config.seconds if seconds is None else min(seconds, self.config.seconds)
        order = {"do": "run", "argv": [*argv], "seconds": limit, "background": False, "talks": False}
        return {**order, **more}

    async def _asked(self, order: dict[str, Any], rest: bytes) -> tuple[dict[str, Any], bytes]:
        async with self._lock:
            answer, text = await self._whole(self._exchange(order, rest), self.config.seconds + GRACE_S)
        if "error" in answer:
            raise OSError(f"the sandbox: {answer['error']}")
        return answer, text

    async def _exchange(self, order: dict[str, Any], rest: bytes) -> tuple[dict[str, Any], bytes]:
        try:
            await self._send(order, rest)
            return await self._receive()
        except (EOFError, OSError) as error:
            raise SandboxError("the sandbox has ended") from error

    async def _whole(self, exchange: Any, seconds: float) -> Any:
        """An exchange to its end: one that is given up leaves a sandbox of no use."""
        try:
            return await asyncio.wait_for(exchange, seconds)
        except TimeoutError:
            await self.close()
            raise SandboxError(f"the sandbox did not answer within {seconds:g} s") from None
        except asyncio.CancelledError:
            await self.close()
            raise

    async def _send(self, order: dict[str, Any], rest: bytes) -> None:
        if self._writer is None or self._closed:
            raise SandboxError("the sandbox has ended")
        text = json.dumps(order).encode()
        self._writer.write(HEADER.pack(len(text), len(rest)) + text + rest)
        await self._writer.drain()

    async def _receive(self) -> tuple[dict[str, Any], bytes]:
        assert self._reader is not None
        sizes = HEADER.unpack(await self._reader.readexactly(HEADER.size))
        if max(sizes) > MOST_BYTES:
            raise SandboxError("the sandbox answered with nonsense")
        text, rest = [await self._reader.readexactly(size) for size in sizes]
        return json.loads(text), rest


class Conversation:
    """A command that is given lines and gives lines."""

    def __init__(self, box: Sandbox, seconds: float) -> None:
        self._box = box
        self._parts: asyncio.Queue[bytes] = asyncio.Queue(PARTS)
        self._rest = b""
        self._ended = False
        self._task = asyncio.create_task(self._listen(seconds))

    async def send(self, text: bytes) -> None:
        """More for its stdin; nothing where it has ended."""
        if not self._task.done():
            with suppress(OSError, SandboxError):
                await self._box._send({"do": "more"}, text)

    async def line(self, limit: int) -> bytes | None:
        """Its next line, without the end; None where it ended, or wrote a longer one."""
        while b"\n" not in self._rest:
            if self._ended or len(self._rest) > limit or not (part := await self._parts.get()):
                self._ended = self._ended or len(self._rest) <= limit
                return None
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line if len(line) <= limit else None

    async def end(self) -> Result:
        """Stop it, where it has not ended, and wait for that."""
        try:
            if not self._task.done():
                with suppress(OSError, SandboxError):
                    await self._box._send({"do": "stop"}, b"")
            while not self._task.done():  # what it still says is not heard
                waiting = asyncio.ensure_future(self._parts.get())
                await asyncio.wait({self._task, waiting}, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
            return await self._task
        finally:
            self._box._lock.release()

    async def _listen(self, seconds: float) -> Result:
        try:
            async with asyncio.timeout(seconds):
                while True:
                    answer, rest = await self._box._receive()
                    if "code" in answer:
                        return result(answer, rest)
                    if rest:
                        await self._parts.put(rest)
        except (EOFError, OSError, SandboxError):  # TimeoutError is an OSError
            await self._box.close()
            return Result(None, "", "", "sandbox", 0.0)
        finally:
            await self._parts.put(b"")


def result(answer: dict[str, Any], rest: bytes) -> Result:
    """What the first process says of a command's end."""
    if "error" in answer:
        return Result(None, "", answer["error"], "sandbox", 0.0)
    out, err = rest[: answer["out"]], rest[answer["out"] :]
    cut_out, cut_err = answer["cut"]
    return Result(answer["code"], _text(out, cut_out), _text(err, cut_err), answer["reason"], answer["seconds"])


def _text(written: bytes, cut: bool) -> str:
    """
    >>> _text(b"a\\xff", False), _text(b"aaaa", True)
    ('a\ufffd', 'aaaa\\n[cut after 4 bytes]')
    """
    text = written.decode(errors="replace")
    return f"{text}\n[cut after {len(written):,} bytes]" if cut else text


@cache
def enders() -> ThreadPoolExecutor:
    """Threads that wait for sandboxes to be gone."""
    return ThreadPoolExecutor(8, thread_name_prefix="sandbox end")
