"""A content hash of named tensors: what the learner published and what the engine serves are the same or they are not.

XXH3 with 128 bits (xxhash.com) of each tensor's bytes, and of the list of names, dtypes, shapes and tensor hashes in
sorted order. So the order of iteration, strides and storage do not matter. It finds damage, not forgery.
Measured on one Zen 5 core with 270 MB of bf16: XXH3 34 GB/s, SHA-256 1.8 GB/s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import xxhash
from torch import Tensor


def tensor_hash(tensor: Tensor) -> str:
    """Hexadecimal hash (32 digits) of dtype, shape and bits. NaN payloads and the sign of zero count.

    A tensor on a device is copied to the host.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    state = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    if flat.numel():
        state.update(memoryview(flat.view(torch.uint8).numpy().data))
    return state.hexdigest()


def tensor_hashes(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """The hash of each tensor by its name. Tensors are taken one at a time, so an iterator may reuse its memory."""
    hashes: dict[str, str] = {}
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        assert name not in hashes, f"tensor {name} is given twice"
        hashes[name] = tensor_hash(tensor)
    return hashes


def file_hash(path: Path) -> str:
    """Hexadecimal hash (32 digits) of a file's bytes."""
    state, block = xxhash.xxh3_128(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            state.update(block[:count])
    return state.hexdigest()


def root_hash(hashes: Mapping[str, str]) -> str:
    """Hexadecimal hash (32 digits) of named hashes, whatever their order."""
    # repr delimits the name, so no two lists give the same text.
    return xxhash.xxh3_128("\n".join(f"{name!r} {hashes[name]}" for name in sorted(hashes)).encode()).hexdigest()


def tensor_digest(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """Hexadecimal hash (32 digits) of the tensors' names, dtypes, shapes and bits."""
    return root_hash(tensor_hashes(tensors))
