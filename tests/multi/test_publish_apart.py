"""Weights that go to other processes: through shared memory, a folder and torch.distributed, and what goes wrong."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tandem.bench import publish as bench
from tandem.cli.main import main
from tandem.errors import DeliveryError
from tandem.kernels.weight import Weight
from tandem.sync.files import WHOLE_EVERY, FileReader, FileSender
from tandem.sync.group import GroupReader, GroupSender
from tandem.sync.memory import MemoryReader, MemorySender
from tandem.sync.transport import Held
from tests.apart import CONTEXT, DEADLINE_S, apart, drawn, hear, like, moved, version

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd, /proc")


def versions(count: int, share: float = 0.01):
    tensors = drawn()
    for step in range(count):
        yield version(step, tensors)
        tensors = moved(tensors, step, share)


def join(port: int, rank: int, ranks: int, deadline_s: float, held: Held | None, name: str = "0"):
    store = dist.TCPStore("127.0.0.1", port, None, rank == 0, timeout=timedelta(seconds=DEADLINE_S))
    if held is None:
        return GroupSender(store, ranks, deadline_s=deadline_s, name=name)
    return GroupReader(store, rank, ranks, held, deadline_s=deadline_s, name=name)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


# --- shared memory


@pytest.fixture
def memory():
    sender = MemorySender(drawn())
    yield sender
    sender.close()


def test_memory_brings_each_version_to_two_processes(memory):
    """A version that arrives late, twice or mixed with another; a reader that missed some, or comes in the middle."""
    with apart(MemoryReader, memory.address, tensors=drawn()) as first:
        assert isinstance(first.opened(), int)
        assert first.receive(0.0) == (None, first_digest_of_zeros())
        told = list(versions(6))
        for newest, weights in told[:3]:
            memory.publish(newest, weights)
            assert first.receive() == (newest, newest.digest)
        assert first.receive(0.01) == (told[2][0], told[2][0].digest)  # nothing new
        with apart(MemoryReader, memory.address, tensors=drawn()) as second:
            assert isinstance(second.opened(), int)
            assert second.receive() == (told[2][0], told[2][0].digest)
            for newest, weights in told[3:]:
                memory.publish(newest, weights)
            for reader in (first, second):
                assert reader.receive() == (told[5][0], told[5][0].digest)


def first_digest_of_zeros() -> str:
    return version(0, like(drawn()))[0].digest


def test_a_version_overtaken_while_it_is_taken_is_not_served(memory, monkeypatch):
    """A rank's shares, which nobody hashed, cut from memory in which the next version but one was begun."""
    told, real = list(versions(3)), Held.take
    memory.publish(*told[0])

    def take(self, *given):
        real(self, *given)
        monkeypatch.setattr(Held, "take", real)
        for each in told[1:]:
            memory.publish(*each)

    monkeypatch.setattr(Held, "take", take)
    reader = MemoryReader(memory.address, Held(like(drawn())))
    assert reader.receive(1.0) == told[2][0] == reader.held.version


def test_a_byte_flipped_in_shared_memory_is_named_and_mended(memory):
    """Damage that is served, or a reader that never gets over it."""
    reader = MemoryReader(memory.address, Held(like(drawn())))
    told = list(versions(4))
    memory.publish(*told[0])
    memory.slots[1].image["layers.0.qkv"].view(torch.int16)[3, 3] ^= 1
    with pytest.raises(
        DeliveryError, match=r"shared memory .*not what was published, in 1 of 5 tensors: layers\.0\.qkv"
    ):
        reader.receive(0.0)
    memory.publish(*told[1])
    assert reader.receive(0.0) == told[1][0]
    memory.publish(*told[2])
    memory.slots[1]._notice[60] ^= 1
    with pytest.raises(DeliveryError, match="what it says of version 3 is damaged"):
        reader.receive(0.0)
    assert reader.held.version == told[1][0]
    memory.publish(*told[3])
    assert reader.receive(0.0) == told[3][0]


