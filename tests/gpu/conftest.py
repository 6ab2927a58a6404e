"""Triton's kernels on a GPU, or under its interpreter where there is none.

The interpreter is chosen when triton and the kernels are first imported: here, and the variable is gone again before
any test runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tandem.kernels import choice
from tandem.kernels.rounding import NOT_ROUNDED, Rounding
from tandem.models.decoder import Decoder
from tandem.models.parts import expected_shapes
from tandem.models.spec import ModelSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATIONS = (
    "attention",
    "attention_backward",
    "codes",
    "eights",
    "linear",
    "norm",
    "page_sum",
    "rotary",
    "sample",
    "swiglu",
    "vectors",
)

if find_spec("triton") is not None:
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
            importlib.import_module("triton.experimental.gluon")  # the first launch imports it, and it looks again
            from tests.gpu.interpret import mend

            mend()
        for operation in OPERATIONS:
            importlib.import_module(f"tandem.kernels.gpu.{operation}")


@pytest.fixture
def device() -> str:
    """Where the kernels run."""
    return DEVICE


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The public operations choose Triton, on the CPU too."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install 'tandem-rl[dev]'")
    monkeypatch.setenv("TANDEM_KERNELS", "triton")
    choice._asked.cache_clear()
    yield
    monkeypatch.undo()
    choice._asked.cache_clear()


def random_decoder(
    dtype: str = "float32", seed: int = 0, device: str = DEVICE, rounding: Rounding = NOT_ROUNDED, **changes: Any
) -> Decoder:
    """Two layers of grouped queries, tied embeddings; weights so large that choices depend on all of the context."""
    shape = {"vocab_size": 67, "width": 16, "ff_width": 24, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 8}
    spec = ModelSpec("llama", **{**shape, "max_position": 256, **changes})
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in expected_shapes(spec).items():
        noise = torch.randn(size, generator=generator)
        tensors[name] = 1 + 0.2 * noise if "norm" in name else noise * (2 / size[-1] ** 0.5 if len(size) == 2 else 0.2)
    return Decoder(spec, dtype, device, rounding=rounding).load(tensors.items())


@pytest.fixture
def make_decoder() -> Callable[..., Decoder]:
    return random_decoder
