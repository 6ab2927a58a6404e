"""Two network namespaces joined by a slow link, which stand in for two machines: a Ray's head in one, its node in the
other. Run as a program it is the driver of a run beside the head.

    python -m tests.two_machines CONFIG OUT
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tandem import env
from tests.placed import run

HEAD, NODE, PORT = "10.203.77.1", "10.203.77.2", 6390
RATE = "40mbit"
UP_S = 90.0


@dataclass(frozen=True, slots=True)
class Two:
    """The namespaces, by name."""

    head: str
    node: str

    def into(self, where: str) -> list[str]:
        return ["ip", "netns", "exec", where]

    def crossed_bytes(self) -> int:
        """What has gone from the head's end of the link to the node's."""
        told = subprocess.run(
            [*self.into(self.head), "cat", "/sys/class/net/to-node/statistics/tx_bytes"],
            capture_output=True,
            text=True,
            check=True,
        )
        return int(told.stdout)


def _ip(*what: str) -> str:
    return subprocess.run(["ip", *what], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def two() -> Iterator[Two]:
    """OSError or CalledProcessError where this kernel, or this user, may make none."""
    made = Two(f"tandem-head-{os.getpid()}", f"tandem-node-{os.getpid()}")
    with contextlib.ExitStack() as leaving:
        for name in (made.head, made.node):
            _ip("netns", "add", name)
            leaving.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True)
        link = ("type", "veth", "peer", "name", "to-head", "netns", made.node)
        _ip("-n", made.head, "link", "add", "to-node", *link)
        for name, end, address in ((made.head, "to-node", HEAD), (made.node, "to-head", NODE)):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            for device in ("lo", end):
                _ip("-n", name, "link", "set", device, "up")
            rate = ["root", "tbf", "rate", RATE, "burst", "64kb", "latency", "500ms"]
            subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", end, *rate], check=True, capture_output=True)
        yield made


@contextlib.contextmanager
def cluster(there: Two, folder: Path) -> Iterator[Mapping[str, str]]:
    """A head without a processor to give, and a node; what a driver's environment needs."""
    environment = {
        **os.environ,
        "TANDEM_CACHE": str(env.cache_dir()),
        "HOME": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ADDRESS": f"{HEAD}:{PORT}",
    }
    common = ["--block", "--object-store-memory=100000000", "--disable-usage-stats"]
    head = ["--head", f"--port={PORT}", f"--node-ip-address={HEAD}", "--num-cpus=0", "--include-dashboard=false"]
    node = [f"--address={HEAD}:{PORT}", f"--node-ip-address={NODE}", "--num-cpus=8"]
    with contextlib.ExitStack() as leaving:
        # Ray's sockets lie in it, and their paths may have 107 bytes.
        head.append(f"--temp-dir={leaving.enter_context(tempfile.TemporaryDirectory(prefix='ray-'))}")
        for where, given in ((there.head, head), (there.node, node)):
            log = leaving.enter_context((folder / f"{where}.log").open("w"))
            command = [*there.into(where), sys.executable, "-m", "ray.scripts.scripts", "start", *given, *common]
            started = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            leaving.callback(started.wait, 20)
            leaving.callback(_end, there, where)
            _until_up(started, Path(log.name))
        yield environment


def _until_up(started: subprocess.Popen[bytes], log: Path) -> None:
    """Until it says so in its log."""
    until_s = time.monotonic() + UP_S
    while "Ray runtime started" not in log.read_text():
        assert time.monotonic() < until_s and started.poll() is None, log.read_text()[-2000:]
        time.sleep(0.2)


def _end(there: Two, where: str) -> None:
    """Everything that was started in a namespace, and what that started."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        until_s = time.monotonic() + 5
        while left := _ip("netns", "pids", where).split():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), sent)
            if sent == signal.SIGTERM and time.monotonic() > until_s:
                break
            time.sleep(0.5)


def main(config: str, out: str) -> None:
    """A run of a pickled config."""
    run(pickle.loads(Path(config).read_bytes()), Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
