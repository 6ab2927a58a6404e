"""A model into another folder: a student cut out of a teacher, or what a teacher says of a run's texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tandem import env
from tandem.algo.distil import rest_of, texts
from tandem.algo.pack import PromptTotal, canonical, pack
from tandem.algo.tensors import to_tensors
from tandem.corpus.solutions import written
from tandem.corpus.teacher import Origin, StoredWriter, words_hash
from tandem.errors import ConfigError
from tandem.kernels.divergence import Head, top_logprobs
from tandem.models.checkpoint import open_checkpoint, save_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.spec import ModelSpec
from tandem.program.pool import EnvironmentPool
from tandem.program.render import renderer_of
from tandem.run.config import RunConfig
from tandem.run.distil import check_teacher, load_teacher
from tandem.run.source import resolve_source
from tandem.run.stream import PromptStream
from tandem.surgery.prune import Importance, Kept, Size, choose, measured, pieces, pruned
from tandem.sync.publish import weight_version
from tandem.train.score import hidden_states
from tandem.types import Sample

DTYPE = "bfloat16"  # of a student's weights, and in which importance is measured


@dataclass(frozen=True, slots=True)
class Pruned:
    """What became of a teacher."""

    spec: ModelSpec
    kept: Kept
    importance: Importance | None
    parameters: int
    before: int  # the teacher's


def prune(source: str, out: Path, sizes: Mapping[str, int], text: Path | None) -> Pruned:
    """Write a student of a model into a new folder, in bf16; by importance over the text of a file, where one is given.

    sizes: by the names of `Size`.
    """
    size = Size(**sizes)
    if size == Size():
        raise ConfigError("nothing is to be left out. Give --layers, --heads, --kv-heads, --ff-width or --width.")
    if out.exists():
        raise ConfigError(f"{out} is there already. Choose another folder, or remove it.")
    torch.set_num_threads(env.num_threads())
    checkpoint = open_checkpoint(resolve_source(source))
    spec, tokenizer = checkpoint.spec, checkpoint.load_tokenizer()
    wanted, importance = size.of(spec), None
    if text is not None:
        try:
            tokens = tokenizer.encode(text.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--measure {text} cannot be read: {error}. Give a file of text.") from error
        decoder = Decoder(spec, DTYPE).load(checkpoint.tensors())
        importance = measured(decoder, pieces(tokens, spec.max_position))
    kept = choose(spec, wanted, importance)
    student, tensors = pruned(spec, checkpoint.tensors(), wanted, kept)
    part = out.with_name(out.name + ".part")
    save_checkpoint(part, student, tensors, tokenizer, DTYPE)
    part.rename(out)
    before = sum(tensor.numel() for _, tensor in checkpoint.tensors())
    return Pruned(student, kept, importance, sum(tensor.numel() for tensor in tensors.values()), before)


def store_teacher(config: RunConfig, out: Path, told: Callable[[int, int], None]) -> tuple[int, int]:
    """What distil.teacher says of all texts that a run of the config would read, into a new folder; returns how many
    texts and tokens. told(step, tokens) after each step's."""
    asked = config.distil
    if config.objective != "distil" or asked.on_policy or not asked.top_k:
        raise ConfigError(
            f"log-probs are stored of written texts (objective {config.objective}, distil.on_policy {asked.on_policy}) "
            f"and of so many tokens (distil.top_k {asked.top_k}). Set objective=distil, distil.on_policy=false and "
            "distil.top_k=32 or so."
        )
    if config.corpus.on:
        raise ConfigError(
            "corpus.sources is set, and what is stored are a teacher's log-probs of the task's own solutions. Leave "
            "corpus.sources out, or learn from the corpus with the teacher beside it."
        )
    torch.set_num_threads(env.num_threads())
    checkpoint = open_checkpoint(resolve_source(config.model.source))
    tokenizer = checkpoint.load_tokenizer()
    if check_teacher(config, checkpoint, tokenizer) is None:
        raise ConfigError(f"distil.teacher {asked.teacher} is no model but log-probs that were stored before.")
    with ExitStack() as leaving:
        pool = EnvironmentPool(config.task)
        leaving.callback(pool.close)
        renderer = renderer_of(tokenizer, config.task)
        teacher = load_teacher(asked.teacher, config.model)
        pool.ready()
        vocab = min(teacher.spec.vocab_size, checkpoint.spec.vocab_size)
        words = words_hash(tokenizer.backend.get_vocab(True))
        digest = weight_version(teacher, 0).digest
        origin = Origin(asked.teacher, digest, words, config.model.dtype, vocab, asked.temperature, asked.top_k)
        writer, stream = leaving.enter_context(StoredWriter(out, origin)), PromptStream(pool)
        positions = min(checkpoint.spec.max_position, teacher.spec.max_position)
        for step in range(1, config.steps + 1):
            prompts = stream.take(config.rollout.prompts_per_step)
            batch = texts(written(prompts, pool.solutions(prompts), renderer, positions))
            _store(writer, teacher, batch.samples, batch.prompts, config.learner.microbatch_tokens)
            told(step, writer.rows)
        return len(writer.hashes), writer.rows


def _store(
    writer: StoredWriter, teacher: Decoder, samples: Sequence[Sample], prompts: Sequence[PromptTotal], budget: int
) -> None:
    samples, prompts = canonical(samples, prompts)
    found: dict[int, tuple[torch.Tensor, ...]] = {}
    for microbatch in pack(samples, prompts, budget):
        with torch.no_grad():
            hidden_NM = hidden_states(teacher, microbatch, to_tensors(microbatch, teacher.device))
        origin = writer.origin
        ids, logprobs = top_logprobs(Head(hidden_NM, teacher.head), origin.top_k, origin.temperature, origin.vocab)
        rest = rest_of(logprobs.double())[:, 0].float()
        ends = np.cumsum(microbatch.sample_tokens)[:-1].tolist()
        parts = zip(*(torch.tensor_split(one.cpu(), ends) for one in (ids, logprobs, rest)), strict=True)
        found |= dict(zip(microbatch.members.tolist(), parts, strict=True))
    for index, sample in enumerate(samples):
        writer.add(sample, *found[index])


def described(made: Pruned) -> dict[str, object]:
    """For people and JSON."""
    spec = dataclasses.asdict(made.spec)
    shape = {name: spec[name] for name in ("layers", "heads", "kv_heads", "ff_width", "width")}
    by = None if made.importance is None else [round(value, 6) for value in made.importance.layers_L.tolist()]
    return {
        "parameters": made.parameters,
        "of": made.before,
        **shape,
        "kept_layers": list(made.kept.layers),
        "importance_of_layers": by,
    }
