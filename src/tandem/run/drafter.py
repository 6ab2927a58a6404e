"""A small model that drafts for an engine: whether it fits, and from a config to the drafter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from tandem.engine.layout import KvLayout
from tandem.engine.runner import DecoderRunner, dtype_name
from tandem.errors import ConfigError
from tandem.models.checkpoint import Checkpoint
from tandem.models.config import ModelConfig
from tandem.models.decoder import Decoder
from tandem.models.taps import layers_of
from tandem.run.distil import differs, load_teacher, open_teacher
from tandem.run.source import resolve_source
from tandem.run.texts import read_texts
from tandem.speculate.eagle import Eagle, EagleSpec
from tandem.speculate.files import open_drafter, read_spec
from tandem.speculate.mixed import Mixed
from tandem.speculate.model import ModelDrafter
from tandem.speculate.pages import whole_group
from tandem.speculate.snapshots import MixedDrafter
from tandem.speculate.states import BlockDrafter, EagleDrafter
from tandem.speculate.vocabulary import DraftHead, Ranking, read_ids

if TYPE_CHECKING:
    from tandem.engine.config import DraftConfig, EngineConfig
    from tandem.engine.draft import Drafter
    from tandem.kernels.weight import Weight
    from tandem.models.tokenizer import Tokenizer
    from tandem.speculate.block import BlockSpec

_loaded: WeakValueDictionary[tuple[str, str], Decoder] = WeakValueDictionary()  # by source and dtype: engines share it


def check_drafter(
    config: EngineConfig, model: ModelConfig, target: Checkpoint, tokenizer: Tokenizer
) -> Checkpoint | EagleSpec | BlockSpec | None:
    """What is to draft: a small model, opened, or what one on the model's states is made of; None where nothing with
    weights does. ConfigError where it cannot; no weight is read."""
    asked = config.draft
    if not asked.model:
        return None
    if model.device != "cpu":
        raise ConfigError(
            f"engine.draft.by is {asked.by}, and model.device {model.device}: models draft on the CPU alone as yet. "
            "Set engine.draft.by to suffix, or to none."
        )
    whole_group(KvLayout.for_engine(target.spec, config, model.dtype, model.kv))
    if asked.by != "model":
        made = read_spec(Path(resolve_source(asked.model)), target.spec)
        if made.kind != asked.by:
            raise ConfigError(
                f"engine.draft.by is {asked.by}, and engine.draft.model {asked.model} is of kind {made.kind}. Set "
                "engine.draft.by to what it is."
            )
        layers_of(target.spec, made.layers)
        return made
    drafter = open_teacher(asked.model)
    own, other = (one.backend.get_vocab(True) for one in (tokenizer, drafter.load_tokenizer()))
    if own != other:
        raise ConfigError(
            f"engine.draft.model {asked.model} reads other tokens than {target.origin}: {differs(own, other)}. Its "
            "drafts would name other texts. Choose a model of the same family, or one cut out of the target "
            "(`tandem convert prune`)."
        )
    vocab = min(target.spec.vocab_size, drafter.spec.vocab_size)
    if asked.vocabulary > vocab:
        raise ConfigError(f"engine.draft.vocabulary is {asked.vocabulary}, of {vocab} tokens. Set it lower, or to 0.")
    if asked.vocabulary_of and not Path(asked.vocabulary_of).exists():
        raise ConfigError(
            f"engine.draft.vocabulary_of {asked.vocabulary_of} is not there. Give a text, JSON lines with a text each, "
            "a run's folder, or a token map (.pt); or leave it out."
        )
    return drafter


def drafter_on(runner: DecoderRunner, num_pages: int, config: EngineConfig, tokenizer: Tokenizer) -> Drafter:
    """The drafter that a config names, beside a runner's pages. All engines of a process share a model's weights."""
    asked, target = config.draft, runner.decoder
    if asked.by != "model":
        module = open_drafter(Path(resolve_source(asked.model)), target)
        if isinstance(module, Mixed):
            return MixedDrafter(module, runner, num_pages, config)
        if isinstance(module, Eagle):
            return EagleDrafter(module, runner, num_pages, config)
        head = _head(asked, module.head, target.spec.vocab_size, tokenizer)
        return BlockDrafter(module, runner, num_pages, config, head)
    name = asked.model, dtype_name(target.dtype)
    decoder = _loaded.get(name)
    if decoder is None:
        decoder = _loaded[name] = load_teacher(asked.model, ModelConfig(asked.model, dtype=name[1]))  # type: ignore[arg-type]
    vocab = min(target.spec.vocab_size, decoder.spec.vocab_size)
    head = _head(asked, decoder.head, vocab, tokenizer)
    return ModelDrafter(decoder, head, runner.layout, num_pages, config)


def _head(asked: DraftConfig, weight: Weight, vocab: int, tokenizer: Tokenizer) -> DraftHead:
    ranking = Ranking(vocab, asked.history, tokenizer.stop_token_ids) if asked.vocabulary else None
    head = DraftHead(weight, vocab, asked.vocabulary, ranking)
    if ranking is not None and asked.vocabulary_of:
        head.keep(kept_ids(asked, tokenizer, vocab))
    return head


def kept_ids(asked: DraftConfig, tokenizer: Tokenizer, vocab: int) -> list[int]:
    """The tokens that engine.draft.vocabulary_of names, or has most of. ConfigError for a file of another kind."""
    path = Path(asked.vocabulary_of)
    if path.suffix == ".pt":
        return read_ids(path, vocab)[: asked.vocabulary]
    files = [path]
    if path.is_dir():
        steps = (path / "trajectories").glob("step-*.jsonl")
        files = sorted(steps, key=lambda one: int(one.stem.removeprefix("step-")), reverse=True)
    ranking = Ranking(vocab, 1 << 62, ())
    for file in files:  # a run's latest steps first, as far as they are counted
        for text in read_texts(file, paragraphs=False, flag="engine.draft.vocabulary_of"):
            if ranking.total < asked.history:
                ranking.add(tokenizer.encode(text))
    if not ranking.total:
        raise ConfigError(
            f"engine.draft.vocabulary_of {path} has no text. Give one, a run with rollouts, or leave it out."
        )
    return [int(one) for one in ranking.most(asked.vocabulary)]
