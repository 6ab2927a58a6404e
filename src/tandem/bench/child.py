"""A server in a process of its own: started, waited for, asked, ended. Tandem's or a peer's, by its command line."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import msgspec

from tandem import env
from tandem.bench.client import Plan, Result
from tandem.bench.peers import peer_side
from tandem.bench.work import MODEL
from tandem.errors import ConfigError, WorldError

PORT = "{port}"
KV_BYTES = 3 << 30  # of the measured servers: as much as the peer is given (docs/performance.md)
START_S = 600.0  # for a server to answer
STOP_S = 30.0  # after SIGTERM
CALL_S = 120.0  # for one call
LOOK_S = 0.05  # between two looks at its health
FIRST = {"prompt": list(range(100, 116)), "max_tokens": 8, "temperature": 1.0, "ignore_eos": True}
SHOWN = 1500  # characters of what a server said, in an error


@dataclass(frozen=True, slots=True)
class Program:
    """A server's name and command line, in which {port} stands for its port.

    >>> Program("vllm", ("vllm", "serve", "--port={port}")).command(8001)
    ['vllm', 'serve', '--port=8001']
    """

    name: str
    words: tuple[str, ...]

    def command(self, port: int) -> list[str]:
        return [word.replace(PORT, str(port)) for word in self.words]


def own(*settings: str, kv_bytes: int = KV_BYTES, module: str = "tandem") -> Program:
    """`tandem serve` on the model that the benches are of; by another module than tandem's own."""
    given = (f"engine.kv_memory_bytes={kv_bytes}", *settings)
    words = [sys.executable, "-m", module, "serve", MODEL, "--port", PORT]
    return Program("tandem", (*words, *(word for one in given for word in ("--set", one))))


def peer_program(text: str) -> Program:
    """The server that --peer names; ConfigError where it is none.

    >>> peer_program("env A=1 sh -c 'serve {port}'").name, peer_program("sh -m vllm.entrypoints {port}").name
    ('sh', 'vllm')
    """
    side = peer_side(text)
    if not any(PORT in word for word in side.command):
        raise ConfigError(f"--peer {text!r} does not say {PORT}, which stands for the port that its server listens on.")
    return Program(_name(side.command), side.command)


def _name(words: Sequence[str]) -> str:
    """Of the program that a command line starts: a module's where Python runs one."""
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1].partition(".")[0]
    named = (os.path.basename(word) for word in words if "=" not in word and not word.startswith("-"))
    return next((name for name in named if name != "env"), words[0])


@dataclass(slots=True)
class Server:
    """One that answers. `start_s`: from its command to its first answer of 8 tokens."""

    name: str
    port: int
    pid: int
    model: str = ""
    start_s: float = 0.0
    key: str = ""  # that it is called with

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> tuple[int, bytes]:
        """Status and body of one call. OSError or HTTPException where none comes."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=CALL_S)
        try:
            sent = body if isinstance(body, bytes) or body is None else msgspec.json.encode(body)
            head = {"content-type": kind} if sent is not None else {}
            head |= {"authorization": f"Bearer {self.key}"} if self.key else {}
            connection.request(method, path, sent, head)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def cpu_s(self) -> float:
        """Seconds of processor time of its processes that live, and of those that they waited for."""
        ticks = 0
        for fields in _group(self.pid):
            ticks += sum(map(int, fields[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """Of its processes, pages that they share counted in each."""
        return sum(int(fields[21]) for fields in _group(self.pid)) * os.sysconf("SC_PAGE_SIZE")

    def ask(self, plan: Plan) -> Result:
        """A plan's calls, by a client in a process of its own."""
        command = [sys.executable, "-m", "tandem.bench.client"]
        try:
            done = subprocess.run(
                command,
                input=msgspec.json.encode(plan),
                capture_output=True,
                timeout=plan.deadline_s + CALL_S,
                check=False,
                env=env.foreign(),
            )
        except subprocess.TimeoutExpired as error:
            raise WorldError(f"the client of {self.name} did not end within {plan.deadline_s + CALL_S:g} s.") from error
        if done.returncode:
            raise WorldError(f"the client of {self.name} failed: {done.stderr.decode('utf-8', 'replace')[-SHOWN:]}")
        return msgspec.json.decode(done.stdout, type=Result)


def _ends_with_us() -> None:
    """In the child: SIGTERM as its parent ends, however that does."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG


def _group(pgid: int) -> Iterator[list[str]]:
    """Of each process of a group, the fields of its /proc/PID/stat behind the name: [0] is its state, [2] its group."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[2]) == pgid:
                yield fields


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@contextmanager
def serving(program: Program, key: str = "") -> Iterator[Server]:
    """A server that has answered, called with this key, in a group of processes of its own that ends with the block, or
    with this process.

    WorldError where it ends, or has not answered after START_S, with the end of what it said."""
    port = free_port()
    with tempfile.TemporaryFile() as said:
        began_s = time.perf_counter()
        child = subprocess.Popen(
            program.command(port),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=env.foreign(),
            start_new_session=True,
            preexec_fn=_ends_with_us,
        )
        server = Server(program.name, port, child.pid, key=key)
        try:
            _first_answer(server, child, began_s)
            yield server
            if child.poll() is not None:
                raise WorldError(f"{_spelt(program)} ended with {child.returncode} while it was asked.")
        except WorldError as error:
            said.seek(max(0, said.seek(0, os.SEEK_END) - SHOWN))
            heard = said.read().decode("utf-8", "replace")
            raise WorldError(f"{error} The end of what {program.name} said: {heard}") from error
        finally:
            stop(child)


def _first_answer(server: Server, child: subprocess.Popen[bytes], began_s: float) -> None:
    """Waits for its health, and asks it once."""
    status = 0
    while status != 200:
        if child.poll() is not None:
            raise WorldError(f"the server of {server.name} ended with {child.returncode} before it answered.")
        if time.perf_counter() - began_s > START_S:
            raise WorldError(f"the server of {server.name} was not healthy after {START_S:g} s.")
        with suppress(OSError, HTTPException):
            status, _ = server.call("GET", "/health")
        if status != 200:
            time.sleep(LOOK_S)
    try:
        server.model = msgspec.json.decode(server.call("GET", "/v1/models")[1])["data"][0]["id"]
        status, body = server.call("POST", "/v1/completions", {"model": server.model, **FIRST})
    except (OSError, HTTPException, KeyError, IndexError, msgspec.DecodeError) as error:
        raise WorldError(f"the server of {server.name} gave no first answer: {error!r}.") from error
    if status != 200:
        raise WorldError(f"the server of {server.name} refused a first call with {status}: {body[:SHOWN]!r}.")
    server.start_s = time.perf_counter() - began_s


def stop(child: subprocess.Popen[bytes]) -> None:
    """Ends a child and all processes of its group."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, how)
        until_s = time.monotonic() + STOP_S
        while time.monotonic() < until_s:
            child.poll()  # takes its end, without which it counts as one of the group
            if not any(fields[0] != "Z" for fields in _group(child.pid)):
                child.wait(STOP_S)
                return
            time.sleep(LOOK_S)
    raise WorldError(f"processes of group {child.pid} did not end within {2 * STOP_S:g} s.")


def _spelt(program: Program) -> str:
    return f"the server `{shlex.join(program.words)}`"