def test_shared_memory_cannot_shrink_or_be_written_by_readers(memory):
    """A reader killed by a signal since the memory is gone under it, or another's weights changed by it."""
    descriptor = os.open(memory.address, os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 4096)
        with pytest.raises(PermissionError):
            os.pwrite(descriptor, b"x", 0)
    finally:
        os.close(descriptor)
    reader = MemoryReader(memory.address, Held(like(drawn())))
    with pytest.raises(ValueError, match="read-only"):
        reader._control[0] = 0


def test_an_address_that_is_no_senders(tmp_path):
    """A crash, or numbers taken for weights, where another file lies at the address."""
    (tmp_path / "file").write_bytes(b"x" * 8192)
    held = Held(like(drawn()))
    with pytest.raises(DeliveryError, match="opening it: it is no sender's"):
        MemoryReader(str(tmp_path / "file"), held)
    with pytest.raises(DeliveryError, match="opening it: No such file"):
        MemoryReader("/proc/1/fd/123456789", held)
    descriptor = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 8192)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    with pytest.raises(DeliveryError, match="first page is another program's"):
        MemoryReader(f"/proc/{os.getpid()}/fd/{descriptor}", held)
    os.close(descriptor)


def test_a_reader_stopped_within_a_copy_holds_nobody_up(memory):
    """A learner that waits for a stopped engine, or an engine that goes on with halves of two versions."""
    told = list(versions(6, share=0.5))
    with apart(MemoryReader, memory.address, tensors=drawn()) as reader:
        pid = reader.opened()
        memory.publish(*told[0])
        reader.ask("stop within the next copy")
        assert reader.answer() == "armed"
        reader.ask("receive", DEADLINE_S)
        _until(lambda: _state(pid) == "T")
        for newest, weights in told[1:]:
            memory.publish(newest, weights)
        os.kill(pid, signal.SIGCONT)
        assert reader.answer() == (told[5][0], told[5][0].digest)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def _until(ready) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_reader_leaves_nothing_behind(memory):
    """A reader's death that stops the learner, or leaves a name or a lock of it."""
    before = set(os.listdir("/dev/shm"))
    told = list(versions(3))
    with apart(MemoryReader, memory.address, tensors=drawn()) as reader:
        reader.opened()
        memory.publish(*told[0])
        assert reader.receive()[0] == told[0][0]
        reader.end()
        for newest, weights in told[1:]:
            memory.publish(newest, weights)
    assert {name for name in set(os.listdir("/dev/shm")) - before if "tandem" in name} == set()


def _dies(connection, die: bool) -> None:
    sender = MemorySender(drawn())
    first, second = versions(2)
    sender.publish(*first)
    connection.send(sender.address)
    connection.recv()
    if die:
        sender.slots[0].image = _Deadly(sender.slots[0].image)
        sender.publish(*second)
    sender.close()
    connection.send("closed")
    connection.recv()


class _Deadly(dict[str, torch.Tensor]):
    def __getitem__(self, name: str) -> torch.Tensor:
        if name == "layers.0.down":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(name)


@pytest.mark.parametrize("die", [True, False], ids=["killed in the middle of a version", "closed"])
def test_a_sender_that_ends_is_told_of_at_once(die):
    """A half-written version that is taken, or an engine that waits for a dead learner until its deadline."""
    ours, theirs = CONTEXT.Pipe()
    child = CONTEXT.Process(target=_dies, args=(theirs, die), daemon=True)
    child.start()
    reader = MemoryReader(hear(ours, child), Held(like(drawn())))
    first, _ = versions(2)
    assert reader.receive(0.0) == first[0]
    ours.send("go on")
    began = time.monotonic()
    with pytest.raises(DeliveryError, match="waiting for a version after 1: the learner's process has ended"):
        reader.receive(10 * DEADLINE_S)
    assert time.monotonic() - began < DEADLINE_S and reader.held.version == first[0]
    child.kill()
    child.join(DEADLINE_S)
    with pytest.raises(DeliveryError, match=r"opening it: .*The learner has ended"):
        MemoryReader(reader._address, Held(like(drawn())))


