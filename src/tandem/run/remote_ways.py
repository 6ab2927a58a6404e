"""How each dialect's server is given weights, and how it says which it serves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

import torch
from safetensors.torch import save

from tandem.errors import DeliveryError, EngineError
from tandem.run.remote_calls import CallError
from tandem.run.remote_config import Dialect
from tandem.types import WeightVersion

PART_BYTES = 64 << 20  # of the weights that are sent at once, or one tensor
EMPTY = sha256(b"").hexdigest()  # of a matrix that vLLM's CPU has packed: its parameter holds nothing any more
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # by vLLM

Ask = Callable[..., Any]  # (path, body, within_s) -> answer; EngineError
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Sent:
    """What goes to a server."""

    version: WeightVersion
    label: str  # what the server is to call it
    tensors: Tensors  # the learner's own, by their names in Transformers' checkpoints
    folder: str  # where they lie, for who reads them there


class Way(Protocol):
    """To one server. EngineError where it cannot be asked."""

    def send(self, sent: Sent) -> None:
        """DeliveryError where the server has others than were sent."""
        ...

    def label(self) -> str:
        """What the server calls the weights that it serves."""
        ...


class TandemWay:
    """All tensors, in parts; the server compares their hash before it serves them."""

    def __init__(self, url: str, ask: Ask) -> None:
        self.url, self.ask = url, ask

    def send(self, sent: Sent) -> None:
        """As Way says."""
        self.ask("/start_weight_update", {})
        for part in parts_of(sent.tensors):
            self.ask("/update_weights", save(part))
        told = self.ask("/finish_weight_update", {"weight_version": sent.label, "digest": sent.version.digest})
        digest = told.get("digest") if isinstance(told, dict) else None
        if digest != sent.version.digest:
            raise DeliveryError(f"{self.url} serves weights {digest!r}, not {sent.version.digest!r}.")

    def label(self) -> str:
        """As Way says."""
        return _label(self.ask("/weight_info"))


class VllmWay:
    """A folder that it reads anew, by the verbs that VLLM_SERVER_DEV_MODE=1 opens; then its checksums are compared."""

    def __init__(self, url: str, ask: Ask) -> None:
        self.url, self.ask = url, ask
        self._before: tuple[Mapping[str, str], Mapping[str, str]] | None = None  # ours and theirs of the last version

    def send(self, sent: Sent) -> None:
        """As Way says."""
        self.ask("/pause?mode=wait", {})
        try:
            self.ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": sent.folder}})
            flushed = self.ask("/reset_prefix_cache", {})
            if not isinstance(flushed, dict) or flushed.get("success") is not True:
                raise DeliveryError(f"{self.url} kept its prefix cache, whose keys are of older weights ({flushed}).")
            self.ask("/update_weight_version", {"new_version": sent.label})
            told = self.ask("/weight_checker", {"action": "checksum"})
            theirs = told.get("checksums") if isinstance(told, dict) else None
            if not isinstance(theirs, dict) or not theirs:
                raise DeliveryError(f"{self.url}/weight_checker gave no checksums.")
            ours = checksums(sent.tensors)
            compare(self.url, ours, theirs, {name for name, one in sent.tensors.items() if one.ndim == 1}, self._before)
            self._before = ours, theirs
        finally:
            with suppress(EngineError):  # the first error says why
                self.ask("/resume", {})

    def label(self) -> str:
        """As Way says."""
        return _label(self.ask("/weight_info"))


class SglangWay:
    """A folder that it reads anew."""

    def __init__(self, url: str, ask: Ask) -> None:
        self.url, self.ask = url, ask
        self._path = "/model_info"

    def send(self, sent: Sent) -> None:
        """As Way says."""
        told = self.ask("/update_weights_from_disk", {"model_path": sent.folder, "weight_version": sent.label})
        if not isinstance(told, dict) or told.get("success") is not True:
            said = told.get("message") if isinstance(told, dict) else told
            raise DeliveryError(f"{self.url} did not take the weights of {sent.folder}: {said}.")

    def label(self) -> str:
        """As Way says."""
        try:
            return _label(self.ask(self._path))
        except CallError as error:
            if error.status != 404 or self._path != "/model_info":
                raise
            self._path = "/get_model_info"  # its name in older ones
            return self.label()


WAYS: Mapping[Dialect, Callable[[str, Ask], Way]] = {"tandem": TandemWay, "vllm": VllmWay, "sglang": SglangWay}
ADVICE: Mapping[Dialect, str] = {
    "tandem": "Start it with --set server.control=true, and give remote.key_env an admin's key where it has keys.",
    "vllm": "Start it with VLLM_SERVER_DEV_MODE=1 and without quantization, where remote.folder is mounted too.",
    "sglang": "Start it where remote.folder is mounted too.",
}


def parts_of(tensors: Tensors) -> Iterator[dict[str, torch.Tensor]]:
    """In their order, PART_BYTES at once or a tensor."""
    part, size = dict[str, torch.Tensor](), 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > PART_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor.detach().to("cpu").contiguous()
        size += tensor.nbytes
    yield part


def checksums(tensors: Tensors) -> dict[str, str]:
    """SHA-256 of the bytes of each tensor, and of those that vLLM joins.

    >>> found = checksums({"a.up_proj.weight": torch.zeros(1), "a.gate_proj.weight": torch.ones(1)})
    >>> found["a.gate_up_proj.weight"] == checksums({"b": torch.tensor([1.0, 0.0])})["b"]
    True
    """
    found = {name: _sha256(tensor) for name, tensor in tensors.items()}
    for joined, parts in JOINED.items():
        for name in [name for name in tensors if f".{parts[0]}." in name]:
            others = [name.replace(f".{parts[0]}.", f".{part}.") for part in parts]
            if all(other in tensors for other in others):
                whole = torch.cat([tensors[other].detach().cpu() for other in others])
                found[name.replace(f".{parts[0]}.", f".{joined}.")] = _sha256(whole)
    return found


def compare(
    url: str,
    ours: Mapping[str, str],
    theirs: Mapping[str, str],
    vectors: set[str],
    before: tuple[Mapping[str, str], Mapping[str, str]] | None,
) -> None:
    """Checksums of what was written with those of vLLM, whose names say the rank before a colon. DeliveryError where
    they say that it holds others.

    Ranks divide matrices, and it packs them for some devices (into nothing that its checksums see, on a CPU): those are
    not the same bytes. Vectors are, and at least one tensor has to be. A matrix that one rank has must have changed
    since the version before where ours has, and nowhere else.
    """
    names = {key: key.rpartition(":")[2] for key in theirs}
    ranks, wrong, same = Counter(names.values()), [], 0
    for key, name in names.items():
        if name not in ours or theirs[key] == EMPTY:
            continue
        same += theirs[key] == ours[name]
        if theirs[key] == ours[name]:
            continue
        changed = None if before is None or key not in before[1] else theirs[key] != before[1][key]
        moved = before is not None and ours[name] != before[0].get(name)
        if name in vectors or (changed is not None and ranks[name] == 1 and changed != moved):
            wrong.append(key)
    if wrong or not same:
        told = f"{len(wrong)} of {len(theirs)} tensors: {', '.join(wrong[:3])}" if wrong else "all tensors"
        raise DeliveryError(f"{url} holds others than were written, by its checksums of {told}.")


def _sha256(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return sha256(flat.numpy().tobytes()).hexdigest()


def _label(told: Any) -> str:
    return str(told.get("weight_version")) if isinstance(told, dict) else ""
