"""A model whose matrices are numbers of a format: nearest, GPTQ, and what makes either err less.

The four matrices of each layer are rounded (qkv and gate_up each as one, with one scale of the tensor where a format
has such beside its blocks'); embedding, head and norms stay. A method is a way to write the model otherwise, and one to
round it:

    nearest, gptq                    numerics/gptq.py
    awq, smooth                      scales of inputs, numerics/scaling.py
    hadamard, rotation               residual stream and value heads rotated; drawn, or learned (turn.py)

and `awq+gptq`, `smooth+gptq`, `hadamard+gptq`, `rotation+gptq`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from tandem.errors import ConfigError, NonFiniteError, nearest
from tandem.kernels.quantise import nearest as nearest_of
from tandem.kernels.quantise import values
from tandem.models.decoder import Decoder
from tandem.models.parts import Slot
from tandem.models.spec import ModelSpec
from tandem.numerics import ggml
from tandem.numerics.blocks import WHOLE, Blocks, Format
from tandem.numerics.ggml import Coded, GgmlType
from tandem.numerics.gptq import DAMP, Factor, factor, gptq
from tandem.numerics.rotation import hadamard_matrix, random_hadamard
from tandem.numerics.scaling import awq_scales, clipped, smooth_scales
from tandem.surgery.calibrate import SITES, Inputs, walk
from tandem.surgery.fold import Tensors, alike, fold_scales, fuse_norms, matrix, put, rotated, slots
from tandem.surgery.turn import learned_turn

Rewrite = Literal["", "awq", "smooth", "hadamard", "rotation"]
DTYPE = "bfloat16"  # in which texts are run
TOLD = 4  # tensors of an error


@dataclass(frozen=True, slots=True)
class Method:
    """How the model is written before it is rounded, and how it is rounded.

    >>> Method.read("hadamard+gptq"), Method.read("awq").reads_texts, Method.read("hadamard").reads_texts
    (Method(rewrite='hadamard', gptq=True), True, False)
    """

    rewrite: Rewrite = ""
    gptq: bool = False

    @classmethod
    def read(cls, name: str) -> Method:
        """ConfigError for one that is not known."""
        first, plus, second = name.partition("+")
        rewrites = [one for one in get_args(Rewrite) if one]
        known = [*rewrites, "nearest", "gptq"]
        if first not in known or plus and (second != "gptq" or first not in rewrites):
            raise ConfigError(
                f"--method {name} is not known: give one of {', '.join(known)}, or one of the first four with +gptq."
                f"{nearest(first, known)}"
            )
        return cls(first if first in rewrites else "", "gptq" in (first, second))  # type: ignore[arg-type]

    @property
    def reads_texts(self) -> bool:
        return self.gptq or self.rewrite in ("awq", "smooth", "rotation")


@dataclass(slots=True, eq=False)
class Quantised:
    """What became of a model."""

    spec: ModelSpec
    tensors: Tensors  # all, fp32; the matrices as they read back
    blocks: dict[str, Blocks] = field(default_factory=dict)  # by matrix, as codes; none where nothing was rounded
    types: Mapping[str, GgmlType | None] = field(default_factory=dict)  # by matrix: in place of the format; None: F16
    coded: dict[str, Coded | None] = field(default_factory=dict)  # by matrix, of those
    damped: dict[str, float] = field(default_factory=dict)  # matrices whose H needed more on its diagonal, and how much
    exponents: dict[str, float] = field(default_factory=dict)  # AWQ's a, by layer and slot
    cpu_s: dict[str, float] = field(default_factory=dict)  # of this process, by phase
    signal: float = 0.0  # sum of squares of what was rounded, and of its errors
    noise: float = 0.0

    @property
    def sqnr_db(self) -> float:
        return 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else math.inf


def check_finite(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
    """NonFiniteError for weights that are NaN or infinite: in which layer and tensor, and how many."""
    wrong = {name: count for name, x in tensors.items() if (count := x.numel() - int(x.isfinite().sum()))}
    if not wrong:
        return
    places = {
        one.name: f"layer {index}, {site}" for index in range(spec.layers) for site, slot in slots(spec, index).items()
        for one in slot.stored
    }  # fmt: skip
    told = [
        f"{places.get(name, 'outside the layers')} ({name}): {count:,} of {tensors[name].numel():,}"
        for name, count in wrong.items()
    ]
    more = f"; and {len(told) - TOLD} more tensors" if len(told) > TOLD else ""
    raise NonFiniteError(
        f"weights are NaN or infinite, and nothing is made of such: {'; '.join(told[:TOLD])}{more}. The model is "
        "damaged, or a training run went wrong: take another copy, or an earlier checkpoint."
    )


def quantised(
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    method: Method,
    form: Format | None,
    texts: Sequence[Sequence[int]] = (),
    types: Mapping[str, GgmlType | None] | None = None,
) -> Quantised:
    """A model (any float dtype, by Hugging Face name) by a method. No format: written otherwise and not rounded, which
    `smooth` and `hadamard` can. ConfigError for texts that are needed and missing, and for what cannot be divided.

    types: of each matrix in a GGUF file, which it is rounded to; the format is then what scales and rotations are
    searched with.
    """
    check(method, form, texts)
    check_finite(spec, tensors)
    made = Quantised(spec, {name: tensor.float() for name, tensor in tensors.items()}, types=types or {})
    with _timed(made, "rewrite"):
        if method.rewrite in ("hadamard", "rotation"):
            made.spec, made.tensors = fuse_norms(spec, made.tensors)
            head_DD = hadamard_matrix(spec.head_size)
            if method.rewrite == "hadamard":
                turn_MM = random_hadamard(spec.width)
            else:
                assert form is not None
                turn_MM = learned_turn(
                    made.spec, rotated(made.spec, made.tensors, torch.eye(spec.width), head_DD), form, texts
                )
            made.tensors = rotated(made.spec, made.tensors, turn_MM, head_DD)
        elif method.rewrite:
            _rescale(made, method.rewrite == "awq", form, texts)
    if form is not None:
        with _timed(made, "round"):
            _gptq(made, form, texts) if method.gptq else _nearest(made, form)
    return made


def check(method: Method, form: Format | None, texts: Sequence[Sequence[int]]) -> None:
    """ConfigError for what the method needs and is not given."""
    if form is None and (method.gptq or method.rewrite not in ("smooth", "hadamard")):
        raise ConfigError(
            "this method rounds to a format, and none is given, or floats: --format int4_g128, or another."
        )
    if method.reads_texts and not any(len(text) for text in texts):
        raise ConfigError("this method looks at what the matrices are given, and there is no text: --texts FILE.")


@contextmanager
def _timed(made: Quantised, name: str) -> Iterator[None]:
    """CPU seconds of a phase, all threads."""
    start = time.process_time()
    yield
    made.cpu_s[name] = time.process_time() - start


@contextmanager
def _named(index: int, site: str) -> Iterator[None]:
    """A NonFiniteError within says where it was."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"layer {index}, {site}: {error}") from error


