"""Processes that receive weights: real ones, each told over a pipe what to do next."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from tandem.errors import DeliveryError
from tandem.numerics.digest import root_hash, tensor_hashes
from tandem.sync.receive import Weights
from tandem.sync.transport import Held
from tandem.types import WeightVersion

DEADLINE_S = 120  # of an answer: these machines may be busy

# A server that has torch in memory and has run nothing: its children are as good as new, and there at once.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "tandem.sync.memory", "tandem.sync.files", "tandem.sync.group"])


def like(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def drawn(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of more than one block, of two dtypes, of odd lengths."""
    shapes = {"embed": (300, 257), "layers.0.qkv": (96, 64), "layers.0.down": (64, 1), "norm": (64,), "bias": (3,)}
    generator = torch.Generator().manual_seed(seed)
    of = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    return of | {"bias": torch.randn(4, generator=generator)}


def moved(tensors: Mapping[str, torch.Tensor], seed: int, share: float = 0.01) -> dict[str, torch.Tensor]:
    """Other weights, of which about this share of elements differs. The norm stays."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in tensors.items():
        touched = torch.rand(tensor.shape, generator=generator) < share
        other = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        result[name] = tensor if name == "norm" else torch.where(touched, other, tensor)
    return result


def version(step: int, tensors: Mapping[str, torch.Tensor]) -> tuple[WeightVersion, Weights]:
    hashes = tensor_hashes(tensors)
    return WeightVersion(step, root_hash(hashes)), Weights(tensors, hashes)


def _serve(connection: Connection, make: Callable[..., Any], given: tuple[Any, ...], layout: Any) -> None:
    held = Held(layout)
    try:
        reader = make(*given, held)
        connection.send(os.getpid())
    except DeliveryError as error:
        connection.send(str(error))
        return
    while True:
        verb, *asked = connection.recv()
        try:
            if verb == "receive":
                reader.receive(*asked)
                digest = root_hash(tensor_hashes(held.tensors))
                connection.send((held.version, digest))
            if verb == "stop within the next copy":
                held.tensors = _Stops(held.tensors)
                connection.send("armed")
        except DeliveryError as error:
            connection.send(str(error))


class _Stops(dict[str, torch.Tensor]):
    """Tensors of which the second is asked for twice: to be looked at, and to be written, when the process stops."""

    asked = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked += name == "layers.0.qkv"
        if name == "layers.0.qkv" and self.asked == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().__getitem__(name)


def hear(connection: Connection, child: Any) -> Any:
    """What a child says next. AssertionError where it ends without a word."""
    assert wait([connection, child.sentinel], DEADLINE_S) and connection.poll(0), "no answer"
    return connection.recv()


class Apart:
    """A reader in a process of its own."""

    def __init__(self, make: Callable[..., Any], *given: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        self.connection, theirs = CONTEXT.Pipe()
        self.child = CONTEXT.Process(target=_serve, args=(theirs, make, given, like(tensors)), daemon=True)
        self.child.start()
        theirs.close()

    def opened(self) -> int | str:
        """Its process, or why it could open nothing."""
        return self.answer()

    def ask(self, *what: Any) -> None:
        self.connection.send(what)

    def answer(self) -> Any:
        return hear(self.connection, self.child)

    def receive(self, timeout_s: float = DEADLINE_S / 2) -> Any:
        """(version, digest of what lies there), or what the error says."""
        self.ask("receive", timeout_s)
        return self.answer()

    def end(self) -> None:
        self.child.kill()
        self.child.join(DEADLINE_S)


@contextlib.contextmanager
def apart(make: Callable[..., Any], *given: Any, tensors: Mapping[str, torch.Tensor]) -> Iterator[Apart]:
    reader = Apart(make, *given, tensors=tensors)
    try:
        yield reader
    finally:
        reader.end()
