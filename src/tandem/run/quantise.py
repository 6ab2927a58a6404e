"""A model into a folder of quantised matrices, by round to nearest or by a method that looks at texts or rotates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

import torch

from tandem import env
from tandem.errors import ConfigError
from tandem.models.checkpoint import open_checkpoint, save_checkpoint
from tandem.models.peft import is_adapter
from tandem.models.quantised.scheme import refuse_blocks
from tandem.models.quantised.write import FILES, Kind, kind_of, slots_of, write
from tandem.models.tokenizer import Tokenizer
from tandem.numerics.blocks import Format, format_of
from tandem.run.source import resolve_source
from tandem.surgery.quantise import Method, check, quantised

SEQUENCE_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Asked:
    """By which method, over which texts.

    >>> Asked("hadamard+gptq").sequences
    128
    """

    method: str = "nearest"
    texts: Path | None = None  # a file of text
    sequences: int = 128  # pieces of SEQUENCE_TOKENS, taken evenly out of it


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a model."""

    kind: Kind | None  # None: written as floats
    form: Format | None  # None: nothing was rounded
    matrices: int
    weights: int  # numbers of those matrices
    sqnr_db: float  # of all of them, beside what was rounded
    bytes: int  # of the new folder's weights
    damped: Mapping[str, float]  # matrices whose inputs needed more on the diagonal of their second moments
    cpu_s: Mapping[str, float]  # of this process, by phase


def quantise(source: str, out: Path, wanted: str, dtype: str, asked: Asked | None = None) -> Made:
    """Write `source` into a new folder: matrices of layers by `wanted`, the rest in `dtype`.

    wanted: FILE or FILE:FORMAT (models/quantised/write.py:kind_of), or a format of numbers alone, whose values are
    written as floats of `dtype`; "": none, where a method only writes the model otherwise. ConfigError for an unknown
    format or method and for a folder that is there; ModelError where the format does not fit.
    """
    asked = asked or Asked()
    method = Method.read(asked.method)
    kind = kind_of(wanted) if wanted.partition(":")[0] in FILES else None
    form = kind.form if kind else format_of(wanted) if wanted else None
    if out.exists():
        raise ConfigError(f"{out} is there already. Choose another folder, or remove it.")
    if asked.texts is None:
        check(method, form, ())
    torch.set_num_threads(env.num_threads())
    resolved = resolve_source(source)
    if is_adapter(Path(resolved)):
        raise ConfigError(
            f"{source} is an adapter, and what is quantised are whole weights. Fold it into its model first: tandem "
            f"convert merge {source} --out DIR; then quantise DIR."
        )
    checkpoint = open_checkpoint(resolved)
    spec, tokenizer = checkpoint.spec, checkpoint.load_tokenizer()
    if kind and kind.form.block > 0 and kind.form.rows == 1:
        for slot in slots_of(spec):
            refuse_blocks(slot.stored[0].name, slot.columns or 0, kind.form.block)
    texts = pieces(asked, tokenizer, spec.max_position) if method.reads_texts else ()
    made = quantised(spec, dict(checkpoint.tensors()), method, form, texts)
    aside = out.with_name(f"{out.name}.part")
    with ExitStack() as leaving:
        leaving.callback(rmtree, aside, ignore_errors=True)
        if kind:
            floats = {name: tensor for name, tensor in made.tensors.items() if name not in made.blocks}
            write(aside, made.spec, floats, kind, made.blocks, tokenizer, dtype)
        else:
            save_checkpoint(aside, made.spec, made.tensors, tokenizer, dtype)
        aside.rename(out)
    weights = sum(blocks.codes.numel() for blocks in made.blocks.values())
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return Made(kind, form, len(made.blocks), weights, made.sqnr_db, size, made.damped, made.cpu_s)


def pieces(asked: Asked, tokenizer: Tokenizer, most_tokens: int) -> list[Sequence[int]]:
    """A file's tokens in pieces, as many as are asked for, taken evenly; the last may be shorter."""
    assert asked.texts is not None
    try:
        tokens = tokenizer.encode(asked.texts.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--texts {asked.texts} cannot be read: {error}. Give a file of text.") from error
    size = min(SEQUENCE_TOKENS, most_tokens)
    found: list[Sequence[int]] = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    if not found:
        raise ConfigError(f"--texts {asked.texts} is empty. Give a file of text.")
    count = min(asked.sequences, len(found))
    return [found[index * len(found) // count] for index in range(count)]


def described(made: Made) -> dict[str, object]:
    """For people and JSON."""
    return {
        "file": made.kind.file if made.kind else None,
        "format": made.form.name if made.form else None,
        "matrices": made.matrices,
        "weights": made.weights,
        "bits": made.form.bits if made.form else None,
        "sqnr_db": round(made.sqnr_db, 2) if made.form else None,
        "bytes": made.bytes,
        "damped": dict(made.damped),
        "cpu_s": {name: round(spent, 3) for name, spent in made.cpu_s.items()},
    }