def _limited(folder: str, connection) -> None:
    def limit(bytes_: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))

    said = []
    limit(50_000)
    try:
        MemorySender(drawn())
    except DeliveryError as error:
        said.append(str(error))
    sender = FileSender(Path(folder))
    for step, most in enumerate((50_000, 50_000, 4_000, 50_000)):
        limit(most)
        try:
            sender.publish(*version(step, {"embed": torch.full((64, 64), float(step)).bfloat16()}))
        except DeliveryError as error:
            said.append(str(error))
    connection.send((said, sorted(os.listdir(folder))))


def test_without_room(tmp_path):
    """A process ended by a signal, or half a file under a version's name, where memory or disk is full."""
    ours, theirs = CONTEXT.Pipe()
    child = CONTEXT.Process(target=_limited, args=(str(tmp_path), theirs), daemon=True)
    child.start()
    (memory, disk), names = hear(ours, child)
    assert "shared memory, setting it aside: two copies of the weights take" in memory and "File too large" in memory
    assert f"folder {tmp_path}, writing version 2" in disk and "Earlier versions are untouched" in disk
    assert [name for name in names if name.startswith(".aside")] == []
    assert [name[:9] for name in names if name.endswith(".safetensors")] == ["000000002", "000000003"]
    assert names[-1].endswith("whole.safetensors")
    reader = FileReader(tmp_path, Held({"embed": torch.ones(64, 64).bfloat16()}))
    newest = reader.receive(0.0)
    assert newest is not None and newest.step == 3


# --- a folder


def test_a_folder_brings_versions_to_a_process_that_comes_late(tmp_path):
    """A reader that starts in the middle, falls behind or finds what it needs pruned."""
    sender = FileSender(tmp_path)
    told = list(versions(2 * WHOLE_EVERY + 3))
    with apart(FileReader, tmp_path, tensors=drawn()) as early, apart(FileReader, tmp_path, tensors=drawn()) as late:
        early.opened(), late.opened()
        for step, (newest, weights) in enumerate(told):
            sender.publish(newest, weights)
            if step < 5 or step % 6 == 0:
                assert early.receive() == (newest, newest.digest)
        assert late.receive() == (told[-1][0], told[-1][0].digest)
        assert early.receive() == (told[-1][0], told[-1][0].digest)
    names = [path.name for path in sorted(tmp_path.glob("*.safetensors"))]
    assert len(names) == WHOLE_EVERY + 3 and [".whole." in name for name in names].count(True) == 2
    whole = sum(path.stat().st_size for path in tmp_path.glob("*.whole.*")) / 2
    assert all(path.stat().st_size < 0.15 * whole for path in tmp_path.glob("*.changes.*"))
    sender.close()


def test_a_damaged_file_is_named(tmp_path):
    """Half a file or a flipped byte that is served, or that no later version gets a reader over."""
    sender = FileSender(tmp_path)
    told = list(versions(3))
    sender.publish(*told[0])
    (whole,) = tmp_path.glob("*.whole.*")
    right = whole.read_bytes()
    reader = FileReader(tmp_path, Held(like(drawn())))
    whole.write_bytes(right[:-500])
    with pytest.raises(DeliveryError, match=rf"file .*{whole.name}, reading it: .*cut off"):
        reader.receive(0.0)
    whole.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    with pytest.raises(
        DeliveryError, match=rf"file .*{whole.name}: version 0 .*in 1 of 5 tensors: (norm|embed|bias|lay)"
    ):
        reader.receive(0.0)
    whole.write_bytes(right)
    assert reader.receive(0.0) == told[0][0]
    sender.publish(*told[1])
    (changes,) = tmp_path.glob("*.changes.*")
    written = changes.read_bytes()
    changes.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
    with pytest.raises(DeliveryError, match=rf"file .*{changes.name}: version 1 .*changes arrived damaged, in 1 of"):
        reader.receive(0.0)
    assert reader.held.version == told[0][0]
    sender._since_whole = WHOLE_EVERY
    sender.publish(*told[2])
    assert reader.receive(0.0) == told[2][0]
    sender.close()