def _nearest(made: Quantised, form: Format) -> None:
    for index in range(made.spec.layers):
        own = slots(made.spec, index)
        for site in SITES:
            _round(made, own[site], form, index, None)


def _gptq(made: Quantised, form: Format, texts: Sequence[Sequence[int]]) -> None:
    decoder = Decoder(made.spec, DTYPE).load(made.tensors.items())

    def change(index: int, seen: Mapping[str, Inputs]) -> None:
        for site, inputs in seen.items():
            slot = slots(made.spec, index)[site]
            with _named(index, site):
                found = factor(inputs.hessian_KK)
            _round(made, slot, form, index, found)
            weight = getattr(decoder.layers[index].mix if site in ("qkv", "out") else decoder.layers[index].feed, site)
            weight.value.copy_(matrix(made.tensors, slot))
            weight.repack()

    walk(decoder, texts, change, sequential=True)


def _round(made: Quantised, slot: Slot, form: Format, index: int, found: Factor | None) -> None:
    """A matrix of a layer, as one where a row's blocks are its own; else each tensor that lies in it."""
    whole = matrix(made.tensors, slot)
    if not bool(whole.isfinite().all()):
        raise NonFiniteError(f"layer {index}, {slot.name}: its numbers overflow fp32 as it is written otherwise.")
    if made.types:
        with _named(index, slot.name):
            _round_coded(made, slot, whole, found)
        _tell_damped(made, slot, index, found)
        return
    together = form.rows == 1 and form.block != WHOLE
    parts = [whole] if together else list(whole.split([one.rows for one in slot.stored]))
    with _named(index, slot.name):
        rounded = [nearest_of(part, form) if found is None else gptq(part, found, form) for part in parts]
    read = [values(blocks, form) for blocks in rounded]
    for part, value in zip(parts, read, strict=True):
        made.signal += float(torch.linalg.vector_norm(part)) ** 2
        made.noise += float(torch.dist(part, value)) ** 2
    put(made.tensors, slot, read[0] if together else torch.cat(read))
    _tell_damped(made, slot, index, found)
    if together:
        rounded = _apart(rounded[0], slot)
    made.blocks |= {one.name: blocks for one, blocks in zip(slot.stored, rounded, strict=True)}


