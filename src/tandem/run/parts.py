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
from tandem.engine.runner import DecoderRunner, pool_dtype, token_bytes
from tandem.errors import ConfigError
from tandem.models.checkpoint import open_checkpoint
from tandem.models.config import ModelConfig
from tandem.models.decoder import Decoder
from tandem.models.tokenizer import Tokenizer
from tandem.program.render import Renderer
from tandem.run.departures import check_engine, of_engine, without_departures
from tandem.run.folder import latest_checkpoint
from tandem.sync.publish import Publisher


@dataclass(frozen=True, slots=True)
class Parts:
    """What generates and learns: decoders, engines, what brings weights from one to the other, and the words around."""

    decoder: Decoder  # the learner's
    tokenizer: Tokenizer
    renderer: Renderer
    engine: Engine  # samples rollouts
    exact_engine: Engine  # the learner's own policy, for evaluation; `engine` itself where nothing departs
    publisher: Publisher
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


def build_parts(model: ModelConfig, config: EngineConfig, lag: int = 0) -> Parts:
    """Load the model and put an engine on it. ModelError, ConfigError, CapacityError for what the user can mend.

    The engine shares the learner's decoder unless its weights are rounded, of another dtype, or `lag` updates old.
    """
    torch.set_num_threads(env.num_threads())
    checkpoint = open_checkpoint(resolve_source(model.source))
    spec = checkpoint.spec
    check_engine(spec, config)
    tokenizer = checkpoint.load_tokenizer()
    decoder = Decoder(spec, model.dtype, model.device, model.kernels).load(checkpoint.tensors())
    dtype = model.dtype if config.dtype == "same" else config.dtype
    rounded = config.weights != "same" or dtype != model.dtype
    serving = Decoder(spec, dtype, model.device, model.kernels) if rounded or lag else decoder
    source = (Decoder(spec, model.dtype, model.device, model.kernels) if rounded else serving) if lag else None

    def engine_on(decoder: Decoder, config: EngineConfig) -> Engine:
        per_token = token_bytes(spec, pool_dtype(decoder.dtype, config.kv_dtype))
        num_pages = count_pages(config.kv_memory_bytes, per_token, config.page_tokens)
        runner = DecoderRunner(decoder, num_pages, config.page_tokens, config)
        return Engine(runner, config, num_pages, max_context=spec.max_position, decode=tokenizer.decode)

    engine = engine_on(serving, config)
    exact = not (lag or of_engine(model, config))
    exact_engine = engine if exact else engine_on(decoder, without_departures(config))
    publisher = Publisher(decoder, serving, source, engine, exact_engine, lag)
    version = publisher.publish(0)
    pool = engine.scheduler.pool
    plan = {
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "kernels": "compiled" if decoder.compiled else "reference",
        "kv_pages": pool.num_pages,
        "kv_capacity_tokens": pool.num_pages * config.page_tokens,
        "kv_bytes_per_token": token_bytes(spec, pool_dtype(serving.dtype, config.kv_dtype)),
        "parameters": sum(weight.value.numel() for _, weight in decoder.weights()),
        "decoders": len({id(d) for d in (decoder, serving, source) if d is not None}),
        "weights": version.digest,
    }
    return Parts(decoder, tokenizer, Renderer(tokenizer), engine, exact_engine, publisher, plan)
