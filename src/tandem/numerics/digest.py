"""A content hash of named tensors: what the learner published and what the engine serves are the same or they are not.

SHA-256 in a tree: each tensor's bytes are cut into chunks of CHUNK_BYTES, hashed by a pool of threads (hashlib releases
the interpreter lock); the root covers, by name in sorted order, the name, dtype, shape and chunk hashes of each tensor.
So the order of iteration, strides and storage do not matter, and the number of threads does not either.
Measured on two Zen 5 cores with 270 MB of bf16: SHA-256 1.8 GB/s a core, BLAKE2b 1.15 GB/s, SHA-1 1.9 GB/s.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

CHUNK_BYTES = 4 << 20


def tensor_digest(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], threads: int | None = None) -> str:
    """Hexadecimal hash (64 digits) of the tensors' names, dtypes, shapes and bits. `threads`: default all usable cores.

    Tensors on a device are copied to the host. NaN payloads and the sign of zero count: it is the bits that are hashed.
    """
    named = sorted(tensors.items() if isinstance(tensors, Mapping) else tensors, key=lambda pair: pair[0])
    root = hashlib.sha256()
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        pending: list[tuple[str, Tensor, list[Future[bytes]]]] = []
        for name, tensor in named:
            chunks = [pool.submit(_sha256, chunk) for chunk in _chunks(tensor)]
            pending.append((name, tensor, chunks))
        previous = None
        for name, tensor, chunks in pending:
            assert name != previous, f"tensor {name} is given twice"
            previous = name
            # repr delimits the name, so no two lists of tensors give the same text.
            root.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)} {len(chunks)}\n".encode())
            for chunk in chunks:
                root.update(chunk.result())
    return root.hexdigest()


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    view = memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]


def _sha256(chunk: memoryview) -> bytes:
    return hashlib.sha256(chunk).digest()
