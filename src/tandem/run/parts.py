"""A config to the parts of a run on this machine: task, model, engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tandem import env
from tandem.engine.admit import count_pages
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner, token_bytes
from tandem.errors import ConfigError
from tandem.kernels.build import compiler
from tandem.models.checkpoint import open_checkpoint
from tandem.models.config import ModelConfig
from tandem.models.decoder import Decoder
from tandem.models.tokenizer import Tokenizer
from tandem.program.render import Renderer
from tandem.run.folder import latest_checkpoint
from tandem.sync.publish import weight_version


@dataclass(frozen=True, slots=True)
class Parts:
    """What generates: one decoder under one engine, and the words around it."""

    decoder: Decoder
    tokenizer: Tokenizer
    renderer: Renderer
    engine: Engine
    plan: dict[str, Any]  # what the program decided, for plan.json


def resolve_source(source: str) -> str:
    """A model source; a run folder stands for its newest checkpoint."""
    folder = Path(source)
    if not (folder / "config.json").is_file() or not (folder / "checkpoints").is_dir():
        return source
    saved = latest_checkpoint(folder)
    if saved is None:
        raise ConfigError(f"the run {folder} has no checkpoint yet; it saves one at its end, or on Ctrl-C.")
    return str(saved.path)


def build_parts(model: ModelConfig, engine_config: EngineConfig) -> Parts:
    """Load the model and put an engine on it. ModelError, CapacityError for what the user can mend."""
    torch.set_num_threads(env.num_threads())
    checkpoint = open_checkpoint(resolve_source(model.source))
    tokenizer = checkpoint.load_tokenizer()
    decoder = Decoder(checkpoint.spec, model.dtype).load(checkpoint.tensors())
    spec = decoder.spec
    per_token = token_bytes(spec, decoder.dtype)
    num_pages = count_pages(engine_config.kv_memory_bytes, per_token, engine_config.page_tokens)
    runner = DecoderRunner(decoder, num_pages, engine_config.page_tokens)
    version = weight_version(decoder, 0)
    engine = Engine(
        runner, engine_config, num_pages, max_context=spec.max_position, decode=tokenizer.decode, version=version
    )
    plan = {
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "kernels": "compiled" if compiler() else "reference",
        "kv_pages": num_pages,
        "kv_capacity_tokens": num_pages * engine_config.page_tokens,
        "kv_bytes_per_token": per_token,
        "parameters": sum(weight.value.numel() for _, weight in decoder.weights()),
        "weights": version.digest,
    }
    return Parts(decoder, tokenizer, Renderer(tokenizer), engine, plan)
