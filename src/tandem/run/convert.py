"""A model into another folder: a student cut out of a teacher, or what a teacher says of a run's texts."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tandem import env
from tandem.algo.distil import rest_of
from tandem.algo.pack import PromptTotal, canonical, pack
from tandem.algo.supervised import select
from tandem.algo.tensors import to_tensors
from tandem.corpus.sources import check_sources
from tandem.corpus.teacher import Origin, StoredWriter, is_stored, words_hash
from tandem.errors import ConfigError
from tandem.kernels.divergence import Head, top_logprobs
from tandem.models.aside import written_aside
from tandem.models.checkpoint import open_checkpoint, save_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.parts import expected_shapes
from tandem.models.peft import is_adapter
from tandem.models.spec import ModelSpec
from tandem.program.pool import EnvironmentPool
from tandem.program.render import Renderer, renderer_of
from tandem.run.config import RunConfig, check_training
from tandem.run.distil import check_teacher, load_teacher, weights_hash
from tandem.run.reading import Corpus, Solutions
from tandem.run.source import resolve_source
from tandem.run.stream import PromptStream
from tandem.run.texts import read_texts
from tandem.surgery.prune import Importance, Kept, Size, choose, measured, pieces, pruned
from tandem.train.score import hidden_states
from tandem.types import Group, Sample

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
        raise ConfigError(
            "nothing is to be left out. Give --size NAME=N, once for each of what is to be smaller: layers, heads, "
            "kv_heads, ff_width or width."
        )
    if out.exists():
        raise ConfigError(f"{out} is there already. Choose another folder, or remove it.")
    torch.set_num_threads(env.num_threads())
    resolved = resolve_source(source)
    if is_adapter(Path(resolved)):
        raise ConfigError(
            f"{source} is an adapter, and a student is cut out of whole weights. Fold it into its model first: tandem "
            f"convert merge {source} --out DIR; then prune DIR."
        )
    checkpoint = open_checkpoint(resolved)
    spec, tokenizer = checkpoint.spec, checkpoint.load_tokenizer()
    wanted, importance = size.of(spec), None
    if text is not None:
        texts = [tokenizer.encode(one) for one in read_texts(text, paragraphs=False, flag="--measure")]
        decoder = Decoder(spec, DTYPE).load(checkpoint.tensors())
        importance = measured(decoder, pieces(texts, spec.max_position))
    kept = choose(spec, wanted, importance)
    student, tensors = pruned(spec, checkpoint.tensors(), wanted, kept)
    with written_aside(out) as part:
        save_checkpoint(part, student, tensors, tokenizer, DTYPE)
    before = sum(map(math.prod, expected_shapes(spec).values()))
    return Pruned(student, kept, importance, sum(tensor.numel() for tensor in tensors.values()), before)


def store_teacher(config: RunConfig, out: Path, told: Callable[[int, int], None]) -> tuple[int, int]:
    """What distil.teacher says of all texts that a run of the config would read, into a new folder; returns how many
    texts and tokens. Of a corpus that is every row once, the held-out ones too, whatever config.steps. told(texts,
    tokens) so far, as they are written."""
    asked = config.distil
    if config.objective != "distil" or asked.on_policy or not asked.top_k:
        raise ConfigError(
            f"log-probs are stored of written texts (objective {config.objective}, distil.on_policy {asked.on_policy}) "
            f"and of so many tokens (distil.top_k {asked.top_k}). Set objective=distil, distil.on_policy=false and "
            "distil.top_k=32 or so."
        )
    if is_stored(asked.teacher):
        raise ConfigError(f"distil.teacher {asked.teacher} is no model but log-probs that were stored before.")
    check_training(config)
    check_sources(config.corpus)
    torch.set_num_threads(env.num_threads())
    checkpoint = open_checkpoint(resolve_source(config.model.source))
    tokenizer = checkpoint.load_tokenizer()
    check_teacher(config, checkpoint, tokenizer)
    with ExitStack() as leaving:
        pool = EnvironmentPool(config.task, idle=not config.asks_task)
        leaving.callback(pool.close)
        if config.asks_task:
            pool.ready()
        corpus, groups = _texts(config, renderer_of(tokenizer, config.task), checkpoint.spec.max_position, pool)
        teacher = load_teacher(asked.teacher, config.model)
        origin = Origin(
            asked.teacher,
            weights_hash(asked.teacher),
            words_hash(tokenizer.backend.get_vocab(True)),
            config.model.dtype,
            min(teacher.spec.vocab_size, checkpoint.spec.vocab_size),
            teacher.spec.max_position,
            asked.temperature,
            asked.top_k,
            corpus,
        )
        writer = leaving.enter_context(StoredWriter(out, origin))
        for some in groups:
            batch = select(some)
            _store(writer, teacher, batch.samples, batch.prompts, config.learner.microbatch_tokens)
            told(len(writer.hashes), writer.rows)
        return len(writer.hashes), writer.rows


def _texts(
    config: RunConfig, renderer: Renderer, positions: int, pool: EnvironmentPool
) -> tuple[dict[str, str], Iterator[Sequence[Group]]]:
    """The digests of a corpus's sources, none where the task writes the texts; and what is read, some at a time."""
    if not config.corpus.on:
        solutions, stream = Solutions(config, renderer, positions, pool), PromptStream(pool)
        return {}, (solutions.take(stream) for _ in range(config.steps))
    rows = Corpus(config, renderer, positions, pool).stream
    digests = {source.reader.name: source.reader.digest for source in rows.sources}
    groups, count = rows.every(), config.rollout.prompts_per_step
    return digests, iter(lambda: list(itertools.islice(groups, count)), [])


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
