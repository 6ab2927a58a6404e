"""What it costs to bring weights to another process: whole, and what a learner's step changed, by each of the ways."""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.bench.work import build_learner
from tandem.errors import DeliveryError

if TYPE_CHECKING:
    import torch

    from tandem.sync.receive import Weights
    from tandem.sync.transport import Sender
    from tandem.types import WeightVersion

STEPS = 6  # of the learner, on samples of random tokens
TRAIN = (8, 128)  # samples of a step, tokens each
SHARES = (0.0002, 0.003, 0.03)  # of elements that change, where no learner says
REPEATS = 5
DEADLINE_S = 120.0
WAYS = ("memory", "file", "gloo")

Version = tuple["WeightVersion", "Weights"]


def publish() -> dict[str, Any]:
    """Rows of (what, share of elements that changed, its bytes, ms of the sender and of the receiver)."""
    from tandem.numerics.digest import tensor_hashes

    learner, samples = build_learner(*TRAIN)
    tensors = {name: weight.value for name, weight in learner.decoder.weights()}
    began = time.perf_counter()
    tensor_hashes(tensors)
    hash_ms = 1e3 * (time.perf_counter() - began)
    rows: list[dict[str, Any]] = []
    works: list[tuple[str, Callable[[], Iterator[Version]]]] = [
        ("steps of the learner", lambda: _steps(learner, samples))
    ]
    works += [(f"{share:.2%} drawn", lambda share=share: _drawn(tensors, share)) for share in SHARES]  # type: ignore[misc]
    for way in WAYS:
        for work, versions in works if way == "file" else works[:1]:
            rows += _measure(way, work, tensors, versions())
    size = sum(tensor.nbytes for tensor in tensors.values())
    return {"bench": "publish", "rows": rows, "weights_bytes": size, "hash_ms": hash_ms}


def _version(step: int, tensors: Mapping[str, torch.Tensor]) -> Version:
    from tandem.numerics.digest import root_hash, tensor_hashes
    from tandem.sync.receive import Weights
    from tandem.types import WeightVersion

    hashes = tensor_hashes(tensors)
    return WeightVersion(step, root_hash(hashes)), Weights(tensors, hashes)


def _steps(learner: Any, samples: Any) -> Iterator[Version]:
    """AdamW at a learning rate of 1e-6; the first version is that before any step."""
    from tandem.algo.pack import count_prompts

    for step in range(STEPS + 1):
        if step:
            learner.step(samples, count_prompts(samples))
        yield _version(step, {name: weight.value for name, weight in learner.decoder.weights()})


def _drawn(tensors: Mapping[str, torch.Tensor], share: float) -> Iterator[Version]:
    """Each version with the last bit of so many elements flipped, at random places."""
    import torch

    generator = torch.Generator().manual_seed(0)
    words = {name: tensor.clone() for name, tensor in tensors.items()}
    for step in range(REPEATS + 1):
        for tensor in words.values() if step else ():
            flat = tensor.view(-1).view(torch.int16)
            places = torch.randint(len(flat), (round(share * len(flat)),), generator=generator)
            flat[places] ^= 1
        yield _version(step, words)


def _measure(
    way: str, work: str, tensors: Mapping[str, torch.Tensor], versions: Iterator[Version]
) -> Iterator[dict[str, Any]]:
    """The first version goes whole; the others, but in shared memory, as what changed. Of these the medians."""

    taken: list[tuple[float, float]] = []
    shares: list[float] = []
    last: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as folder, _apart(way, folder, tensors) as (sender, connection):
        for version, weights in versions:
            if last:
                differ = sum(int((last[name] != tensor).sum()) for name, tensor in weights.tensors.items())
                shares.append(differ / sum(tensor.numel() for tensor in last.values()))
            last = {name: tensor.clone() for name, tensor in weights.tensors.items()}
            if way == "gloo":
                connection.send("receive")
            began = time.perf_counter()
            sender.publish(version, weights)
            sent_s = time.perf_counter() - began
            if way != "gloo":
                connection.send("receive")
            taken.append((sent_s, _answer(connection)))
    yield _row(f"{way}: whole", 1.0, taken[:1])
    yield _row(f"{way}: {work}", statistics.median(shares), taken[1:])


def _row(work: str, share: float, taken: list[tuple[float, float]]) -> dict[str, Any]:
    """
    >>> _row("x", 0.1, [(0.001, 0.002), (0.003, 0.004), (0.003, 0.003)])
    {'work': 'x', 'changed': 0.1, 'publish_ms': 3.0, 'receive_ms': 3.0, 'count': 3}
    """
    sent_s, received_s = zip(*taken, strict=True)
    medians = 1e3 * statistics.median(sent_s), 1e3 * statistics.median(received_s)
    return {"work": work, "changed": share, "publish_ms": medians[0], "receive_ms": medians[1], "count": len(taken)}


def _answer(connection: Connection) -> float:
    """Seconds that the receiver took."""
    if not connection.poll(DEADLINE_S):
        raise DeliveryError(f"the receiver of `bench publish` did not answer within {DEADLINE_S:g} s.")
    return float(connection.recv())


@contextmanager
def _apart(way: str, folder: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[Sender, Connection]]:
    """A sender here, and a receiver in a process of its own."""
    from tandem.sync.files import FileSender
    from tandem.sync.memory import MemorySender
    from tandem.sync.transport import layout_of

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    sender: Sender
    if way == "memory":
        sender = MemorySender(tensors)
        where = sender.address
    elif way == "file":
        sender, where = FileSender(Path(folder)), folder
    else:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            where = str(bound.getsockname()[1])
    child = context.Process(target=_receive, args=(theirs, way, where, layout_of(tensors)), daemon=True)
    child.start()
    try:
        if way == "gloo":
            sender = _group(where, None)
        _answer(ours)
        yield sender, ours
        sender.close()
    finally:
        child.kill()
        child.join()


def _group(port: str, held: Any) -> Any:
    import torch.distributed as dist

    from tandem.sync.group import GroupReader, GroupSender

    store = dist.TCPStore("127.0.0.1", int(port), None, held is None, timeout=timedelta(seconds=DEADLINE_S))
    if held is None:
        return GroupSender(store, 2, deadline_s=DEADLINE_S)
    return GroupReader(store, 1, 2, held, deadline_s=DEADLINE_S)


def _receive(connection: Connection, way: str, where: str, layout: Mapping[str, Any]) -> None:
    """The receiver's process: takes the next version when it is told to, and says how long that took."""
    import torch

    from tandem.sync.files import FileReader
    from tandem.sync.memory import MemoryReader
    from tandem.sync.transport import Held

    held = Held({name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in layout.items()})
    reader: Any
    if way == "memory":
        reader = MemoryReader(where, held)
    elif way == "file":
        reader = FileReader(Path(where), held)
    else:
        reader = _group(where, held)
    connection.send(0.0)
    while connection.recv():
        began = time.perf_counter()
        reader.receive(DEADLINE_S)
        connection.send(time.perf_counter() - began)