def _round_coded(made: Quantised, slot: Slot, whole: Tensor, found: Factor | None) -> None:
    """A matrix of a layer, in its type of a GGUF file."""
    kind = made.types[slot.stored[0].name]
    if kind is None:
        made.coded |= dict.fromkeys(slot.shapes())
        return
    coded = ggml.encode(whole, kind) if found is None else ggml.gptq(whole, found, kind)
    value = coded.values()
    made.signal += float(torch.linalg.vector_norm(whole)) ** 2
    made.noise += float(torch.dist(whole, value)) ** 2
    put(made.tensors, slot, value)
    start = 0
    for one in slot.stored:
        made.coded[one.name] = coded.rows(slice(start, start + one.rows))
        start += one.rows


def _tell_damped(made: Quantised, slot: Slot, index: int, found: Factor | None) -> None:
    if found is not None and found.damp > DAMP:
        made.damped[f"{index}.{slot.name}"] = found.damp


def _apart(blocks: Blocks, slot: Slot) -> list[Blocks]:
    """A matrix's codes and scales as those of the tensors that lie in it."""
    made, start = [], 0
    for one in slot.stored:
        rows = slice(start, start + one.rows)
        start += one.rows
        zeros = None if blocks.zeros is None else blocks.zeros[rows]
        made.append(Blocks(blocks.codes[rows], blocks.scales[rows], blocks.whole, zeros))
    return made


def _rescale(made: Quantised, awq: bool, form: Format | None, texts: Sequence[Sequence[int]]) -> None:
    """AWQ's scales and ends, or SmoothQuant's scales, folded in, by what matrices are given before any is rounded."""
    spec, tensors = made.spec, made.tensors
    decoder = Decoder(spec, DTYPE).load(tensors.items())

    def change(index: int, seen: Mapping[str, Inputs]) -> None:
        own = slots(spec, index)
        scaled = {}
        for site, inputs in seen.items():
            weight_NK = matrix(tensors, own[site])
            if awq:
                assert form is not None
                level_K = alike(spec, site, inputs.mean_K)
                with _named(index, site):
                    s_K, made.exponents[f"{index}.{site}"] = awq_scales(weight_NK, inputs.hessian_KK, level_K, form)
            elif site in ("qkv", "gate_up"):  # behind a norm, as in the paper
                s_K = smooth_scales(weight_NK, inputs.largest_K)
            else:
                continue
            fold_scales(spec, tensors, index, site, s_K)
            scaled[site] = inputs.scaled(s_K)
        for site, inputs in scaled.items() if awq else ():
            assert form is not None
            put(tensors, own[site], clipped(matrix(tensors, own[site]), inputs.hessian_KK, form))

    walk(decoder, texts, change, sequential=False)