def test_two_senders_in_a_folder(tmp_path):
    """Versions of two learners in turn; and a folder that a dead one left, which nobody could use again."""
    command = (
        "import sys, time, pathlib\nfrom tandem.sync.files import FileSender\n"
        "sender = FileSender(pathlib.Path(sys.argv[1]))\nprint('open', flush=True)\ntime.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", command, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    ) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == b"open\n"
            with pytest.raises(DeliveryError, match=f"process {other.pid} sends weights through it"):
                FileSender(tmp_path)
        finally:
            other.kill()
    (tmp_path / ".aside-000000009-half").write_bytes(b"half")
    old = FileSender(tmp_path)
    told = list(versions(3))
    old.publish(*told[0])
    old.publish(*told[1])
    old.close()
    reader = FileReader(tmp_path, Held(like(drawn())))
    assert reader.receive(0.0) == told[1][0]
    sender = FileSender(tmp_path)
    sender.publish(*told[2])
    assert reader.receive(0.0) == told[2][0] and not list(tmp_path.glob(".aside*"))
    sender.close()


# --- torch.distributed


def test_a_group_brings_versions_to_two_processes():
    """Changes sent to a rank that holds another version, or ranks that go on with different weights."""
    port, ranks = free_port(), 3
    with (
        apart(join, port, 1, ranks, DEADLINE_S / 4, tensors=drawn()) as first,
        apart(join, port, 2, ranks, DEADLINE_S / 4, tensors=drawn()) as second,
    ):
        sender = join(port, 0, ranks, DEADLINE_S / 4, None)
        first.opened(), second.opened()
        for newest, weights in versions(4):
            for reader in (first, second):
                reader.ask("receive", DEADLINE_S)
            sender.publish(newest, weights)
            assert first.answer() == second.answer() == (newest, newest.digest)
        assert first.receive(0.01)[0] == newest
        sender.close()
        assert "waiting, with rank 0: the learner has ended" in first.receive()


@pytest.mark.parametrize("fault", ["stopped", "killed", "never comes"])
def test_a_rank_that_does_not_take_part_is_named(fault):
    """A learner that hangs with an engine, or an error that names neither rank nor phase."""
    port, deadline_s = free_port(), 5.0
    with apart(join, port, 1, 2, deadline_s, tensors=drawn()) as reader:
        sender = join(port, 0, 2, DEADLINE_S / 4, None)
        pid = reader.opened()
        sender.deadline_s = deadline_s
        told = list(versions(2))
        if fault == "killed":
            reader.end()
        if fault == "stopped":
            os.kill(pid, signal.SIGSTOP)
        with pytest.raises(DeliveryError, match=r"version 1, meeting, with rank 1: .*the deadline is 5 s"):
            sender.publish(*told[0])
        with pytest.raises(DeliveryError, match="meeting failed with rank 1 earlier. Make both ends anew"):
            sender.publish(*told[1])


# --- what it costs


def test_publishing_is_measured(monkeypatch, capsys):
    """A way that is not measured, changes that went whole, or a share of changes that was not counted."""
    tensors = drawn()

    class Learner:
        steps = 0

        class decoder:
            @staticmethod
            def weights():
                return [(name, Weight(tensor, matrix=False)) for name, tensor in tensors.items()]

        def step(self, samples, totals) -> None:
            self.steps += 1
            tensors.update(moved(tensors, self.steps, 0.01))

    monkeypatch.setattr(bench, "build_learner", lambda *_: (Learner(), []))
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: CONTEXT)
    monkeypatch.setattr(bench, "STEPS", 2)
    monkeypatch.setattr(bench, "REPEATS", 2)
    assert main(["bench", "publish", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    works = {row["work"]: row for row in result["rows"]}
    assert {f"{way}: whole" for way in bench.WAYS} <= set(works)
    for way in bench.WAYS:
        assert 0 < works[f"{way}: steps of the learner"]["changed"] < 0.02
    assert works["file: 3.00% drawn"]["changed"] == pytest.approx(0.03, rel=0.2)
    assert all(row["publish_ms"] > 0 and row["receive_ms"] > 0 for row in result["rows"])
